"""BM25 of (query, product) pairs over a catalog. All of it is native Spark SQL but the cutting of text into terms."""

from collections.abc import Sequence

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from csrm.schemas import PAIR_KEY
from csrm.spark.text import is_blank, search_terms_udf

_UNITS = 1_000_000_000


def product_terms(catalog_df: DataFrame) -> DataFrame:
    """Terms that each product is found by: those of its title, brand, category and attribute values.

    Products without a title are left out: there is nothing to show, to augment with, or to score. Attribute names are
    left out: they are the same for all products of a category. Persist the result: BM25 reads it more than once.

    Returns:
        market, product_id, terms (array); one row a product, hash-partitioned by product.
    """
    return (
        catalog_df.where(~is_blank(F.col("title")))
        .select("market", "product_id", product_text().alias("text"))
        .repartition("market", "product_id")
        .select("market", "product_id", search_terms_udf("text").alias("terms"))
    )


def product_text() -> Column:
    """Text that a product is found by: title, brand, category and attribute values."""
    return F.concat_ws(" ", "title", "brand", "category", F.map_values("attributes"))


def query_terms(queries_df: DataFrame) -> DataFrame:
    """Terms of each query: market, query_id, terms (array); one row a query. Persist the result as that of products."""
    return queries_df.select("market", "query_id", search_terms_udf("query").alias("terms"))


def bm25_scores(
    product_terms_df: DataFrame,
    query_terms_df: DataFrame,
    max_term_share: float = 1.0,
    k1: float = 1.2,
    b: float = 0.75,
) -> DataFrame:
    """BM25 of all pairs that share a term, with the statistics of each market.

    The variant is Lucene's: a pair's score is the sum over the query's terms t, repetitions counted, of

        idf(t) * tf / (tf + k1 * (1 - b + b * length / mean_length))    with
        idf(t) = ln(1 + (N - n(t) + 0.5) / (n(t) + 0.5))

    for a market of N products, n(t) of them with t, tf times in this one. Robertson and Zaragoza, "The Probabilistic
    Relevance Framework: BM25 and Beyond", 2009; Lucene's are this idf, which is never negative, and the missing factor
    k1 + 1, which changes no order. As there, products without any term are not counted.

    A term that half of the products have makes half of them match each of its queries, at almost no gain in order:
    `max_term_share` bounds that, and with it the size of the join and its skew.

    Args:
        product_terms_df: as of `product_terms`.
        query_terms_df: as of `query_terms`.
        max_term_share: a query's terms that more than this share of its market's products have are ignored, but not
            its rarest one, so that every query with known terms finds something; 1.0 ignores none.
        k1: how slowly repetitions of a term saturate, >= 0.
        b: how much long products are held back, in [0, 1].

    Returns:
        market, query_id, product_id, bm25 (double, > 0); each pair once. Terms are added in whole billionths, so that
        the sum, and with it the order of products, does not depend on how the rows were distributed.
    """
    document_frequency_df = (
        product_terms_df.select("market", F.explode(F.array_distinct("terms")).alias("term"))
        .groupBy("market", "term")
        .agg(F.count("*").alias("num_with_term"))
    )
    postings_df = (
        product_terms_df.withColumn("length", F.size("terms"))
        .select("market", "product_id", "length", F.explode("terms").alias("term"))
        .groupBy("market", "product_id", "length", "term")
        .agg(F.count("*").alias("tf"))
    )
    return bm25_of_postings(
        postings_df,
        query_terms_df,
        statistics_df=collection_statistics(product_terms_df, ["market"]),
        document_frequency_df=document_frequency_df,
        collection=["market"],
        max_term_share=max_term_share,
        k1=k1,
        b=b,
    )


def collection_statistics(product_terms_df: DataFrame, collection: Sequence[str]) -> DataFrame:
    """Number and mean length in terms of each collection's products that have terms: num_products, mean_length.

    Args:
        product_terms_df: terms (array), and the collection's columns; one row a product.
        collection: columns that name a collection of products, such as market.
    """
    return (
        product_terms_df.where(F.size("terms") > 0)
        .groupBy(*collection)
        .agg(F.count("*").alias("num_products"), F.avg(F.size("terms")).alias("mean_length"))
    )


def bm25_of_postings(
    postings_df: DataFrame,
    query_terms_df: DataFrame,
    *,
    statistics_df: DataFrame,
    document_frequency_df: DataFrame,
    collection: Sequence[str],
    max_term_share: float = 1.0,
    k1: float = 1.2,
    b: float = 0.75,
) -> DataFrame:
    """BM25 as of `bm25_scores`, over collections of products that are given as postings.

    Args:
        postings_df: the collection's columns, product_id, length, term, tf (> 0); each (product, term) once.
        query_terms_df: the collection's columns, query_id, terms (array).
        statistics_df: as of `collection_statistics`.
        document_frequency_df: the collection's columns, term, num_with_term.
        collection: columns that name a collection, market among them; a query is compared with the products of its own.
        max_term_share: see `bm25_scores`.
        k1: see `bm25_scores`.
        b: see `bm25_scores`.

    Returns:
        As `bm25_scores`.
    """
    idf = F.log1p((F.col("num_products") - F.col("num_with_term") + 0.5) / (F.col("num_with_term") + 0.5))
    rarest = F.min("num_with_term").over(Window.partitionBy("market", "query_id"))
    query_weights_df = (
        query_terms_df.select(*collection, "query_id", F.explode("terms").alias("term"))
        .join(document_frequency_df, [*collection, "term"], "inner")
        .join(F.broadcast(statistics_df), list(collection), "inner")
        .withColumn("rarest", rarest)
        .where(
            (F.col("num_with_term") <= max_term_share * F.col("num_products"))
            | (F.col("num_with_term") == F.col("rarest"))
        )
        .select(*collection, "query_id", "term", idf.alias("weight"), "mean_length")
    )
    length_factor = k1 * (1 - b + b * F.col("length") / F.col("mean_length"))
    part = F.col("weight") * F.col("tf") / (F.col("tf") + length_factor)
    return (
        postings_df.join(query_weights_df, [*collection, "term"], "inner")
        .groupBy(*PAIR_KEY)
        .agg((F.sum(F.round(part * _UNITS).cast("long")) / _UNITS).alias("bm25"))
        .where(F.col("bm25") > 0)
    )
