"""Pairs to score: for each query its best products, for each product its best queries, and pairs that were given."""

from collections.abc import Mapping

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from csrm.retrieval.lexical import product_terms
from csrm.retrieval.translations import with_language
from csrm.schemas import CANDIDATES, PAIR_KEY, UNCOVERED_PRODUCTS
from csrm.spark.text import is_blank


def best_pairs(strengths_df: DataFrame, products_per_query: int, queries_per_product: int) -> DataFrame:
    """Each query's best products together with each product's best queries.

    Both ranks are put on one and the same frame, so strengths are computed once. Ties go to the smaller id.

    Args:
        strengths_df: market, query_id, product_id, strength (BM25, a cosine, ...: more is better), each pair once.
        products_per_query: best products of a query, >= 0.
        queries_per_product: best queries of a product, >= 0.

    Returns:
        Columns of `schemas.CANDIDATES`; source is "query" for the first kind, "product" for what only the second adds.
    """
    is_best_product = F.col("product_rank") <= products_per_query
    return (
        _ranked(strengths_df, products_per_query, queries_per_product)
        .withColumn("source", F.when(is_best_product, "query").otherwise("product"))
        .select(*CANDIDATES.column_names)
    )


def strongest_pairs(strengths_df: DataFrame, products_per_query: int, *, queries_per_product: int = 0) -> DataFrame:
    """The pairs of best_pairs with their strengths: where these are read more than once, few rows need to be kept."""
    return _ranked(strengths_df, products_per_query, queries_per_product).select(*PAIR_KEY, "strength")


def _ranked(strengths_df: DataFrame, products_per_query: int, queries_per_product: int) -> DataFrame:
    of_query = Window.partitionBy("market", "query_id").orderBy(F.desc("strength"), F.asc("product_id"))
    is_kept = F.col("product_rank") <= products_per_query
    if queries_per_product:
        of_product = Window.partitionBy("market", "product_id").orderBy(F.desc("strength"), F.asc("query_id"))
        strengths_df = strengths_df.withColumn("query_rank", F.row_number().over(of_product))
        is_kept |= F.col("query_rank") <= queries_per_product
    return strengths_df.withColumn("product_rank", F.row_number().over(of_query)).where(is_kept)


def with_pairs_of(pairs_df: DataFrame, others_df: DataFrame, source: str) -> DataFrame:
    """Pairs united with those that another source finds; pairs that are in both keep theirs.

    Args:
        pairs_df: columns of `schemas.CANDIDATES`.
        others_df: as of `best_pairs`, each pair once.
        source: "translated" or "semantic".

    Returns:
        Columns of `schemas.CANDIDATES`; source is the new one for what only the second frame has.
    """
    return (
        pairs_df.unionByName(others_df.withColumn("source", F.lit(source)))
        .groupBy(*PAIR_KEY)
        .agg(F.min_by("source", F.col("source") == source).alias("source"))
        .select(*CANDIDATES.column_names)
    )


def with_given_pairs(pairs_df: DataFrame, given_df: DataFrame) -> DataFrame:
    """Pairs united with given ones, which win: their source is "given".

    A given pair whose query or product does not exist is kept: the scoring job rejects it with the reason.

    Args:
        pairs_df: columns of `schemas.CANDIDATES`.
        given_df: market, query_id, product_id, each pair once.
    """
    given_df = given_df.withColumn("source", F.lit("given")).select(*CANDIDATES.column_names)
    return pairs_df.join(given_df, list(CANDIDATES.key), "left_anti").unionByName(given_df)


def uncovered_products(
    catalog_df: DataFrame,
    queries_df: DataFrame,
    query_terms_df: DataFrame,
    candidates_df: DataFrame,
    translated_df: DataFrame | None = None,
    is_semantic: bool = False,
) -> DataFrame:
    """Products that no candidate with a query text names, with the reason.

    Given pairs whose query does not exist or is blank are never scored, so they cover no product.

    Args:
        catalog_df: columns of `schemas.CATALOG`.
        queries_df: columns of `schemas.QUERIES`.
        query_terms_df: as of `lexical.query_terms`.
        candidates_df: columns of `schemas.CANDIDATES`.
        translated_df: market and product_id of products that have a translation of a query's term; None where nothing
            was translated.
        is_semantic: whether products were also searched by an encoder.

    Returns:
        Columns of `schemas.UNCOVERED_PRODUCTS`. The reason is "no_title"; "no_shared_term": none of its terms is in any
        query of its market, nor translates a term that is; "too_dissimilar": the same, and no query is near it by the
        encoder that was asked too; or "not_among_best": it shares terms, but only such as are
        too frequent to count (`max_term_share`), or no queries per product were asked for.
    """
    key = ["market", "product_id"]
    with_text_df = queries_df.where(~is_blank(F.col("query")))
    covering_df = candidates_df.join(with_text_df, ["market", "query_id"], "left_semi")
    uncovered_df = catalog_df.join(covering_df, key, "left_anti")
    vocabulary_df = query_terms_df.select("market", F.explode("terms").alias("term")).distinct()
    sharing_df = (
        product_terms(uncovered_df)
        .select(*key, F.explode("terms").alias("term"))
        .join(vocabulary_df, ["market", "term"], "left_semi")
        .select(*key)
    )
    if translated_df is not None:
        sharing_df = sharing_df.unionByName(translated_df.select(*key))
    sharing_df = sharing_df.distinct().withColumn("shares_term", F.lit(True))
    reason = (
        F.when(is_blank(F.col("title")), "no_title")
        .when(F.col("shares_term"), "not_among_best")
        .otherwise("too_dissimilar" if is_semantic else "no_shared_term")
    )
    return (
        uncovered_df.join(sharing_df, key, "left").withColumn("reason", reason).select(*UNCOVERED_PRODUCTS.column_names)
    )


def coverage_by_language(
    catalog_df: DataFrame, queries_df: DataFrame, candidates_df: DataFrame, markets: Mapping[str, str]
) -> DataFrame:
    """How many products of each language are in a candidate with a query text, by what found the first of these.

    Args:
        catalog_df: columns of `schemas.CATALOG`.
        queries_df: columns of `schemas.QUERIES`.
        candidates_df: columns of `schemas.CANDIDATES`.
        markets: market to language, for products that name none.

    Returns:
        market, language (in lower case), products, words (in a pair that words found), translated (in none of these,
        but in one that translations found), semantic (in none of these, but in one that an encoder found), given (only
        in given pairs), uncovered (in none).
    """
    key = ["market", "product_id"]
    with_text_df = queries_df.where(~is_blank(F.col("query")))
    source = F.col("source")
    sources_df = (
        candidates_df.join(with_text_df, ["market", "query_id"], "left_semi")
        .groupBy(*key)
        .agg(
            F.bool_or(source.isin("query", "product")).alias("has_words"),
            F.bool_or(source == "translated").alias("has_translated"),
            F.bool_or(source == "semantic").alias("has_semantic"),
        )
    )
    found_by = (
        F.when(F.col("has_words"), "words")
        .when(F.col("has_translated"), "translated")
        .when(F.col("has_semantic"), "semantic")
        .when(F.col("has_words").isNotNull(), "given")
        .otherwise("uncovered")
    )
    return (
        with_language(catalog_df, markets)
        .join(sources_df, key, "left")
        .withColumn("found_by", found_by)
        .groupBy("market", "language")
        .agg(
            F.count("*").alias("products"),
            *(
                F.count_if(F.col("found_by") == name).alias(name)
                for name in ("words", "translated", "semantic", "given", "uncovered")
            ),
        )
    )
