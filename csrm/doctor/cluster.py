"""Checks through Spark: the session, every executor, and the folder of the tables."""

import re
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import pyspark
from pyspark import BarrierTaskContext
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from csrm.bundle.loading import load_bundle
from csrm.doctor.checks import Check, CheckWarning, checked, failed
from csrm.doctor.encoder import CheckedSemantic, checks_of_encoder
from csrm.doctor.machine import PACKAGES, checks_of_code, checks_of_scoring, installed_versions
from csrm.embedding.encoder import encoder_digest
from csrm.errors import ConfigError, CsrmError, InputError, ScoringError
from csrm.night.settings import NightSettings
from csrm.schemas import TEXT_VECTORS, Column, Table
from csrm.spark.catalogs import tables_folder
from csrm.spark.session import build_session
from csrm.spark.storage import delete_table
from csrm.spark.tables import forget_table, read_table, replace_rows, table_exists, table_path
from csrm.spark.workers import errors_of_workers, scoring_profile, task_device, task_threads

PATIENCE_S = 120.0
"""For executors that are still starting."""
_NUM_FILES = 4


def doctor_session() -> SparkSession:
    """The doctor's session: started by the first call, the same for each later one."""
    return build_session("csrm-doctor")


def check_session() -> str:
    spark = doctor_session()
    if spark.version != pyspark.__version__:
        raise ConfigError(
            f"expected Spark {pyspark.__version__}, which pyspark is, found {spark.version}. Unset SPARK_HOME, or "
            "install the pyspark of that Spark."
        )
    jvm: Any = spark.sparkContext._jvm
    java = jvm.java.lang.System.getProperty("java.version")
    return f"{spark.version} with Delta on Java {java}, master {spark.sparkContext.master}"


def check_settings(settings: NightSettings) -> str:
    """Spark's settings, where they decide how pairs are scored.

    Raises:
        ConfigError: see scoring_profile.
        CheckWarning: pairs would be scored twice, or GPUs shared or starved of memory.
    """
    spark = doctor_session()
    profile = scoring_profile(spark, settings.device, settings.one_task_per_gpu)
    conf = spark.sparkContext.getConf()
    doubts = []
    if conf.get("spark.speculation", "false") == "true":
        doubts.append("spark.speculation is on: slow tasks are scored twice, each with a model of its own")
    if settings.device == "cuda" and profile is None:
        doubts.append("no GPU for each task: all tasks of an executor use one (spark.executor.resource.gpu.amount)")
    if settings.device != "cpu" and conf.contains("spark.executor.pyspark.memory"):
        doubts.append("spark.executor.pyspark.memory limits address space, of which CUDA takes far more than it uses")
    if doubts:
        raise CheckWarning("; ".join(doubts))
    return "a task that scores has " + ("what any task has" if profile is None else "a GPU for itself")


def checks_of_executors(
    settings: NightSettings, patience_s: float = PATIENCE_S, *, searches: Sequence[CheckedSemantic] = ()
) -> Iterator[tuple[str, Check]]:
    """Every executor, by as many tasks at one time as it can run: one of them looks, or one for each GPU.

    Args:
        settings: of the night.
        patience_s: seconds that executors may take to come.
        searches: encoders that every executor must have, too.

    Yields:
        Place (host and port of the executor, and its GPU) and check; "driver" for what was found from there.
    """
    came = checked("executors", _check_executors, patience_s)
    yield "driver", came
    if came.exit_code:
        return
    try:
        with errors_of_workers():
            rows = _looks(doctor_session(), settings, searches)
    except CsrmError as error:
        yield "driver", failed("executors", _cause(error))
        return
    for row in rows:
        yield row[0], Check(*row[1:])


