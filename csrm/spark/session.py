"""The Spark session with Delta, under spark-submit and under plain python."""

import logging
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyspark
from delta import configure_spark_with_delta_pip
from pyspark import SparkConf, SparkContext, StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.utils import is_remote

from csrm.errors import ConfigError
from csrm.spark.jars import spark_jars_dir

_DELTA_EXTENSION = "io.delta.sql.DeltaSparkSessionExtension"
_DELTA_CATALOG = "org.apache.spark.sql.delta.catalog.DeltaCatalog"
_BATCH_LIMIT = "spark.sql.execution.arrow.maxBytesPerBatch"
_BATCH_BYTES = "64m"
"""Of usual texts, ten thousand rows, where a batch ends anyway, are less."""


def build_session(app_name: str) -> SparkSession:
    """The running session, or a new one with Delta.

    Under spark-submit its settings stay as given. Under plain python (no master named in PYSPARK_SUBMIT_ARGS) the
    session is local[*] with 4 GB for the driver. A local master also gets the local profile: few partitions, UTC, no
    UI, no progress bars, errors only in the log; a setting that was given wins. Delta's jars are resolved through Ivy
    only where none is present.

    Raises:
        ConfigError: spark-submit started Spark without Delta on its class path, or the session is one of Spark Connect.
    """
    if is_remote() or "SPARK_REMOTE" in os.environ:
        raise ConfigError(
            "Spark session: expected a driver of its own, got Spark Connect, through which jobs cannot reach the JVM. "
            "Start the job with spark-submit, or unset SPARK_REMOTE and SPARK_CONNECT_MODE_ENABLED. Only "
            "relevance_score_udf works through Spark Connect."
        )
    logging.getLogger("py4j").setLevel(logging.WARNING)  # reports each connection it closes
    running = SparkSession.getActiveSession()
    if running is not None:
        return _as_written(running)
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ
    if submitted:
        SparkContext._ensure_initialized()
    given = SparkConf()  # under spark-submit: its arguments and spark-defaults.conf; else empty
    submit_args = os.environ.get("PYSPARK_SUBMIT_ARGS", "")
    named_master = re.search(r"(?:--master[ =]|spark[.]master=)['\"]?([^\s'\"]+)", submit_args)
    words = shlex.split(submit_args)
    for option, setting in pairwise(words):
        if option == "--conf":
            given.set(*setting.split("=", 1))
    if named_master is not None:
        given.setMaster(named_master[1])
    builder = SparkSession.builder.appName(app_name)
    if not submitted and os.environ.get("LC_ALL", "") in ("", "C", "POSIX"):
        os.environ["LC_ALL"] = "C.UTF-8"  # else a JVM in a container without a locale writes `?` into file names
    if not submitted and named_master is None:
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        log_config = (Path(__file__).parent / "log4j2.properties").as_uri()
        builder = (
            builder.master("local[*]")
            .config("spark.driver.memory", "4g")
            .config("spark.driver.extraJavaOptions", f"-Dlog4j2.configurationFile={log_config}")
        )
        given.setMaster("local[*]")
    if given.get("spark.master", "").startswith("local"):
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        profile = _local_profile(given.get("spark.master", ""))
        if submitted:
            profile["spark.log.level"] = "ERROR"
        for key, value in profile.items():
            if not given.contains(key):
                builder = builder.config(key, value)
    extensions = [name for name in given.get("spark.sql.extensions", "").split(",") if name]
    if _DELTA_EXTENSION not in extensions:
        builder = builder.config("spark.sql.extensions", ",".join([*extensions, _DELTA_EXTENSION]))
    if not given.contains("spark.sql.catalog.spark_catalog"):
        builder = builder.config("spark.sql.catalog.spark_catalog", _DELTA_CATALOG)
    if submitted:
        _check_delta_is_loadable()
    elif not _delta_jar_is_installed() and "delta-spark" not in submit_args:
        builder = configure_spark_with_delta_pip(builder)
    return _as_written(builder.getOrCreate())


def _as_written(spark: SparkSession) -> SparkSession:
    """A session that reads files and SQL as jobs mean them, whatever the cluster's defaults say.

    A damaged or missing file is an error: skipped without a word, its rows would be deleted from what is published.
    A backslash in SQL escapes: else the condition on a market or run with a quote in its name meets no row. A batch for
    Python ends at _BATCH_BYTES where nobody set another limit: Spark's own is 2 GB, which huge titles may fill.
    """
    for name in ("files.ignoreCorruptFiles", "files.ignoreMissingFiles", "parser.escapedStringLiterals"):
        spark.conf.set(f"spark.sql.{name}", "false")
    if spark.conf.get(_BATCH_LIMIT, None) is None:
        spark.conf.set(_BATCH_LIMIT, _BATCH_BYTES)
    return spark


