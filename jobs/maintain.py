"""Care for the tables after a night: lay published rows out by query, delete rows of old runs, remove old files.

Readers see the same rows before, meanwhile and after. Markets are held by leases, so that no run works on them.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Self

from pydantic import Field, model_validator
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from csrm.cli import job_parser, run_job
from csrm.config import Settings, load_config
from csrm.schemas import OUTPUTS, REJECTED_PAIRS, RELEVANCE_SCORES, RUN_PAIRS, SCORES_STAGING, SCORING_RUNS
from csrm.spark.leases import LEASE_SECONDS, hold_leases
from csrm.spark.maintenance import (
    TableSize,
    cluster_market,
    count_old_files,
    ended_runs,
    is_clustered,
    published_markets,
    remove_old_files,
    run_markets,
    set_retention,
    table_size,
)
from csrm.spark.session import build_session
from csrm.spark.tables import delete_rows, read_table, table_exists, table_path

SAFE_HOURS = 168
"""Delta's own lower bound: a job that reads or writes for longer could lose its files."""
LOG_DAYS = 30
"""Delta keeps the log of a table for so long; without it the change feed cannot be read."""


class MaintenanceConfig(Settings):
    """Settings of the job."""

    tables: str
    """Folder of the tables that CSRM writes."""
    file_mb: float = Field(default=1.0, gt=0)
    """Size of a file of relevance_scores, MiB; a reader of one query opens about so much."""
    change_feed_days: int = Field(default=7, ge=1, le=LOG_DAYS)
    """Consumers of the change feed may lag so far behind."""
    retention_hours: int = Field(default=SAFE_HOURS, ge=1, le=24 * LOG_DAYS)
    """Files are kept for so long after the version that removed them."""
    allow_short_retention: bool = False
    """Whether retention_hours may be under 168: only where no job reads or writes for longer than it."""
    staging_days: int = Field(default=14, ge=1)
    """A run's staged scores, plan and rejected pairs are kept for so long after it ended."""
    lease_seconds: float = Field(default=LEASE_SECONDS, gt=1)
    """As in score_catalog.yaml."""

    @model_validator(mode="after")
    def _retention_is_long_enough(self) -> Self:
        if self.retention_hours < 24 * self.change_feed_days:
            raise ValueError(
                f"retention_hours: expected {24 * self.change_feed_days} or more, the hours of change_feed_days, got "
                f"{self.retention_hours}: removing old files removes the change feed's too"
            )
        if self.retention_hours < SAFE_HOURS and not self.allow_short_retention:
            raise ValueError(
                f"retention_hours: expected {SAFE_HOURS} or more, got {self.retention_hours}: a job that reads or "
                "writes for longer would lose its files under its feet. Where none does, set allow_short_retention"
            )
        return self


def build_parser() -> argparse.ArgumentParser:
    parser = job_parser(__doc__ or "", "conf/maintain.yaml")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = load_config(args.config, MaintenanceConfig, args.overrides)
    spark = build_session("csrm-maintain")
    read_table(spark, SCORING_RUNS, table_path(config.tables, SCORING_RUNS))  # says so where the folder is wrong
    if args.dry_run:
        foresee(spark, config)
        return 0
    markets = run_markets(spark, config.tables)
    with hold_leases(spark, config.tables, markets, "jobs/maintain.py", config.lease_seconds):
        maintain(spark, config)
    return 0


def maintain(spark: SparkSession, config: MaintenanceConfig) -> None:
    """Do it, and print one line a table."""
    scores_path = table_path(config.tables, RELEVANCE_SCORES)
    is_old = F.col("run_id").isin(*ended_runs(spark, config.tables, datetime.now(UTC), config.staging_days))
    for table in OUTPUTS:
        path = table_path(config.tables, table)
        if not table_exists(spark, path):
            continue
        before, done = table_size(spark, path), []
        if table is RELEVANCE_SCORES:
            markets = loose_markets(spark, config)
            for market in markets:
                cluster_market(spark, scores_path, market, config.file_mb)
            done = [f"clustered {', '.join(markets)}"] if markets else []
        if table in (SCORES_STAGING, RUN_PAIRS, REJECTED_PAIRS):
            done = [f"{delete_rows(spark, path, is_old):,} rows of old runs deleted"]
        set_retention(spark, path, config.retention_hours)
        remove_old_files(spark, path)
        print("; ".join([f"{table.name}: {_sizes(before, table_size(spark, path))}", *done]), flush=True)


def foresee(spark: SparkSession, config: MaintenanceConfig) -> None:
    """Print, one line a table, what maintain would do."""
    is_old = F.col("run_id").isin(*ended_runs(spark, config.tables, datetime.now(UTC), config.staging_days))
    for table in OUTPUTS:
        path = table_path(config.tables, table)
        if not table_exists(spark, path):
            continue
        plans = [f"would remove {count_old_files(spark, path, config.retention_hours)} files"]
        if table is RELEVANCE_SCORES:
            plans.append(f"would cluster {', '.join(loose_markets(spark, config)) or 'no market'}")
        if table in (SCORES_STAGING, RUN_PAIRS, REJECTED_PAIRS):
            num_rows = read_table(spark, table, path).where(is_old).count()
            plans.append(f"would delete {num_rows:,} rows of old runs")
        print(f"{table.name}: " + "; ".join(plans), flush=True)


def loose_markets(spark: SparkSession, config: MaintenanceConfig) -> list[str]:
    """Published markets that changed since they were clustered."""
    path = table_path(config.tables, RELEVANCE_SCORES)
    return [market for market in published_markets(spark, config.tables) if not is_clustered(spark, path, market)]


def _sizes(before: TableSize, after: TableSize) -> str:
    return (
        f"{before.num_files:,} -> {after.num_files:,} files, {_mb(before.num_bytes)} -> {_mb(after.num_bytes)} MB; "
        f"with old versions {before.num_stored_files:,} -> {after.num_stored_files:,} files, "
        f"{_mb(before.num_stored_bytes)} -> {_mb(after.num_stored_bytes)} MB"
    )


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f}"


if __name__ == "__main__":
    sys.exit(run_job(main))
