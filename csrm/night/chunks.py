"""Scores on their way to scores_staging: chunk by chunk, so that a run that dies loses one chunk at most."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from csrm.night.plan import bucket
from csrm.night.publish import newest_scores
from csrm.schemas import PAIR_KEY, SCORES_STAGING
from csrm.spark.commits import Transaction, append_rows
from csrm.spark.tables import table_path


class Chunk(NamedTuple):
    """Pairs that are scored and staged together: those of a range of buckets."""

    number: int
    low: int
    high: int
    """Not in it."""
    num_pairs: int

    def holds(self, bucket: Column) -> Column:
        """Condition on a pair's or a query's bucket."""
        return (bucket >= self.low) & (bucket < self.high)


def next_chunk(number: int, low: int, pairs_in_bucket: np.ndarray, num_pairs: float) -> Chunk:
    """The chunk from one bucket on: at least one pair, and no more buckets than it takes to reach num_pairs.

    Args:
        number: of the chunk.
        low: its first bucket; it or a later one has pairs.
        pairs_in_bucket: pairs to score, shape (NUM_BUCKETS,).
        num_pairs: wanted.
    """
    reached = np.cumsum(pairs_in_bucket[low:])
    high = low + int(np.searchsorted(reached, max(min(num_pairs, reached[-1]), 1))) + 1
    return Chunk(number, low, high, int(reached[high - low - 1]))


def stage_scores(
    spark: SparkSession,
    tables_dir: str,
    app: str,
    pairs_in_bucket: np.ndarray,
    score: Callable[[Chunk], DataFrame],
    chunk_seconds: float,
    pairs_per_s: float,
) -> int:
    """Score chunk by chunk, one commit each.

    Args:
        spark: the session.
        tables_dir: folder of CSRM's tables.
        app: names this attempt of the run: a later attempt's first chunk holds other rows than this one's.
        pairs_in_bucket: pairs to score, shape (NUM_BUCKETS,).
        score: rows of scores_staging for a chunk.
        chunk_seconds: how long a chunk should take.
        pairs_per_s: expected; after the first chunk the measured rate counts.

    Returns:
        The number of chunks.
    """
    path = table_path(tables_dir, SCORES_STAGING)
    number = low = done = 0
    total, started = int(pairs_in_bucket.sum()), time.monotonic()
    while done < total:
        chunk = next_chunk(number, low, pairs_in_bucket, pairs_per_s * chunk_seconds)
        append_rows(score(chunk), SCORES_STAGING, path, Transaction(app, number))
        number, low, done = number + 1, chunk.high, done + chunk.num_pairs
        pairs_per_s = done / (time.monotonic() - started)
    return number


def in_chunk(df: DataFrame, chunk: Chunk) -> DataFrame:
    """Rows of a frame with market and query_id that belong to a chunk."""
    return df.where(chunk.holds(bucket()))


def canary_pairs(
    planned_df: DataFrame, published_df: DataFrame, staged_df: DataFrame, *, num_pairs: int, seed: str
) -> DataFrame:
    """A random sample of the pairs whose score was made before this attempt, the same for the same seed.

    Args:
        planned_df: columns of run_pairs, of one run.
        published_df: columns of relevance_scores, which hold the unchanged pairs.
        staged_df: columns of scores_staging, which hold the reused pairs (state staged).
        num_pairs: of each market and state, at most.
        seed: any text.

    Returns:
        market, query_id, product_id, pair_key, state (unchanged or staged), earlier_score.
    """
    key = [*PAIR_KEY, "pair_key", "state"]
    at_random = Window.partitionBy("market", "state").orderBy(F.xxhash64(*PAIR_KEY, F.lit(seed)))
    place = F.row_number().over(at_random)  # Spark keeps the first of each market and state only
    earlier_df = planned_df.where("state IN ('unchanged', 'staged')")
    sample_df = earlier_df.withColumn("place", place).where(F.col("place") <= num_pairs).select(*key)
    scores_df = published_df.withColumn("state", F.lit("unchanged")).unionByName(
        newest_scores(staged_df).withColumn("state", F.lit("staged")), allowMissingColumns=True
    )
    scores_df = scores_df.select(*key, F.col("relevance_score").alias("earlier_score"))
    return F.broadcast(sample_df).join(scores_df, on=key, how="inner")