def require_names(spark: SparkSession, names: Iterable[str]) -> None:
    """Check that the driver's JVM can write names of markets and paths into file names.

    Raises:
        ConfigError: its file names are ASCII, as in a POSIX locale, and a name is not.
    """
    foreign = _foreign(names)
    jvm = spark.sparkContext._jvm
    assert jvm is not None
    encoding = str(jvm.java.lang.System.getProperty("sun.jnu.encoding"))
    if foreign and not _is_utf8(encoding):
        raise ConfigError(
            f"Spark session: file names of its JVM are {encoding}, in which {foreign} cannot be written. Start Spark "
            "with LC_ALL=C.UTF-8 in the environment of the driver and of its executors "
            "(spark.executorEnv.LC_ALL=C.UTF-8)."
        )


def require_names_on_executors(spark: SparkSession, names: Iterable[str]) -> None:
    """Check the same of the executors' JVMs, by a job that is run where a name is not ASCII and executors are apart.

    Raises:
        ConfigError: file names of an executor are ASCII, and a name is not.
    """
    foreign = _foreign(names)
    context: Any = spark.sparkContext
    if not foreign or context._jsc.sc().isLocal():
        return
    num_tasks = context.defaultParallelism
    asked_df = spark.range(0, num_tasks, 1, num_tasks).selectExpr(
        "reflect('java.lang.System', 'getProperty', 'sun.jnu.encoding') AS encoding"
    )
    wrong = sorted({row["encoding"] for row in asked_df.collect() if not _is_utf8(row["encoding"])})
    if wrong:
        raise ConfigError(
            f"Spark session: file names of executors are {wrong[0]}, in which {foreign} cannot be read or written. Set "
            "spark.executorEnv.LC_ALL=C.UTF-8 (--conf spark.executorEnv.LC_ALL=C.UTF-8 of spark-submit)."
        )


def _foreign(names: Iterable[str]) -> list[str]:
    return sorted({name for name in names if not name.isascii()})


def _is_utf8(encoding: str) -> bool:
    return encoding.upper().replace("-", "") == "UTF8"


def _local_profile(master: str) -> dict[str, str]:
    cores = master.removeprefix("local").strip("[]").split(",")[0]
    num_cores = int(cores) if cores.isdigit() else (os.cpu_count() or 1) if cores == "*" else 1
    return {
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.session.timeZone": "UTC",
        # CSRM makes no schemas; an existing folder spares the user an empty spark-warehouse
        "spark.sql.warehouse.dir": tempfile.gettempdir(),
        "spark.sql.shuffle.partitions": str(num_cores),
        "spark.databricks.delta.snapshotPartitions": "2",
        # VACUUM lists a table's files in so many tasks, 10,000 if not told otherwise
        "spark.sql.sources.parallelPartitionDiscovery.parallelism": str(2 * num_cores),
    }


def _delta_jar_is_installed() -> bool:
    return any(spark_jars_dir().glob("delta-spark*.jar"))


def _check_delta_is_loadable() -> None:
    jvm = SparkContext._jvm
    assert jvm is not None
    if not jvm.org.apache.spark.util.Utils.classIsLoadable(_DELTA_EXTENSION):
        spark_line = ".".join(pyspark.__version__.split(".")[:2])
        raise ConfigError(
            "Spark session: expected Delta Lake on the class path, found none. Submit the job with "
            f"--packages io.delta:delta-spark_{spark_line}_2.13:{version('delta-spark')}, or put that jar and its "
            "dependencies into Spark's jars folder."
        )


@contextmanager
def persisted(df: DataFrame) -> Iterator[DataFrame]:
    """A frame that is computed once and kept, on disk where memory does not suffice, while the block runs."""
    df.persist(StorageLevel.MEMORY_AND_DISK)
    try:
        yield df
    finally:
        df.unpersist()


@contextmanager
def without_console(spark: SparkSession) -> Iterator[None]:
    """A block in which what Scala code prints in the driver's thread of this one goes nowhere."""
    jvm = spark.sparkContext._jvm
    assert jvm is not None
    console = getattr(getattr(jvm.scala, "Console$"), "MODULE$")  # its output is kept by thread
    before = console.out()
    console.setOutDirect(jvm.java.io.PrintStream(jvm.java.io.OutputStream.nullOutputStream()))
    try:
        yield
    finally:
        console.setOutDirect(before)
