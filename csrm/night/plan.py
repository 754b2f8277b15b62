"""The pairs of a night: what is to be done with each, and the texts of those to score, laid out for scoring."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from csrm.errors import InputError
from csrm.night.settings import BYTES_PER_TITLE, FEWEST_PAIRS_PER_TASK, NUM_BUCKETS, PAIRS_PER_TASK
from csrm.schemas import PAIR_KEY
from csrm.scoring.prompts import MOST_CHARACTERS
from csrm.scoring.scorer import PAIR_COLUMNS
from csrm.spark.text import is_blank

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanCounts:
    """Pairs of a plan."""

    num_candidates: int
    num_unchanged: int
    num_reused: int
    """Pairs whose score waits in scores_staging already."""
    rejected: dict[str, int]
    """Reason to pairs."""
    to_score: np.ndarray
    """Pairs to score in each bucket, shape (NUM_BUCKETS,)."""

    @property
    def num_to_score(self) -> int:
        """Pairs to score in all buckets."""
        return int(self.to_score.sum())


def count_plan(planned_df: DataFrame, markets: Collection[str], candidates_path: str) -> PlanCounts:
    """Count the pairs of a plan.

    Args:
        planned_df: columns of run_pairs, of one run.
        markets: those of the run.
        candidates_path: where its candidates are, for the message.

    Raises:
        InputError: a market has no candidates.
    """
    counts = planned_df.groupBy("market", "state", "reason", "bucket").count().toPandas()
    found = set(counts["market"])
    if empty := sorted(set(markets) - found):
        raise InputError(
            f"input candidates at {candidates_path!r}: no pairs for the markets {empty}; it has {sorted(found)} of "
            f"{sorted(markets)}. Build their candidates, or take them out of 'markets'."
        )
    by_state = counts.groupby("state")["count"].sum()
    by_reason = counts.groupby("reason")["count"].sum()
    to_score = counts[counts["state"] == "to_score"]
    return PlanCounts(
        num_candidates=int(counts["count"].sum()),
        num_unchanged=int(by_state.get("unchanged", 0)),
        num_reused=int(by_state.get("staged", 0)),
        rejected={str(reason): int(count) for reason, count in by_reason.items()},
        to_score=np.bincount(to_score["bucket"], weights=to_score["count"], minlength=NUM_BUCKETS).astype(int),
    )


def with_retrieved_titles(queries_df: DataFrame, retrieval_df: DataFrame, broadcast_limit_mb: int) -> DataFrame:
    """Queries with `retrieved_titles array<string>`, by rank; empty where nothing was retrieved.

    The titles are broadcast, which passes them through the driver; where they are estimated (from their number and
    lengths) to be larger than broadcast_limit_mb, both sides are shuffled instead, and a log line says so.

    Args:
        queries_df: market, query_id and more; one row a query.
        retrieval_df: market, query_id, rank, title; its key (market, query_id, rank) is unique.
        broadcast_limit_mb: in MiB; 0 never broadcasts.
    """
    retrieved_df = retrieval_df.groupBy("market", "query_id").agg(
        F.transform(F.array_sort(F.collect_list(F.struct("rank", "title"))), lambda row: row["title"]).alias(
            "retrieved_titles"
        )
    )
    size_mb = _estimated_mb(retrieval_df)
    if size_mb <= broadcast_limit_mb:
        retrieved_df = F.broadcast(retrieved_df)
    else:
        logger.warning(
            "retrieved titles take about %.1f MB, over broadcast_limit_mb=%d: joined to the queries by a shuffle.",
            size_mb,
            broadcast_limit_mb,
        )
    titles = F.coalesce("retrieved_titles", F.array().cast("array<string>"))
    return queries_df.join(retrieved_df, on=["market", "query_id"], how="left").withColumn("retrieved_titles", titles)


def query_fields(queries_df: DataFrame, languages: Mapping[str, str]) -> DataFrame:
    """What a prompt says of each query: market, query_id, language, query, retrieved_titles.

    Args:
        queries_df: market, query_id, query, language, retrieved_titles; one row a query.
        languages: language of each market, for queries that name none.
    """
    market_language = F.create_map(*(F.lit(text) for item in sorted(languages.items()) for text in item))
    language = F.coalesce("language", market_language[F.col("market")])
    return queries_df.select("market", "query_id", language.alias("language"), "query", "retrieved_titles")


def plan_pairs(
    candidates_df: DataFrame,
    queries_df: DataFrame,
    catalog_df: DataFrame,
    published_df: DataFrame,
    staged_df: DataFrame,
    bundle_digest: str,
) -> DataFrame:
    """What is to be done with each candidate pair. Texts are hashed before the joins, which carry keys only.

    Args:
        candidates_df: market, query_id, product_id; one row a pair.
        queries_df: as of query_fields, one row a query.
        catalog_df: market, product_id, title, brand, category, attributes; one row a product.
        published_df: market, query_id, product_id, pair_key of relevance_scores.
        staged_df: the same of scores that wait in scores_staging; a pair may be there more than once.
        bundle_digest: of the bundle that scores.

    Returns:
        The columns of `schemas.RUN_PAIRS` but run_id.
    """
    pair = list(PAIR_KEY)
    query_keys_df = queries_df.select(
        "market", "query_id", is_blank(_beginning(F.col("query"))).alias("is_query_blank"), _query_key(bundle_digest)
    )
    product_keys_df = catalog_df.select(
        "market", "product_id", is_blank(_beginning(F.col("title"))).alias("is_title_blank"), product_key(bundle_digest)
    )
    published_df = published_df.select(*pair, F.col("pair_key").alias("published_key"))
    staged_df = staged_df.select(*pair, F.col("pair_key")).distinct().withColumn("is_staged", F.lit(True))
    reason = (
        F.when(F.col("query_key").isNull(), "no_query")
        .when(F.col("product_key").isNull(), "no_product")
        .when(F.col("is_query_blank"), "empty_query")
        .when(F.col("is_title_blank"), "empty_title")
    )
    state = (
        F.when(F.col("reason").isNotNull(), "rejected")
        .when(F.col("published_key") == F.col("pair_key"), "unchanged")
        .when(F.col("is_staged"), "staged")
        .otherwise("to_score")
    )
    return (
        candidates_df.select(*pair)
        .join(published_df, on=pair, how="left")
        .join(query_keys_df, on=["market", "query_id"], how="left")
        .join(product_keys_df, on=["market", "product_id"], how="left")
        .withColumn("reason", reason)
        .withColumn("pair_key", F.when(F.col("reason").isNull(), F.xxhash64("query_key", "product_key")))
        .join(staged_df, on=[*pair, "pair_key"], how="left")
        .select(*pair, "pair_key", state.alias("state"), "reason", bucket().alias("bucket"))
    )


def with_rejections(planned_df: DataFrame, published_df: DataFrame, staged_df: DataFrame) -> DataFrame:
    """Planned pairs, of which those that could not be scored are rejected now, with the reason that scoring found.

    A pair whose published score is still right keeps it as "unchanged": only its label probabilities were to come.

    Args:
        planned_df: columns of run_pairs.
        published_df: market, query_id, product_id, pair_key of relevance_scores.
        staged_df: columns of scores_staging. Where a pair has a score there too, the score counts.
    """
    key = [*PAIR_KEY, "pair_key"]
    failed_df = (
        staged_df.groupBy(*key)
        .agg(F.min("reason").alias("found_reason"), F.count("relevance_score").alias("num_scores"))
        .where((F.col("num_scores") == 0) & F.col("found_reason").isNotNull())
        .join(published_df.select(*key, F.lit(True).alias("is_published")), on=key, how="left")
    )
    is_waiting = F.col("state").isin("staged", "to_score")
    is_failed = is_waiting & F.col("found_reason").isNotNull()
    is_kept = is_failed & F.col("is_published").isNotNull()
    return (
        planned_df.join(failed_df, on=key, how="left")
        .withColumn("reason", F.when(is_failed & ~is_kept, F.col("found_reason")).otherwise(F.col("reason")))
        .withColumn("state", F.when(is_kept, "unchanged").when(is_failed, "rejected").otherwise(F.col("state")))
        .select(*planned_df.columns)
    )


def with_texts(pairs_df: DataFrame, queries_df: DataFrame, catalog_df: DataFrame) -> DataFrame:
    """Planned pairs with everything that a prompt is made of.

    Texts are cut to the MOST_CHARACTERS that a prompt knows before the joins: a product's go into all of its pairs, and
    the window over a query's pairs holds 4,096 rows in memory.

    Args:
        pairs_df: market, query_id, product_id, pair_key, of pairs whose query and product exist.
        queries_df: as of query_fields.
        catalog_df: as for plan_pairs.
    """
    texts = ("title", "brand", "category")
    products_df = catalog_df.select(
        "market", "product_id", *(_beginning(F.col(name)).alias(name) for name in texts), _short_attributes()
    )
    titles = F.transform("retrieved_titles", _beginning).alias("retrieved_titles")
    queries_df = queries_df.select("market", "query_id", "language", _beginning(F.col("query")).alias("query"), titles)
    return (
        pairs_df.select(*PAIR_KEY, "pair_key")
        .join(queries_df, on=["market", "query_id"], how="inner")
        .join(products_df, on=["market", "product_id"], how="inner")
        .select("query_id", "product_id", "pair_key", *PAIR_COLUMNS)
    )


def _beginning(text: Column) -> Column:
    return F.left(text, F.lit(MOST_CHARACTERS))


def _short_attributes() -> Column:
    is_long = F.exists(F.map_values("attributes"), lambda value: F.length(value) > MOST_CHARACTERS)
    cut = F.transform_values("attributes", lambda _, value: _beginning(value))
    return F.when(is_long, cut).otherwise(F.col("attributes")).alias("attributes")


def bucket() -> Column:
    """Part of the night that a query with all its pairs belongs to, from 0 to NUM_BUCKETS - 1."""
    return F.pmod(F.xxhash64("market", "query_id"), F.lit(NUM_BUCKETS)).cast("int")


def pair_key(bundle_digest: str) -> Column:
    """64-bit hash of PAIR_COLUMNS and the bundle: equal keys of one pair mean an equal score.

    Hashed is the text of JSON objects, which leave null fields out (so null differs from empty), with the attributes as
    entries in the order of their names (so their order in the map does not matter); one object for what the products
    of a query share, one for the product. Each holds the bundle's digest and goes through SHA-256: who writes a title
    cannot choose another one with the same key.
    """
    return F.xxhash64(_query_key(bundle_digest), product_key(bundle_digest))


def _query_key(bundle_digest: str) -> Column:
    fields = [F.col(name) for name in ("market", "language", "query", "retrieved_titles")]
    return _keyed_hash(fields, bundle_digest).alias("query_key")


def product_key(bundle_digest: str) -> Column:
    """64 bits that stand for what a prompt says of a product, from title, brand, category and attributes.

    Args:
        bundle_digest: of the bundle that scores; who writes titles does not know it.
    """
    attributes = F.array_sort(F.map_entries("attributes")).alias("attributes")
    return _keyed_hash([*map(F.col, ("title", "brand", "category")), attributes], bundle_digest).alias("product_key")


def _keyed_hash(fields: Sequence[Column], bundle_digest: str) -> Column:
    """64 bits of a SHA-256 over fields and the bundle's digest."""
    text = F.to_json(F.struct(*fields, F.lit(bundle_digest).alias("bundle_digest")))
    return F.xxhash64(F.sha2(text, 256))


