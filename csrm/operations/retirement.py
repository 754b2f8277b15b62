"""A market that is scored no more: its rows leave the published table, as one commit."""

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from csrm.config import TablesSettings
from csrm.errors import ConfigError
from csrm.night.leases import hold_leases
from csrm.night.publish import Publication
from csrm.night.published import published_markets, require_unique_pairs
from csrm.night.runs import read_newest
from csrm.night.settings import LEASE_SECONDS, LeaseSeconds
from csrm.operations.interventions import publish_intervention
from csrm.operations.rollback import exact_changes
from csrm.schemas import RELEVANCE_SCORES
from csrm.spark.session import persisted
from csrm.spark.tables import table_path


class RetirementConfig(TablesSettings):
    """Settings of the job."""

    lease_seconds: LeaseSeconds = LEASE_SECONDS
    """As in score_catalog.yaml."""


def retire_market(spark: SparkSession, config: RetirementConfig, market: str, *, reason: str) -> Publication:
    """Delete a market's rows from relevance_scores in one commit, which readers of the change feed follow.

    Args:
        spark: the session.
        config: settings of the job.
        market: the market.
        reason: why; it stays in the commit, and in the row of scoring_runs.

    Raises:
        ConfigError: no reason, or nothing is published of the market.
        InputError: a pair is published twice.
        LeaseError: a run holds the market.
    """
    if not reason.strip():
        raise ConfigError("--reason: expected why the market is retired, got nothing.")
    with hold_leases(spark, config.tables, [market], "jobs/retire.py", config.lease_seconds) as leases:
        markets = published_markets(spark, config.tables)
        if market not in markets:
            raise ConfigError(f"market {market!r}: nothing of it is published; relevance_scores has {markets}.")
        published_df = read_newest(spark, RELEVANCE_SCORES, config.tables).where(F.col("market") == market)
        require_unique_pairs(spark, published_df, table_path(config.tables, RELEVANCE_SCORES))
        with persisted(exact_changes(published_df.limit(0), published_df)) as changes_df:
            return publish_intervention(
                spark,
                config.tables,
                changes_df,
                market=market,
                lease=leases[market],
                verdict="retired",
                metadata={"retired": market, "reason": reason},
                inputs={},
            )
