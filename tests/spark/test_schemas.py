"""CSRM's own tables in a schema of Spark's catalog."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from csrm.cli import setting_arguments
from csrm.commands import maintain, retire
from csrm.doctor.cluster import check_tables
from csrm.errors import ConfigError, InputError, LeaseError
from csrm.night.leases import hold_leases
from csrm.night.runs import create_output_tables
from csrm.night.settings import CheckedNight
from csrm.schemas import RELEVANCE_SCORES
from csrm.spark.catalogs import tables_folder
from csrm.spark.tables import read_table, table_path
from tests.consumers.publishing import publish, record

pytestmark = pytest.mark.spark
NIGHT_TABLES = ["relevance_scores", "run_pairs", "scores_staging", "scoring_runs"]


@pytest.fixture
def location(spark: SparkSession, tmp_path: Path) -> Iterator[str]:
    """Location of the schema `search`, whose name has what a URI would write otherwise."""
    folder = f"{tmp_path}/search tables é"
    spark.sql(f"CREATE SCHEMA search LOCATION '{folder}'")
    yield folder
    spark.sql("DROP SCHEMA search CASCADE")


def names(spark: SparkSession) -> list[str]:
    """Tables and views of the schema; SHOW TABLES lists the session's temporary views too."""
    return sorted(row["tableName"] for row in spark.sql("SHOW TABLES IN search").collect() if not row["isTemporary"])


def test_tables_are_in_the_location_of_the_schema_and_have_names_there(spark: SparkSession, location: str) -> None:
    folder = tables_folder(spark, "schema:search")
    create_output_tables(spark, folder)
    publish(spark, folder, "r1", {"us": {("q1", "p1"): 0.5}}, day=0)

    assert folder.removeprefix("file:") == location
    assert names(spark) == NIGHT_TABLES
    (row,) = spark.table("search.relevance_scores").collect()
    assert (row["query_id"], row["relevance_score"]) == ("q1", 0.5)
    assert Path(location, "relevance_scores", "_delta_log").is_dir()
    comments = {row["col_name"]: row["comment"] for row in spark.sql("DESCRIBE search.relevance_scores").collect()}
    assert comments["market"] == RELEVANCE_SCORES.columns[0].comment


def test_a_table_that_was_dropped_gets_its_name_again_and_has_its_rows(spark: SparkSession, location: str) -> None:
    folder = tables_folder(spark, "schema:search")
    create_output_tables(spark, folder)
    publish(spark, folder, "r1", {"us": {("q1", "p1"): 0.5}}, day=0)
    spark.sql("DROP TABLE search.relevance_scores")
    assert names(spark) == NIGHT_TABLES[1:]
    assert read_table(spark, RELEVANCE_SCORES, table_path(folder, RELEVANCE_SCORES)).count() == 1

    create_output_tables(spark, folder)

    assert spark.table("search.relevance_scores").count() == 1


def test_two_jobs_that_create_the_tables_at_one_moment_both_find_them(spark: SparkSession, location: str) -> None:
    folder = tables_folder(spark, "schema:spark_catalog.search")
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(create_output_tables, spark, folder) for _ in range(2)]:
            done.result()

    assert names(spark) == NIGHT_TABLES


def test_a_folder_beside_the_schema_has_the_tables(spark: SparkSession, location: str, tmp_path: Path) -> None:
    folder = tables_folder(spark, f"schema:search?folder={tmp_path}/lake")
    create_output_tables(spark, folder)

    assert folder == f"{tmp_path}/lake"
    assert names(spark) == NIGHT_TABLES
    assert not Path(location, "relevance_scores").exists()
    detail = spark.sql("DESCRIBE DETAIL search.relevance_scores").head()
    assert detail is not None
    assert detail["location"] == f"file:{tmp_path}/lake/relevance_scores"


