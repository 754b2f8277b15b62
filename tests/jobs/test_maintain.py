"""The maintenance job as it is called after a night."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from csrm.cli import setting_arguments
from csrm.commands import maintain
from csrm.config import load_config
from csrm.errors import ConfigError, InputError, LeaseError
from csrm.night.leases import hold_leases
from csrm.schemas import REJECTED_PAIRS, RELEVANCE_SCORES, RUN_PAIRS, SCORES_STAGING, TEXT_VECTORS, Table
from csrm.spark.commits import Transaction, append_rows
from csrm.spark.tables import create_table, read_table, replace_rows, spark_schema, table_path, table_version
from tests.consumers.publishing import HOSTILE_MARKET, START, publish, record


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"change_feed_days": 8}, "expected 192 or more.*got 168: removing old files removes the change feed's too"),
        (
            {"retention_hours": 48, "change_feed_days": 2},
            "expected 168 or more, got 48: a job that reads or writes for longer would lose its files",
        ),
        ({"retention_hours": 48, "allow_short_retention": True}, "expected 168 or more, the hours of change_feed_days"),
        ({"change_feed_days": 31}, "change_feed_days: Input should be less than or equal to 30"),
    ],
)
def test_a_retention_that_would_harm_a_reader_is_refused(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config("conf/maintain.yaml", maintain.MaintenanceConfig, setting_arguments(**settings)[1::2])


def test_a_short_retention_can_be_allowed() -> None:
    settings = setting_arguments(retention_hours=48, change_feed_days=2, allow_short_retention=True)

    assert load_config("conf/maintain.yaml", maintain.MaintenanceConfig, settings[1::2]).retention_hours == 48


def add_run(spark: SparkSession, tables_dir: str, run_id: str, verdict: str, day: int) -> None:
    """A run with one row in each table that keeps rows of runs."""
    record(spark, tables_dir, run_id, ["kr"], verdict, day)
    values = {"market": "kr", "query_id": "q", "product_id": "p", "relevance_score": 0.5, "predicted_grade": "E"}
    values |= {"bundle_digest": "d", "pair_key": 1, "scored_at": START, "run_id": run_id, "state": "to_score"}
    values |= {"reason": "no_query", "bucket": 0}
    for table in (SCORES_STAGING, RUN_PAIRS, REJECTED_PAIRS):
        row = tuple(values.get(name) for name in table.column_names)
        row_df = spark.createDataFrame([row], spark_schema(table))
        replace_rows(row_df, table, table_path(tables_dir, table), where=f"run_id = '{run_id}'")


def runs_in(spark: SparkSession, tables_dir: str, table: Table) -> list[str]:
    return sorted(row["run_id"] for row in read_table(spark, table, table_path(tables_dir, table)).collect())


@contextmanager
def monitored_console(spark: SparkSession) -> Iterator[Any]:
    """What Scala code prints in this thread, as a Java stream of bytes."""
    jvm: Any = spark.sparkContext._jvm
    console = getattr(getattr(jvm.scala, "Console$"), "MODULE$")
    before, printed = console.out(), jvm.java.io.ByteArrayOutputStream()
    console.setOutDirect(jvm.java.io.PrintStream(printed))
    try:
        yield printed
    finally:
        console.setOutDirect(before)


@pytest.mark.spark
@pytest.mark.slow
def test_maintenance_clusters_what_changed_and_forgets_old_runs_but_those_whose_scores_may_be_used(
    spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables_dir, today = str(tmp_path), (datetime.now(UTC) - START).days
    path = table_path(tables_dir, RELEVANCE_SCORES)
    publish(spark, tables_dir, "old", {HOSTILE_MARKET: {("q1", "p1"): 0.5}, "kr": {("q1", "p1"): 0.5}}, day=0)
    add_run(spark, tables_dir, "old", "published", 0)
    add_run(spark, tables_dir, "old-rejected", "rejected", today - 15)
    add_run(spark, tables_dir, "rejected", "rejected", today - 13)
    arguments = setting_arguments(tables=tables_dir)
    runs, version = ["old", "old-rejected", "rejected"], table_version(spark, path)

    assert maintain.main([*arguments, "--dry-run"]) == 0

    output = capsys.readouterr().out
    assert f"relevance_scores: would remove 0 files; would cluster {HOSTILE_MARKET}, kr" in output
    assert "scores_staging: would remove 0 files; would delete 2 rows of old runs" in output
    assert runs_in(spark, tables_dir, SCORES_STAGING) == runs
    assert table_version(spark, path) == version

    with monitored_console(spark) as console:
        assert maintain.main(arguments) == 0
    assert console.toString() == ""  # Delta's VACUUM prints a line that names no table

    output = capsys.readouterr().out
    assert "0 old files removed; its folder keeps " in output
    assert f"; clustered {HOSTILE_MARKET}, kr\n" in output
    for table in (SCORES_STAGING, RUN_PAIRS, REJECTED_PAIRS):
        assert f"{table.name}: 3 -> 1 files, " in output
        assert runs_in(spark, tables_dir, table) == ["rejected"]
    assert output.count("2 rows of old runs deleted") == 3
    assert read_table(spark, RELEVANCE_SCORES, path).count() == 2

    with hold_leases(spark, tables_dir, ["kr"], "run x"), pytest.raises(LeaseError, match="run x"):
        maintain.main(arguments)
    lost = Path(path) / "market=kr" / "part-of-a-job-that-died.parquet"
    lost.touch()
    os.utime(lost, (0, 0))
    capsys.readouterr()
    assert maintain.main(arguments) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("relevance_scores: "))
    assert "; 1 old files removed; " in line
    assert "clustered" not in line
    assert not lost.exists()


@pytest.mark.spark
@pytest.mark.slow
def test_vectors_of_many_nights_are_joined_into_few_files_and_stay_what_they_are(
    spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables_dir = str(tmp_path)
    record(spark, tables_dir, "first", ["kr"], "published", 0)
    path = table_path(tables_dir, TEXT_VECTORS)
    create_table(spark, TEXT_VECTORS, path)
    for night in range(3):
        rows = [("digest", kind, f"{kind}-{night}", [float(night), 0.5]) for kind in ("passage", "query")]
        rows_df = spark.createDataFrame(rows, spark_schema(TEXT_VECTORS))
        append_rows(rows_df, TEXT_VECTORS, path, Transaction(f"night-{night}", 0))
    before = sorted(map(tuple, read_table(spark, TEXT_VECTORS, path).collect()))
    assert len(before) == 6

    assert maintain.main([*setting_arguments(tables=tables_dir), "--dry-run"]) == 0
    assert "text_vectors: would remove 0 files; would join its small files" in capsys.readouterr().out
    assert maintain.main(setting_arguments(tables=tables_dir)) == 0
    assert "text_vectors: 6 -> 2 files, " in capsys.readouterr().out
    assert sorted(map(tuple, read_table(spark, TEXT_VECTORS, path).collect())) == before


@pytest.mark.spark
def test_a_folder_without_tables_is_an_error(spark: SparkSession, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a Delta table, found none"):
        maintain.main(setting_arguments(tables=str(tmp_path)))
