"""Whether a market without judgments could open: what its queries and products lack, by the published scores.

Nobody has judged a pair of the market, so a score is the only witness: where it is wrong, so is a finding. The queries
of live markets, put into the market's language, stand for those that nobody has asked here yet.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce

import pandas as pd
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from csrm.errors import InputError
from csrm.operations.findings import Text
from csrm.operations.launch_answers import (
    LaunchInputs,
    cut,
    product_reach,
    query_answers,
    query_segments,
    title_terms,
    unknown_terms,
)
from csrm.operations.launch_findings import NUM_SCORE_STEPS, LaunchFindings
from csrm.operations.live_queries import LiveQueries, launch_queries, live_answers, translated_queries
from csrm.retrieval.translations import with_language
from csrm.schemas import LAUNCH_FINDINGS, LAUNCH_QUERIES, RELEVANCE_SCORES, UNCOVERED_PRODUCTS
from csrm.spark.inputs import Input
from csrm.spark.session import persisted
from csrm.spark.tables import overwrite_markets, read_table, spark_schema, table_exists, table_path, table_version
from csrm.spark.text import is_blank, text_key_udf


@dataclass(frozen=True)
class LaunchLimits:
    """When a product is good, and how much is shown."""

    threshold: float
    """Score from which a product is good."""
    num_best: int
    """Good titles of a query, best first, that are looked at for their language."""
    num_examples: int
    """Queries, terms and products of each list."""


def open_market(
    spark: SparkSession, tables_dir: str, market: str, markets: Mapping[str, str], inputs: Mapping[str, Input]
) -> LaunchInputs:
    """The rows of a market; the frequency of a query that names none is its count in behaviour.

    Queries of one text share its count, so that searches are counted once.

    Args:
        spark: the session.
        tables_dir: folder of CSRM's tables.
        market: the market.
        markets: market to language.
        inputs: catalog and queries, and behaviour or not, as of read_inputs.
    """
    is_own = F.col("market") == market
    path, uncovered_path = (table_path(tables_dir, table) for table in (RELEVANCE_SCORES, UNCOVERED_PRODUCTS))
    scores_df, version = spark.createDataFrame([], spark_schema(RELEVANCE_SCORES)), 0
    if table_exists(spark, path):
        version = table_version(spark, path)
        scores_df = read_table(spark, RELEVANCE_SCORES, path, version).where(is_own)
    uncovered_df = None
    if table_exists(spark, uncovered_path):
        uncovered_df = read_table(spark, UNCOVERED_PRODUCTS, uncovered_path).where(is_own)
    asked_df = with_language(inputs["queries"].df.where(is_own & ~is_blank(F.col("query"))), markets)
    if "behaviour" in inputs:
        asked_df = with_behaviour_counts(asked_df, inputs["behaviour"].df.where(is_own))
    digests = sorted(row[0] for row in scores_df.select("bundle_digest").distinct().collect())
    return LaunchInputs(
        scores_df.select("query_id", "product_id", "relevance_score"),
        with_language(inputs["catalog"].df.where(is_own & ~is_blank(F.col("title"))), markets),
        asked_df,
        None if uncovered_df is None else uncovered_df.select("product_id", "reason"),
        version,
        tuple(digests),
    )


def with_behaviour_counts(queries_df: DataFrame, behaviour_df: DataFrame) -> DataFrame:
    """Queries with the frequency that they name, else the count of their text in behaviour.

    Args:
        queries_df: columns of `schemas.QUERIES`, of one market.
        behaviour_df: columns of `schemas.BEHAVIOUR`, of the same market.

    Returns:
        As queries_df. Queries of one text that name no frequency share what the others' frequencies leave of the count:
        one more for the first, by query_id, where it does not come out even.
    """
    counts_df = behaviour_df.groupBy(text_key_udf("query").alias("key")).agg(F.sum("count").alias("count"))
    same_text = Window.partitionBy("key", F.isnull("frequency"))
    num_queries, place = F.count("*").over(same_text), F.row_number().over(same_text.orderBy("query_id"))
    named = F.coalesce(F.sum("frequency").over(Window.partitionBy("key")), F.lit(0))
    rest = F.when(F.col("count") > named, F.col("count") - named).when(F.col("count").isNotNull(), 0)
    share = F.floor(rest / num_queries) + (place <= rest % num_queries).cast("long")
    return (
        queries_df.withColumn("key", text_key_udf("query"))
        .join(counts_df, "key", "left")
        .withColumn("frequency", F.coalesce("frequency", share))
        .select(*queries_df.columns)
    )


def require_scores(
    opened: Mapping[str, LaunchInputs], live: Mapping[str, LiveQueries], markets: Mapping[str, str], tables_dir: str
) -> None:
    """Check that each market has published scores. Of one that has none, the live queries are written.

    Args:
        opened: market to its rows.
        live: market to the queries of live markets; empty without them.
        markets: market to language.
        tables_dir: folder of CSRM's tables, for launch_queries.

    Raises:
        InputError: some have none.
    """
    unscored = [market for market, inputs in opened.items() if not inputs.bundle_digests]
    if not unscored:
        return
    way_out = (
        "Where shoppers have asked nothing yet, give inputs.live_queries: this job then puts the queries of live "
        "markets into the market's language, and writes them to launch_queries."
    )
    if live:
        path = table_path(tables_dir, LAUNCH_QUERIES)
        for market in unscored:
            inputs = opened[market]
            known_df = title_terms(inputs.catalog_df)
            live_df = live_answers(
                translated_queries(live[market], markets[market]), query_answers(inputs, 1.0, 1), known_df
            )
            overwrite_markets(launch_queries(live_df, market, markets[market]), LAUNCH_QUERIES, path, [market])
        way_out = f"The queries of live markets, in its language, are at {path!r}, ready to be inputs.queries of these."
    raise InputError(
        f"markets {unscored}: expected published scores in {table_path(tables_dir, RELEVANCE_SCORES)!r}, found none. A "
        "launch report shows what they say, so score the market first: name it under 'markets' of "
        f"build_retrieval_table, build_candidates and score_catalog. {way_out}"
    )


def finding_rows(market: str, answers_df: DataFrame, terms_df: DataFrame, products_df: DataFrame) -> DataFrame:
    """What is wanting, one row each: columns of `schemas.LAUNCH_FINDINGS`.

    Args:
        market: the market.
        answers_df: as of `query_answers`.
        terms_df: as of `unknown_terms`.
        products_df: as of `product_reach`.
    """
    of_query: dict[str, Column | None] = {"item": F.col("query_id"), "text": F.col("query")}
    nothing: dict[str, Column | None] = {name: F.lit(None) for name in ("language", "category", "searches", "score")}
    parts: list[tuple[DataFrame, str, dict[str, Column | None]]] = [
        (answers_df.where("NOT is_good"), "query_without_good_product", of_query),
        (answers_df.where("is_foreign"), "query_all_foreign", of_query),
        (terms_df, "unknown_term", {**nothing, "item": F.col("term"), "text": F.col("query"), "searches": None}),
        (
            products_df.where("reason != 'reached'"),
            "product_unreached",
            {"item": F.col("product_id"), "text": F.col("title"), "searches": F.lit(None)},
        ),
    ]
    return reduce(DataFrame.unionByName, (_finding_rows(df, market, name, values) for df, name, values in parts))


def live_finding_rows(market: str, live_df: DataFrame) -> DataFrame:
    """Queries of live markets that are not good: columns of `schemas.LAUNCH_FINDINGS`.

    Args:
        market: the market.
        live_df: as of `live_answers`.
    """
    names = {"weak": "without_good_product", "not_scored": "not_scored", "untranslated": "untranslated"}
    is_said = F.col("state") != "untranslated"
    values = {
        "origin": F.col("origin"),
        "item": F.col("query_id"),
        "text": F.when(is_said, F.col("translation")).otherwise(F.col("query")),
        "language": F.lit(None),
        "category": F.lit(None),
    }
    parts = (
        _finding_rows(live_df.where(F.col("state") == state), market, f"live_query_{name}", values)
        for state, name in names.items()
    )
    return reduce(DataFrame.unionByName, parts)


def _finding_rows(df: DataFrame, market: str, finding: str, values: Mapping[str, Column | None]) -> DataFrame:
    """Rows of one kind; a value that is not named, or is None, is the column of its name."""
    known = {"market": F.lit(market), "finding": F.lit(finding), "origin": F.lit(market)}
    known |= {name: value for name, value in values.items() if value is not None}
    return df.select(
        *(known.get(one.name, F.col(one.name)).cast(one.type).alias(one.name) for one in LAUNCH_FINDINGS.columns)
    )


def find_launch(
    market: str,
    markets: Mapping[str, str],
    inputs: LaunchInputs,
    *,
    live: LiveQueries | None,
    limits: LaunchLimits,
    tables: str,
) -> LaunchFindings:
    """Find what a market lacks, and write it to launch_findings, and live queries to launch_queries.

    Args:
        market: the market.
        markets: market to language, live ones too.
        inputs: rows of the market.
        live: queries of live markets; None: without them.
        limits: when a product is good, and how much is shown.
        tables: folder of CSRM's tables.

    Returns:
        What its page shows, which is small.
    """
    with ExitStack() as kept:
        answers_df = kept.enter_context(persisted(query_answers(inputs, limits.threshold, limits.num_best)))
        known_df = kept.enter_context(persisted(title_terms(inputs.catalog_df)))
        terms_df = kept.enter_context(persisted(unknown_terms(answers_df, known_df)))
        products_df = kept.enter_context(persisted(product_reach(inputs, limits.threshold)))
        rows_df = finding_rows(market, answers_df, terms_df, products_df)
        live_counts, live_examples = (pd.DataFrame(columns=list(names)) for names in (_LIVE_COUNTS, _LIVE_EXAMPLES))
        if live is not None:
            said_df = translated_queries(live, markets[market])
            live_df = kept.enter_context(persisted(live_answers(said_df, answers_df, known_df)))
            rows_df = rows_df.unionByName(live_finding_rows(market, live_df))
            counts = (F.count("*").alias("num_queries"), F.sum("searches").alias("searches"))
            live_counts = _frame(live_df.groupBy("origin", "state").agg(*counts))
            wanting_df = live_df.where("state != 'good'")
            live_examples = _examples(wanting_df, _LIVE_EXAMPLES, by="state", count=limits.num_examples)
            queries_df = launch_queries(live_df, market, markets[market])
            overwrite_markets(queries_df, LAUNCH_QUERIES, table_path(tables, LAUNCH_QUERIES), [market])
        overwrite_markets(rows_df, LAUNCH_FINDINGS, table_path(tables, LAUNCH_FINDINGS), [market])
        unreached_df = products_df.where("reason != 'reached'")
        segments = _frame(query_segments(answers_df))
        return LaunchFindings(
            market=market,
            language=markets[market],
            threshold=limits.threshold,
            num_best=limits.num_best,
            scores_version=inputs.scores_version,
            bundle_digests=inputs.bundle_digests,
            curve=_curve(answers_df),
            segments=segments,
            queries=_examples(answers_df.where("NOT is_good"), (*_QUERY, "title"), count=limits.num_examples),
            foreign_queries=_examples(answers_df.where("is_foreign"), (*_QUERY, "titles"), count=limits.num_examples),
            terms=_examples(terms_df, _TERM, count=limits.num_examples, key="term"),
            num_terms=terms_df.count(),
            products=_frame(products_df.groupBy("language", "reason").agg(F.count("*").alias("num_products"))),
            unreached=_examples(
                unreached_df,
                _PRODUCT,
                by="reason",
                count=limits.num_examples,
                key="product_id",
                first=F.desc_nulls_last("score"),
            ),
            live=live_counts,
            live_queries=live_examples,
            languages=dict(markets),
            notes=_notes(segments, inputs),
        )


_QUERY = ("query_id", "query", "language", "searches", "score")
_TERM = ("term", "num_queries", "searches", "query")
_PRODUCT = ("product_id", "title", "language", "reason", "score", "query")
_LIVE_COUNTS = ("origin", "state", "num_queries", "searches")
_LIVE_EXAMPLES = ("origin", "query_id", "query", "translation", "state", "searches", "score")


def _notes(segments: pd.DataFrame, inputs: LaunchInputs) -> list[str]:
    notes = []
    if segments["searches"].isna().all():
        notes.append(
            "No query has a frequency, so each counts as much as the others: fill the column of queries, or give "
            "inputs.behaviour."
        )
    if inputs.uncovered_df is None:
        notes.append("There is no table uncovered_products: why a product is in no pair is not known.")
    return notes


def _curve(answers_df: DataFrame) -> list[float]:
    """See LaunchFindings.curve."""
    step = F.floor(F.coalesce("score", F.lit(-1.0)) * NUM_SCORE_STEPS + 1e-6).alias("step")
    counts = {row["step"]: row["count"] for row in answers_df.groupBy(step).count().collect()}
    total = sum(counts.values())
    return [
        sum(count for step, count in counts.items() if step >= least) / max(total, 1)
        for least in range(NUM_SCORE_STEPS + 1)
    ]


_TEXTS = ("query", "title", "translation", "term", "query_id", "product_id")


def _examples(
    df: DataFrame,
    names: tuple[str, ...],
    *,
    count: int,
    by: str | None = None,
    key: str = "query_id",
    first: Column | None = None,
) -> pd.DataFrame:
    """The first rows, or those of each value of a column: by searches where nothing else is said.

    Texts and ids are `Text`.
    """
    order = (F.desc_nulls_last("searches") if first is None else first, F.asc(key))
    if by is None:
        rows_df = df.orderBy(*order).limit(count)
    else:
        place = F.row_number().over(Window.partitionBy(by).orderBy(*order))
        rows_df = df.withColumn("place", place).where(F.col("place") <= count).orderBy(by, "place")
    found = _frame(rows_df.select(*(cut(name).alias(name) if name in _TEXTS else F.col(name) for name in names)))
    for name in {*names} & {*_TEXTS}:
        found[name] = pd.Series([None if row is None else Text(*row) for row in found[name]], dtype=object)
    if "titles" in found:
        titles = [[(Text(*row["title"]), row["product_language"]) for row in titles] for titles in found["titles"]]
        found["titles"] = pd.Series(titles, dtype=object)
    return found


def _frame(small_df: DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        small_df.collect(), columns=small_df.columns, dtype=object
    )  # whole numbers stay so beside nulls
