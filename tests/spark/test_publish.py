"""Staging, audit, publishing: only what changed, once."""

import json
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from csrm.errors import ConfigError
from csrm.schemas import REJECTED_PAIRS, RELEVANCE_SCORES, SCORES_STAGING, SCORING_RUNS
from csrm.spark.publish import (
    audit_counts,
    audit_run,
    check_same_run,
    find_published_run,
    publish_run,
    read_run_rows,
    record_run,
    score_changes,
    write_run_rows,
)
from csrm.spark.tables import read_table, sql_path, table_path, table_version

SCORED_AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SCHEMA = (
    "market string, query_id string, product_id string, relevance_score float, predicted_grade string, "
    "bundle_digest string, pair_key bigint, scored_at timestamp, run_id string"
)


def scores(spark: SparkSession, run_id: str, *rows: tuple[str, str, float, str, int], digest: str = "d1") -> DataFrame:
    """Rows of (market, product_id, relevance_score, predicted_grade, pair_key) for query q."""
    values = [
        (market, "q", product_id, score, grade, digest, key, SCORED_AT, run_id)
        for market, product_id, score, grade, key in rows
    ]
    return spark.createDataFrame(values, SCHEMA)


def results(staged: dict[str, int], num_rejected: int = 0, num_candidates: int = 10) -> dict[str, bool]:
    return {
        result["name"]: result["passed"]
        for result in audit_counts("kr", staged, num_rejected, num_candidates, max_rejected_share=0.2)
    }


def test_a_complete_run_passes_its_audit() -> None:
    assert all(results({"num_rows": 8, "num_keys": 8, "num_nan": 0, "num_in_range": 8}, num_rejected=2).values())


@pytest.mark.parametrize(
    ("staged", "num_rejected", "failed"),
    [
        ((9, 9, 0, 9), 0, {"staged and rejected pairs"}),
        ((0, 0, 0, 0), 10, {"staged pairs", "share of rejected pairs"}),
        ((10, 9, 0, 10), 0, {"distinct staged pairs"}),
        ((10, 10, 1, 9), 0, {"scores that are no number", "scores in [0, 1]"}),
        ((10, 10, 0, 9), 0, {"scores in [0, 1]"}),
        ((7, 7, 0, 7), 3, {"share of rejected pairs"}),
    ],
)
def test_each_fault_of_a_run_fails_its_audit(
    staged: tuple[int, int, int, int], num_rejected: int, failed: set[str]
) -> None:
    counts = dict(zip(("num_rows", "num_keys", "num_nan", "num_in_range"), staged, strict=True))

    assert {name for name, passed in results(counts, num_rejected).items() if not passed} == failed


@pytest.mark.parametrize(
    ("markets", "digest", "named"),
    [
        (["kr"], "d1", r"markets \['kr', 'tw'\] with bundle d1; this one has the markets \['kr'\] with bundle d1"),
        (["kr", "tw"], "d2", r"with bundle d1; .* with bundle d2\. Choose another --run-id"),
    ],
)
def test_a_run_id_is_not_used_again_for_other_markets_or_another_bundle(
    markets: list[str], digest: str, named: str
) -> None:
    published = Row(run_id="a", started_at=SCORED_AT, markets=["kr", "tw"], bundle_digest="d1")

    check_same_run(published, ["tw", "kr"], "d1")
    with pytest.raises(ConfigError, match=named):
        check_same_run(published, markets, digest)


