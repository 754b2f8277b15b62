"""Bring one market of relevance_scores back to the state right after a run published it.

    python jobs/rollback.py --market tw --to-run R

One new commit touches the rows that differ, so consumers of the change feed follow it. Other markets stay as they are.
The next night scores what the rows then lack: before it, mend what was wrong, or it will be published again.
"""

import argparse
from collections.abc import Sequence

from pydantic import Field
from pyspark import StorageLevel
from pyspark.sql import functions as F

from csrm.cli import job_parser
from csrm.config import Settings, load_config
from csrm.night.leases import hold_leases
from csrm.night.publish import count_changes, publish_changes
from csrm.night.runs import read_newest, require_run
from csrm.night.settings import LEASE_SECONDS
from csrm.operations.rollback import exact_changes, read_published_state
from csrm.schemas import RELEVANCE_SCORES
from csrm.spark.session import build_session


class RollbackConfig(Settings):
    """Settings of the job."""

    tables: str
    """Folder of the tables that CSRM writes."""
    lease_seconds: float = Field(default=LEASE_SECONDS, gt=1)
    """As in score_catalog.yaml."""


def build_parser() -> argparse.ArgumentParser:
    parser = job_parser(__doc__ or "", "conf/rollback.yaml")
    parser.add_argument("--market", required=True, help="the market")
    parser.add_argument("--to-run", required=True, metavar="RUN_ID", help="a run that published it")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = load_config(args.config, RollbackConfig, args.overrides)
    spark = build_session("csrm-rollback")
    run = require_run(spark, config.tables, args.to_run)
    wanted_df = read_published_state(spark, config.tables, run, args.market)
    owner = f"jobs/rollback.py to {args.to_run}"
    with hold_leases(spark, config.tables, [args.market], owner, config.lease_seconds) as leases:
        published_df = read_newest(spark, RELEVANCE_SCORES, config.tables).where(F.col("market") == args.market)
        changes_df = exact_changes(wanted_df, published_df).persist(StorageLevel.MEMORY_AND_DISK)
        num_changes = count_changes(changes_df)
        metadata = {"rollback_to": args.to_run}
        publication = publish_changes(spark, config.tables, changes_df, num_changes, leases, metadata)
    if num_changes:
        counts = ", ".join(f"{count:,} {name}" for name, count in num_changes[args.market].items())
        print(f"market {args.market}: as run {args.to_run} left it, in version {publication.version}: {counts}")
    else:
        print(f"market {args.market}: is as run {args.to_run} left it already; nothing changed")
    return 0
