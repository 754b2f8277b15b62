"""Take a market that is scored no more out of relevance_scores.

    python jobs/retire.py --market tw --reason "the storefront was closed"

Take the market out of `markets` of all configurations first, or the next night publishes it again. One commit deletes
its rows, so consumers of the change feed follow it. `jobs/rollback.py` brings the market back within the retention.
"""

import argparse
from collections.abc import Sequence

from csrm.cli import job_parser, job_settings
from csrm.operations.retirement import RetirementConfig, retire_market
from csrm.spark.catalogs import located_tables
from csrm.spark.session import build_session


def build_parser() -> argparse.ArgumentParser:
    parser = job_parser(__doc__, "conf/retire.yaml")
    parser.add_argument("--market", required=True, help="the market")
    parser.add_argument("--reason", required=True, help="why; kept in the table's history")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = job_settings(args, RetirementConfig)
    spark = build_session("csrm-retire")
    publication = retire_market(spark, located_tables(spark, config), args.market, reason=args.reason)
    num_rows = publication.totals["delete"]
    print(f"market {args.market}: {num_rows:,} rows deleted from relevance_scores, in version {publication.version}")
    return 0