@pytest.mark.spark
def test_the_audit_counts_what_is_in_the_tables(spark: SparkSession, tmp_path: Path) -> None:
    tables = str(tmp_path)
    nan = float("nan")
    staged_df = scores(
        spark,
        "r",
        *(("kr", "1", 0.5, "yes", 1), ("kr", "1", nan, "no", 1), ("kr", "3", 0.5, "no", 1)),
        ("tw", "1", 1.5, "no", 1),
    )
    rejected_df = spark.createDataFrame(
        [("kr", "q", "2", "no_product", "r"), ("us", "q", "1", "no_product", "r")],
        "market string, query_id string, product_id string, reason string, run_id string",
    )
    write_run_rows(scores(spark, "other", ("kr", "9", 0.5, "yes", 1)), SCORES_STAGING, tables, "other")
    write_run_rows(staged_df, SCORES_STAGING, tables, "r")
    write_run_rows(rejected_df, REJECTED_PAIRS, tables, "r")

    audit = audit_run(spark, tables, "r", num_candidates={"kr": 4, "tw": 1, "us": 1}, max_rejected_share=0.25)

    assert [(result["market"], result["value"], result["passed"]) for result in audit.results] == [
        *(("kr", 4, True), ("kr", 3, True), ("kr", 2, False), ("kr", 1, False), ("kr", 2, False), ("kr", 0.25, True)),
        *(("tw", 1, True), ("tw", 1, True), ("tw", 1, True), ("tw", 0, True), ("tw", 0, False), ("tw", 0.0, True)),
        *(("us", 1, True), ("us", 0, False), ("us", 0, True), ("us", 0, True), ("us", 0, True), ("us", 1.0, False)),
    ]
    assert audit.num_staged == 4
    assert len(audit.failed) == 6
    assert json.loads(json.dumps(audit.results)) == audit.results


@pytest.mark.spark
def test_the_changes_are_exactly_the_rows_that_differ(spark: SparkSession) -> None:
    published_df = scores(
        spark,
        "old",
        ("kr", "same", 0.5, "yes", 1),
        ("kr", "same within the tolerance", 0.5, "yes", 1),
        ("kr", "score", 0.5, "yes", 1),
        ("kr", "grade", 0.5, "yes", 1),
        ("kr", "key", 0.5, "yes", 1),
        ("kr", "gone", 0.5, "yes", 1),
    )
    staged_df = scores(
        spark,
        "new",
        ("kr", "same", 0.5, "yes", 1),
        ("kr", "same within the tolerance", 0.5000005, "yes", 1),
        ("kr", "score", 0.500002, "yes", 1),
        ("kr", "grade", 0.5, "no", 1),
        ("kr", "key", 0.5, "yes", 2),
        ("tw", "same", 0.5, "yes", 1),
    )

    rows = score_changes(staged_df, published_df).orderBy("market", "product_id").collect()

    assert [(row["market"], row["product_id"], row["operation"], row["run_id"]) for row in rows] == [
        ("kr", "gone", "delete", None),
        ("kr", "grade", "update", "new"),
        ("kr", "key", "update", "new"),
        ("kr", "score", "update", "new"),
        ("tw", "same", "insert", "new"),
    ]


@pytest.mark.spark
def test_another_bundle_changes_every_row(spark: SparkSession) -> None:
    row = ("kr", "1", 0.5, "yes", 1)

    changes_df = score_changes(scores(spark, "new", row, digest="d2"), scores(spark, "old", row, digest="d1"))

    assert [row["operation"] for row in changes_df.collect()] == ["update"]


