"""Back to an earlier state of a market: found in scoring_runs, read by time travel, published as one new commit."""

from collections.abc import Mapping
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from csrm.cli import without_credentials
from csrm.config import TablesSettings
from csrm.errors import ConfigError, InputError
from csrm.night.leases import hold_leases
from csrm.night.publish import Publication
from csrm.night.published import is_same_table
from csrm.night.runs import PUBLISHED, read_nights, require_run
from csrm.night.settings import LEASE_SECONDS, LeaseSeconds
from csrm.operations.interventions import publish_intervention
from csrm.operations.maintenance import market_files, missing_files
from csrm.schemas import RELEVANCE_SCORES
from csrm.spark.tables import read_table, table_path


class RollbackConfig(TablesSettings):
    """Settings of the job."""

    lease_seconds: LeaseSeconds = LEASE_SECONDS
    """As in score_catalog.yaml."""


def roll_back(spark: SparkSession, config: RollbackConfig, market: str, *, run_id: str) -> Publication:
    """Publish what brings a market back to its state right after a run.

    Args:
        spark: the session.
        config: settings of the job.
        market: the market.
        run_id: a run that published it.

    Raises:
        ConfigError, InputError: see read_published_state; or there is no such run, or a pair is published twice.
        LeaseError: a run holds the market.
    """
    run = require_run(spark, config.tables, run_id)
    read_published_state(spark, config.tables, run, market)  # says what is wrong before a lease is taken
    with hold_leases(spark, config.tables, [market], f"jobs/rollback.py to {run_id}", config.lease_seconds) as leases:
        run = require_run(spark, config.tables, run_id)
        wanted_df = read_published_state(spark, config.tables, run, market)
        path = without_credentials(table_path(config.tables, RELEVANCE_SCORES))
        return publish_intervention(
            spark,
            config.tables,
            wanted_df,
            market=market,
            lease=leases[market],
            verdict="rolled_back",
            metadata={"rollback_to": run_id},
            inputs={RELEVANCE_SCORES.name: f"{path}@v{run['published_version']}"},
        )


def read_published_state(spark: SparkSession, tables_dir: str, run: Mapping[str, Any], market: str) -> DataFrame:
    """A market's rows of relevance_scores right after a run, as they were.

    Args:
        spark: the session.
        tables_dir: folder of CSRM's tables.
        run: its row of scoring_runs.
        market: one of its markets.

    Raises:
        ConfigError: the run was not published, or not for the market.
        InputError: relevance_scores is another table now, or the state's files are gone; the message names the oldest
            one that is left.
    """
    run_id, version = run["run_id"], run["published_version"]
    if market not in run["markets"]:
        raise ConfigError(f"run {run_id!r}: has no market {market!r}, it has {sorted(run['markets'])}.")
    if run["verdict"] not in PUBLISHED:
        raise ConfigError(
            f"run {run_id!r}: expected a run that was published, it is {run['verdict']}. Newest of market {market!r}: "
            f"{_listed(published_runs(spark, tables_dir, market)[-5:])}."
        )
    path = table_path(tables_dir, RELEVANCE_SCORES)
    if not is_same_table(spark, path, run):
        raise InputError(
            f"run {run_id!r}: relevance_scores at {path!r} is not the table that the run published to, so its version "
            f"{version} is another state: the table was made anew since, or its history is gone. Nothing was changed. "
            "Score again, or put the table back that the run knew."
        )
    if not _is_left(spark, path, market, version):
        runs = published_runs(spark, tables_dir, market)
        oldest = next((run for run in runs if _is_left(spark, path, market, run[1])), None)
        raise InputError(
            f"run {run_id!r}: its state of market {market!r}, version {version} of {path!r}, is older than the table's "
            f"retention and was removed. The oldest that is left: {_listed([oldest] if oldest else [])}. "
            "How long states are kept is retention_hours of jobs/maintain.py."
        )
    return read_table(spark, RELEVANCE_SCORES, path, version).where(F.col("market") == market)


def published_runs(spark: SparkSession, tables_dir: str, market: str) -> list[tuple[str, int]]:
    """Names of the runs that published a market, or found it published, with their versions, oldest first."""
    is_published = F.col("verdict").isin(*PUBLISHED) & F.array_contains("markets", F.lit(market))
    runs_df = read_nights(spark, tables_dir).where(is_published)
    rows = runs_df.select("run_id", "published_version").orderBy("published_version", "started_at").collect()
    return [(row["run_id"], row["published_version"]) for row in rows]


def _is_left(spark: SparkSession, path: str, market: str, version: int) -> bool:
    try:
        return not missing_files(spark, path, market_files(spark, path, market, version))
    except InputError:
        return False


def _listed(runs: list[tuple[str, int]]) -> str:
    return ", ".join(f"{run_id} (version {version})" for run_id, version in runs) or "none"
