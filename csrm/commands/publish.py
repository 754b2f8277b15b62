"""Publish a run that its audit had rejected, after a person reviewed it, or throw its scores away.

    python jobs/publish.py --run-id R --accept drift --reason "new season"
    python jobs/publish.py --run-id R --discard

Nothing is scored. Publishing needs a reason, which stays in the run's row; discarded scores are never used again.
"""

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime

from pyspark import StorageLevel
from pyspark.sql import functions as F

from csrm.cli import Console, add_log_format, job_parser
from csrm.config import load_config
from csrm.errors import AuditError, ConfigError
from csrm.night.audit import accept, failures
from csrm.night.leases import hold_leases
from csrm.night.messages import say_publication
from csrm.night.publish import count_changes, publish_changes, run_changes
from csrm.night.runs import (
    read_newest,
    read_open_staging,
    read_run_rows,
    record_run,
    require_run,
)
from csrm.operations.review import PublishConfig, discard, require_publishable
from csrm.schemas import RELEVANCE_SCORES, RUN_PAIRS
from csrm.spark.session import build_session


def build_parser() -> argparse.ArgumentParser:
    parser = job_parser(__doc__, "conf/publish.yaml")
    parser.add_argument("--run-id", required=True, help="name of the run")
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="CHECK",
        help="failed check of the audit that is right all the same, such as drift or deleted; may be repeated",
    )
    parser.add_argument("--reason", default="", help="why; kept in the run's row")
    parser.add_argument("--discard", action="store_true", help="throw the run's staged scores away")
    add_log_format(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.discard == bool(args.accept):
        raise ConfigError("expected --accept CHECK with --reason, or --discard; one of the two.")
    config = load_config(args.config, PublishConfig, args.overrides)
    console = Console(args.log_format == "json")
    spark = build_session("csrm-publish")
    run = require_run(spark, config.tables, args.run_id)
    owner = f"jobs/publish.py of {args.run_id}"
    with hold_leases(spark, config.tables, run["markets"], owner, config.lease_seconds) as leases:
        run = require_run(spark, config.tables, args.run_id)  # others may have worked on it until now
        if args.discard:
            discard(spark, config.tables, run, console)
            return 0
        require_publishable(spark, config.tables, run)
        results = accept(run["audit"] or [], args.accept, args.reason)
        if failed := sorted({result["name"] for result in failures(results)}):
            raise AuditError(
                f"run {args.run_id}: these checks failed and were not accepted: {failed}. Nothing published."
            )
        scores_df = read_newest(spark, RELEVANCE_SCORES, config.tables)
        published_df = scores_df.where(F.col("market").isin(*run["markets"]))
        planned_df = read_run_rows(spark, RUN_PAIRS, config.tables, args.run_id)
        num_planned = planned_df.count()
        if num_planned != run["num_candidates"]:  # published rows that a plan does not name are deleted
            raise AuditError(
                f"run {args.run_id}: expected {run['num_candidates']:,} pairs in {RUN_PAIRS.name}, found "
                f"{num_planned:,}: its plan was cleaned up (staging_days of jobs/maintain.py). Nothing published. "
                "Score again with jobs/score_catalog.py."
            )
        staged_df = read_open_staging(spark, config.tables, run["markets"], args.run_id)
        changes_df = run_changes(planned_df, published_df, staged_df, args.run_id).persist(StorageLevel.MEMORY_AND_DISK)
        num_missing = changes_df.where("operation != 'delete' AND relevance_score IS NULL").count()
        if num_missing:
            raise AuditError(
                f"run {args.run_id}: {num_missing:,} of its pairs have no staged score any more. Score again with "
                f"jobs/score_catalog.py --run-id {args.run_id}."
            )
        metadata = {"run_id": args.run_id, "bundle_digest": run["bundle_digest"], "reason": args.reason}
        num_changes = count_changes(changes_df)
        publication = publish_changes(spark, config.tables, changes_df, num_changes, leases, metadata)
        verdict = "published" if num_changes else "already_published"
        end = {"verdict": verdict, "published_version": publication.version, "finished_at": datetime.now(UTC)}
        record_run(spark, config.tables, {**run, **end, "audit": results, "changes": publication.totals})
        say_publication(console, verdict, args.run_id, publication, config.tables)
    return 0
