"""From staged scores to the published table: one commit a market that touches what changed."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from csrm.errors import LeaseError
from csrm.night.leases import Lease
from csrm.schemas import LABEL_PROBABILITIES, PAIR_KEY, RELEVANCE_SCORES
from csrm.spark.commits import merge_changes
from csrm.spark.tables import require_as_made, table_path, table_version

_SCORED = ("scored_at", "relevance_score", "predicted_grade", "bundle_digest")
_PROBABILITIES = LABEL_PROBABILITIES.name


@dataclass(frozen=True)
class Publication:
    """What a publish did."""

    version: int
    """Version of relevance_scores afterwards."""
    num_changes: Mapping[str, Mapping[str, int]]
    """Market to operation (insert, update, delete) to rows; empty where nothing changed."""

    @property
    def totals(self) -> dict[str, int]:
        """Operation to rows of all markets."""
        return dict(sum((Counter(counts) for counts in self.num_changes.values()), Counter[str]()))


def run_changes(planned_df: DataFrame, published_df: DataFrame, staged_df: DataFrame, run_id: str) -> DataFrame:
    """What turns the published scores of some markets into a run's.

    Pairs whose published row has the planned key stay untouched, but where it lacks label probabilities that were
    staged. Of several staged scores of a key the newest counts.

    Args:
        planned_df: columns of run_pairs: all pairs of one run in these markets.
        published_df: columns of relevance_scores, in these markets.
        staged_df: columns of scores_staging.
        run_id: of the run that publishes.

    Returns:
        The columns of relevance_scores, operation (insert, update, or delete, which has the key alone), old_score and
        old_grade. A planned pair without a staged score has a null score.
    """
    key = list(PAIR_KEY)
    old_df = published_df.select(
        *key,
        F.col("pair_key").alias("old_key"),
        F.col("relevance_score").alias("old_score"),
        F.col("predicted_grade").alias("old_grade"),
        F.col(_PROBABILITIES).isNull().alias("is_bare"),
    )
    is_new = F.col("state") != "unchanged"
    scorable_df = planned_df.where(F.col("reason").isNull()).select(
        *key, "pair_key", is_new.alias("is_new"), F.lit(True).alias("is_planned")
    )
    is_changed = F.col("is_planned").isNull() | F.col("old_key").isNull() | (F.col("old_key") != F.col("pair_key"))
    operation = (
        F.when(F.col("is_planned").isNull(), "delete").when(F.col("old_key").isNull(), "insert").otherwise("update")
    )
    return (
        scorable_df.join(old_df, on=key, how="full")
        .where(is_changed | (F.col("is_new") & F.col("is_bare")))
        .join(newest_scores(staged_df), on=[*key, "pair_key"], how="left")
        .where(is_changed | F.col(_PROBABILITIES).isNotNull())
        .select(
            *key,
            "pair_key",
            *_SCORED,
            _PROBABILITIES,
            F.lit(run_id).alias("run_id"),
            operation.alias("operation"),
            "old_score",
            "old_grade",
        )
    )


def newest_scores(staged_df: DataFrame) -> DataFrame:
    """The newest staged score of each pair and key, of those of one instant the largest; failed pairs are left out.

    Args:
        staged_df: columns of scores_staging.

    Returns:
        market, query_id, product_id, pair_key, scored_at, relevance_score, predicted_grade, bundle_digest,
        label_probabilities.
    """
    entries = F.map_entries(_PROBABILITIES).alias("entries")  # Spark compares no maps
    newest = F.max(F.struct(*_SCORED, entries)).alias("newest")
    newest_df = staged_df.where(F.col("reason").isNull()).groupBy(*PAIR_KEY, "pair_key").agg(newest)
    probabilities = F.map_from_entries("newest.entries").alias(_PROBABILITIES)
    return newest_df.select(*PAIR_KEY, "pair_key", *[f"newest.{name}" for name in _SCORED], probabilities)


def count_changes(changes_df: DataFrame) -> dict[str, dict[str, int]]:
    """Market to operation to rows; what has none is left out."""
    counts: dict[str, dict[str, int]] = {}
    for row in changes_df.groupBy("market", "operation").count().orderBy("market", "operation").collect():
        counts.setdefault(row["market"], {})[row["operation"]] = row["count"]
    return counts


def publish_changes(
    spark: SparkSession,
    tables_dir: str,
    changes_df: DataFrame,
    num_changes: Mapping[str, Mapping[str, int]],
    leases: Mapping[str, Lease],
    metadata: Mapping[str, str],
) -> Publication:
    """Apply changes to relevance_scores, one commit a market.

    Args:
        spark: the session.
        tables_dir: folder of CSRM's tables.
        changes_df: the columns of relevance_scores and operation; computed once for each market, so best persisted.
        num_changes: market to operation to rows of changes_df, without markets that have none.
        leases: of these markets.
        metadata: what the commits carry in the table's history, beside their market.

    Raises:
        InputError: a person took the change feed or a constraint from the table; nothing was published.
        LeaseError: another run took over a market; the message names the markets that were published before.
    """
    path = table_path(tables_dir, RELEVANCE_SCORES)
    require_as_made(spark, RELEVANCE_SCORES, path)
    version = None
    published: list[str] = []
    for market in sorted(num_changes):
        lease = leases[market]
        lease.require()
        market_df = changes_df.where(F.col("market") == market)
        version = merge_changes(market_df, RELEVANCE_SCORES, path, {"market": market}, metadata, lease.transaction)
        if version is None:
            raise LeaseError(
                f"market {market!r}: Delta refused the publish, for another run has taken over the market's lease. "
                f"Published before that: {published or 'nothing'}. Run it again: its scores are kept."
            )
        published.append(market)
    return Publication(table_version(spark, path) if version is None else version, num_changes)
