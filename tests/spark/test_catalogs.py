"""Inputs that are named in a catalog: Spark's own, and a Hive metastore."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from pyspark.sql import SparkSession

from csrm.cli import setting_arguments
from csrm.config import InputSpec
from csrm.errors import InputError
from csrm.schemas import CANDIDATES, QUERIES, RELEVANCE_SCORES
from csrm.spark.inputs import read_input, read_rows
from csrm.spark.tables import read_table, table_path
from tests.consumers.publishing import publish
from tests.docs.pages import python_blocks

pytestmark = pytest.mark.spark
ROOT = Path(__file__).parents[2]
FIRST = "SELECT 'kr' AS market, 'q1' AS query_id, 'tent' AS query, 'x' AS `Provider`"
SECOND = "SELECT 'kr' AS market, 'q2' AS query_id, 'lamp' AS query, 'x' AS `Provider`"


def named(name: str, **options: str) -> InputSpec:
    return InputSpec(path=name, format="table", options=options)


def test_a_delta_table_by_name_is_pinned_to_its_version_and_found_by_its_folder(
    spark: SparkSession, tmp_path: Path
) -> None:
    spark.sql(f"CREATE TABLE shop_queries USING delta LOCATION '{tmp_path}/queries' AS {FIRST}")
    try:
        read = read_input(spark, QUERIES, named("shop_queries"))
        spark.sql(f"INSERT INTO shop_queries {SECOND}")

        assert read.version == 0
        assert read.path.removeprefix("file:") == f"{tmp_path}/queries"
        assert [row["query_id"] for row in read.df.collect()] == ["q1"]
        assert read_rows(spark, QUERIES, named("spark_catalog.default.shop_queries")).count() == 2
        assert read_input(spark, QUERIES, named("shop_queries", versionAsOf="0")).df.count() == 1
    finally:
        spark.sql("DROP TABLE shop_queries")


def test_tables_of_other_formats_and_views_are_read_by_name(spark: SparkSession, tmp_path: Path) -> None:
    spark.sql(f"CREATE TABLE parquet_queries USING parquet LOCATION '{tmp_path}/queries' AS {FIRST}")
    spark.sql("CREATE VIEW lamp_queries AS SELECT market, query_id, 'lamp' AS query FROM parquet_queries")
    try:
        table, view = (read_input(spark, QUERIES, named(name)) for name in ("parquet_queries", "lamp_queries"))

        assert (table.version, view.version) == (None, None)
        assert len(table.files) == 1
        assert [row["query"] for read in (table, view) for row in read.df.collect()] == ["tent", "lamp"]
    finally:
        spark.sql("DROP VIEW lamp_queries")
        spark.sql("DROP TABLE parquet_queries")


@pytest.mark.parametrize("name", ["no_such_table", "no_such_catalog.shop.queries", "a b; DROP TABLE x", ""])
def test_a_name_that_the_catalog_lacks_is_an_input_error(spark: SparkSession, name: str) -> None:
    with pytest.raises(InputError, match=r"cannot be found: .*Expected the name of a table or view in Spark's catalog"):
        read_input(spark, QUERIES, named(name))


WRITE_TABLES = """
from csrm.spark.session import build_session

spark = build_session("metastore")
spark.sql("CREATE DATABASE shop")
spark.sql("CREATE TABLE shop.products USING delta AS SELECT 'us' AS market, 'p1' AS product_id, 'red shoe' AS title")
spark.sql("CREATE TABLE shop.queries STORED AS PARQUET AS SELECT 'us' AS market, 'q1' AS query_id, 'shoe' AS query")
"""


Run = Callable[..., None]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs Python in a process of its own, whose Spark has a Hive metastore below tmp_path."""
    settings = {
        "spark.sql.catalogImplementation": "hive",
        "spark.sql.warehouse.dir": f"{tmp_path}/warehouse",
        "spark.hadoop.javax.jdo.option.ConnectionURL": f"jdbc:derby:;databaseName={tmp_path}/metastore;create=true",
        "spark.hadoop.datanucleus.schema.autoCreateAll": "true",
        "spark.hadoop.hive.metastore.schema.verification": "false",
    }
    submit = " ".join(f"--conf {name}={value}" for name, value in settings.items())
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYSPARK_GATEWAY", "SPARK_"))}
    environment = {
        **kept,
        "PYTHONPATH": str(ROOT),
        "PYSPARK_SUBMIT_ARGS": f"{submit} pyspark-shell",
        "JAVA_TOOL_OPTIONS": f"-Dderby.stream.error.file={tmp_path}/derby.log",
    }

    def run_python(*command: str) -> None:
        ended = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr

    return run_python


@pytest.mark.slow
def test_a_job_reads_tables_of_a_hive_metastore_by_name(spark: SparkSession, tmp_path: Path, run: Run) -> None:
    run("-c", WRITE_TABLES)
    inputs = {name: {"path": f"shop.{name}", "format": "table"} for name in ("products", "queries")}
    run(
        "jobs/build_candidates.py",
        *setting_arguments(
            markets={"us": "en"},
            inputs={"catalog": inputs["products"], "queries": inputs["queries"]},
            tables=f"{tmp_path}/tables",
        ),
    )

    candidates_df = read_table(spark, CANDIDATES, f"{tmp_path}/tables/candidates")
    assert [(row["query_id"], row["product_id"]) for row in candidates_df.collect()] == [("q1", "p1")]


NEW_SESSION = """
from csrm.spark.session import build_session

spark = build_session("view")
"""
READ_VIEW = """
rows = spark.table("relevance_scores_readable").collect()
assert [(row.query, row.title, row.relevance_score) for row in rows] == [("shoe", "red shoe", 0.5)], rows
"""


@pytest.mark.long
@pytest.mark.slow
def test_a_hive_metastore_keeps_the_view_of_the_page(spark: SparkSession, tmp_path: Path, run: Run) -> None:
    publish(spark, str(tmp_path), "r1", {"us": {("q1", "p1"): 0.5}}, day=0)
    pd.DataFrame({"market": ["us"], "query_id": ["q1"], "query": ["shoe"]}).to_parquet(tmp_path / "queries.parquet")
    products = pd.DataFrame({"market": ["us"], "product_id": ["p1"], "title": ["red shoe"]})
    products.to_parquet(tmp_path / "catalog.parquet")
    names = f"path, market, query_id = {table_path(str(tmp_path), RELEVANCE_SCORES)!r}, 'us', 'q1'\n"
    block = python_blocks("docs/read-scores.md")["As a view"].replace("build/demo/inputs", str(tmp_path))

    run("-c", NEW_SESSION + names + block)
    run("-c", NEW_SESSION + READ_VIEW)
