"""Publishing: only what changed, one commit a market, fenced by leases; what runs leave behind."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from csrm.errors import ConfigError, InputError, LeaseError
from csrm.night.leases import Lease, hold_leases
from csrm.night.publish import count_changes, publish_changes, run_changes
from csrm.night.runs import (
    check_same_run,
    create_output_tables,
    discard_staging,
    find_later_run,
    find_run,
    read_open_staging,
    read_run_rows,
    record_end,
    record_run,
    require_run,
    scoring_rate,
    write_run_rows,
)
from csrm.schemas import RELEVANCE_SCORES, RUN_PAIRS, SCORES_STAGING, SCORING_RUNS
from csrm.spark.tables import create_table, read_table, spark_schema, sql_path, table_path, table_version

SCORED_AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SCHEMA = (
    "market string, query_id string, product_id string, relevance_score float, predicted_grade string, "
    "bundle_digest string, pair_key bigint, scored_at timestamp, run_id string, label_probabilities map<string,float>"
)
RUN: dict[str, Any] = {
    "run_id": "a",
    "data_date": date(2026, 1, 2),
    "markets": ["kr", "tw"],
    "started_at": SCORED_AT,
    "finished_at": SCORED_AT,
    "verdict": "rejected",
    "inputs": {"catalog": "/tables/catalog@v3"},
    "bundle_digest": "d1",
    "precision": "fp32",
    "device": "cpu (CPUExecutionProvider)",
    "versions": {"csrm": "0.1.0"},
    "num_candidates": 4,
    "num_unchanged": 0,
    "num_reused": 0,
    "num_scored": 3,
    "rejected": {"no_query": 1},
    "seconds": {"scoring": 1.5},
    "audit": [{"market": "kr", "name": "complete", "value": 3, "bound": "= 3", "passed": True}],
    "base_version": 0,
}


def scores(
    spark: SparkSession,
    run_id: str,
    *rows: tuple[str, str, float | None, str, int],
    digest: str = "d1",
    scored_at: datetime = SCORED_AT,
    probabilities: dict[str, float] | None = None,
) -> DataFrame:
    """Rows of (market, product_id, relevance_score, predicted_grade, pair_key) for query q."""
    values = [
        (market, "q", product_id, score, grade, digest, key, scored_at, run_id, probabilities)
        for market, product_id, score, grade, key in rows
    ]
    return spark.createDataFrame(values, SCHEMA)


def staged(
    spark: SparkSession, run_id: str, *rows: tuple[str, str, float | None, str, int], **values: Any
) -> DataFrame:
    """The same as rows of scores_staging; those without a score have a reason."""
    reason = F.when(F.col("relevance_score").isNull(), "model_error")
    return scores(spark, run_id, *rows, **values).withColumn("reason", reason)


def planned(spark: SparkSession, *pairs: tuple[str, str, int | None]) -> DataFrame:
    """Rows of (market, product_id, pair_key) of run r for query q; those without a key were rejected."""
    rows = [
        (market, "q", product_id, key, "to_score" if key else "rejected", None if key else "no_product", 0, "r")
        for market, product_id, key in pairs
    ]
    return spark.createDataFrame(rows, spark_schema(RUN_PAIRS))


@pytest.mark.parametrize(
    ("verdict", "markets", "digest", "named"),
    [
        (
            "published",
            ["kr"],
            "d1",
            r"is published: it has the markets \['kr', 'tw'\] with bundle d1; this one has the markets \['kr'\] with "
            "bundle d1",
        ),
        ("published", ["kr", "tw"], "d2", r"with bundle d1; .* with bundle d2\. Choose another --run-id"),
        ("running", ["kr"], "d1", "is running: it has the markets"),
        ("rejected", ["kr", "tw", "us"], "d1", "is rejected: it has the markets"),
    ],
)
def test_a_run_id_is_not_used_again_for_other_markets_or_another_bundle(
    verdict: str, markets: list[str], digest: str, named: str
) -> None:
    earlier = Row(
        run_id="a", started_at=SCORED_AT, verdict=verdict, markets=["kr", "tw"], bundle_digest="d1", intervention=None
    )

    check_same_run(earlier, ["tw", "kr"], "d1")
    with pytest.raises(ConfigError, match=named):
        check_same_run(earlier, markets, digest)


def test_a_run_that_was_not_published_goes_on_with_another_bundle() -> None:
    earlier = Row(
        run_id="a",
        started_at=SCORED_AT,
        verdict="rejected",
        markets=["kr", "tw"],
        bundle_digest="d1",
        intervention=None,
    )

    check_same_run(earlier, ["kr", "tw"], "d2")


@pytest.mark.spark
def test_a_run_changes_the_pairs_whose_key_differs(spark: SparkSession) -> None:
    published_df = scores(
        spark,
        "old",
        ("kr", "same", 0.5, "yes", 1),
        ("kr", "key", 0.5, "yes", 2),
        ("kr", "gone", 0.5, "yes", 3),
        ("kr", "rejected", 0.5, "yes", 4),
    )
    planned_df = planned(
        spark, ("kr", "same", 1), ("kr", "key", 20), ("kr", "new", 5), ("kr", "missing", 6), ("kr", "rejected", None)
    )
    staged_df = staged(
        spark, "x", ("kr", "key", 0.1, "no", 20), ("kr", "new", 0.3, "no", 5), ("kr", "same", 0.9, "no", 99)
    ).union(staged(spark, "y", ("kr", "key", 0.2, "no", 20), scored_at=SCORED_AT.replace(hour=9)))

    rows = run_changes(planned_df, published_df, staged_df, "r").orderBy("product_id").collect()

    assert [
        (row["product_id"], row["operation"], row["relevance_score"], row["old_score"], row["run_id"]) for row in rows
    ] == [
        ("gone", "delete", None, 0.5, "r"),
        ("key", "update", pytest.approx(0.2), 0.5, "r"),
        ("missing", "insert", None, None, "r"),
        ("new", "insert", pytest.approx(0.3), None, "r"),
        ("rejected", "delete", None, 0.5, "r"),
    ]


@pytest.mark.spark
def test_probabilities_are_added_to_rows_that_lack_them_and_never_taken_away(spark: SparkSession) -> None:
    old_df = scores(spark, "old", ("kr", "bare", 0.5, "yes", 1), ("kr", "staged without", 0.5, "yes", 2)).union(
        scores(spark, "old", ("kr", "full", 0.5, "yes", 3), ("kr", "gone", 0.5, "yes", 4), probabilities={"yes": 1.0})
    )
    keys = (("kr", "bare", 1), ("kr", "staged without", 2), ("kr", "full", 3), ("kr", "new", 5), ("kr", "tie", 6))
    known, other = {"no": 0.5, "yes": 0.5}, {"no": 0.25, "yes": 0.75}
    staged_df = (
        staged(spark, "x", ("kr", "bare", 0.5, "yes", 1), ("kr", "full", 0.5, "yes", 3), probabilities=known)
        .union(staged(spark, "x", ("kr", "staged without", 0.5, "yes", 2)))
        .union(staged(spark, "x", ("kr", "new", 0.5, "yes", 5), ("kr", "tie", 0.5, "yes", 6), probabilities=known))
        .union(staged(spark, "y", ("kr", "tie", 0.5, "yes", 6), probabilities=other))
    )

    changes_df = run_changes(planned(spark, *keys), old_df, staged_df, "r")

    found = {row["product_id"]: (row["operation"], row["label_probabilities"]) for row in changes_df.collect()}
    assert found == {
        "bare": ("update", known),
        "gone": ("delete", None),
        "new": ("insert", known),
        "tie": ("insert", known),
    }
    unchanged_df = planned(spark, *keys[:1]).withColumn("state", F.lit("unchanged"))
    assert run_changes(unchanged_df, old_df.where("pair_key = 1"), staged_df, "r").isEmpty()


@pytest.fixture
def leases(spark: SparkSession, tmp_path: Path) -> Iterator[dict[str, Lease]]:
    """Of the markets kr and tw; the tables of a run are there too."""
    create_output_tables(spark, str(tmp_path))
    with hold_leases(spark, str(tmp_path), ["kr", "tw"], "test") as held:
        yield held


@pytest.mark.spark
def test_a_publish_commits_once_a_market_what_changed_and_nothing_when_repeated(
    spark: SparkSession, tmp_path: Path
) -> None:
    tables = str(tmp_path)
    path = table_path(tables, RELEVANCE_SCORES)
    create_output_tables(spark, tables)

    def publish(run_id: str, markets: list[str], *rows: tuple[str, str, float, str, int]) -> tuple[int, dict]:
        published_df = read_table(spark, RELEVANCE_SCORES, path).where(F.col("market").isin(*markets))
        planned_df = planned(spark, *((market, product, key) for market, product, _, _, key in rows))
        changes_df = run_changes(planned_df, published_df, staged(spark, run_id, *rows), run_id)
        with hold_leases(spark, tables, markets, run_id) as held:
            done = publish_changes(spark, tables, changes_df, count_changes(changes_df), held, {"run_id": run_id})
        return done.version, dict(done.num_changes)

    first = [("kr", "1", 0.1, "no", 1), ("kr", "2", 0.2, "no", 2), ("tw", "1", 0.3, "no", 3)]
    assert publish("a", ["kr", "tw"], *first) == (2, {"kr": {"insert": 2}, "tw": {"insert": 1}})
    assert publish("b", ["kr", "tw"], *first) == (2, {})
    second = [("kr", "1", 0.1, "no", 1), ("kr", "2", 0.9, "yes", 4), ("kr", "3", 0.4, "no", 5)]
    assert publish("c", ["kr"], *second) == (3, {"kr": {"insert": 1, "update": 1}})
    assert publish("d", ["kr"], *second[1:]) == (4, {"kr": {"delete": 1}})

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
    carried = [json.loads(row["userMetadata"]) for row in history[1:]]
    assert [(commit["run_id"], commit["market"]) for commit in carried] == [
        ("a", "kr"),
        ("a", "tw"),
        ("c", "kr"),
        ("d", "kr"),
    ]


@pytest.mark.spark
def test_a_publish_that_delta_skips_says_that_it_was_superseded(
    spark: SparkSession, tmp_path: Path, leases: dict[str, Lease]
) -> None:
    changes_df = scores(spark, "a", ("kr", "1", 0.1, "no", 1), ("tw", "1", 0.1, "no", 1))
    changes_df = changes_df.withColumn("operation", F.lit("insert"))
    arguments = (changes_df, {"kr": {"insert": 1}, "tw": {"insert": 1}}, leases, {"run_id": "a"})
    publish_changes(spark, str(tmp_path), *arguments)
    version = table_version(spark, table_path(str(tmp_path), RELEVANCE_SCORES))

    with pytest.raises(LeaseError, match=r"Delta refused the publish.*Published before that: nothing"):
        publish_changes(spark, str(tmp_path), *arguments)

    assert table_version(spark, table_path(str(tmp_path), RELEVANCE_SCORES)) == version


@pytest.mark.spark
def test_staged_scores_are_open_until_their_run_is_published_or_discarded(spark: SparkSession, tmp_path: Path) -> None:
    tables = str(tmp_path)
    create_output_tables(spark, tables)
    verdicts = {"p": "published", "ap": "already_published", "r": "rejected", "run'": "running", "s": "superseded"}
    for run_id, verdict in verdicts.items():
        write_run_rows(staged(spark, run_id, ("kr", run_id, 0.1, "no", 1)), SCORES_STAGING, tables, run_id)
        record_run(spark, tables, {**RUN, "run_id": run_id, "verdict": verdict})
    write_run_rows(staged(spark, "no row", ("kr", "no row", 0.1, "no", 1)), SCORES_STAGING, tables, "no row")
    write_run_rows(staged(spark, "failed", ("kr", "failed", None, "no", 1)), SCORES_STAGING, tables, "failed")

    def open_runs(markets: list[str], run_id: str = "next") -> set[str]:
        return {row["run_id"] for row in read_open_staging(spark, tables, markets, run_id).collect()}

    assert open_runs(["kr"], "failed") == {"r", "run'", "s", "no row", "failed"}  # the run that goes on
    assert open_runs(["kr"]) == {"r", "run'", "s", "no row"}
    assert open_runs(["tw"]) == set()
    assert discard_staging(spark, tables, "run'") == 1
    assert discard_staging(spark, tables, "run'") == 0
    assert open_runs(["kr"]) == {"r", "s", "no row"}


@pytest.mark.spark
def test_a_second_attempt_of_a_run_replaces_its_rows(spark: SparkSession, tmp_path: Path) -> None:
    tables = str(tmp_path)
    write_run_rows(planned(spark, ("kr", "1", 1)), RUN_PAIRS, tables, "r")
    other_df = planned(spark, ("kr", "1", 1), ("kr", "2", None)).withColumn("run_id", F.lit("b'"))
    write_run_rows(other_df, RUN_PAIRS, tables, "b'")
    write_run_rows(other_df.where("product_id = '2'"), RUN_PAIRS, tables, "b'")

    assert [row["product_id"] for row in read_run_rows(spark, RUN_PAIRS, tables, "b'").collect()] == ["2"]
    assert read_run_rows(spark, RUN_PAIRS, tables, "r").count() == 1


@pytest.mark.spark
def test_runs_of_two_markets_record_at_the_same_time(spark: SparkSession, tmp_path: Path) -> None:
    tables = str(tmp_path)
    create_table(spark, SCORING_RUNS, table_path(tables, SCORING_RUNS))
    together = Barrier(2)

    def record(run_id: str) -> None:
        together.wait(60)
        record_run(spark, tables, {**RUN, "run_id": run_id})

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(record, ("a", "b")))

    rows = read_table(spark, SCORING_RUNS, table_path(tables, SCORING_RUNS)).collect()
    assert sorted(row["run_id"] for row in rows) == ["a", "b"]


@pytest.mark.spark
def test_a_run_has_one_row_which_is_found(spark: SparkSession, tmp_path: Path) -> None:
    tables = str(tmp_path)
    assert find_run(spark, tables, "a") is None
    record_run(spark, tables, {**RUN, "verdict": "running", "audit": None, "finished_at": None})
    record_run(spark, tables, {**RUN, "verdict": "published", "published_version": 2})
    later = {**RUN, "run_id": "b", "started_at": SCORED_AT.replace(hour=9), "num_scored": 6}
    record_run(spark, tables, later)

    found = find_run(spark, tables, "a")
    assert found is not None
    assert (found["published_version"], found["markets"], found["started_at"], found["seconds"]) == (
        2,
        ["kr", "tw"],
        SCORED_AT.replace(tzinfo=None),
        {"scoring": 1.5},
    )
    assert require_run(spark, tables, "a")["audit"] == RUN["audit"]
    with pytest.raises(InputError, match=r"run 'c': no run of this name in .*; the newest are \['b', 'a'\]"):
        require_run(spark, tables, "c")
    path = table_path(tables, SCORING_RUNS)
    assert read_table(spark, SCORING_RUNS, path).count() == 2

    record_end(spark, tables, RUN, "superseded")  # of an attempt that slept while its successor published
    assert find_run(spark, tables, "a") == found

    assert find_later_run(spark, tables, {**RUN, "started_at": SCORED_AT.replace(tzinfo=None)}) is None
    record_run(spark, tables, {**later, "verdict": "published", "markets": ["tw"]})
    assert find_later_run(spark, tables, found.asDict()) == "b"
    assert find_later_run(spark, tables, {**found.asDict(), "markets": ["kr"]}) is None
    assert scoring_rate(spark, tables, "d1", RUN["device"]) == pytest.approx(4)
    assert scoring_rate(spark, tables, "d1", "cuda") is None
