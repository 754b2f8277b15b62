"""What the queries of a market get by its published scores, and which of its products they reach."""

from dataclasses import dataclass

import pandas as pd
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql.pandas.functions import pandas_udf
from pyspark.sql.types import ArrayType, StringType

from csrm.operations.findings import MOST_CHARACTERS
from csrm.spark.text import search_terms_udf
from csrm.text import unknown_phrases

HEAD_SHARE, TORSO_SHARE = 0.5, 0.9
"""The most frequent queries up to the first share of all searches are head, up to the second torso, then tail."""


@dataclass(frozen=True)
class LaunchInputs:
    """Rows of one market, each with its language in lower case."""

    scores_df: DataFrame
    """query_id, product_id, relevance_score: the published ones."""
    catalog_df: DataFrame
    """Columns of `schemas.CATALOG`; products without a title are left out."""
    queries_df: DataFrame
    """Columns of `schemas.QUERIES`; blank ones are left out, frequency may be null."""
    uncovered_df: DataFrame | None = None
    """product_id, reason: as build_candidates wrote them."""
    scores_version: int = 0
    """Version of relevance_scores."""
    bundle_digests: tuple[str, ...] = ()
    """Digests of the bundles that made the scores; empty where there are none."""


def query_answers(inputs: LaunchInputs, threshold: float, num_best: int) -> DataFrame:
    """What each query of a market gets by the published scores. Equal scores go to the smaller product id.

    Args:
        inputs: rows of the market.
        threshold: score from which a product is good.
        num_best: good titles of a query, best first, that are looked at for their language.

    Returns:
        query_id, query, language, searches; score, product_id, title, category of the best product, null where no pair
        has a score; is_good; is_foreign: there are good products, and the best of these are all in another language
        than the query; titles: (title, language) of these; frequency_band (head, torso, tail or null), num_terms.
    """
    products_df = inputs.catalog_df.select(
        "product_id", "title", "category", F.col("language").alias("product_language")
    )
    of_query = Window.partitionBy("query_id").orderBy(F.desc("relevance_score"), F.asc("product_id"))
    is_good = F.col("relevance_score") >= threshold
    is_looked_at = is_good & (F.col("rank") <= num_best)
    best = F.struct("rank", "relevance_score", "product_id", "title", "category")
    shown = F.struct("rank", cut("title").alias("title"), "product_language")
    asked_df = inputs.queries_df.select(
        *("query_id", "query", "language", F.col("frequency").alias("searches")),
        F.size(search_terms_udf("query")).alias("num_terms"),
    )
    best_df = (
        inputs.scores_df.join(products_df, "product_id", "inner")
        .join(inputs.queries_df.select("query_id", "language"), "query_id", "inner")
        .withColumn("rank", F.row_number().over(of_query))
        .where((F.col("rank") == 1) | is_looked_at)
        .groupBy("query_id")
        .agg(
            F.min(best).alias("best"),
            F.count_if(is_looked_at).alias("num_good"),
            F.count_if(is_looked_at & (F.col("product_language") != F.col("language"))).alias("num_foreign"),
            F.array_sort(F.collect_list(F.when(is_looked_at, shown))).alias("titles"),
        )
    )
    by_frequency = Window.orderBy(F.desc("searches"), F.asc("query_id"))
    earlier = F.sum("searches").over(by_frequency.rowsBetween(Window.unboundedPreceding, -1))
    share = F.coalesce(earlier, F.lit(0)) / F.sum("searches").over(Window.partitionBy())
    band = F.when(share < HEAD_SHARE, "head").when(share < TORSO_SHARE, "torso").otherwise("tail")
    num_good = F.coalesce("num_good", F.lit(0))
    return asked_df.join(best_df, "query_id", "left").select(
        *("query_id", "query", "language", "searches", "num_terms"),
        F.when(F.col("searches").isNotNull(), band).alias("frequency_band"),
        F.col("best.relevance_score").alias("score"),
        *(F.col(f"best.{name}").alias(name) for name in ("product_id", "title")),
        F.nullif(F.trim(F.element_at(F.split("best.category", ">"), 1)), F.lit("")).alias("category"),
        (num_good > 0).alias("is_good"),
        ((num_good > 0) & (F.col("num_foreign") == num_good)).alias("is_foreign"),
        "titles",
    )


