"""A rejected run after a person's review: publish it, or discard its scores."""

from datetime import UTC, datetime
from typing import Any

from pyspark.sql import SparkSession

from csrm.cli import Console
from csrm.config import Settings
from csrm.errors import ConfigError, LeaseError
from csrm.night.runs import (
    PUBLISHED,
    discard_staging,
    find_later_run,
    record_run,
)
from csrm.night.settings import LEASE_SECONDS
from csrm.schemas import RELEVANCE_SCORES, SCORES_STAGING
from csrm.spark.commits import read_commits
from csrm.spark.tables import table_path


class PublishConfig(Settings):
    """Settings of the job."""

    tables: str
    """Folder of the tables that CSRM writes."""
    lease_seconds: float = LEASE_SECONDS
    """As in score_catalog.yaml."""


def discard(spark: SparkSession, tables_dir: str, run: dict[str, Any], console: Console) -> None:
    """Throw a run's staged scores away.

    Raises:
        ConfigError: it was published.
    """
    if run["verdict"] in PUBLISHED:
        raise ConfigError(
            f"run {run['run_id']!r}: was published, which discarding would not undo. To go back to an earlier state: "
            "jobs/rollback.py."
        )
    num_rows = discard_staging(spark, tables_dir, run["run_id"])
    record_run(spark, tables_dir, {**run, "verdict": "discarded", "finished_at": datetime.now(UTC)})
    text = f"discarded run {run['run_id']}: {num_rows:,} scores deleted from {SCORES_STAGING.name}"
    console.say("discarded", text, run_id=run["run_id"], num_rows=num_rows)


def require_publishable(spark: SparkSession, tables_dir: str, run: dict[str, Any]) -> None:
    """Raises:
    ConfigError: the run is not one that its audit rejected.
    LeaseError: one of its markets was published since, maybe by a run that died before it ended: its state is old.
    """
    if run["verdict"] != "rejected":
        raise ConfigError(f"run {run['run_id']!r}: expected a run that its audit rejected, it is {run['verdict']}.")
    later = find_later_run(spark, tables_dir, run)
    if later is not None:
        raise LeaseError(
            f"run {run['run_id']!r}: run {later!r} was started after it and published the same market. Score again."
        )
    commits = read_commits(spark, table_path(tables_dir, RELEVANCE_SCORES), run["base_version"])
    of_others = {commit.get("market") for commit in commits if commit.get("run_id") != run["run_id"]}
    if changed := sorted(set(run["markets"]) & of_others):
        raise LeaseError(
            f"run {run['run_id']!r}: the published scores of {changed} were changed since it compared with them. "
            "Score again."
        )
