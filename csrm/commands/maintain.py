"""Care for the tables after a night: lay published rows out by query, delete rows of old runs, remove old files.

Readers see the same rows before, meanwhile and after. Markets are held by leases, so that no run works on them.
"""

import argparse
from collections.abc import Sequence

from csrm.cli import job_parser, job_settings
from csrm.night.leases import hold_leases
from csrm.operations.maintenance import (
    MaintenanceConfig,
    foresee,
    maintain,
    run_markets,
)
from csrm.schemas import SCORING_RUNS
from csrm.spark.catalogs import located_tables
from csrm.spark.session import build_session
from csrm.spark.tables import read_table, table_path


def build_parser() -> argparse.ArgumentParser:
    parser = job_parser(__doc__, "conf/maintain.yaml")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = job_settings(args, MaintenanceConfig)
    spark = build_session("csrm-maintain")
    config = located_tables(spark, config)
    read_table(spark, SCORING_RUNS, table_path(config.tables, SCORING_RUNS))  # says so where the folder is wrong
    if args.dry_run:
        foresee(spark, config)
        return 0
    markets = run_markets(spark, config.tables)
    with hold_leases(spark, config.tables, markets, "jobs/maintain.py", config.lease_seconds):
        maintain(spark, config)
    return 0
