"""Queries of live markets in the language of a market that is to be opened, and what they would get there."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import pandas as pd
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.functions import pandas_udf

from csrm.errors import InputError
from csrm.retrieval.translations import with_language
from csrm.schemas import LAUNCH_QUERIES
from csrm.scoring.phrasebook import MAX_PHRASE_CHARACTERS, Phrasebook
from csrm.scoring.prompts import Translation
from csrm.spark.inputs import Input
from csrm.spark.text import is_blank, search_terms_udf, text_key_udf

NUM_TRANSLATIONS = 6
"""Translations of a live query that are tried."""
_NO_SPACES = r"[\p{IsHan}\p{IsHiragana}\p{IsKatakana}]"
_PHRASES_TEXT = "struct<texts: array<string>, rest: string>"


@dataclass(frozen=True)
class LiveQueries:
    """Queries of live markets, and what puts them into the language of another one."""

    queries_df: DataFrame
    """Columns of `schemas.QUERIES`, with their language in lower case; none is blank."""
    translations_df: DataFrame | None
    """Columns of `schemas.QUERY_TRANSLATIONS`."""
    phrasebook: Phrasebook | None
    """As of `read_phrases`."""


def live_queries(inputs: Mapping[str, Input], live_markets: Mapping[str, str], language: str) -> LiveQueries:
    """Queries of live markets, and what puts them into a language.

    Args:
        inputs: live_queries, and query_translations or parallel_text, as of read_inputs.
        live_markets: market to language.
        language: of the market that is to be opened.

    Raises:
        InputError: no live query, or nothing to put one into the language.
    """
    queries_df = with_language(inputs["live_queries"].df.where(~is_blank(F.col("query"))), live_markets)
    if queries_df.isEmpty():
        raise InputError(
            f"input live_queries at {inputs['live_queries'].path!r}: expected queries of the markets "
            f"{sorted(live_markets)}, got none. Are 'live_markets' spelled as in the table?"
        )
    translations_df = inputs["query_translations"].df if "query_translations" in inputs else None
    parallel_df = inputs["parallel_text"].df if "parallel_text" in inputs else None
    others = {market: source for market, source in live_markets.items() if source.lower() != language.lower()}
    phrasebook = None if parallel_df is None or not others else read_phrases(parallel_df, others, language)
    return LiveQueries(queries_df, translations_df, phrasebook)


def read_phrases(parallel_df: DataFrame, sources: Mapping[str, str], language: str) -> Phrasebook:
    """Phrases of split train that put text of live markets into a market's language, in memory of the driver.

    Args:
        parallel_df: columns of `schemas.PARALLEL_TEXT`; a text serves both directions.
        sources: live market to language.
        language: of the market.

    Raises:
        InputError: there are none.
    """
    wanted, target = sorted({source.lower() for source in sources.values()}), language.lower()
    ways = [("source", "target"), ("target", "source")]
    phrases_df = reduce(
        DataFrame.unionByName,
        (
            parallel_df.where(F.coalesce("split", F.lit("train")) == "train").select(
                F.lower(f"{one}_language").alias("from_language"),
                F.lower(f"{other}_language").alias("to_language"),
                F.col(f"{one}_text").alias("phrase"),
                F.col(f"{other}_text").alias("translation"),
            )
            for one, other in ways
        ),
    )
    is_short = F.length("phrase") <= MAX_PHRASE_CHARACTERS
    rows = (
        phrases_df.where(is_short & F.col("from_language").isin(wanted) & (F.col("to_language") == target))
        .where(~is_blank(F.col("phrase")) & ~is_blank(F.col("translation")))
        .distinct()
        .orderBy("from_language", "phrase", "translation")
        .collect()
    )
    if not rows:
        found = phrases_df.select("from_language", "to_language").distinct().collect()
        there = sorted(f"{row['from_language']} to {row['to_language']}" for row in found)
        raise InputError(
            f"input parallel_text: expected short texts of split train from {', '.join(wanted)} to {target}, got none. "
            f"It has texts from {', '.join(there) or 'nothing'}. Name the languages as 'markets' and 'live_markets' "
            "do, or give inputs.query_translations."
        )
    return Phrasebook([[Translation(*row) for row in rows]])


def translated_queries(live: LiveQueries, language: str) -> DataFrame:
    """Queries of live markets in the language of a market: as given, as they are, or phrase by phrase.

    One that is in the language already stays as it is, unless a translation is given.

    Args:
        live: the queries.
        language: of the market.

    Returns:
        origin (market), query_id, query, searches, texts (array: translations, the best first; empty without any),
        rest (what stayed as it was).
    """
    queries_df, given = live.queries_df, F.when(F.col("language") == language.lower(), F.col("query"))
    if live.translations_df is not None:
        queries_df = queries_df.join(live.translations_df, ["market", "query_id"], "left")
        given = F.when(~is_blank(F.col("translation")), F.col("translation")).otherwise(given)
    by_phrase = F.lit(None).cast(_PHRASES_TEXT)
    if live.phrasebook is not None:
        shared, target = queries_df.sparkSession.sparkContext.broadcast(live.phrasebook), language.lower()

        @pandas_udf(_PHRASES_TEXT)  # type: ignore[call-overload]  # as above
        def phrase_by_phrase(texts: pd.Series, languages: pd.Series) -> pd.DataFrame:
            book = shared.value
            said = []
            for text, source in zip(texts, languages, strict=True):
                tried = [book.translate_and_rest(text, source, target, choice) for choice in range(NUM_TRANSLATIONS)]
                said.append((list(dict.fromkeys(one for one, _ in tried)), tried[0][1]))
            return pd.DataFrame(said, columns=["texts", "rest"])

        by_phrase = F.when(given.isNull(), phrase_by_phrase("query", "language"))
    return queries_df.withColumns({"given": given, "said": by_phrase}).select(
        F.col("market").alias("origin"),
        *("query_id", "query", F.col("frequency").alias("searches")),
        F.coalesce(F.when(F.col("given").isNotNull(), F.array("given")), "said.texts", F.array()).alias("texts"),
        F.when(F.col("given").isNotNull(), F.lit("")).otherwise(F.col("said.rest")).alias("rest"),
    )


def query_key(name: str) -> Column:
    """The same for spellings of a query; also for those with and without spaces, where a script needs none."""
    return F.regexp_replace(text_key_udf(name), f"(?<={_NO_SPACES}) | (?={_NO_SPACES})", "")


def live_answers(translated_df: DataFrame, answers_df: DataFrame, known_df: DataFrame) -> DataFrame:
    """What the queries of live markets would get: the answer to the query of the market that has the same text.

    Args:
        translated_df: as of `translated_queries`.
        answers_df: as of `query_answers`.
        known_df: as of `title_terms`.

    Returns:
        origin, query_id, query, searches, translation, score, state: "good", "weak" (no good product), "not_scored"
        (no query of the market has this text, or none of its pairs a score), "untranslated" (nothing was translated,
        or a term that stayed as it was is in no title). Of translations, the first that
        is a query of the market with a score is taken, else the first that is a query of the market, else the first.
    """
    key = ["origin", "query_id"]
    foreign_df = (
        translated_df.select(*key, F.explode(search_terms_udf("rest")).alias("term"))
        .join(known_df, "term", "left_anti")
        .select(*key)
        .distinct()
        .withColumn("is_foreign", F.lit(True))
    )
    answered_df = (
        answers_df.withColumn("key", query_key("query"))
        .groupBy("key")
        .agg(F.max("score").alias("score"), F.max("is_good").alias("is_good"))
    )
    taken = F.struct(
        F.isnull("score").alias("is_unscored"),
        F.isnull("is_good").alias("is_new"),
        "place",
        "translation",
        "score",
        "is_good",
    )
    said_df = (
        translated_df.select(*key, F.posexplode("texts").alias("place", "translation"))
        .withColumn("key", query_key("translation"))
        .join(answered_df, "key", "left")
        .groupBy(*key)
        .agg(F.min(taken).alias("taken"))
    )
    state = (
        F.when(F.col("taken").isNull() | F.coalesce("is_foreign", F.lit(False)), "untranslated")
        .when(F.col("taken.score").isNull(), "not_scored")
        .when(F.col("taken.is_good"), "good")
        .otherwise("weak")
    )
    return (
        translated_df.join(said_df, key, "left")
        .join(foreign_df, key, "left")
        .withColumn("state", state)
        .select(*key, "query", "searches", "taken.translation", "taken.score", "state")
    )


def launch_queries(live_df: DataFrame, market: str, language: str) -> DataFrame:
    """Queries of live markets that can be asked in a market: columns of `schemas.LAUNCH_QUERIES`.

    Args:
        live_df: as of `live_answers`.
        market: the market.
        language: of the market.
    """
    one = F.min(F.struct("origin", "query_id", "translation"))
    return (
        live_df.where("state != 'untranslated'")
        .groupBy(query_key("translation").alias("key"))
        .agg(one.alias("one"), F.sum("searches").alias("frequency"))
        .select(
            F.lit(market).alias("market"),
            F.concat("one.origin", F.lit(":"), "one.query_id").alias("query_id"),
            F.col("one.translation").alias("query"),
            "frequency",
            F.lit(language).alias("language"),
        )
        .select(*LAUNCH_QUERIES.column_names)
    )