def query_segments(answers_df: DataFrame) -> DataFrame:
    """Queries and those without a good product, of each segment.

    Args:
        answers_df: as of `query_answers`.

    Returns:
        As `LaunchFindings.segments`. The category is the first level of the best product's; the length counts the
        terms that search cuts a query into.
    """
    num_terms = F.col("num_terms")
    length = (
        F.when(num_terms == 0, "no term")
        .when(num_terms == 1, "1 term")
        .when(num_terms == 2, "2 terms")
        .when(num_terms <= 4, "3 or 4 terms")
        .otherwise("5 or more terms")
    )
    segments = {
        "all": F.lit("all queries"),
        "category": F.coalesce(F.substring("category", 1, MOST_CHARACTERS), F.lit("none known")),
        "length": length,
        "language": F.substring("language", 1, MOST_CHARACTERS),
        "frequency": F.coalesce("frequency_band", F.lit("not known")),
    }
    dimensions = F.array(*(F.struct(F.lit(name).alias("name"), one.alias("value")) for name, one in segments.items()))
    is_without = ~F.col("is_good")
    return (
        answers_df.withColumn("segment", F.explode(dimensions))
        .groupBy(F.col("segment.name").alias("dimension"), F.col("segment.value").alias("value"))
        .agg(
            F.count("*").alias("num_queries"),
            F.count_if(is_without).alias("num_without"),
            F.count_if(F.col("score").isNull()).alias("num_unscored"),
            F.count_if("is_foreign").alias("num_foreign"),
            F.sum("searches").alias("searches"),
            F.sum(F.when(is_without, F.col("searches")).otherwise(F.col("searches") * 0)).alias("searches_without"),
        )
    )


@pandas_udf(ArrayType(StringType()))  # type: ignore[call-overload]  # the stubs want what is inferred
def _unknown_phrases_udf(texts: pd.Series, is_known: pd.Series) -> pd.Series:
    return pd.Series(list(map(unknown_phrases, texts, is_known)), texts.index, dtype=object)


def title_terms(catalog_df: DataFrame) -> DataFrame:
    """Terms that a title of the catalog has: term, each once."""
    return catalog_df.select(F.explode(search_terms_udf("title")).alias("term")).distinct()


def unknown_terms(queries_df: DataFrame, known_df: DataFrame) -> DataFrame:
    """Phrases of queries that no title has.

    Args:
        queries_df: query_id, query, searches.
        known_df: as of `title_terms`.

    Returns:
        term, num_queries, searches, query (one of most searches), query_id; see `csrm.text.unknown_phrases`.
    """
    terms_df = queries_df.select("query_id", F.posexplode(search_terms_udf("query")).alias("place", "term"))
    flags_df = (
        terms_df.join(known_df.withColumn("is_known", F.lit(True)), "term", "left")
        .groupBy("query_id")
        .agg(F.array_sort(F.collect_list(F.struct("place", F.coalesce("is_known", F.lit(False))))).alias("flags"))
        .select("query_id", F.transform("flags", lambda flag: flag["col2"]).alias("is_known"))
        .where(F.exists("is_known", lambda flag: ~flag))
    )
    example = F.struct((-F.coalesce("searches", F.lit(0))).alias("least"), F.col("query_id").alias("id"), "query")
    return (
        queries_df.join(flags_df, "query_id", "inner")
        .select("query_id", "query", "searches", F.explode(_unknown_phrases_udf("query", "is_known")).alias("term"))
        .groupBy("term")
        .agg(F.count("*").alias("num_queries"), F.sum("searches").alias("searches"), F.min(example).alias("example"))
        .select("term", "num_queries", "searches", F.col("example.query").alias("query"))
    )


def product_reach(inputs: LaunchInputs, threshold: float) -> DataFrame:
    """The best query of each product that has a title.

    Args:
        inputs: rows of the market.
        threshold: score from which a product is good.

    Returns:
        product_id, title, language, category, score and query (null where no pair has a score), reason: "reached",
        "low_score", or without a scored pair that of uncovered_products, else "no_scored_pair".
    """
    best = F.struct((-F.col("relevance_score")).alias("least"), F.col("query_id").alias("id"), "query")
    best_df = (
        inputs.scores_df.join(inputs.queries_df.select("query_id", "query"), "query_id", "inner")
        .groupBy("product_id")
        .agg(F.min(best).alias("best"), F.max("relevance_score").alias("score"))
    )
    reasons_df = inputs.uncovered_df
    if reasons_df is None:
        reasons_df = inputs.catalog_df.select("product_id", F.lit(None).cast("string").alias("reason")).limit(0)
    reason = (
        F.when(F.col("score") >= threshold, "reached")
        .when(F.col("score").isNotNull(), "low_score")
        .otherwise(F.coalesce("reason", F.lit("no_scored_pair")))
    )
    return (
        inputs.catalog_df.join(best_df, "product_id", "left")
        .join(reasons_df, "product_id", "left")
        .select(
            *("product_id", "title", "language", "category", "score"),
            F.col("best.query").alias("query"),
            reason.alias("reason"),
        )
    )


def cut(name: str) -> Column:
    """Beginning of a text, and how many characters it has: what `findings.Text` is made of."""
    text = F.col(name)
    return F.when(
        text.isNotNull(),
        F.struct(F.substring(text, 1, MOST_CHARACTERS).alias("beginning"), F.length(text).alias("num_characters")),
    )
