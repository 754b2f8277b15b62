"""Bring one market of relevance_scores back to the state right after a run published it.

    python jobs/rollback.py --market tw --to-run R

One new commit touches the rows that differ, so consumers of the change feed follow it. Other markets stay as they are.
The next night scores what the rows then lack: before it, mend what was wrong, or it will be published again.
"""

import argparse
from collections.abc import Sequence

from csrm.cli import job_parser, job_settings
from csrm.operations.rollback import RollbackConfig, roll_back
from csrm.spark.catalogs import located_tables
from csrm.spark.session import build_session


def build_parser() -> argparse.ArgumentParser:
    parser = job_parser(__doc__, "conf/rollback.yaml")
    parser.add_argument("--market", required=True, help="the market")
    parser.add_argument("--to-run", required=True, metavar="RUN_ID", help="a run that published it")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = job_settings(args, RollbackConfig)
    spark = build_session("csrm-rollback")
    config = located_tables(spark, config)
    publication = roll_back(spark, config, args.market, run_id=args.to_run)
    if publication.num_changes:
        counts = ", ".join(f"{count:,} {name}" for name, count in publication.num_changes[args.market].items())
        print(f"market {args.market}: as run {args.to_run} left it, in version {publication.version}: {counts}")
    else:
        print(f"market {args.market}: is as run {args.to_run} left it already; nothing changed")
    return 0