@pytest.mark.parametrize(
    ("made", "drop"),
    [
        ("VIEW search.relevance_scores AS SELECT 1 AS score", "VIEW"),
        ("TABLE search.relevance_scores (score INT) USING delta LOCATION '{}'", "TABLE"),
        ("TABLE search.relevance_scores (score INT) USING parquet LOCATION '{}'", "TABLE"),
    ],
)
def test_what_has_the_name_of_a_table_is_left_alone(
    spark: SparkSession, location: str, tmp_path: Path, made: str, drop: str
) -> None:
    spark.sql(f"CREATE {made}".format(tmp_path / "theirs"))

    with pytest.raises(InputError, match=r"table search.relevance_scores: expected the table at .*Drop what has the"):
        create_output_tables(spark, tables_folder(spark, "schema:search"))

    assert spark.table("search.relevance_scores").columns == ["score"]
    spark.sql(f"DROP {drop} search.relevance_scores")  # what the message says
    create_output_tables(spark, tables_folder(spark, "schema:search"))
    assert names(spark) == NIGHT_TABLES


@pytest.mark.parametrize("name", ["no_such_schema", "no_catalog.search", "search; DROP SCHEMA search", "a b"])
def test_a_schema_that_is_not_there_is_a_configuration_error(spark: SparkSession, location: str, name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a schema of Spark's catalog .*Make it once: CREATE"):
        tables_folder(spark, f"schema:{name}")


def test_the_message_says_that_a_catalog_in_memory_forgets_schemas(spark: SparkSession) -> None:
    with pytest.raises(ConfigError, match=r"is in memory and forgets its schemas \(spark.sql.catalogImpl"):
        maintain.main(setting_arguments(tables="schema:no_such_schema"))


@pytest.fixture
def shop(spark: SparkSession, tmp_path: Path) -> str:
    """A catalog whose schemas have no location, and which keeps no Delta tables: a database's."""
    spark.conf.set("spark.sql.catalog.shop", "org.apache.spark.sql.execution.datasources.v2.jdbc.JDBCTableCatalog")
    spark.conf.set("spark.sql.catalog.shop.url", f"jdbc:derby:{tmp_path}/shop;create=true")
    spark.conf.set("spark.sql.catalog.shop.driver", "org.apache.derby.iapi.jdbc.AutoloadedDriver")
    return "shop.APP"


def test_a_schema_without_location_needs_a_folder(spark: SparkSession, shop: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no location. Name a folder .*: schema:shop.APP\?folder=URI"):
        tables_folder(spark, f"schema:{shop}")

    folder = tables_folder(spark, f"schema:{shop}?folder={tmp_path}/lake")
    with pytest.raises(InputError, match=r"table shop.APP.relevance_scores: .*NOT_SUPPORTED_IN_JDBC_CATALOG"):
        create_output_tables(spark, folder)


def test_leases_of_a_schema_keep_two_jobs_apart_however_they_name_it(spark: SparkSession, location: str) -> None:
    folder = tables_folder(spark, "schema:search")
    create_output_tables(spark, folder)
    publish(spark, folder, "r1", {"us": {("q1", "p1"): 0.5}}, day=0)
    record(spark, folder, "r1", ["us"], "published", day=0)

    with hold_leases(spark, location, ["us"], "run r2"):
        for job, words in ((maintain, []), (retire, ["--market", "us", "--reason", "closed"])):
            with pytest.raises(LeaseError, match=r"market 'us': run r2 .* works on it"):
                job.main([*setting_arguments(tables="schema:search"), *words])
    assert retire.main([*setting_arguments(tables="schema:search"), "--market", "us", "--reason", "closed"]) == 0
    assert spark.table("search.relevance_scores").count() == 0


def test_the_doctor_registers_a_table_and_leaves_none(spark: SparkSession, location: str, tmp_path: Path) -> None:
    said = check_tables(CheckedNight(tables="schema:search", bundle="b"))

    assert said == "schema:search: a Delta table was written, read and deleted"
    assert names(spark) == []
    assert [path.name for path in Path(location).iterdir()] == []
