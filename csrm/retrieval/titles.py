"""Product titles that augment a query: from behaviour, else by its words, else by the translations of these."""

from collections.abc import Mapping
from functools import reduce

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from csrm.retrieval.lexical import bm25_scores
from csrm.retrieval.translations import TranslatedProducts, translated_scores
from csrm.schemas import PAIR_KEY, RETRIEVAL_TABLE
from csrm.spark.text import is_blank, text_key_udf

FUSED_PLACES = 100
"""Products of a query that each way of search brings to the fusion."""
RANK_CONSTANT = 60
_FUSION_UNITS = 1_000_000_000


def split_judged(
    behaviour_df: DataFrame, queries_df: DataFrame, judgments_df: DataFrame
) -> tuple[DataFrame, DataFrame]:
    """Behaviour rows without those of judged pairs, and those of judged pairs.

    A judged pair's behaviour may be where its label comes from; a title must not be chosen because of its label.
    Grades are not read.

    Args:
        behaviour_df: columns of `schemas.BEHAVIOUR`.
        queries_df: columns of `schemas.QUERIES`; a judged query counts for all queries of the same text.
        judgments_df: columns of `schemas.JUDGMENTS`.

    Returns:
        Two frames with the columns of `behaviour_df`: unjudged rows, judged rows.
    """
    judged_df = (
        judgments_df.select(*PAIR_KEY)
        .join(queries_df.select("market", "query_id", "query"), ["market", "query_id"], "inner")
        .select("market", "product_id", text_key_udf("query").alias("query_key"))
        .distinct()
    )
    keyed_df = behaviour_df.withColumn("query_key", text_key_udf("query"))
    on = ["market", "product_id", "query_key"]
    unjudged_df = keyed_df.join(judged_df, on, "left_anti").select(*behaviour_df.columns)
    return unjudged_df, keyed_df.join(judged_df, on, "left_semi").select(*behaviour_df.columns)


def behaviour_titles(
    behaviour_df: DataFrame, queries_df: DataFrame, catalog_df: DataFrame, num_titles: int, min_count: int
) -> DataFrame:
    """Titles of the products that were chosen most often after a query.

    A behaviour row belongs to every query of the same text, see csrm.text.text_key; counts of spellings that so become
    one are summed.

    Args:
        behaviour_df: columns of `schemas.BEHAVIOUR`.
        queries_df: columns of `schemas.QUERIES`.
        catalog_df: columns of `schemas.CATALOG`.
        num_titles: titles a query at most.
        min_count: smallest summed count that is used, >= 1.

    Returns:
        Columns of `schemas.RETRIEVAL_TABLE`, source "behaviour".
    """
    counts_df = (
        behaviour_df.groupBy("market", text_key_udf("query").alias("query_key"), "product_id")
        .agg(F.sum("count").alias("strength"))
        .where(F.col("strength") >= min_count)
    )
    keys_df = queries_df.where(~is_blank(F.col("query"))).select(
        "market", "query_id", text_key_udf("query").alias("query_key")
    )
    strengths_df = counts_df.join(keys_df, ["market", "query_key"], "inner")
    return _strongest_titles(strengths_df, catalog_df, num_titles, "behaviour")


def lexical_titles(
    product_terms_df: DataFrame,
    query_terms_df: DataFrame,
    catalog_df: DataFrame,
    num_titles: int,
    max_term_share: float,
) -> DataFrame:
    """Titles of the products that a query finds by its words, BM25 over its market's catalog. No label is read.

    Args:
        product_terms_df: as of `lexical.product_terms`.
        query_terms_df: as of `lexical.query_terms`, of the queries that need titles.
        catalog_df: columns of `schemas.CATALOG`.
        num_titles: titles a query at most.
        max_term_share: as in `lexical.bm25_scores`.

    Returns:
        Columns of `schemas.RETRIEVAL_TABLE`, source "lexical".
    """
    scores_df = bm25_scores(product_terms_df, query_terms_df, max_term_share)
    return _strongest_titles(scores_df.withColumnRenamed("bm25", "strength"), catalog_df, num_titles, "lexical")


