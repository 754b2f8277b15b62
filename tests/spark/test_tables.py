"""Tables on storage, on a real Delta."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Barrier

import deltalake
import pytest
from delta.tables import DeltaTable
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from csrm.cli import setting_arguments
from csrm.commands import migrate
from csrm.errors import InputError, LeaseError
from csrm.night.leases import hold_leases
from csrm.schemas import CANDIDATES, CATALOG, RELEVANCE_SCORES, RETRIEVAL_TABLE, SCORES_STAGING, SCORING_RUNS
from csrm.spark.commits import Transaction, append_rows, merge_changes, session_settings
from csrm.spark.migration import migrate_table
from csrm.spark.tables import (
    create_table,
    open_table,
    overwrite_table,
    read_table,
    replace_rows,
    spark_schema,
    sql_literal,
    sql_path,
    table_path,
    table_version,
)

pytestmark = pytest.mark.spark

SCORED_AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def scores(spark: SparkSession, *rows: tuple[str | None, str, str, float | None]) -> DataFrame:
    values = [(*row, "E", "digest", 7, SCORED_AT, "run", None) for row in rows]
    return spark.createDataFrame(values, spark_schema(replace(RELEVANCE_SCORES, columns=_nullable())))


def _nullable() -> tuple:
    return tuple(replace(column, required=False) for column in RELEVANCE_SCORES.columns)


@pytest.fixture(scope="module")
def scores_path(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A published table with two markets; its folder's name has a space and a quote."""
    path = table_path(str(tmp_path_factory.mktemp("it's tables")), RELEVANCE_SCORES)
    rows = scores(spark, ("kr", "q1", "p1", 0.5), ("tw", "q1", "p1", 0.25))
    assert overwrite_table(rows, RELEVANCE_SCORES, path) == 1
    return path


def test_a_created_table_has_its_comments_constraints_partitions_and_change_feed(
    spark: SparkSession, scores_path: str
) -> None:
    table_df, version = open_table(spark, scores_path)
    detail = spark.sql(f"DESCRIBE DETAIL {sql_path(scores_path)}").head()
    columns = spark.sql(f"DESCRIBE {sql_path(scores_path)}").collect()

    assert version == 1
    assert detail["partitionColumns"] == ["market"]
    assert detail["properties"]["delta.enableChangeDataFeed"] == "true"
    assert detail["properties"]["delta.constraints.score_range"] == "relevance_score >= 0 AND relevance_score <= 1"
    assert detail["description"] == "Published relevance of (query, product) pairs, one row a pair"
    assert columns[0]["comment"] == "Storefront, for example tw"
    assert table_df.columns == RELEVANCE_SCORES.column_names


@pytest.mark.parametrize(
    ("row", "broken"),
    [
        (("kr", "q1", "p1", 1.5), "score_range"),
        (("kr", "q1", "p1", float("nan")), "score_"),
        (("kr", "q1", "p1", None), "relevance_score"),
        ((None, "q1", "p1", 0.5), "market"),
    ],
)
def test_a_row_that_breaks_a_constraint_is_refused(
    spark: SparkSession, scores_path: str, row: tuple[str | None, str, str, float | None], broken: str
) -> None:
    with pytest.raises(Exception, match=broken) as caught:
        scores(spark, row).write.format("delta").mode("append").save(scores_path)

    assert "DeltaInvariantViolationException" in str(caught.value) or isinstance(caught.value, PySparkException)
    assert table_version(spark, scores_path) == 1


def test_a_replaced_slice_leaves_the_rest_and_is_one_commit(spark: SparkSession, tmp_path: Path) -> None:
    path = str(tmp_path / "scores")
    replace_rows(scores(spark, ("kr", "q1", "p1", 0.5), ("tw", "q1", "p1", 0.25)), RELEVANCE_SCORES, path)

    version = overwrite_table(scores(spark, ("tw", "q2", "p2", 1.0)), RELEVANCE_SCORES, path, where="market = 'tw'")

    assert version == 2
    rows = read_table(spark, RELEVANCE_SCORES, path).orderBy("market").collect()
    assert [(row["market"], row["query_id"], row["relevance_score"]) for row in rows] == [
        ("kr", "q1", 0.5),
        ("tw", "q2", 1.0),
    ]
    assert read_table(spark, RELEVANCE_SCORES, path, version=1).where("market = 'tw'").head()["query_id"] == "q1"


