"""What a run's report reads, on real Delta tables; expected values are worked by hand."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from delta.tables import DeltaTable
from pyspark.sql import SparkSession

from csrm.config import InputSpec
from csrm.errors import InputError
from csrm.operations.findings import NUM_PLOT_BINS, Comparison, RunFindings, Text
from csrm.operations.history import Limits, read_findings, read_runs
from csrm.schemas import RELEVANCE_SCORES, RUN_PAIRS, SCORES_STAGING, SCORING_RUNS, Table
from csrm.spark.tables import overwrite_table, spark_schema, table_path

pytestmark = pytest.mark.spark

STARTED = datetime(2026, 11, 20, 1, 30, tzinfo=UTC)
LIMITS = Limits(num_runs=30, num_moved=10, num_samples=1)
LANGUAGES = {"kr": "ko", "tw": "zh-TW"}
DIGEST = "d" * 64

# Versions 1 and 2 of relevance_scores. Market us is another run's: it is never shown.
BEFORE = [
    ("kr", "q1", "a", 0.9, "E", "r0"),
    ("kr", "q1", "b", 0.5, "S", "r0"),
    ("kr", "q1", "c", 0.1, "I", "r0"),
    ("kr", "q2", "a", 0.3, "S", "r0"),
    ("tw", "q1", "x", 0.4, "S", "r0"),
    ("us", "q9", "z", 0.7, "E", "other"),
]
AFTER = [
    ("kr", "q1", "a", 0.7, "E", "r1"),  # down by 0.2
    ("kr", "q1", "b", 0.5, "S", "r0"),
    ("kr", "q2", "a", 0.8, "E", "r1"),  # up by 0.5
    ("kr", "q2", "b", 0.2, "I", "r1"),  # inserted; q1 c is deleted
    ("tw", "q1", "x", 0.4, "S", "r1"),  # scored again with the same result
    ("us", "q9", "z", 0.1, "I", "other"),
]
# Runs r2 (rejected) and r3 (died) compare with version 2.
PAIRS = [
    ("kr", "q1", "a", 11, "to_score", None, "r1"),
    ("kr", "q1", "d", None, "rejected", "no_product", "r1"),
    ("kr", "q1", "e", None, "rejected", "no_product", "r1"),
    ("tw", "q1", "y", None, "rejected", "empty_title", "r1"),
    ("kr", "q1", "a", 21, "to_score", None, "r2"),
    ("kr", "q1", "b", 10, "unchanged", None, "r2"),
    ("kr", "q2", "a", 22, "staged", None, "r2"),
    ("kr", "q3", "a", 23, "to_score", None, "r2"),
    ("kr", "q2", "b", None, "rejected", "empty_query", "r2"),
    ("tw", "q1", "x", 24, "to_score", None, "r2"),
    ("kr", "q1", "a", 31, "to_score", None, "r3"),
    ("tw", "q1", "x", 32, "to_score", None, "r3"),
]
STAGED = [
    ("kr", "q1", "a", math.nan, "E", 21, "r2", 0),
    ("kr", "q2", "a", 0.9, "E", 22, "dead", 1),
    ("kr", "q2", "a", 0.6, "E", 22, "dead too", 2),  # the newest of one key: down by 0.2
    ("kr", "q2", "a", 0.1, "I", 99, "dead", 3),  # another key
    ("kr", "q3", "a", 0.95, "E", 23, "r2", 1),
    ("tw", "q1", "x", 0.6, "S", 24, "r2", 1),  # up by 0.2
    ("kr", "q1", "a", 0.75, "E", 31, "r3", 1),
]


def run_row(run_id: str, day: int, verdict: str, **values: Any) -> tuple[Any, ...]:
    row = {
        "run_id": run_id,
        "data_date": date(2026, 11, 20) + timedelta(days=day),
        "markets": ["kr", "tw"],
        "started_at": STARTED + timedelta(days=day),
        "finished_at": STARTED + timedelta(days=day, minutes=2),
        "verdict": verdict,
        "inputs": {"catalog": "catalog@v0", "queries": "queries"},
        "bundle_digest": DIGEST,
        "precision": "fp32",
        "device": "cpu (CPUExecutionProvider)",
        "versions": {"csrm": "0.1"},
        "num_candidates": 8,
        "num_scored": 3,
        "seconds": {"scoring": 1.5},
        "audit": json.dumps([]),
        **values,
    }
    return tuple(row.get(name) for name in SCORING_RUNS.column_names)


def write(spark: SparkSession, tables: Path, table: Table, rows: list[tuple[Any, ...]]) -> int:
    """Replace a table; last columns that the rows leave out are null."""
    rows = [(*row, *[None] * (len(table.columns) - len(row))) for row in rows]
    return overwrite_table(spark.createDataFrame(rows, spark_schema(table)), table, table_path(str(tables), table))


def scores(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [(*row[:5], DIGEST, 1, STARTED, row[5]) for row in rows]


def write_tables(spark: SparkSession, tables: Path) -> None:
    assert write(spark, tables, RELEVANCE_SCORES, scores(BEFORE)) == 1
    assert write(spark, tables, RELEVANCE_SCORES, scores(AFTER)) == 2
    write(spark, tables, RUN_PAIRS, [(*row[:6], 0, row[6]) for row in PAIRS])
    staged = [(*row[:5], DIGEST, row[5], STARTED + timedelta(seconds=row[7]), row[6], None) for row in STAGED]
    write(spark, tables, SCORES_STAGING, staged)
    catalog = f"{tables}/catalog"
    runs = [
        run_row("r0", 0, "published", published_version=1, inputs={"catalog": f"{catalog}@v0"}),
        run_row(
            *("r1", 1, "published"),
            base_version=1,
            published_version=2,
            inputs={"catalog": f"{catalog}@v1", "queries": f"{tables}/queries.parquet"},
            rejected={"no_product": 2, "empty_title": 1},
        ),
        run_row("r2", 2, "rejected", base_version=2),
        run_row("r3", 3, "running", base_version=2, finished_at=None, num_scored=None),
        run_row("r4", 4, "already_published", base_version=2, published_version=2),
        run_row("r5", 5, "discarded", base_version=2),
        run_row("r6", 6, "superseded", base_version=2),
        run_row("gone", 7, "published", base_version=2, published_version=7),
    ]
    write(spark, tables, SCORING_RUNS, runs)


@pytest.fixture(scope="module")
def tables(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("night")
    write_tables(spark, folder)
    products = [("kr", "a", "새 신발"), ("kr", "a", "낡은 신발"), ("kr", "d", None), ("tw", "x", "雨傘" * 100)]
    for titles in ([("kr", "a", "old shoe"), ("tw", "x", "雨傘" * 100)], products):
        spark.createDataFrame(titles, "shop string, product_id string, title string").write.format("delta").mode(
            "overwrite"
        ).save(f"{folder}/catalog")
    queries = [("kr", "q1", "신발"), ("kr", "q2", "운동화"), ("kr", "q7", "not asked for")]
    pd.DataFrame(queries, columns=["market", "query_id", "query"]).to_parquet(folder / "queries.parquet")
    return folder


def night_of(spark: SparkSession, tables: Path, run_id: str | None, **settings: Any) -> RunFindings:
    catalog = InputSpec(path=f"{tables}/catalog", columns={"market": "shop"})
    queries = InputSpec(path=f"{tables}/queries.parquet", format="parquet")
    given = {"catalog": catalog, "queries": queries, "languages": LANGUAGES, "limits": LIMITS, **settings}
    return read_findings(spark, str(tables), run_id, **given)


@pytest.fixture(scope="module")
def nights(spark: SparkSession, tables: Path) -> Callable[[str], RunFindings]:
    """What is read of each run; read once."""
    return lru_cache(partial(night_of, spark, tables))


def compared(night: RunFindings) -> Comparison:
    assert night.comparison is not None
    return night.comparison


def changes(night: RunFindings) -> dict[tuple[str, str], tuple[int, int]]:
    """Market and operation to pairs and moved pairs."""
    rows = compared(night).changes.itertuples()
    return {(row.market, row.operation): (row.num_pairs, row.num_moved) for row in rows}


def bins(night: RunFindings, market: str, state: str) -> list[tuple[int, str, int]]:
    found = compared(night).bins
    found = found[(found["market"] == market) & (found["state"] == state)].sort_values(["bin", "grade"])
    return list(zip(found["bin"], found["grade"], found["num_pairs"], strict=True))


def test_a_published_run_is_compared_with_the_version_that_it_started_from(
    nights: Callable[[str], RunFindings],
) -> None:
    night = nights("r1")

    assert changes(night) == {
        ("kr", "delete"): (1, 0),
        ("kr", "insert"): (1, 0),
        ("kr", "update"): (2, 2),
        ("tw", "update"): (1, 0),
    }
    update = compared(night).changes.query("market == 'kr' and operation == 'update'").iloc[0]
    assert update["mean_move"] == pytest.approx((0.2 + 0.5) / 2)
    assert update["largest_move"] == pytest.approx(0.5)
    assert night.notes == []
    assert night.languages == LANGUAGES


def test_queries_and_products_that_moved_most_come_first_with_their_pair_that_moved_most(
    nights: Callable[[str], RunFindings],
) -> None:
    found = compared(nights("r1"))

    counts = ["market", "id", "num_up", "num_down", "other_id"]
    assert found.queries[counts].to_numpy().tolist() == [["kr", "q2", 1, 0, "a"], ["kr", "q1", 0, 1, "a"]]
    assert found.products[counts].to_numpy().tolist() == [["kr", "a", 1, 1, "q2"]]
    moves = ["total_move", "before", "after"]
    np.testing.assert_allclose(found.queries[moves], [[0.5, 0.3, 0.8], [0.2, 0.9, 0.7]], rtol=1e-6)
    np.testing.assert_allclose(found.products[moves], [[0.7, 0.3, 0.8]], rtol=1e-6)
    assert found.lost_queries.to_numpy().tolist() == [["kr", "q1", 1, 2]]
    assert found.lost_products.to_numpy().tolist() == [["kr", "c", 1, 0]]


def test_scores_are_counted_by_market_state_and_grade(nights: Callable[[str], RunFindings]) -> None:
    night = nights("r1")

    assert NUM_PLOT_BINS == 25
    assert bins(night, "kr", "before") == [(2, "I", 1), (7, "S", 1), (12, "S", 1), (22, "E", 1)]
    assert bins(night, "kr", "after") == [(5, "I", 1), (12, "S", 1), (17, "E", 1), (20, "E", 1)]
    assert set(compared(night).bins["market"]) == {"kr", "tw"}
    summary = compared(night).summary.set_index(["market", "state"])
    # of 0.1, 0.3, 0.5, 0.9 the smallest that at least 10, 50 and 90 % do not exceed
    assert summary.loc[("kr", "before")].tolist() == pytest.approx([0.45, 0.1, 0.3, 0.9])


def test_a_run_that_was_not_published_is_compared_by_its_staged_scores(nights: Callable[[str], RunFindings]) -> None:
    night = nights("r2")

    # kr: q2 b is a candidate that is rejected now; q1 a has a score that is no number and so no move
    assert changes(night) == {
        ("kr", "delete"): (1, 0),
        ("kr", "insert"): (1, 0),
        ("kr", "update"): (2, 1),
        ("tw", "update"): (1, 1),
    }
    assert bins(night, "kr", "after") == [(-1, "E", 1), (12, "S", 1), (15, "E", 1), (23, "E", 1)]
    moved = compared(night).queries
    assert moved[["market", "id"]].to_numpy().tolist() == [["tw", "q1"], ["kr", "q2"]]
    assert moved["after"].tolist() == pytest.approx([0.6, 0.6])


def test_pairs_that_a_dead_run_did_not_score_are_pending_and_not_deleted(nights: Callable[[str], RunFindings]) -> None:
    night = nights("r3")

    assert changes(night)[("tw", "pending")] == (1, 0)
    assert changes(night)[("kr", "update")] == (1, 1)
    assert ("tw", "delete") not in changes(night)
    assert bins(night, "tw", "after") == []
    assert night.runs[0]["finished_at"] is None


def test_a_run_that_found_everything_published_changed_nothing(nights: Callable[[str], RunFindings]) -> None:
    night = nights("r4")

    assert compared(night).changes.empty
    assert compared(night).queries.empty
    assert bins(night, "kr", "before") == bins(night, "kr", "after")
    assert night.rejected is None
    assert len(night.notes) == 1
    assert night.notes[0].startswith("run_pairs has no pairs of this run")


def test_the_first_run_has_inserted_everything(nights: Callable[[str], RunFindings]) -> None:
    night = nights("r0")

    assert changes(night) == {("kr", "insert"): (4, 0), ("tw", "insert"): (1, 0)}
    assert bins(night, "kr", "before") == []
    assert len(night.runs) == 1


@pytest.mark.parametrize("run_id", ["r5", "r6"])
def test_a_run_whose_scores_are_gone_is_not_compared(nights: Callable[[str], RunFindings], run_id: str) -> None:
    assert nights(run_id).comparison is None


def test_a_version_that_is_gone_is_said(spark: SparkSession, tables: Path, tmp_path: Path) -> None:
    night = night_of(spark, tables, "gone")
    assert night.comparison is None
    assert any("version 7 cannot be read" in note for note in night.notes)

    shutil.copytree(tables, tmp_path / "tables")
    # the files of version 1, as VACUUM leaves it
    log = (tmp_path / "tables" / "relevance_scores" / "_delta_log" / f"{1:020}.json").read_text(encoding="utf-8")
    for action in map(json.loads, log.splitlines()):
        if "add" in action:
            (tmp_path / "tables" / "relevance_scores" / action["add"]["path"]).unlink()
    night = night_of(spark, tmp_path / "tables", "r1")
    assert night.comparison is None
    assert any("version 1 or 2, are gone" in note for note in night.notes)


def test_rejected_pairs_are_counted_and_some_of_each_reason_are_drawn(nights: Callable[[str], RunFindings]) -> None:
    night = nights("r1")

    assert night.rejected is not None
    assert night.samples is not None
    assert night.rejected.to_numpy().tolist() == [["tw", "empty_title", 1], ["kr", "no_product", 2]]
    assert night.samples["reason"].tolist() == ["empty_title", "no_product"]
    assert night.samples["product_id"].tolist()[0] == "y"


def test_texts_are_those_that_the_run_read_and_those_that_the_run_before_had_read(
    nights: Callable[[str], RunFindings],
) -> None:
    night = nights("r1")

    # a product that the catalog has twice does not stop the report
    assert night.products.present[("kr", "a")] == Text("낡은 신발", 5)
    assert night.products.earlier[("kr", "a")] == Text("old shoe", 8)
    assert ("kr", "d") not in night.products.present
    assert night.queries.present == {("kr", "q1"): Text("신발", 2), ("kr", "q2"): Text("운동화", 3)}
    assert night.queries.earlier == {}


def test_long_texts_are_cut_before_they_come_to_the_driver(nights: Callable[[str], RunFindings]) -> None:
    night = nights("r2")

    assert night.products.present[("tw", "x")] == Text("雨傘" * 70, 200)
    assert any("what the run read, catalog@v0, is gone" in note for note in night.notes)


def test_texts_that_cannot_be_read_are_left_out_and_said(spark: SparkSession, tables: Path) -> None:
    night = night_of(
        spark,
        tables,
        "r2",
        catalog=InputSpec(path=f"{tables}/nowhere", format="parquet"),
        queries=InputSpec(path=f"{tables}/queries.parquet", format="parquet", columns={"query": "text"}),
    )
    assert night.queries.present == {}
    assert [note.split(",")[0] for note in night.notes] == [
        "Texts of queries cannot be read",
        "Texts of catalog cannot be read",
    ]


def test_the_newest_run_is_taken_where_none_is_named(spark: SparkSession, tables: Path) -> None:
    runs, num_newer = read_runs(spark, str(tables), None, num_runs=30)
    assert [run["run_id"] for run in runs] == ["gone", "r6", "r5", "r4", "r3", "r2", "r1", "r0"]
    assert num_newer == 0


def test_the_history_ends_with_the_run_itself(spark: SparkSession, tables: Path) -> None:
    runs, num_newer = read_runs(spark, str(tables), "r3", num_runs=3)
    assert [run["run_id"] for run in runs] == ["r3", "r2", "r1"]
    assert num_newer == 4


@pytest.fixture
def seoul() -> Iterator[None]:
    before = os.environ.get("TZ")
    os.environ["TZ"] = "Asia/Seoul"
    time.tzset()
    yield
    if before is None:
        del os.environ["TZ"]
    else:
        os.environ["TZ"] = before
    time.tzset()


def test_times_are_in_utc_wherever_the_driver_is(spark: SparkSession, tables: Path, seoul: None) -> None:
    (run,), _ = read_runs(spark, str(tables), "r0", num_runs=30)
    assert run["started_at"] == STARTED
    assert run["started_at"].hour == 1


def test_a_run_that_does_not_exist_is_refused_and_the_newest_are_named(
    spark: SparkSession, tables: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"expected run 'r99', found none; the newest runs are \['gone', 'r6', 'r5'"):
        night_of(spark, tables, "r99")
    with pytest.raises(InputError, match="expected a Delta table, found none"):
        night_of(spark, tmp_path, None)
    write(spark, tmp_path, SCORING_RUNS, [])
    with pytest.raises(InputError, match="expected a run, found none; it has no rows"):
        night_of(spark, tmp_path, None)


def test_a_run_of_a_table_that_was_made_anew_is_not_compared_with_the_versions_of_the_new_one(
    spark: SparkSession, tables: Path, tmp_path: Path
) -> None:
    shutil.copytree(tables, tmp_path, dirs_exist_ok=True)
    runs = DeltaTable.forPath(spark, table_path(str(tmp_path), SCORING_RUNS))
    runs.update("run_id = 'r1'", {"table_id": "'of another table'"})

    night = night_of(spark, tmp_path, "r1")

    assert night.comparison is None
    assert any("was made anew since, so that its versions are other states" in note for note in night.notes)