def translated_titles(
    translated: TranslatedProducts, catalog_df: DataFrame, num_titles: int, max_term_share: float
) -> DataFrame:
    """Titles in other languages that the translations of a query's words find.

    Args:
        translated: as of `translations.translated_products`, of the queries that need titles.
        catalog_df: columns of `schemas.CATALOG`.
        num_titles: titles a query at most.
        max_term_share: as in `lexical.bm25_scores`.

    Returns:
        Columns of `schemas.RETRIEVAL_TABLE`, source "translated".
    """
    scores_df = translated_scores(translated, max_term_share)
    return _strongest_titles(scores_df.withColumnRenamed("bm25", "strength"), catalog_df, num_titles, "translated")


def fused_titles(sources: Mapping[str, DataFrame], catalog_df: DataFrame, num_titles: int) -> DataFrame:
    """Titles that several ways of search find, by reciprocal rank.

    A product's strength is the sum of 1 / (60 + rank) over the ways that have it among their first hundred of the
    query: Cormack, Clarke and Buettcher, "Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning
    Methods", 2009.

    Args:
        sources: name of each way to its market, query_id, product_id, strength (> 0), each pair once.
        catalog_df: columns of `schemas.CATALOG`.
        num_titles: titles a query at most.

    Returns:
        Columns of `schemas.RETRIEVAL_TABLE`. The source is the way that ranks the product best, of equals the first;
        similarity is relative to the query's strongest title of any way.
    """
    of_query = Window.partitionBy("market", "query_id").orderBy(F.desc("strength"), F.asc("product_id"))
    ranked = [
        strengths_df.withColumn("place", F.row_number().over(of_query))
        .where(F.col("place") <= FUSED_PLACES)
        .select(*PAIR_KEY, F.struct(F.col("place"), F.lit(number), F.lit(name).alias("source")).alias("found"))
        for number, (name, strengths_df) in enumerate(sources.items())
    ]
    part = F.round(_FUSION_UNITS / (RANK_CONSTANT + F.col("found.place"))).cast("long")
    fused_df = (
        reduce(DataFrame.unionByName, ranked)
        .groupBy(*PAIR_KEY)
        .agg((F.sum(part) / _FUSION_UNITS).alias("strength"), F.min("found")["source"].alias("source"))
    )
    return _strongest_titles(fused_df, catalog_df, num_titles, F.col("source"))


def _strongest_titles(
    strengths_df: DataFrame, catalog_df: DataFrame, num_titles: int, source: str | Column
) -> DataFrame:
    """Strongest titles of each query; equal titles once, ties by product_id, similarity relative to the strongest.

    Args:
        strengths_df: market, query_id, product_id, strength (> 0), each pair once.
        catalog_df: columns of `schemas.CATALOG`; products without a title are not used.
        num_titles: titles a query at most.
        source: its name, or a column of strengths_df that holds it.
    """
    titles_df = catalog_df.where(~is_blank(F.col("title"))).select("market", "product_id", "title")
    best_first = [F.desc("strength"), F.asc("product_id")]
    of_query = Window.partitionBy("market", "query_id")
    of_title = Window.partitionBy("market", "query_id", "title_key")
    return (
        strengths_df.join(titles_df, ["market", "product_id"], "inner")
        .withColumn("title_key", text_key_udf("title"))
        .withColumn("copy", F.row_number().over(of_title.orderBy(*best_first)))
        .where(F.col("copy") == 1)
        .withColumn("rank", F.row_number().over(of_query.orderBy(*best_first)))
        .where(F.col("rank") <= num_titles)
        .withColumn("similarity", (F.col("strength") / F.max("strength").over(of_query)).cast("double"))
        .withColumn("source", F.lit(source))  # which leaves a column as it is
        .select(*RETRIEVAL_TABLE.column_names)
    )
