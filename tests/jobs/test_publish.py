"""Publishing a rejected run after review: what keeps it from being published, on small tables of a real Delta."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from csrm.cli import setting_arguments
from csrm.commands import publish as publish_job
from csrm.errors import AuditError, ConfigError, InputError, LeaseError
from csrm.night.leases import Lease, hold_leases
from csrm.night.runs import create_output_tables, read_newest, record_run, require_run, write_run_rows
from csrm.operations import review as review_room
from csrm.schemas import RELEVANCE_SCORES, RUN_PAIRS
from csrm.spark.commits import delete_rows
from csrm.spark.tables import spark_schema, sql_path, table_path, table_version
from tests.consumers.publishing import publish, record

pytestmark = [pytest.mark.spark, pytest.mark.slow]

ACCEPT = ("--accept", "deleted", "--reason", "season is over")


@pytest.fixture(scope="module")
def rejected_run(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tables of a market with three rows, and of a rejected run that deletes one of them."""
    folder = str(tmp_path_factory.mktemp("rejected"))
    create_output_tables(spark, folder)
    version = publish(spark, folder, "first", {"kr": {("q", f"p{n}"): 0.5 for n in range(3)}}, day=1)
    record(spark, folder, "first", ["kr"], "published", 1, published_version=version)
    rows = [("kr", "q", f"p{n}", 500, "unchanged", None, 0, "second") for n in range(2)]
    write_run_rows(spark.createDataFrame(rows, spark_schema(RUN_PAIRS)), RUN_PAIRS, folder, "second")
    failed = {"market": "kr", "name": "deleted", "passed": False, "severity": "error", "accepted": None}
    plan = {"num_candidates": 2, "base_version": version, "audit": [failed]}
    record(spark, folder, "second", ["kr"], "rejected", 2, **plan)
    return folder


@pytest.fixture
def tables_dir(rejected_run: str, tmp_path: Path) -> str:
    """A copy of these tables."""
    shutil.copytree(rejected_run, tmp_path / "tables")
    return str(tmp_path / "tables")


def review(tables_dir: str, *arguments: str) -> int:
    return publish_job.main(["--run-id", "second", *arguments, *setting_arguments(tables=tables_dir)])


def test_nothing_is_published_into_a_table_that_lost_a_constraint(spark: SparkSession, tables_dir: str) -> None:
    path = table_path(tables_dir, RELEVANCE_SCORES)
    spark.sql(f"ALTER TABLE {sql_path(path)} DROP CONSTRAINT {RELEVANCE_SCORES.checks[0][0]}")
    before = table_version(spark, path)

    with pytest.raises(InputError, match=r"They were changed since. Nothing was written.*ADD CONSTRAINT"):
        review(tables_dir, *ACCEPT)
    assert table_version(spark, path) == before
    assert require_run(spark, tables_dir, "second")["verdict"] == "rejected"


def test_a_run_whose_plan_was_cleaned_up_is_not_published(spark: SparkSession, tables_dir: str) -> None:
    delete_rows(spark, table_path(tables_dir, RUN_PAIRS), F.col("run_id") == "second")

    with pytest.raises(AuditError, match=r"expected 2 pairs in run_pairs, found 0: its plan was cleaned up"):
        review(tables_dir, *ACCEPT)

    assert read_newest(spark, RELEVANCE_SCORES, tables_dir).count() == 3


def test_a_run_that_was_published_before_its_markets_were_free_is_not_discarded(
    spark: SparkSession, tables_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def hold_later(*arguments: Any) -> Iterator[dict[str, Lease]]:
        record(spark, tables_dir, "second", ["kr"], "published", 2, published_version=2)
        with hold_leases(*arguments) as leases:
            yield leases

    monkeypatch.setattr(review_room, "hold_leases", hold_later)

    with pytest.raises(ConfigError, match=r"run 'second': was published, which discarding would not undo"):
        review(tables_dir, "--discard")


def test_a_run_is_not_published_over_one_that_died_after_it_had_published_the_market(
    spark: SparkSession, tables_dir: str
) -> None:
    publish(spark, tables_dir, "died", {"kr": {("q", "p0"): 0.7}}, day=3)
    record(spark, tables_dir, "died", ["kr", "tw"], "running", 3)

    with pytest.raises(LeaseError, match=r"the published scores of \['kr'\] were changed since it compared with them"):
        review(tables_dir, *ACCEPT)


def test_a_run_is_published_after_a_publish_of_it_that_died_in_between(spark: SparkSession, tables_dir: str) -> None:
    publish(spark, tables_dir, "second", {"kr": {("q", "p2"): None}}, day=3)

    assert review(tables_dir, *ACCEPT) == 0

    rows = read_newest(spark, RELEVANCE_SCORES, tables_dir).orderBy("product_id").collect()
    assert [row["product_id"] for row in rows] == ["p0", "p1"]


def test_a_run_is_published_after_commits_of_other_markets(spark: SparkSession, tables_dir: str) -> None:
    publish(spark, tables_dir, "other", {"tw": {("q", "p0"): 0.7}}, day=3)

    assert review(tables_dir, *ACCEPT) == 0

    rows = read_newest(spark, RELEVANCE_SCORES, tables_dir).orderBy("market", "product_id").collect()
    assert [(row["market"], row["product_id"]) for row in rows] == [("kr", "p0"), ("kr", "p1"), ("tw", "p0")]


@pytest.mark.parametrize("hour", [5, 6])  # UTC: half past one in New York, twice
def test_a_run_of_an_hour_that_comes_twice_keeps_its_time(
    spark: SparkSession, tables_dir: str, monkeypatch: pytest.MonkeyPatch, hour: int
) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        started_at = datetime(2026, 11, 1, hour, 30, tzinfo=UTC)
        record(spark, tables_dir, "late", ["kr"], "rejected", 3, started_at=started_at)
        record_run(spark, tables_dir, require_run(spark, tables_dir, "late"))
        assert require_run(spark, tables_dir, "late")["started_at"] == started_at
    finally:
        monkeypatch.undo()
        time.tzset()
