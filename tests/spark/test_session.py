"""The Spark session: what its environment must be able to do."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from pyspark.sql import SparkSession

from csrm.config import InputSpec
from csrm.errors import ConfigError, InputError
from csrm.schemas import CATALOG
from csrm.spark.inputs import read_input, read_inputs
from csrm.spark.session import build_session, require_names
from csrm.spark.tables import sql_literal

pytestmark = pytest.mark.spark

IN_A_POSIX_LOCALE = """
from csrm.spark.session import build_session, require_names
spark = build_session("test")
require_names(spark, ["日本"])
print(spark.sparkContext.master, spark.conf.get("spark.sql.session.timeZone"))
"""

ON_EXECUTORS = """
from csrm.errors import ConfigError
from csrm.spark.session import build_session, require_names, require_names_on_executors
spark = build_session("test")
require_names(spark, ["日本"])
require_names_on_executors(spark, ["kr"])
try:
    require_names_on_executors(spark, ["日本", "kr"])
except ConfigError as error:
    print(error)
"""


def test_names_that_the_jvm_cannot_write_are_refused_with_the_way_out(spark: SparkSession) -> None:
    system = spark.sparkContext._jvm.java.lang.System
    encoding = system.getProperty("sun.jnu.encoding")
    require_names(spark, ["kr", "台灣"])
    system.setProperty("sun.jnu.encoding", "ANSI_X3.4-1968")
    try:
        require_names(spark, ["kr", "/data/tables"])
        with pytest.raises(ConfigError, match=r"\['/data/büro', '台灣'\] cannot be written.*LC_ALL=C\.UTF-8"):
            require_names(spark, ["kr", "台灣", "/data/büro"])
    finally:
        system.setProperty("sun.jnu.encoding", encoding)


def test_inputs_at_paths_that_the_jvm_cannot_read_are_refused_with_the_way_out(spark: SparkSession) -> None:
    system = spark.sparkContext._jvm.java.lang.System
    encoding = system.getProperty("sun.jnu.encoding")
    system.setProperty("sun.jnu.encoding", "ANSI_X3.4-1968")
    try:
        with pytest.raises(ConfigError, match=r"\['/data/büro/catalog', '日本'\] cannot be written"):
            read_inputs(spark, {CATALOG: InputSpec(path="/data/büro/catalog")}, ["日本", "us"])
    finally:
        system.setProperty("sun.jnu.encoding", encoding)


@pytest.mark.slow
def test_executors_that_cannot_write_a_name_are_found() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LANG"}
    master = "local-cluster[1,1,1024]"
    settings = "--conf spark.executor.memory=1g --conf spark.executorEnv.LC_ALL=POSIX --conf spark.driver.memory=1g"
    environment |= {"LC_ALL": "C.UTF-8", "PYSPARK_SUBMIT_ARGS": f"--master {master} {settings} pyspark-shell"}

    finished = subprocess.run(
        [sys.executable, "-c", ON_EXECUTORS], env=environment, capture_output=True, text=True, check=False
    )

    assert finished.returncode == 0, finished.stderr
    assert "file names of executors are ANSI_X3.4-1968, in which ['日本'] cannot be read or written" in finished.stdout


@pytest.mark.parametrize("name", ["SPARK_REMOTE", "SPARK_CONNECT_MODE_ENABLED"])
def test_jobs_refuse_spark_connect_with_the_way_out(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "sc://localhost")
    with pytest.raises(ConfigError, match=r"got Spark Connect.*Start the job with spark-submit, or unset"):
        build_session("test")


@pytest.mark.slow
def test_plain_python_in_a_posix_locale_writes_any_name_and_takes_a_master_from_its_environment() -> None:
    unwanted = ("LANG", "LC_ALL", "PYSPARK_GATEWAY_PORT", "PYSPARK_GATEWAY_SECRET", "SPARK_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    environment |= {"LC_ALL": "POSIX", "PYTHONUTF8": "1", "PYSPARK_SUBMIT_ARGS": "--master local[1] pyspark-shell"}

    finished = subprocess.run(
        [sys.executable, "-c", IN_A_POSIX_LOCALE], env=environment, capture_output=True, text=True, check=False
    )

    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == ["local[1]", "UTC"]


def test_no_damaged_file_is_skipped_whatever_the_cluster_says(spark: SparkSession, tmp_path: Path) -> None:
    for n in range(2):
        rows = pd.DataFrame([("tw", f"p{n}", "t")], columns=["market", "product_id", "title"])
        rows.to_parquet(tmp_path / f"{n}.parquet")
    damaged = bytearray((tmp_path / "1.parquet").read_bytes())
    damaged[4:30] = b"\xff" * 26
    (tmp_path / "1.parquet").write_bytes(damaged)
    names = ("spark.sql.files.ignoreCorruptFiles", "spark.sql.files.ignoreMissingFiles")
    for name in names:
        spark.conf.set(name, "true")

    with pytest.raises(InputError, match="cannot be read: "):
        read_input(build_session("job"), CATALOG, InputSpec(path=str(tmp_path), format="parquet"))
    assert [spark.conf.get(name) for name in names] == ["false", "false"]


def test_a_backslash_in_sql_escapes_whatever_the_cluster_says(spark: SparkSession) -> None:
    """As Spark before 2.0 had it, a market with a quote in its name was another text in conditions."""
    spark.conf.set("spark.sql.parser.escapedStringLiterals", "true")

    text = "it's \\ a `run`"
    assert build_session("job").sql(f"SELECT {sql_literal(text)} AS text").head()["text"] == text


def test_huge_texts_come_to_python_in_small_batches(spark: SparkSession) -> None:
    """Else ten thousand titles of a megabyte are one batch of 2 GB, several times, in each worker."""

    def size(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for batch in batches:
            yield pd.DataFrame({"num_bytes": [int(batch["title"].str.len().sum())]})

    titles_df = build_session("job").range(0, 100, 1, 1).selectExpr("repeat('x', 1048576) AS title")
    sizes = [row["num_bytes"] for row in titles_df.mapInPandas(size, "num_bytes bigint").collect()]
    assert sum(sizes) == 100 * 2**20
    assert max(sizes) <= 65 * 2**20
    spark.conf.set("spark.sql.execution.arrow.maxBytesPerBatch", "32m")
    assert build_session("job").conf.get("spark.sql.execution.arrow.maxBytesPerBatch") == "32m"
    spark.conf.unset("spark.sql.execution.arrow.maxBytesPerBatch")
    build_session("job")