def _looks(
    spark: SparkSession, settings: NightSettings, searches: Sequence[CheckedSemantic]
) -> list[tuple[str, str, str, str, int]]:
    """Rows of place and Check, ordered by place."""
    device, threads = settings.device, task_threads(spark)
    digest = load_bundle(settings.bundle, settings.bundle_digest).digest
    encoders = {search: encoder_digest(search.encoder) for search in searches}
    driver = installed_versions(PACKAGES)
    profile = scoring_profile(spark, device, settings.one_task_per_gpu)
    columns = ["place", *Check._fields]

    def look(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for _ in batches:
            pass
        context = BarrierTaskContext.get()
        gpus = context.resources().get("gpu")
        gpu = None if gpus is None else gpus.addresses[0]
        number = context.partitionId()
        place = context.getTaskInfos()[number].address + ("" if gpu is None else f" gpu {gpu}")
        if context.allGather(place).index(place) == number:  # the first of those that share a place
            checks = checks_of_code(PACKAGES, driver)
            scoring = checks_of_scoring(settings, task_device(device), gpu, threads, digest)
            encoding = [
                check
                for search, encoder in encoders.items()
                for check in checks_of_encoder(search, task_device(search.device), threads, encoder)
            ]
            rows = [(place, *check) for check in (*checks, *scoring, *encoding)]
            yield pd.DataFrame(rows, columns=columns)

    schema = "place string, name string, verdict string, text string, exit_code int"
    num_tasks = _tasks_at_once(spark, profile)
    looks_df = spark.range(0, num_tasks, 1, num_tasks).mapInPandas(look, schema, barrier=True, profile=profile)
    return sorted((tuple(row) for row in looks_df.collect()), key=lambda row: row[0])


def _check_executors(patience_s: float) -> str:
    """Executors that have come, once there are as many as were asked for.

    Raises:
        ScoringError: none has come.
        ConfigError: they may come and go, so that not all can be looked at.
        CheckWarning: fewer than were asked for.
    """
    spark = doctor_session()
    conf = spark.sparkContext.getConf()
    if conf.get("spark.dynamicAllocation.enabled", "false") == "true":
        raise ConfigError(
            "spark.dynamicAllocation.enabled: executors come and go, so not all can be looked at. Submit the doctor "
            "with --conf spark.dynamicAllocation.enabled=false."
        )
    context: Any = spark.sparkContext._jsc.sc()
    if context.isLocal():
        return "1, the driver's own: a local session"
    cores, cores_max = (int(conf.get(name, "0") or "0") for name in ("spark.executor.cores", "spark.cores.max"))
    expected = int(conf.get("spark.executor.instances", "0") or "0") or (cores_max // cores if cores else 0) or 1
    deadline = time.monotonic() + patience_s
    while True:
        found = len(context.statusTracker().getExecutorInfos()) - 1  # the driver is in the list, too
        if found >= expected:
            return f"{found} of {expected}"
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    if not found:
        raise ScoringError(
            f"expected {expected}, none came within {patience_s:.0f} s. Has the cluster room for one "
            "(spark.executor.cores, .memory, .resource.gpu.amount)? Can it reach the driver? Its log and the "
            "cluster's page say more."
        )
    raise CheckWarning(f"expected {expected}, {found} came within {patience_s:.0f} s; a night would run on these")


def _tasks_at_once(spark: SparkSession, profile: Any) -> int:
    """Tasks that the executors can run side by side, with the resources of a profile."""
    context: Any = spark.sparkContext._jsc.sc()
    profiles = context.resourceProfileManager()
    java_profile = profiles.defaultResourceProfile() if profile is None else profile._java_resource_profile
    profiles.addResourceProfile(java_profile)
    num_tasks = int(context.maxNumConcurrentTasks(java_profile))
    if not num_tasks:
        raise ConfigError(
            "executors: expected room for one task that scores, found none. spark.task.cpus must not be more than "
            "spark.executor.cores."
        )
    return num_tasks


def _cause(error: CsrmError) -> CsrmError:
    """What keeps executors from being looked at, with the way out where it is known."""
    missing = re.search(r"No module named '([\w.]+)'", str(error.__cause__))
    if missing is not None:
        return ConfigError(
            f"expected the module {missing[1]} in their Python, found none. Send them code and environment, as "
            "docs/deployment.md says, and name their Python by spark.pyspark.python."
        )
    if isinstance(error, ScoringError):
        return ScoringError(str(error).partition("\n")[0])
    return error


def check_tables(settings: NightSettings) -> str:
    """That Spark can write, read and delete a Delta table beside those of the night.

    Raises:
        InputError: what was written is not what is read.
    """
    spark = doctor_session()
    number = Column("number", "bigint", "Number of the row")
    table = Table(f"doctor_{uuid.uuid4().hex}", "Written by csrm.doctor, to be deleted at once", (number,), ("number",))
    path = table_path(tables_folder(spark, settings.tables), table)
    try:
        with errors_of_workers():
            rows_df = spark.range(0, _NUM_FILES, 1, _NUM_FILES).withColumnRenamed("id", "number")
            replace_rows(rows_df, table, path)
            num_rows = read_table(spark, table, path).count()
    finally:
        delete_table(spark, path)
        forget_table(spark, table, path)
    if num_rows != _NUM_FILES:
        raise InputError(f"{settings.tables}: expected {_NUM_FILES} rows that were just written, found {num_rows}.")
    return f"{settings.tables}: a Delta table was written, read and deleted"


def check_text_vectors(tables: str, encoder: str) -> str:
    """The table of vectors, where there is one: that it can be read, and whether it has any of this encoder.

    Raises:
        BundleError: no encoder there.
        InputError: its columns are others.
        CheckWarning: its vectors are those of other encoders.
    """
    digest = encoder_digest(encoder)
    spark = doctor_session()
    path = table_path(tables_folder(spark, tables), TEXT_VECTORS)
    if not table_exists(spark, path):
        return f"none yet in {path}: the first build embeds every text"
    counts_df = read_table(spark, TEXT_VECTORS, path).groupBy("encoder_digest").agg(F.count("*").alias("num_vectors"))
    counts = {row["encoder_digest"]: row["num_vectors"] for row in counts_df.collect()}
    others = {name: count for name, count in counts.items() if name != digest}
    own = f"{counts.get(digest, 0):,} vectors of {digest[:12]} in {path}"
    if others and digest not in counts:
        listed = ", ".join(f"{count:,} of {name[:12]}" for name, count in sorted(others.items()))
        raise CheckWarning(f"{own}, but {listed}: the encoder is a new one, so the next build embeds every text again")
    return own + (f"; {sum(others.values()):,} of other encoders, which nothing reads" if others else "")