@pytest.mark.spark
def test_a_publish_commits_once_a_market_what_changed_and_nothing_when_repeated(
    spark: SparkSession, tmp_path: Path
) -> None:
    tables = str(tmp_path)
    path = table_path(tables, RELEVANCE_SCORES)
    first = [("kr", "1", 0.1, "no", 1), ("kr", "2", 0.2, "no", 2), ("tw", "1", 0.3, "no", 3)]
    write_run_rows(scores(spark, "a", *first), SCORES_STAGING, tables, "a")
    publication = publish_run(spark, tables, "a", ["kr", "tw"], "d1")

    assert publication.num_changes == {"kr": {"insert": 2}, "tw": {"insert": 1}}
    assert publication.version == 2  # version 0 made the empty table

    repeated = publish_run(spark, tables, "a", ["kr", "tw"], "d1")
    write_run_rows(scores(spark, "b", *first), SCORES_STAGING, tables, "b")
    equal_run = publish_run(spark, tables, "b", ["kr", "tw"], "d1")

    assert (repeated.version, repeated.num_changes) == (2, {})
    assert (equal_run.version, equal_run.num_changes) == (2, {})

    second = [("kr", "1", 0.1, "no", 1), ("kr", "2", 0.9, "yes", 4), ("kr", "3", 0.4, "no", 5)]
    write_run_rows(scores(spark, "c", *second), SCORES_STAGING, tables, "c")
    assert publish_run(spark, tables, "c", ["kr"], "d1").num_changes == {"kr": {"insert": 1, "update": 1}}
    write_run_rows(scores(spark, "d", *second[1:]), SCORES_STAGING, tables, "d")
    assert publish_run(spark, tables, "d", ["kr"], "d1").num_changes == {"kr": {"delete": 1}}

    published = read_table(spark, RELEVANCE_SCORES, path).orderBy("market", "product_id").collect()
    assert [(row["market"], row["product_id"], row["run_id"], row["pair_key"]) for row in published] == [
        ("kr", "2", "c", 4),
        ("kr", "3", "c", 5),
        ("tw", "1", "a", 3),
    ]
    feed_df = spark.read.format("delta").option("readChangeFeed", "true").option("startingVersion", 3).load(path)
    feed = feed_df.where(F.col("_change_type") != "update_preimage").orderBy("_commit_version", "product_id").collect()
    assert [(row["_commit_version"], row["product_id"], row["_change_type"]) for row in feed] == [
        (3, "2", "update_postimage"),
        (3, "3", "insert"),
        (4, "1", "delete"),
    ]
    history = spark.sql(f"DESCRIBE HISTORY {sql_path(path)}").orderBy("version").collect()
    assert [json.loads(row["userMetadata"])["run_id"] for row in history[1:]] == ["a", "a", "c", "d"]
    assert json.loads(history[1]["userMetadata"])["bundle_digest"] == "d1"


@pytest.mark.spark
def test_a_second_attempt_of_a_run_replaces_its_staged_rows(spark: SparkSession, tmp_path: Path) -> None:
    tables = str(tmp_path)
    write_run_rows(
        scores(spark, "a", ("kr", "1", 0.1, "no", 1), ("tw", "1", 0.1, "no", 1)), SCORES_STAGING, tables, "a"
    )
    write_run_rows(scores(spark, "b'", ("kr", "1", 0.1, "no", 1)), SCORES_STAGING, tables, "b'")
    write_run_rows(scores(spark, "b'", ("kr", "2", 0.2, "no", 1)), SCORES_STAGING, tables, "b'")

    assert [row["product_id"] for row in read_run_rows(spark, SCORES_STAGING, tables, "b'").collect()] == ["2"]
    assert read_run_rows(spark, SCORES_STAGING, tables, "a").count() == 2


@pytest.mark.spark
def test_a_run_is_recorded_once_and_found_when_it_was_published(spark: SparkSession, tmp_path: Path) -> None:
    tables = str(tmp_path)
    run: dict[str, Any] = {
        "run_id": "a",
        "data_date": date(2026, 1, 2),
        "markets": ["kr", "tw"],
        "started_at": SCORED_AT,
        "finished_at": SCORED_AT,
        "inputs": {"catalog": "/tables/catalog@v3"},
        "bundle_digest": "d1",
        "device": "cpu (CPUExecutionProvider)",
        "versions": {"csrm": "0.1.0"},
        "num_candidates": 4,
        "num_scored": 3,
        "num_rejected": 1,
        "seconds": {"scoring": 1.5},
        "audit": [{"market": "kr", "name": "staged pairs", "value": 3, "bound": ">= 1", "passed": True}],
        "verdict": "rejected",
        "published_version": None,
    }

    assert find_published_run(spark, tables, "a") is None
    record_run(spark, tables, run)
    assert find_published_run(spark, tables, "a") is None
    record_run(spark, tables, {**run, "verdict": "published", "published_version": 2})
    found = find_published_run(spark, tables, "a")

    assert found is not None
    assert (found["published_version"], found["markets"], found["started_at"], found["seconds"]) == (
        2,
        ["kr", "tw"],
        SCORED_AT.replace(tzinfo=None),
        {"scoring": 1.5},
    )
    assert json.loads(found["audit"]) == run["audit"]
    path = table_path(tables, SCORING_RUNS)
    assert read_table(spark, SCORING_RUNS, path).count() == 1
    assert table_version(spark, path) == 2
