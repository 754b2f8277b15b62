"""From scores to the published table: stage, audit, publish what changed, record the run."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from csrm.errors import ConfigError
from csrm.schemas import REJECTED_PAIRS, RELEVANCE_SCORES, SCORES_STAGING, SCORING_RUNS, Table
from csrm.spark.tables import (
    create_table,
    merge_changes,
    overwrite_table,
    read_table,
    spark_schema,
    sql_literal,
    table_exists,
    table_path,
    table_version,
)

SCORE_TOLERANCE = 1e-6
"""A score that moved by no more is the same score: it is not published again."""

_NOTHING_STAGED = {"num_rows": 0, "num_keys": 0, "num_nan": 0, "num_in_range": 0}

AuditResult = dict[str, Any]
"""market, name, value, bound (text) and passed."""


@dataclass(frozen=True)
class Audit:
    """What an audit found."""

    results: list[AuditResult]
    num_staged: int
    """Rows that the run has in scores_staging."""

    @property
    def failed(self) -> list[AuditResult]:
        return [result for result in self.results if not result["passed"]]


@dataclass(frozen=True)
class Publication:
    """What a publish did."""

    version: int
    """Version of relevance_scores afterwards."""
    num_changes: Mapping[str, Mapping[str, int]]
    """Market to operation (insert, update, delete) to rows; empty where nothing changed."""


def write_run_rows(df: DataFrame, table: Table, tables_dir: str, run_id: str) -> int:
    """Write a run's rows of a table in one commit, in place of those that an earlier attempt left."""
    return overwrite_table(df, table, table_path(tables_dir, table), where=f"run_id = {sql_literal(run_id)}")


def read_run_rows(spark: SparkSession, table: Table, tables_dir: str, run_id: str) -> DataFrame:
    """A run's rows of a table, at the table's present version."""
    path = table_path(tables_dir, table)
    return read_table(spark, table, path, table_version(spark, path)).where(F.col("run_id") == run_id)


def find_published_run(spark: SparkSession, tables_dir: str, run_id: str) -> Row | None:
    """The row of a run that was published, or None."""
    if not table_exists(spark, table_path(tables_dir, SCORING_RUNS)):
        return None
    runs_df = read_run_rows(spark, SCORING_RUNS, tables_dir, run_id)
    return runs_df.where(F.col("verdict") != "rejected").head()


def check_same_run(published: Row, markets: Collection[str], bundle_digest: str) -> None:
    """Refuse a run id under which other markets, or scores of another bundle, were published.

    Args:
        published: the row that find_published_run found.
        markets: those of the new run.
        bundle_digest: that of the new run.

    Raises:
        ConfigError: the markets or the bundle differ.
    """
    expected = (sorted(published["markets"]), published["bundle_digest"])
    found = (sorted(markets), bundle_digest)
    if found != expected:
        raise ConfigError(
            f"--run-id {published['run_id']!r}: a run of this name, started {published['started_at']}, published the "
            f"markets {expected[0]} with bundle {expected[1][:12]}; this one has the markets {found[0]} with bundle "
            f"{found[1][:12]}. Choose another --run-id."
        )


def audit_run(
    spark: SparkSession, tables_dir: str, run_id: str, num_candidates: Mapping[str, int], max_rejected_share: float
) -> Audit:
    """Check a run's staged scores and rejected pairs, read back from their tables, market by market.

    A publish deletes what a market's run does not hold, so a large market must not hide that a small one failed.

    Args:
        spark: the session.
        tables_dir: the folder of CSRM's tables.
        run_id: the run.
        num_candidates: market to the pairs that it was given.
        max_rejected_share: largest share of a market's pairs that may be rejected, in [0, 1].
    """
    score = F.col("relevance_score")
    staged_df = (
        read_run_rows(spark, SCORES_STAGING, tables_dir, run_id)
        .groupBy("market")
        .agg(
            F.count("*").alias("num_rows"),
            F.count_distinct("query_id", "product_id").alias("num_keys"),
            F.count_if(score.isNull() | F.isnan(score)).alias("num_nan"),
            F.count_if(score.between(0.0, 1.0)).alias("num_in_range"),
        )
    )
    rejected_df = read_run_rows(spark, REJECTED_PAIRS, tables_dir, run_id).groupBy("market").count()
    staged = {row["market"]: row.asDict() for row in staged_df.collect()}
    rejected = {row["market"]: row["count"] for row in rejected_df.collect()}
    results: list[AuditResult] = []
    for market in sorted({*num_candidates, *staged, *rejected}):
        counts = (staged.get(market, _NOTHING_STAGED), rejected.get(market, 0), num_candidates.get(market, 0))
        results += audit_counts(market, *counts, max_rejected_share)
    return Audit(results, sum(counts["num_rows"] for counts in staged.values()))


