"""Care of the tables: rows laid out by query, rows of old runs and files of old versions removed.

What readers see stays as it is.
"""

import json
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath
from typing import NamedTuple, Self

from delta.tables import DeltaTable
from pydantic import Field, model_validator
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from csrm.config import TablesSettings
from csrm.errors import InputError
from csrm.night.leases import forget_leases
from csrm.night.published import published_markets
from csrm.night.runs import read_newest
from csrm.night.settings import LEASE_SECONDS, LeaseSeconds
from csrm.schemas import (
    OUTPUTS,
    REJECTED_PAIRS,
    RELEVANCE_SCORES,
    RUN_PAIRS,
    SCORES_STAGING,
    SCORING_RUNS,
    TEXT_VECTORS,
)
from csrm.spark.commits import USER_METADATA, delete_rows, retry_conflicts, session_settings
from csrm.spark.session import without_console
from csrm.spark.storage import AS_IT_IS, folder_size
from csrm.spark.tables import open_table, read_table, sql_literal, sql_path, table_exists, table_path

_RETENTION = "delta.deletedFileRetentionDuration"
_DRY_RUN_LIMIT = 1000
MOST_FILES = 10_000
"""Of a clustered market; past them its files get larger than was asked, for no query is split."""


class TableSize(NamedTuple):
    """What a table takes."""

    num_files: int
    """Files of its newest version."""
    num_bytes: int
    """Bytes of these files."""
    num_stored_files: int
    """All files in its folder: older versions, the change feed and the log too."""
    num_stored_bytes: int
    """Bytes of all files."""
    num_log_files: int
    """Files of the log, to which removing old files adds some."""


def table_size(spark: SparkSession, path: str) -> TableSize:
    """What the table at a path takes now."""
    detail = DeltaTable.forPath(spark, path).detail().select("numFiles", "sizeInBytes").head()
    assert detail is not None
    num_log_files, _ = folder_size(spark, f"{path}/_delta_log")
    return TableSize(detail["numFiles"], detail["sizeInBytes"], *folder_size(spark, path), num_log_files)


def market_files(spark: SparkSession, path: str, market: str, version: int | None = None) -> frozenset[str]:
    """Names of the files that hold a market's rows at a version, from the log alone.

    Raises:
        InputError: the version cannot be read any more.
    """
    table_df, _ = open_table(spark, path, version)
    return frozenset(PurePosixPath(file).name for file in table_df.where(F.col("market") == market).inputFiles())


def is_clustered(spark: SparkSession, path: str, market: str) -> bool:
    """Whether a market's files are those that cluster_market left."""
    is_clustering = (F.col("operation") == "OPTIMIZE") & (F.col("userMetadata") == _clustering(market))
    newest = (
        DeltaTable.forPath(spark, path).history().where(is_clustering).agg(F.max("version").alias("version")).head()
    )
    if newest is None or newest["version"] is None:
        return False
    try:
        clustered_files = market_files(spark, path, market, newest["version"])
    except InputError:  # its version is gone; the market may not have changed since, but who knows
        return False
    return market_files(spark, path, market) == clustered_files


def cluster_market(spark: SparkSession, path: str, market: str, file_mb: float) -> None:
    """Rewrite a market's files so that one query's rows lie in one of them, in one commit that changes no row.

    A publish leaves the rows that it touched in no order. Files of other markets are not touched.

    Args:
        spark: the session.
        path: the folder of relevance_scores.
        market: the market.
        file_mb: size of a file, MiB; a reader of one query opens about so much.
    """
    settings = {
        "spark.databricks.delta.optimize.maxFileSize": str(max(int(file_mb * 2**20), 1)),
        "spark.databricks.io.skipping.mdc.sortWithinFiles": "true",  # a reader skips pages of the file too
        "spark.databricks.io.skipping.mdc.addNoise": "false",  # Delta's default deals one query's rows to many files
        "spark.databricks.io.skipping.mdc.rangeId.max": str(MOST_FILES),
        USER_METADATA: _clustering(market),
    }
    with session_settings(spark, settings):
        optimize = DeltaTable.forPath(spark, path).optimize().where(f"market = {sql_literal(market)}")
        retry_conflicts(lambda: optimize.executeZOrderBy("query_id"))


def ended_runs(spark: SparkSession, tables_dir: str, now: datetime, days: int) -> list[str]:
    """Runs that ended over so many days before `now`; of one that died, the start of its last attempt counts."""
    ended_at = F.coalesce("finished_at", "started_at")
    runs_df = read_newest(spark, SCORING_RUNS, tables_dir).where(ended_at < F.lit(now - timedelta(days=days)))
    return sorted(row["run_id"] for row in runs_df.select("run_id").collect())


