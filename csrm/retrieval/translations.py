"""Words across languages: products in another language, under the words of a query that translate theirs.

Parallel text says which words translate which, without a model: words that often stand in both sides of a text. All
translations of one word count as one word, as in Pirkola's structured queries: "The Effects of Query Structure and
Dictionary Setups in Dictionary-Based Cross-Language Information Retrieval", 1998. They are weighted as in Darwish and
Oard's: "Probabilistic Structured Query Methods", 2003.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from csrm.errors import InputError
from csrm.retrieval.lexical import bm25_of_postings, collection_statistics, product_text
from csrm.spark.session import persisted
from csrm.spark.text import is_blank, search_terms_udf

MIN_ASSOCIATION = 0.1
"""Smallest association of a term with a translation, in (0, 1]."""
MAX_TERMS = 24
"""Terms of a text, on either side. In longer texts, most terms that stand together do not translate each other."""
_UNITS = 1_000_000_000


@dataclass(frozen=True)
class TranslatedProducts:
    """Products in another language than queries of their market, under the terms of these queries."""

    postings_df: DataFrame
    """market, language (of queries), product_id, length, term (of a query), tf (> 0); each (product, term) once."""
    statistics_df: DataFrame
    """market, language (of queries), num_products, mean_length: of all products in other languages."""
    asked_df: DataFrame
    """market, query_id, language, terms (array); one row a query."""


def with_language(df: DataFrame, markets: Mapping[str, str]) -> DataFrame:
    """Rows with their language in lower case, that of their market where they name none.

    Args:
        df: market, language and other columns.
        markets: market to language.
    """
    of_market = F.create_map(*(F.lit(text) for item in sorted(markets.items()) for text in item))
    return df.withColumn("language", F.lower(F.coalesce("language", of_market[F.col("market")])))


def foreign_products(catalog_df: DataFrame, queries_df: DataFrame, markets: Mapping[str, str]) -> DataFrame:
    """Products whose language is another one than that of queries of their market, once for each such language.

    Args:
        catalog_df: columns of `schemas.CATALOG`.
        queries_df: columns of `schemas.QUERIES`.
        markets: market to language.

    Returns:
        market, language (of the queries), product_language, product_id, text; languages are in lower case.
    """
    asked_df = with_language(queries_df.where(~is_blank(F.col("query"))), markets)
    languages_df = asked_df.select("market", F.col("language").alias("query_language")).distinct()
    return (
        with_language(catalog_df.where(~is_blank(F.col("title"))), markets)
        .join(F.broadcast(languages_df), "market", "inner")
        .where(F.col("language") != F.col("query_language"))
        .select(
            "market",
            F.col("query_language").alias("language"),
            F.col("language").alias("product_language"),
            "product_id",
            product_text().alias("text"),
        )
    )


def phrases(parallel_df: DataFrame, pairs: list[tuple[str, str]]) -> DataFrame:
    """Texts of split train with their translations, as terms. Texts without a term and long ones are left out.

    Args:
        parallel_df: columns of `schemas.PARALLEL_TEXT`; a text serves both directions.
        pairs: languages to translate from and to, in lower case.

    Returns:
        language, product_language, terms, translations (arrays of distinct terms); each row once.
    """
    source = F.struct(F.lower("source_language").alias("language"), F.col("source_text").alias("text"))
    target = F.struct(F.lower("target_language").alias("language"), F.col("target_text").alias("text"))
    directions = F.array(
        F.struct(source.alias("source"), target.alias("target")),
        F.struct(target.alias("source"), source.alias("target")),
    )
    is_wanted = F.lit(False)
    for language, other in pairs:
        is_wanted |= (F.col("language") == language) & (F.col("product_language") == other)
    return (
        parallel_df.where(F.coalesce("split", F.lit("train")) == "train")
        .select(F.explode(directions).alias("direction"))
        .select(
            F.col("direction.source.language").alias("language"),
            F.col("direction.target.language").alias("product_language"),
            F.col("direction.source.text").alias("source_text"),
            F.col("direction.target.text").alias("target_text"),
        )
        .where(is_wanted)
        .select(
            "language",
            "product_language",
            F.array_sort(F.array_distinct(search_terms_udf("source_text"))).alias("terms"),
            F.array_sort(F.array_distinct(search_terms_udf("target_text"))).alias("translations"),
        )
        .where(_has_few(F.col("terms")) & _has_few(F.col("translations")))
        .distinct()
    )


def _has_few(terms: Column) -> Column:
    return (F.size(terms) >= 1) & (F.size(terms) <= MAX_TERMS)


def term_translations(phrases_df: DataFrame, vocabulary_df: DataFrame) -> DataFrame:
    """Translations of terms, weighted by how exclusively both stand in the same texts.

    The weight is Dice's coefficient, 2 n(s, t) / (n(s) + n(t)), where n counts the texts with a term s, those with t
    among the terms of the translation, and those with both. Two terms that only ever stand together have 1.

    Args:
        phrases_df: as of `phrases`. Persist it: it is read three times.
        vocabulary_df: language and term, each pair once: terms to translate.

    Returns:
        language, product_language, term, translation, weight in [MIN_ASSOCIATION, 1].
    """
    languages = ["language", "product_language"]
    both_df = (
        phrases_df.select(*languages, F.explode("terms").alias("term"), "translations")
        .join(vocabulary_df, ["language", "term"], "left_semi")
        .select(*languages, "term", F.explode("translations").alias("translation"))
        .groupBy(*languages, "term", "translation")
        .agg(F.count("*").alias("num_both"))
    )
    terms_df = _counts(phrases_df, "terms", "term", "num_with_term")
    translations_df = _counts(phrases_df, "translations", "translation", "num_with_translation")
    weight = 2 * F.col("num_both") / (F.col("num_with_term") + F.col("num_with_translation"))
    return (
        both_df.join(terms_df, [*languages, "term"], "inner")
        .join(translations_df, [*languages, "translation"], "inner")
        .select(*languages, "term", "translation", weight.alias("weight"))
        .where(F.col("weight") >= MIN_ASSOCIATION)
    )


def _counts(phrases_df: DataFrame, terms: str, term: str, name: str) -> DataFrame:
    languages = ["language", "product_language"]
    exploded_df = phrases_df.select(*languages, F.explode(terms).alias(term))
    return exploded_df.groupBy(*languages, term).agg(F.count("*").alias(name))


def translated_postings(product_terms_df: DataFrame, translations_df: DataFrame, asked_df: DataFrame) -> DataFrame:
    """Products under the terms of queries that theirs translate.

    A term occurs in a product as often as its translations do, each with its weight.

    Args:
        product_terms_df: market, language (of queries), product_language, product_id, terms (array).
        translations_df: as of `term_translations`.
        asked_df: market, query_id, language, terms (array).

    Returns:
        As `TranslatedProducts.postings_df`, of terms that a query of the market has. Weights are added in whole
        billionths, so that sums do not depend on how the rows were distributed.
    """
    asked_terms_df = asked_df.select("market", "language", F.explode("terms").alias("term")).distinct()
    return (
        product_terms_df.withColumn("length", F.size("terms"))  # before: else each term's row carries them all
        .select(
            *("market", "language", "product_language", "product_id", "length"),
            F.explode("terms").alias("translation"),
        )
        .join(translations_df, ["language", "product_language", "translation"], "inner")
        .join(asked_terms_df, ["market", "language", "term"], "left_semi")
        .groupBy("market", "language", "product_id", "length", "term")
        .agg((F.sum(F.round(F.col("weight") * _UNITS).cast("long")) / _UNITS).alias("tf"))
    )


@contextmanager
def translated_products(
    catalog_df: DataFrame, queries_df: DataFrame, parallel_df: DataFrame | None, markets: Mapping[str, str]
) -> Iterator[TranslatedProducts | None]:
    """Index the products of other languages by the terms of the queries; it is kept while the block runs.

    Args:
        catalog_df: columns of `schemas.CATALOG`.
        queries_df: columns of `schemas.QUERIES`.
        parallel_df: columns of `schemas.PARALLEL_TEXT`; only its texts of split train are used. None: there is none.
        markets: market to language, for rows that name none. Languages are compared as written, but for case.

    Yields:
        The index; None without parallel text, or where every product is in the language of its market's queries.

    Raises:
        InputError: there are such products, and no text translates between their languages and those of the queries.
    """
    if parallel_df is None:
        yield None
        return
    products_df = foreign_products(catalog_df, queries_df, markets)
    rows = products_df.select("language", "product_language").distinct().collect()
    pairs = sorted((row["language"], row["product_language"]) for row in rows)
    if not pairs:
        yield None
        return
    with ExitStack() as kept:
        phrases_df = kept.enter_context(persisted(phrases(parallel_df, pairs)))
        if phrases_df.isEmpty():
            listed = ", ".join(f"{language} and {other}" for language, other in pairs)
            found = parallel_df.select(F.array_sort(F.array("source_language", "target_language")).alias("languages"))
            there = sorted({" and ".join(row["languages"]) for row in found.distinct().collect()})
            raise InputError(
                f"input parallel_text: expected short texts of split train in {listed}, for products that are listed "
                f"in another language than the queries; got none. It has texts in: {', '.join(there) or 'none'}. "
                "Name the languages as 'markets' and the catalog do, or leave 'inputs.parallel_text' out."
            )
        asked_df = kept.enter_context(persisted(_asked(queries_df, markets)))
        terms_df = kept.enter_context(persisted(_with_terms(products_df)))
        vocabulary_df = asked_df.select("language", F.explode("terms").alias("term")).distinct()
        translations_df = term_translations(phrases_df, vocabulary_df)
        postings_df = kept.enter_context(persisted(translated_postings(terms_df, translations_df, asked_df)))
        yield TranslatedProducts(postings_df, collection_statistics(terms_df, ["market", "language"]), asked_df)


def _asked(queries_df: DataFrame, markets: Mapping[str, str]) -> DataFrame:
    return with_language(queries_df, markets).select(
        "market", "query_id", "language", search_terms_udf("query").alias("terms")
    )


def _with_terms(products_df: DataFrame) -> DataFrame:
    return products_df.repartition("market", "product_id").select(
        "market", "language", "product_language", "product_id", search_terms_udf("text").alias("terms")
    )


def translated_scores(translated: TranslatedProducts, max_term_share: float = 1.0) -> DataFrame:
    """BM25 of the queries and the products of other languages that their words' translations find.

    Args:
        translated: as of `translated_products`.
        max_term_share: as in `lexical.bm25_scores`; a term has the products that have any of its translations.

    Returns:
        market, query_id, product_id, bm25 (double, > 0); each pair once.
    """
    document_frequency_df = translated.postings_df.groupBy("market", "language", "term").agg(
        F.count("*").alias("num_with_term")
    )
    return bm25_of_postings(
        translated.postings_df,
        translated.asked_df,
        statistics_df=translated.statistics_df,
        document_frequency_df=document_frequency_df,
        collection=["market", "language"],
        max_term_share=max_term_share,
    )