def test_a_table_of_something_else_is_never_overwritten(spark: SparkSession, tmp_path: Path) -> None:
    path = str(tmp_path / "mine")
    spark.range(3).write.format("delta").save(path)

    with pytest.raises(InputError, match=r"expected the columns market string.*it has id bigint.*name another folder"):
        replace_rows(scores(spark, ("kr", "q1", "p1", 0.5)), RELEVANCE_SCORES, path)

    assert spark.read.format("delta").load(path).count() == 3


def test_a_table_of_an_older_version_is_refused_until_it_is_migrated(spark: SparkSession, tmp_path: Path) -> None:
    path = str(tmp_path / "it's" / "scores")
    columns = tuple(c for c in RELEVANCE_SCORES.columns if c.name != "predicted_grade")
    older = replace(RELEVANCE_SCORES, columns=columns, schema_version=1)
    row_df = scores(spark, ("kr", "q1", "p1", 0.5))
    replace_rows(row_df, older, path)
    newer = replace(RELEVANCE_SCORES, columns=_nullable(), schema_version=2)

    with pytest.raises(InputError, match=r"expected version 2 of its columns, it has version 1. Migrate it: jobs/mig"):
        create_table(spark, newer, path)
    with pytest.raises(InputError, match=r"it has version 1\. Migrate it: jobs/migrate\.py"):
        read_table(spark, newer, path)
    assert migrate_table(spark, newer, path) == ["predicted_grade"]
    assert migrate_table(spark, newer, path) == []

    create_table(spark, newer, path)
    (row,) = read_table(spark, newer, path).collect()
    assert (row["product_id"], row["relevance_score"], row["predicted_grade"], row["run_id"]) == (
        "p1",
        0.5,
        None,
        "run",
    )
    with pytest.raises(InputError, match=r"it has version 2. Use the newer CSRM that wrote it"):
        create_table(spark, older, path)


def test_staging_of_version_1_takes_pairs_without_a_score_after_its_migration(
    spark: SparkSession, tmp_path: Path
) -> None:
    path = str(tmp_path / "staging")
    newer = ("reason", "label_probabilities")
    columns = tuple(replace(column, required=True) for column in SCORES_STAGING.columns if column.name not in newer)
    create_table(spark, replace(SCORES_STAGING, columns=columns, schema_version=1), path)

    assert migrate_table(spark, SCORES_STAGING, path) == [*newer]

    at = datetime(2026, 1, 2, tzinfo=UTC)
    row = ("kr", "q", "p", None, None, "digest", 1, at, "run", "model_error", None)
    append_rows(spark.createDataFrame([row], spark_schema(SCORES_STAGING)), SCORES_STAGING, path, Transaction("app", 1))
    assert read_table(spark, SCORES_STAGING, path).head()["reason"] == "model_error"


def test_scores_of_version_1_take_label_probabilities_after_their_migration_but_only_right_ones(
    spark: SparkSession, tmp_path: Path
) -> None:
    path = str(tmp_path / "scores")
    checks = tuple(check for check in RELEVANCE_SCORES.checks if check[0] != "probabilities")
    columns = tuple(column for column in RELEVANCE_SCORES.columns if column.name != "label_probabilities")
    older = replace(RELEVANCE_SCORES, columns=columns, checks=checks, schema_version=1)
    before_df = scores(spark, ("kr", "q1", "p1", 0.5))
    replace_rows(before_df, older, path)

    assert migrate_table(spark, RELEVANCE_SCORES, path) == ["label_probabilities"]

    assert read_table(spark, RELEVANCE_SCORES, path).collect() == before_df.collect()
    for wrong in ({"no": -0.25, "yes": 0.5}, {"no": 0.5, "yes": 1.25}):
        wrong_df = before_df.withColumn("label_probabilities", _map(wrong))
        with pytest.raises(Exception, match=r"(?i)probabilities"):
            replace_rows(wrong_df, RELEVANCE_SCORES, path)
    right = {"I": 0.1, "C": 0.2, "S": 0.3, "E": 0.4}
    replace_rows(before_df.withColumn("label_probabilities", _map(right)), RELEVANCE_SCORES, path)
    (row,) = read_table(spark, RELEVANCE_SCORES, path).collect()
    assert row["label_probabilities"] == pytest.approx(right)


def _map(values: dict[str, float]) -> Column:
    pairs = [F.lit(part) for name, value in values.items() for part in (name, value)]
    return F.create_map(*pairs).cast("map<string,float>")