def with_scoring_layout(pairs_df: DataFrame, num_partitions: int, products_per_chunk: int) -> DataFrame:
    """Pairs laid out for scoring: those of one query side by side, a head query's spread over partitions.

    Args:
        pairs_df: market, query_id, product_id and more.
        num_partitions: number of partitions, kept as it is (adaptive execution would merge them by bytes).
        products_per_chunk: products of one query that stay together; more go to further chunks.
    """
    by_query = Window.partitionBy("market", "query_id").orderBy("product_id")
    chunk = F.floor((F.row_number().over(by_query) - 1) / products_per_chunk)
    return (
        pairs_df.withColumn("chunk", chunk)
        .repartition(num_partitions, "market", "query_id", "chunk")
        .sortWithinPartitions(*PAIR_KEY)
        .drop("chunk")
    )


def num_scoring_partitions(num_pairs: int, num_cores: int) -> int:
    """Partitions for scoring. Progress is counted by finished partition, and the last ones leave cores idle.

    Small nights get 32 tasks for each core, but no fewer than 256 pairs each; large ones get 4,096 pairs each.

    Args:
        num_pairs: pairs to score, or a bound.
        num_cores: tasks that run at the same time.
    """
    small = min(32 * num_cores, math.ceil(num_pairs / FEWEST_PAIRS_PER_TASK))
    return max(num_cores, small, math.ceil(num_pairs / PAIRS_PER_TASK))


def _estimated_mb(retrieval_df: DataFrame) -> float:
    row = retrieval_df.agg(F.sum(F.octet_length("title") + BYTES_PER_TITLE).alias("num_bytes")).head()
    assert row is not None
    return (row["num_bytes"] or 0) / 2**20