def audit_counts(
    market: str, staged: Mapping[str, int], num_rejected: int, num_candidates: int, max_rejected_share: float
) -> list[AuditResult]:
    """The audit's results for one market, from its counts.

    Args:
        market: the market.
        staged: num_rows, num_keys (distinct pairs), num_nan and num_in_range of the staged scores.
        num_rejected: pairs that could not be scored.
        num_candidates: pairs that the run was given.
        max_rejected_share: see audit_run.
    """
    num_rows = staged["num_rows"]
    num_pairs, num_keys, num_in_range = num_rows + num_rejected, staged["num_keys"], staged["num_in_range"]
    share = num_rejected / num_candidates if num_candidates else 0.0
    checks = [
        ("staged and rejected pairs", num_pairs, f"= {num_candidates} candidates", num_pairs == num_candidates),
        ("staged pairs", num_rows, ">= 1", num_rows >= 1),
        ("distinct staged pairs", num_keys, f"= {num_rows} staged", num_keys == num_rows),
        ("scores that are no number", staged["num_nan"], "= 0", staged["num_nan"] == 0),
        ("scores in [0, 1]", num_in_range, f"= {num_rows} staged", num_in_range == num_rows),
        ("share of rejected pairs", share, f"<= {max_rejected_share}", share <= max_rejected_share),
    ]
    return [
        {"market": market, "name": name, "value": value, "bound": bound, "passed": passed}
        for name, value, bound, passed in checks
    ]


def publish_run(
    spark: SparkSession, tables_dir: str, run_id: str, markets: Collection[str], bundle_digest: str
) -> Publication:
    """Bring the published table to a run's staged scores: one commit per market, none where nothing changed.

    Rows whose pair_key, bundle, grade and score (within SCORE_TOLERANCE) are as published stay untouched. A published
    pair of these markets that the run does not hold is deleted.
    """
    path = table_path(tables_dir, RELEVANCE_SCORES)
    create_table(spark, RELEVANCE_SCORES, path)
    version = table_version(spark, path)
    published_df = read_table(spark, RELEVANCE_SCORES, path, version).where(F.col("market").isin(*sorted(markets)))
    changes_df = score_changes(read_run_rows(spark, SCORES_STAGING, tables_dir, run_id), published_df)
    num_changes: dict[str, dict[str, int]] = {}
    for row in changes_df.groupBy("market", "operation").count().orderBy("market", "operation").collect():
        num_changes.setdefault(row["market"], {})[row["operation"]] = row["count"]
    metadata = json.dumps({"run_id": run_id, "bundle_digest": bundle_digest})
    for market in num_changes:
        market_df = changes_df.where(F.col("market") == market)
        version = merge_changes(market_df, RELEVANCE_SCORES, path, {"market": market}, metadata)
    return Publication(version, num_changes)


def score_changes(staged_df: DataFrame, published_df: DataFrame) -> DataFrame:
    """What turns the published scores into the staged ones.

    Args:
        staged_df: columns of relevance_scores, one row a pair.
        published_df: the same.

    Returns:
        The columns of relevance_scores and `operation`: insert, update, or delete (then only the key is set).
    """
    key = list(RELEVANCE_SCORES.key)
    values = [name for name in RELEVANCE_SCORES.column_names if name not in key]
    new_df = staged_df.select(*key, F.struct(*values).alias("new"))
    old_df = published_df.select(*key, F.struct(*values).alias("old"))
    moved = F.abs(F.col("new.relevance_score").cast("double") - F.col("old.relevance_score").cast("double"))
    differs = moved > SCORE_TOLERANCE
    for name in ("pair_key", "predicted_grade", "bundle_digest"):
        differs = differs | (F.col(f"new.{name}") != F.col(f"old.{name}"))
    operation = F.when(F.col("old").isNull(), "insert").when(F.col("new").isNull(), "delete").when(differs, "update")
    return (
        new_df.join(old_df, on=key, how="full")
        .withColumn("operation", operation)
        .where(F.col("operation").isNotNull())
        .select(*key, "new.*", "operation")
    )


def record_run(spark: SparkSession, tables_dir: str, run: Mapping[str, Any]) -> None:
    """Write a run's row of scoring_runs; `run` has its columns, with audit as a list of results."""
    values = {**run, "audit": json.dumps(run["audit"])}
    row = tuple(values[name] for name in SCORING_RUNS.column_names)
    write_run_rows(spark.createDataFrame([row], spark_schema(SCORING_RUNS)), SCORING_RUNS, tables_dir, run["run_id"])
