"""A rejected run after a person's review: publish it, or discard its scores."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from csrm.cli import Console
from csrm.config import TablesSettings
from csrm.errors import AuditError, ConfigError, InputError, LeaseError
from csrm.night.audit import accept, failures
from csrm.night.leases import Lease, hold_leases
from csrm.night.messages import say_publication
from csrm.night.publish import Publication, count_changes, publish_changes, run_changes
from csrm.night.published import commits_since, has_history_since
from csrm.night.runs import (
    PUBLISHED,
    discard_staging,
    find_later_run,
    read_newest,
    read_open_staging,
    read_run_rows,
    record_end,
    require_run,
)
from csrm.night.settings import LEASE_SECONDS, LeaseSeconds
from csrm.schemas import RELEVANCE_SCORES, RUN_PAIRS, SCORES_STAGING
from csrm.spark.session import persisted
from csrm.spark.tables import table_id, table_path


class PublishConfig(TablesSettings):
    """Settings of the job."""

    lease_seconds: LeaseSeconds = LEASE_SECONDS
    """As in score_catalog.yaml."""


def publish_rejected(
    spark: SparkSession, config: PublishConfig, run_id: str, *, accepted: Sequence[str], reason: str, console: Console
) -> Publication:
    """Publish a run that its audit had rejected.

    Args:
        spark: the session.
        config: settings of the job.
        run_id: name of the run.
        accepted: failed checks of the audit that are right all the same.
        reason: why; kept in the run's row.
        console: says what was published.

    Raises:
        AuditError: a failed check was not accepted, or scores or plan of the run are gone.
        ConfigError: the run is not one that its audit rejected.
        LeaseError: a run holds one of its markets, or published it since.
    """
    with _held_run(spark, config, run_id) as (run, leases):
        _require_publishable(spark, config.tables, run)
        results = accept(run["audit"] or [], accepted, reason)
        if failed := sorted({result["name"] for result in failures(results)}):
            raise AuditError(f"run {run_id}: these checks failed and were not accepted: {failed}. Nothing published.")
        with persisted(_changes(spark, config.tables, run)) as changes_df:
            _require_all_scores(changes_df, run_id)
            metadata = {"run_id": run_id, "bundle_digest": run["bundle_digest"], "reason": reason}
            num_changes = count_changes(changes_df)
            publication = publish_changes(spark, config.tables, changes_df, num_changes, leases, metadata)
        verdict = "published" if num_changes else "already_published"
        row = {**run, "audit": results, "changes": publication.totals}
        record_end(spark, config.tables, row, verdict, publication.version)
        say_publication(console, verdict, run_id, publication, config.tables)
        return publication


def discard_run(spark: SparkSession, config: PublishConfig, run_id: str, *, console: Console) -> None:
    """Throw away the scores that a run would publish: those that it staged, and those that it reused of other runs.

    Raises:
        ConfigError: the run was published, or is a rollback or a retirement.
        InputError: none of its scores is there any more.
        LeaseError: a run holds one of its markets.
    """
    with _held_run(spark, config, run_id) as (run, _):
        if run["intervention"] is not None:
            raise ConfigError(
                f"run {run_id!r}: is a rollback or a retirement, which has no scores to discard. To undo it: "
                "jobs/rollback.py, to a run of the scoring job."
            )
        if run["verdict"] in PUBLISHED:
            raise ConfigError(
                f"run {run_id!r}: was published, which discarding would not undo. To go back to an earlier state: "
                "jobs/rollback.py."
            )
        record_end(spark, config.tables, run, "discarded")
        num_rows = discard_staging(spark, config.tables, run_id)
    expected = (run["num_scored"] or 0) + (run["num_reused"] or 0)
    if expected and not num_rows and run["verdict"] != "discarded":
        raise InputError(
            f"run {run_id!r}: found 0 of the {expected:,} scores that it had staged or reused. They were removed "
            "before (staging_days of jobs/maintain.py), or discarded with another run. The run counts as discarded now."
        )
    text = f"discarded run {run_id}: {num_rows:,} scores deleted from {SCORES_STAGING.name}"
    console.say("discarded", text, run_id=run_id, num_rows=num_rows)


@contextmanager
def _held_run(
    spark: SparkSession, config: PublishConfig, run_id: str
) -> Iterator[tuple[dict[str, Any], Mapping[str, Lease]]]:
    """A run's row and the leases of its markets; the row is read again once they are held."""
    run = require_run(spark, config.tables, run_id)
    owner = f"jobs/publish.py of {run_id}"
    with hold_leases(spark, config.tables, run["markets"], owner, config.lease_seconds) as leases:
        yield require_run(spark, config.tables, run_id), leases  # others may have worked on it until now


def _require_publishable(spark: SparkSession, tables_dir: str, run: Mapping[str, Any]) -> None:
    """Refuse a run whose state is not, or no longer, the one that would be published.

    Raises:
        ConfigError: the run is not one that its audit rejected.
        LeaseError: one of its markets was published since, maybe by a run that died before it ended.
    """
    if run["verdict"] != "rejected":
        raise ConfigError(f"run {run['run_id']!r}: expected a run that its audit rejected, it is {run['verdict']}.")
    later = find_later_run(spark, tables_dir, run)
    if later is not None:
        raise LeaseError(
            f"run {run['run_id']!r}: run {later!r} was started after it and published the same market. Score again."
        )
    path = table_path(tables_dir, RELEVANCE_SCORES)
    if not has_history_since(spark, path, run["base_version"]):
        raise LeaseError(
            f"run {run['run_id']!r}: the history of relevance_scores since the run compared with it, at version "
            f"{run['base_version']}, was cleaned up, so that nobody knows what was changed since. Score again."
        )
    commits = commits_since(spark, path, run["base_version"], markets=run["markets"])
    changed = sorted(
        {commit.carried.get("market", "all") for commit in commits if commit.carried.get("run_id") != run["run_id"]}
    )
    if changed or run["table_id"] not in (None, table_id(spark, path)):
        raise LeaseError(
            f"run {run['run_id']!r}: the published scores of {changed or 'all markets'} were changed since it compared "
            "with them. Score again."
        )


def _changes(spark: SparkSession, tables_dir: str, run: Mapping[str, Any]) -> DataFrame:
    """What turns the published scores into the run's; see run_changes.

    Raises:
        AuditError: pairs of the run's plan are gone.
    """
    run_id = run["run_id"]
    published_df = read_newest(spark, RELEVANCE_SCORES, tables_dir).where(F.col("market").isin(*run["markets"]))
    planned_df = read_run_rows(spark, RUN_PAIRS, tables_dir, run_id)
    num_planned = planned_df.count()
    if num_planned != run["num_candidates"]:  # published rows that a plan does not name are deleted
        raise AuditError(
            f"run {run_id}: expected {run['num_candidates']:,} pairs in {RUN_PAIRS.name}, found {num_planned:,}: its "
            "plan was cleaned up (staging_days of jobs/maintain.py). Nothing published. Score again with "
            "jobs/score_catalog.py."
        )
    staged_df = read_open_staging(spark, tables_dir, run["markets"], run_id)
    return run_changes(planned_df, published_df, staged_df, run_id)


def _require_all_scores(changes_df: DataFrame, run_id: str) -> None:
    """Refuse to publish pairs without a score.

    Raises:
        AuditError: some staged scores are gone.
    """
    num_missing = changes_df.where("operation != 'delete' AND relevance_score IS NULL").count()
    if num_missing:
        raise AuditError(
            f"run {run_id}: {num_missing:,} of its pairs have no staged score any more. Score again with "
            f"jobs/score_catalog.py --run-id {run_id}."
        )
