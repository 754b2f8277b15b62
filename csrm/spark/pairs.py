"""The rows to score: candidates joined with queries, retrieved titles and products; keyed and laid out for scoring."""

import logging
import math
from collections.abc import Mapping

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from csrm.schemas import REJECTED_PAIRS
from csrm.scoring import PAIR_COLUMNS
from csrm.spark.lexical import is_blank

logger = logging.getLogger(__name__)

_PAIRS_PER_TASK = 4_096
_FEWEST_PAIRS_PER_TASK = 256
_BYTES_PER_TITLE = 64  # what Spark adds to the text of a row: offsets, lengths, the array's share


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


def with_pair_fields(
    candidates_df: DataFrame, queries_df: DataFrame, catalog_df: DataFrame, languages: Mapping[str, str]
) -> DataFrame:
    """Candidates with everything that a prompt is made of, and `reason`: null, or why the pair cannot be scored.

    Args:
        candidates_df: market, query_id, product_id; one row a pair.
        queries_df: market, query_id, query, language, retrieved_titles; one row a query.
        catalog_df: market, product_id, title, brand, category, attributes; one row a product.
        languages: language of each market, for queries that name none.
    """
    market_language = F.create_map(*(F.lit(text) for item in sorted(languages.items()) for text in item))
    queries_df = queries_df.select(
        "market",
        "query_id",
        F.lit(True).alias("has_query"),
        "query",
        F.coalesce("language", market_language[F.col("market")]).alias("language"),
        "retrieved_titles",
    )
    catalog_df = catalog_df.select(
        "market", "product_id", F.lit(True).alias("has_product"), "title", "brand", "category", "attributes"
    )
    reason = (
        F.when(F.col("has_query").isNull(), "no_query")
        .when(F.col("has_product").isNull(), "no_product")
        .when(is_blank(F.col("query")), "empty_query")
        .when(is_blank(F.col("title")), "empty_title")
    )
    return (
        candidates_df.select("market", "query_id", "product_id")
        .join(queries_df, on=["market", "query_id"], how="left")
        .join(catalog_df, on=["market", "product_id"], how="left")
        .select("query_id", "product_id", *PAIR_COLUMNS, reason.alias("reason"))
    )


def filter_scorable(pair_fields_df: DataFrame, bundle_digest: str) -> DataFrame:
    """Pairs that can be scored, with `pair_key`."""
    return pair_fields_df.where(F.col("reason").isNull()).drop("reason").withColumn("pair_key", pair_key(bundle_digest))


def filter_rejected(pair_fields_df: DataFrame, run_id: str) -> DataFrame:
    """Pairs that cannot be scored, as rows of rejected_pairs."""
    return (
        pair_fields_df.where(F.col("reason").isNotNull())
        .withColumn("run_id", F.lit(run_id))
        .select(*REJECTED_PAIRS.column_names)
    )


def pair_key(bundle_digest: str) -> Column:
    """64-bit hash of PAIR_COLUMNS and the bundle: equal keys of one pair mean an equal score.

    Hashed is the text of a JSON object, which leaves null fields out (so null differs from empty), with the attributes
    as entries in the order of their names (so their order in the map does not matter).
    """
    fields = [F.col(name) for name in PAIR_COLUMNS if name != "attributes"]
    attributes = F.array_sort(F.map_entries("attributes")).alias("attributes")
    return F.xxhash64(F.to_json(F.struct(*fields, attributes, F.lit(bundle_digest).alias("bundle_digest"))))


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
        .sortWithinPartitions("market", "query_id", "product_id")
        .drop("chunk")
    )


def num_scoring_partitions(num_pairs: int, num_cores: int) -> int:
    """Partitions for scoring. Progress is counted by finished partition, and the last ones leave cores idle.

    Small nights get 32 tasks for each core, but no fewer than 256 pairs each; large ones get 4,096 pairs each.

    Args:
        num_pairs: pairs to score, or a bound.
        num_cores: tasks that run at the same time.
    """
    small = min(32 * num_cores, math.ceil(num_pairs / _FEWEST_PAIRS_PER_TASK))
    return max(num_cores, small, math.ceil(num_pairs / _PAIRS_PER_TASK))


def _estimated_mb(retrieval_df: DataFrame) -> float:
    row = retrieval_df.agg(F.sum(F.octet_length("title") + _BYTES_PER_TITLE).alias("num_bytes")).head()
    assert row is not None
    return (row["num_bytes"] or 0) / 2**20