def test_checks_are_migrated_too(spark: SparkSession, tmp_path: Path) -> None:
    path = str(tmp_path / "scores")
    create_table(spark, RELEVANCE_SCORES, path)
    spark.sql(f"ALTER TABLE {sql_path(path)} ADD CONSTRAINT ours CHECK (market <> 'xx')")
    kept, changed = RELEVANCE_SCORES.checks[0], ("at_most_half", "relevance_score <= 0.5")
    newer = replace(RELEVANCE_SCORES, checks=(kept, changed), schema_version=RELEVANCE_SCORES.schema_version + 1)
    with pytest.raises(InputError, match="expected version 3 of its columns, it has version 2"):
        create_table(spark, newer, path)

    assert migrate_table(spark, newer, path) == []

    replace_rows(scores(spark, ("kr", "q1", "p1", 0.5)), newer, path)
    with pytest.raises(Exception, match="at_most_half"):
        replace_rows(scores(spark, ("kr", "q1", "p1", 0.75)), newer, path)
    with pytest.raises(Exception, match="ours"):  # what a company added itself stays
        replace_rows(scores(spark, ("xx", "q1", "p1", 0.5)), newer, path)


def test_what_is_no_older_version_is_not_migrated(spark: SparkSession, tmp_path: Path) -> None:
    spark.range(3).write.format("delta").save(str(tmp_path / "mine"))

    with pytest.raises(InputError, match=r"with the columns \['id'\] of no such version. It is left as it is"):
        migrate_table(spark, RELEVANCE_SCORES, str(tmp_path / "mine"))


def test_a_folder_with_other_files_is_never_made_a_table(spark: SparkSession, tmp_path: Path) -> None:
    path = str(tmp_path / "files")
    spark.range(3).write.parquet(path)

    with pytest.raises(InputError, match="cannot be created"):
        create_table(spark, CATALOG, path)


def test_creating_twice_keeps_the_table(spark: SparkSession, scores_path: str) -> None:
    create_table(spark, RELEVANCE_SCORES, scores_path)

    assert table_version(spark, scores_path) == 1


def follow(spark: SparkSession, error: InputError) -> None:
    """Do what the message says."""
    for statement in re.findall(r"ALTER TABLE delta\.`[^`]*` .*?(?=; ALTER|\. Readers)", str(error)):
        spark.sql(statement)


def test_a_change_feed_or_constraint_that_was_taken_away_is_an_error_with_the_way_out(
    spark: SparkSession, tmp_path: Path
) -> None:
    path = str(tmp_path / "relevance_scores")
    create_table(spark, RELEVANCE_SCORES, path)
    spark.sql(f"ALTER TABLE {sql_path(path)} SET TBLPROPERTIES ('delta.enableChangeDataFeed' = 'false')")
    spark.sql(f"ALTER TABLE {sql_path(path)} DROP CONSTRAINT {RELEVANCE_SCORES.checks[0][0]}")

    with pytest.raises(InputError, match=r"They were changed since. Nothing was written.*: ALTER") as caught:
        create_table(spark, RELEVANCE_SCORES, path)

    follow(spark, caught.value)
    create_table(spark, RELEVANCE_SCORES, path)


@pytest.mark.parametrize(
    "switched_on",
    [
        "'delta.enableDeletionVectors' = 'true'",
        "'delta.columnMapping.mode' = 'name', 'delta.minReaderVersion' = '2', 'delta.minWriterVersion' = '5'",
    ],
    ids=["deletion vectors", "column mapping"],
)
def test_features_that_not_every_reader_has_are_an_error_with_the_way_out(
    spark: SparkSession, tmp_path: Path, switched_on: str
) -> None:
    path = str(tmp_path / "relevance_scores")
    replace_rows(scores(spark, ("kr", "q1", "p1", 0.5), ("kr", "q1", "p2", 0.25)), RELEVANCE_SCORES, path)
    spark.sql(f"ALTER TABLE {sql_path(path)} SET TBLPROPERTIES ({switched_on})")
    spark.sql(f"DELETE FROM {sql_path(path)} WHERE product_id = 'p2'")

    with pytest.raises(InputError, match=r"the features with which CSRM made it\. They were changed since\.") as caught:
        create_table(spark, RELEVANCE_SCORES, path)

    follow(spark, caught.value)
    create_table(spark, RELEVANCE_SCORES, path)
    assert deltalake.DeltaTable(path).to_pandas()["product_id"].tolist() == ["p1"]


