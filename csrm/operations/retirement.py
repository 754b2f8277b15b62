"""A market that is scored no more: its rows leave the published table, as one commit."""

from pyspark.sql import SparkSession

from csrm.config import TablesSettings
from csrm.errors import ConfigError
from csrm.night.leases import hold_leases
from csrm.night.publish import Publication
from csrm.night.published import published_markets
from csrm.night.settings import LEASE_SECONDS, LeaseSeconds
from csrm.operations.interventions import publish_intervention


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
        return publish_intervention(
            spark,
            config.tables,
            None,
            market=market,
            lease=leases[market],
            verdict="retired",
            metadata={"retired": market, "reason": reason},
            inputs={},
        )
