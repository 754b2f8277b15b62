"""Published tables for the tests of those who read, roll back and maintain them: the commits that a publish makes."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from pyspark.sql import SparkSession

from csrm.night.runs import record_run
from csrm.schemas import RELEVANCE_SCORES
from csrm.spark.commits import merge_changes
from csrm.spark.tables import create_table, spark_schema, table_path, table_version

HOSTILE_MARKET = 'it\'s a/b "東京" %41 = é?#'
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

Changes = Mapping[tuple[str, str], float | None]
"""(query_id, product_id) to its new score; None deletes the pair."""


def publish(spark: SparkSession, tables_dir: str, run_id: str, changes: Mapping[str, Changes], day: int) -> int:
    """Publish changes, one commit a market, scored on a day after START; the table's version afterwards."""
    path = table_path(tables_dir, RELEVANCE_SCORES)
    create_table(spark, RELEVANCE_SCORES, path)
    schema = spark_schema(RELEVANCE_SCORES).add("operation", "string")
    at = START + timedelta(days=day)
    for market, scores in changes.items():
        rows = [
            (market, *pair, score, "E", "digest", round(1000 * score), at, run_id, None, "update")
            if score is not None
            else (market, *pair, 0.0, "", "", 0, at, "", None, "delete")
            for pair, score in scores.items()
        ]
        changes_df = spark.createDataFrame(rows, schema)
        assert merge_changes(changes_df, RELEVANCE_SCORES, path, {"market": market}, {"run_id": run_id}) is not None
    return table_version(spark, path)


def record(
    spark: SparkSession, tables_dir: str, run_id: str, markets: list[str], verdict: str, day: int, **row: Any
) -> None:
    """A run's row of scoring_runs; it ran for an hour on a day after START."""
    started_at = START + timedelta(days=day)
    fixed = {"bundle_digest": "d", "precision": "fp32", "device": "cpu", "inputs": {}, "versions": {}, "seconds": {}}
    times = {"data_date": started_at.date(), "started_at": started_at, "finished_at": started_at + timedelta(hours=1)}
    record_run(spark, tables_dir, {"run_id": run_id, "markets": markets, "verdict": verdict, **fixed, **times, **row})