def test_columns_that_were_added_by_hand_are_an_error_whose_way_out_keeps_the_rows(
    spark: SparkSession, tmp_path: Path
) -> None:
    scores_path = str(tmp_path / "relevance_scores")
    replace_rows(scores(spark, ("kr", "q1", "p1", 0.5)), RELEVANCE_SCORES, scores_path)
    before = sorted(map(tuple, read_table(spark, RELEVANCE_SCORES, scores_path).collect()))
    spark.sql(f"ALTER TABLE {sql_path(scores_path)} ADD COLUMNS (note string)")
    spark.sql(f"ALTER TABLE {sql_path(scores_path)} ADD COLUMNS (author string)")

    with pytest.raises(InputError, match=r"columns were added to it by hand after version 1\. Take them") as caught:
        create_table(spark, RELEVANCE_SCORES, scores_path)

    (statement,) = re.findall(r"RESTORE TABLE delta\.`[^`]*` TO VERSION AS OF 1", str(caught.value))
    spark.sql(statement)
    create_table(spark, RELEVANCE_SCORES, scores_path)
    assert sorted(map(tuple, read_table(spark, RELEVANCE_SCORES, scores_path).collect())) == before


def test_reading_says_what_is_not_there(spark: SparkSession, scores_path: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a Delta table, found none"):
        read_table(spark, CATALOG, str(tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"version 99 cannot be read.*newest version is 1"):
        open_table(spark, scores_path, version=99)
    with pytest.raises(InputError, match=r"missing columns \['rank', 'title', 'similarity', 'source'\]; it has"):
        read_table(spark, RETRIEVAL_TABLE, scores_path, version=1)
    columns = (*RELEVANCE_SCORES.columns, replace(RELEVANCE_SCORES.columns[0], name="added"))
    newer = replace(RELEVANCE_SCORES, columns=columns, schema_version=RELEVANCE_SCORES.schema_version + 1)
    with pytest.raises(InputError, match=r"expected version 3 of its columns, it has version 2\. Migrate it"):
        read_table(spark, newer, scores_path)


def test_a_sql_literal_reads_back_as_the_text(spark: SparkSession) -> None:
    text = "it's \\ a `run`"

    assert spark.sql(f"SELECT {sql_literal(text)} AS text").head()["text"] == text


def test_other_libraries_read_the_published_table(scores_path: str) -> None:
    deltalake = pytest.importorskip("deltalake")

    rows = deltalake.DeltaTable(scores_path).to_pyarrow_table().to_pylist()

    assert sorted((row["market"], row["relevance_score"]) for row in rows) == [("kr", 0.5), ("tw", 0.25)]
    assert json.loads(deltalake.DeltaTable(scores_path).schema().to_json())["fields"][0]["nullable"] is False


def test_a_relative_folder_starts_at_the_working_directory(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert table_path("tables", CANDIDATES) == f"{tmp_path}/tables/candidates"
    assert table_path("s3://bucket/a/", CANDIDATES) == "s3://bucket/a/candidates"
    create_table(spark, CANDIDATES, table_path("tables", CANDIDATES))
    assert (tmp_path / "tables" / "candidates" / "_delta_log").is_dir()


def test_a_publish_goes_on_where_something_without_a_lease_changes_the_table_meanwhile(
    spark: SparkSession, tmp_path: Path
) -> None:
    path, begun, changed = table_path(str(tmp_path), RELEVANCE_SCORES), tmp_path / "begun", tmp_path / "changed"
    create_table(spark, RELEVANCE_SCORES, path)
    replace_rows(scores(spark, ("kr", "q1", "p1", 0.5), ("kr", "q2", "p1", 0.5)), RELEVANCE_SCORES, path)

    @F.udf("float")
    def waits(score: float) -> float:
        begun.touch()
        deadline = time.monotonic() + 60
        while not changed.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return score

    def change() -> None:
        while not begun.exists():
            time.sleep(0.05)
        spark.sql(f"ALTER TABLE {sql_path(path)} SET TBLPROPERTIES ('note' = 'mine')")
        spark.sql(f"DELETE FROM {sql_path(path)} WHERE query_id = 'q2'")
        changed.touch()

    changes_df = scores(spark, ("kr", "q1", "p1", 0.25), ("kr", "q3", "p1", 0.75)).withColumn(
        "relevance_score", waits("relevance_score")
    )
    with ThreadPoolExecutor() as pool:
        changing = pool.submit(change)
        version = merge_changes(
            changes_df.withColumn("operation", F.lit("update")),
            RELEVANCE_SCORES,
            path,
            {"market": "kr"},
            {"run_id": "r"},
        )
        changing.result()

    assert version == table_version(spark, path)
    rows = read_table(spark, RELEVANCE_SCORES, path).select("query_id", "relevance_score").orderBy("query_id")
    assert [tuple(row) for row in rows.collect()] == [("q1", 0.25), ("q3", 0.75)]


def test_a_migration_waits_for_no_run_and_takes_a_table_of_runs_of_an_older_version(
    spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables_dir, path = str(tmp_path), table_path(str(tmp_path), SCORING_RUNS)
    columns = tuple(column for column in SCORING_RUNS.columns if column.name != "table_id")
    older = replace(SCORING_RUNS, columns=columns, schema_version=SCORING_RUNS.schema_version - 1)
    create_table(spark, older, path)
    row = {
        "run_id": "r",
        "data_date": SCORED_AT.date(),
        "markets": ["kr"],
        "started_at": SCORED_AT,
        "verdict": "running",
    }
    row |= {"bundle_digest": "d", "precision": "fp32", "device": "cpu", "inputs": {}, "versions": {}, "seconds": {}}
    values = tuple(row.get(name) for name in older.column_names)
    spark.createDataFrame([values], spark_schema(older)).write.format("delta").mode("append").save(path)
    arguments = setting_arguments(tables=tables_dir, lease_seconds=3)
    with hold_leases(spark, tables_dir, ["kr"], "run n1", 3), pytest.raises(LeaseError, match="run n1"):
        migrate.main(arguments)
    assert "table_id" not in spark.read.format("delta").load(path).columns
    assert migrate.main(arguments) == 0
    assert capsys.readouterr().out == "scoring_runs: added table_id\n"


def test_a_table_that_several_jobs_create_at_the_same_moment_is_there_for_all_of_them(
    spark: SparkSession, tmp_path: Path
) -> None:
    path = table_path(str(tmp_path), SCORING_RUNS)
    at_once = Barrier(3)

    def create(session: SparkSession) -> None:
        at_once.wait()
        create_table(session, SCORING_RUNS, path)

    with ThreadPoolExecutor() as pool:
        for job in [pool.submit(create, spark.newSession()) for _ in range(3)]:
            job.result()
    assert read_table(spark, SCORING_RUNS, path).count() == 0


def test_a_table_can_be_read_by_every_reader_whatever_the_cluster_has_as_defaults(
    spark: SparkSession, tmp_path: Path
) -> None:
    path = table_path(str(tmp_path), RELEVANCE_SCORES)
    defaults = "spark.databricks.delta.properties.defaults"
    with session_settings(
        spark, {f"{defaults}.enableDeletionVectors": "true", f"{defaults}.columnMapping.mode": "name"}
    ):
        create_table(spark, RELEVANCE_SCORES, path)

    detail = DeltaTable.forPath(spark, path).detail().head()
    assert not {"deletionVectors", "columnMapping"} & set(detail["tableFeatures"])


@pytest.mark.parametrize("where", [None, "market IN ('kr', 'tw')"])
def test_all_rows_are_replaced_also_where_the_session_overwrites_partitions_alone(
    spark: SparkSession, tmp_path: Path, where: str | None
) -> None:
    path, schema = str(tmp_path / "candidates"), spark_schema(CANDIDATES)
    overwrite_table(spark.createDataFrame([("kr", "q", "p", None), ("tw", "q", "p", None)], schema), CANDIDATES, path)

    with session_settings(spark, {"spark.sql.sources.partitionOverwriteMode": "dynamic"}):
        overwrite_table(spark.createDataFrame([("kr", "q2", "p", None)], schema), CANDIDATES, path, where)

    assert [row["query_id"] for row in read_table(spark, CANDIDATES, path).collect()] == ["q2"]


def test_two_jobs_that_replace_the_same_rows_at_once_do_so_one_after_the_other(
    spark: SparkSession, tmp_path: Path
) -> None:
    path, schema = str(tmp_path / "candidates"), spark_schema(CANDIDATES)
    overwrite_table(spark.createDataFrame([("kr", "q", "p", None)], schema), CANDIDATES, path)
    at_once = Barrier(3)

    def overwrite(name: str) -> int:
        session = spark.newSession()
        rows_df = session.createDataFrame([("kr", "q", name, None)], schema)
        at_once.wait()
        return overwrite_table(rows_df, CANDIDATES, path, "market = 'kr'")

    with ThreadPoolExecutor() as pool:
        versions = dict(zip("abc", pool.map(overwrite, "abc"), strict=True))
    (row,) = read_table(spark, CANDIDATES, path).collect()
    assert versions[row["product_id"]] == max(versions.values()) == table_version(spark, path)
    assert len(set(versions.values())) == 3