def run_markets(spark: SparkSession, tables_dir: str) -> list[str]:
    """Markets that a run was started for, sorted."""
    runs_df, _ = open_table(spark, table_path(tables_dir, SCORING_RUNS))  # maybe of an older version
    markets_df = runs_df.select(F.explode("markets").alias("market")).distinct()
    return sorted(row["market"] for row in markets_df.collect())


def set_retention(spark: SparkSession, path: str, hours: int) -> None:
    """Keep files for so long after the version that removed them; older versions can then be read no more.

    The table carries it, for Delta itself refuses to go back further, and its VACUUM takes no other argument.
    """
    interval = f"interval {hours} hours"
    detail = DeltaTable.forPath(spark, path).detail().select("properties").head()
    assert detail is not None
    if detail["properties"].get(_RETENTION) != interval:
        alter = f"ALTER TABLE {sql_path(path)} SET TBLPROPERTIES ('{_RETENTION}' = '{interval}')"
        retry_conflicts(lambda: spark.sql(alter))


def remove_old_files(spark: SparkSession, path: str) -> None:
    """Delete the files, those of the change feed too, that no version within the table's retention needs."""
    with without_console(spark):  # VACUUM prints a line that names no table
        DeltaTable.forPath(spark, path).vacuum()


def count_old_files(spark: SparkSession, path: str, hours: int) -> str:
    """How many files remove_old_files would delete under a retention; Delta lists up to 1000."""
    retention = {"spark.databricks.delta.retentionDurationCheck.enabled": "false"}
    retention["spark.databricks.delta.vacuum.retentionWindowIgnore.enabled"] = "false"
    with session_settings(spark, retention):
        # Listed are also the folders that would be empty.
        listed_df = spark.sql(f"VACUUM {sql_path(path)} RETAIN {hours} HOURS DRY RUN")
        num_files = listed_df.where(F.col("path").endswith(".parquet")).count()
    return f"{num_files:,}" if num_files < _DRY_RUN_LIMIT else f"{num_files:,} or more"


def join_files(spark: SparkSession, path: str) -> None:
    """Rewrite small files as few large ones: each night's new texts come in files of their own."""
    optimize = DeltaTable.forPath(spark, path).optimize()
    retry_conflicts(optimize.executeCompaction)


def missing_files(spark: SparkSession, path: str, names: frozenset[str]) -> frozenset[str]:
    """Those of some data files of a table that are no longer in its folder."""
    found_df = (
        spark.read.format("binaryFile")
        .options(recursiveFileLookup="true", pathGlobFilter="*.parquet", **AS_IT_IS)
        .load(path)
        .select(F.element_at(F.split("path", "/"), -1).alias("name"))
    )
    return names - {row["name"] for row in found_df.collect()}


def _clustering(market: str) -> str:
    """What a clustering's commit carries in the table's history."""
    return json.dumps({"clustered_by": "query_id", "market": market})


SAFE_HOURS = 168
"""Delta's own lower bound: a job that reads or writes for longer could lose its files."""
LOG_DAYS = 30
"""Delta keeps the log of a table for so long; without it the change feed cannot be read."""


class MaintenanceConfig(TablesSettings):
    """Settings of the job."""

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
    lease_seconds: LeaseSeconds = LEASE_SECONDS
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


def maintain(spark: SparkSession, config: MaintenanceConfig) -> None:
    """Do it, and print one line a table."""
    scores_path = table_path(config.tables, RELEVANCE_SCORES)
    old_runs = ended_runs(spark, config.tables, datetime.now(UTC), config.staging_days)
    forget_leases(spark, config.tables, old_runs)
    is_old = F.col("run_id").isin(*old_runs)
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
        if table is TEXT_VECTORS:
            join_files(spark, path)
        set_retention(spark, path, config.retention_hours)
        stored = table_size(spark, path)
        remove_old_files(spark, path)
        after = table_size(spark, path)
        print("; ".join([f"{table.name}: {_sizes(before, stored, after)}", *done]), flush=True)


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
        if table is TEXT_VECTORS:
            plans.append("would join its small files")
        print(f"{table.name}: " + "; ".join(plans), flush=True)


def loose_markets(spark: SparkSession, config: MaintenanceConfig) -> list[str]:
    """Published markets that changed since they were clustered."""
    path = table_path(config.tables, RELEVANCE_SCORES)
    return [market for market in published_markets(spark, config.tables) if not is_clustered(spark, path, market)]


def _sizes(before: TableSize, stored: TableSize, after: TableSize) -> str:
    """Sizes before the care, before old files were removed, and after."""
    num_removed = (stored.num_stored_files - stored.num_log_files) - (after.num_stored_files - after.num_log_files)
    return (
        f"{before.num_files:,} -> {after.num_files:,} files, {_mb(before.num_bytes)} -> {_mb(after.num_bytes)} MB; "
        f"{num_removed:,} old files removed; its folder keeps {after.num_stored_files:,} files, "
        f"{_mb(after.num_stored_bytes)} MB, with log and versions within the retention"
    )


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f}"
