"""The published table as its own witness: what a row of scoring_runs says is proven on relevance_scores."""

from collections.abc import Mapping
from typing import Any

from pyspark.sql import DataFrame, SparkSession

from csrm.errors import InputError
from csrm.night.runs import PUBLISHED, read_newest
from csrm.schemas import PAIR_KEY, RELEVANCE_SCORES
from csrm.spark.commits import read_commits
from csrm.spark.tables import table_exists, table_id, table_path, table_version

_CARE = ("CREATE TABLE", "OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES", "ADD COLUMNS", "CHANGE COLUMN")
"""Operations in Delta's history that change no row."""


def published_markets(spark: SparkSession, tables_dir: str) -> list[str]:
    """Markets with rows in relevance_scores, sorted."""
    markets_df = read_newest(spark, RELEVANCE_SCORES, tables_dir).select("market").distinct()
    return sorted(row["market"] for row in markets_df.collect())


def is_still_published(spark: SparkSession, tables_dir: str, run: Mapping[str, Any]) -> bool:
    """Whether a run was published, and only later runs and care came after it.

    A rollback, a RESTORE, rows written by hand, or a table that was made anew are something else.

    Args:
        spark: the session.
        tables_dir: folder of CSRM's tables.
        run: its row of scoring_runs.
    """
    path = table_path(tables_dir, RELEVANCE_SCORES)
    if run["verdict"] not in PUBLISHED or not table_exists(spark, path) or run["table_id"] != table_id(spark, path):
        return False
    if run["published_version"] > table_version(spark, path):
        return False
    later = [
        commit
        for commit in read_commits(spark, path, run["published_version"])
        if commit.operation not in _CARE and commit.carried.get("market") in (None, *run["markets"])
    ]
    return all("run_id" in commit.carried or "fence" in commit.carried for commit in later)


def is_same_table(spark: SparkSession, path: str, run: Mapping[str, Any]) -> bool:
    """Whether a table is the one that a run published to, so that the version in the run's row is the run's state.

    Args:
        spark: the session.
        path: of relevance_scores.
        run: its row of scoring_runs; where it is older than the column table_id, a commit of the run is the proof.
    """
    if run["table_id"] is not None:
        return bool(run["table_id"] == table_id(spark, path))
    return any(
        commit.carried.get("run_id") == run["run_id"] and commit.version <= run["published_version"]
        for commit in read_commits(spark, path, -1)
    )


def require_unique_pairs(spark: SparkSession, published_df: DataFrame, path: str) -> None:
    """Check that no pair is published twice, which no job of CSRM writes.

    Args:
        spark: the session.
        published_df: columns of relevance_scores.
        path: of the table.

    Raises:
        InputError: some pairs are; the message names three of them, and the way out.
    """
    repeated_df = published_df.groupBy(*PAIR_KEY).count().where("count > 1")
    examples = repeated_df.orderBy(*PAIR_KEY).limit(3).collect()
    if not examples:
        return
    listed = "; ".join(", ".join(f"{name} {row[name]!r}" for name in PAIR_KEY) for row in examples)
    own = [commit.version for commit in read_commits(spark, path, -1) if commit.carried or commit.operation in _CARE]
    raise InputError(
        f"relevance_scores at {path!r}: {repeated_df.count():,} pairs are there more than once, for example {listed}. "
        "Something else than CSRM wrote to the table. Nothing was scored. Take that back with RESTORE TABLE "
        f"delta.`{path}` TO VERSION AS OF {max(own, default='N')}, or delete the rows of these pairs: the next run "
        "scores them again."
    )
