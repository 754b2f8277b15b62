"""Bring the tables that an older CSRM wrote to this version's columns. New columns are null in old rows."""

import argparse
from collections.abc import Sequence

from csrm.cli import job_parser, job_settings
from csrm.config import TablesSettings
from csrm.night.leases import hold_leases
from csrm.night.settings import LEASE_SECONDS, LeaseSeconds
from csrm.operations.maintenance import run_markets
from csrm.schemas import OUTPUTS, SCORING_RUNS
from csrm.spark.catalogs import located_tables
from csrm.spark.migration import migrate_table
from csrm.spark.session import build_session
from csrm.spark.tables import table_exists, table_path


class MigrationConfig(TablesSettings):
    """Settings of the job."""

    lease_seconds: LeaseSeconds = LEASE_SECONDS
    """As in score_catalog.yaml."""


def build_parser() -> argparse.ArgumentParser:
    return job_parser(__doc__, "conf/migrate.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = job_settings(args, MigrationConfig)
    spark = build_session("csrm-migrate")
    config = located_tables(spark, config)
    has_runs = table_exists(spark, table_path(config.tables, SCORING_RUNS))
    markets = run_markets(spark, config.tables) if has_runs else []
    with hold_leases(spark, config.tables, markets, "jobs/migrate.py", config.lease_seconds):  # no run meanwhile
        for table in OUTPUTS:
            path = table_path(config.tables, table)
            if table_exists(spark, path):
                added = migrate_table(spark, table, path)
                found = f"added {', '.join(added)}" if added else f"is at version {table.schema_version}"
                print(f"{table.name}: {found}")
    return 0
