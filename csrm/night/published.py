"""The published table as its own witness: what a row of scoring_runs says is proven on relevance_scores."""

from collections.abc import Collection, Mapping
from typing import Any

from pyspark.sql import DataFrame, SparkSession

from csrm.errors import InputError
from csrm.night.runs import PUBLISHED, read_newest
from csrm.schemas import PAIR_KEY, RELEVANCE_SCORES
from csrm.spark.commits import Commit, read_commits
from csrm.spark.tables import sql_literal, table_exists, table_id, table_path, table_version

_CARE = (
    *("CREATE TABLE", "OPTIMIZE", "REORG", "VACUUM START", "VACUUM END", "ADD COLUMNS", "CHANGE COLUMN"),
    *(
        "SET TBLPROPERTIES",
        "UNSET TBLPROPERTIES",
        "ADD CONSTRAINT",
        "DROP CONSTRAINT",
        "DROP FEATURE",
        "UPGRADE PROTOCOL",
    ),
)
"""Operations in Delta's history that change no row."""


def published_markets(spark: SparkSession, tables_dir: str) -> list[str]:
    """Markets with rows in relevance_scores, sorted."""
    markets_df = read_newest(spark, RELEVANCE_SCORES, tables_dir).select("market").distinct()
    return sorted(row["market"] for row in markets_df.collect())


def is_still_published(spark: SparkSession, tables_dir: str, run: Mapping[str, Any]) -> bool:
    """Whether a run was published, and only later runs and care came after it.

    A rollback, a RESTORE, rows written by hand, or a table that was made anew are something else. So is a history whose
    commits since the run were cleaned up: nothing says what they were.

    Args:
        spark: the session.
        tables_dir: folder of CSRM's tables.
        run: its row of scoring_runs.
    """
    path = table_path(tables_dir, RELEVANCE_SCORES)
    if run["verdict"] not in PUBLISHED or not table_exists(spark, path) or not is_same_table(spark, path, run):
        return False
    if not has_history_since(spark, path, run["published_version"]):
        return False
    later = commits_since(spark, path, run["published_version"], markets=run["markets"])
    return all("run_id" in commit.carried for commit in later)


def markets_of_run(spark: SparkSession, tables_dir: str, run: Mapping[str, Any]) -> list[str]:
    """Markets that a run has published, by its commits."""
    path = table_path(tables_dir, RELEVANCE_SCORES)
    commits = commits_since(spark, path, run["base_version"], markets=run["markets"])
    return [commit.carried["market"] for commit in commits if commit.carried.get("run_id") == run["run_id"]]


def commits_since(spark: SparkSession, path: str, version: int, *, markets: Collection[str]) -> list[Commit]:
    """Commits after a version that may have changed rows of some markets, oldest first.

    Args:
        spark: the session.
        path: of relevance_scores.
        version: of the table.
        markets: the markets; a commit that something else than CSRM made may have changed any.
    """
    return [
        commit
        for commit in read_commits(spark, path, version)
        if commit.operation not in _CARE
        and "fence" not in commit.carried
        and commit.carried.get("market") in (None, *markets)
    ]


def has_history_since(spark: SparkSession, path: str, version: int) -> bool:
    """Whether a table has reached a version, and all commits after it are in its history still.

    Delta removes the log of old versions (delta.logRetentionDuration, 30 days).
    """
    return len(read_commits(spark, path, version)) == table_version(spark, path) - version


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
    example = " AND ".join(f"{name} = {sql_literal(examples[0][name])}" for name in PAIR_KEY)
    delete = f"DELETE FROM delta.`{path}` WHERE {example}"
    way_out = f"Delete the rows of these pairs ({delete}), and the next run scores them again"
    commits = read_commits(spark, path, -1)
    is_own = [commit.operation in _CARE or bool(commit.carried) for commit in commits]
    if False in is_own and True not in is_own[is_own.index(False) :]:  # nothing of ours came after it
        version = commits[is_own.index(False)].version - 1
        way_out = f"Take that back with RESTORE TABLE delta.`{path}` TO VERSION AS OF {version}"
    raise InputError(
        f"relevance_scores at {path!r}: {repeated_df.count():,} pairs are there more than once, for example {listed}. "
        f"Something else than CSRM wrote to the table. Nothing was changed. {way_out}."
    )
