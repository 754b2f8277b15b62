"""Build the retrieval table: the product titles that augment each query.

They come from behaviour, else from the query's words, else from the translations of its words. With an encoder, what
words, translations and meaning find is fused.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Annotated

from pydantic import Field
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from csrm.cli import job_parser, job_settings
from csrm.config import InputSpec, Markets, Settings, TablesSettings
from csrm.errors import InputError
from csrm.retrieval.candidates import strongest_pairs
from csrm.retrieval.lexical import bm25_scores, product_terms, query_terms
from csrm.retrieval.semantic import SemanticSettings, semantic_scores
from csrm.retrieval.titles import (
    FUSED_PLACES,
    behaviour_titles,
    fused_titles,
    lexical_titles,
    split_judged,
    translated_titles,
)
from csrm.retrieval.translations import translated_products, translated_scores
from csrm.schemas import BEHAVIOUR, CATALOG, JUDGMENTS, PARALLEL_TEXT, QUERIES, RETRIEVAL_TABLE, TEXT_VECTORS
from csrm.spark.catalogs import located_tables
from csrm.spark.inputs import Input, read_inputs, require_markets
from csrm.spark.session import build_session, persisted
from csrm.spark.tables import overwrite_markets, read_table, spark_schema, table_path


class RetrievalInputs(Settings):
    """Input tables."""

    catalog: InputSpec
    queries: InputSpec
    behaviour: InputSpec | None = None
    """Clicks or purchases; without it all titles are lexical."""
    judgments: InputSpec | None = None
    """Where given, behaviour of judged pairs is left out, so that no title is chosen because of its label."""
    parallel_text: InputSpec | None = None
    """Queries whose words find nothing get titles in other languages, by the translations of their words."""


class RetrievalConfig(TablesSettings):
    """Settings of this job."""

    markets: Markets
    """Market to its language; only these markets' rows are read and replaced."""
    inputs: RetrievalInputs
    num_titles: Annotated[int, Field(ge=1)] = 5
    """Titles a query at most."""
    min_count: Annotated[int, Field(ge=1)] = 2
    """Clicks or purchases from which a (query, product) counts."""
    max_term_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """A query's terms that more than this share of its market's products have are ignored, but not its rarest one."""
    semantic: SemanticSettings | None = None
    """Where given, titles of words, translations and an encoder are fused by reciprocal rank."""


def build_parser() -> argparse.ArgumentParser:
    return job_parser(__doc__, "conf/build_retrieval_table.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = job_settings(args, RetrievalConfig)
    spark = build_session("csrm-build-retrieval-table")
    config = located_tables(spark, config)
    specs = {CATALOG: config.inputs.catalog, QUERIES: config.inputs.queries}
    if config.inputs.behaviour is not None:
        specs[BEHAVIOUR] = config.inputs.behaviour
        if config.inputs.judgments is not None:
            specs[JUDGMENTS] = config.inputs.judgments
    if config.inputs.parallel_text is not None:
        specs[PARALLEL_TEXT] = config.inputs.parallel_text
    inputs = read_inputs(spark, specs, config.markets)
    require_markets(inputs, config.markets)
    catalog_df, queries_df = inputs["catalog"].df, inputs["queries"].df

    path = table_path(config.tables, RETRIEVAL_TABLE)
    with ExitStack() as kept:
        behaviour_df = kept.enter_context(persisted(titles_from_behaviour(spark, config, inputs)))
        rest_df = queries_df.join(behaviour_df, ["market", "query_id"], "left_anti")
        terms_df = kept.enter_context(persisted(query_terms(rest_df)))
        products_df = kept.enter_context(persisted(product_terms(catalog_df)))
        parallel_df = inputs["parallel_text"].df if "parallel_text" in inputs else None
        if config.semantic is not None:
            scores_df = bm25_scores(products_df, terms_df, config.max_term_share).withColumnRenamed("bm25", "strength")
            words_df = kept.enter_context(persisted(strongest_pairs(scores_df, FUSED_PLACES)))
            sources = {"lexical": words_df}
            index = translated_products(catalog_df, rest_df, parallel_df, config.markets)
            if (translated := kept.enter_context(index)) is not None:
                scores_df = translated_scores(translated, config.max_term_share)
                sources["translated"] = scores_df.withColumnRenamed("bm25", "strength")
            vectors_path = table_path(config.tables, TEXT_VECTORS)
            near_df = semantic_scores(
                spark, catalog_df, rest_df, words_df, vectors_path=vectors_path, settings=config.semantic
            )
            sources["semantic"] = near_df.withColumnRenamed("similarity", "strength")
            titles_df = behaviour_df.unionByName(fused_titles(sources, catalog_df, config.num_titles))
        else:
            lexical_df = lexical_titles(products_df, terms_df, catalog_df, config.num_titles, config.max_term_share)
            if parallel_df is not None:
                lexical_df = kept.enter_context(persisted(lexical_df))
            titles_df = behaviour_df.unionByName(lexical_df)
            if parallel_df is not None:
                rest_df = rest_df.join(lexical_df, ["market", "query_id"], "left_anti")
                index = translated_products(catalog_df, rest_df, parallel_df, config.markets)
                if (translated := kept.enter_context(index)) is not None:
                    translated_df = translated_titles(translated, catalog_df, config.num_titles, config.max_term_share)
                    titles_df = titles_df.unionByName(translated_df)
        version = overwrite_markets(titles_df, RETRIEVAL_TABLE, path, config.markets)

    print_summary(queries_df, read_table(spark, RETRIEVAL_TABLE, path, version), config.markets)
    print(f"Written: {path}, version {version}")
    return 0


def titles_from_behaviour(spark: SparkSession, config: RetrievalConfig, inputs: Mapping[str, Input]) -> DataFrame:
    """Titles from behaviour, none where no behaviour is configured. Prints how many rows are left out as judged."""
    if "behaviour" not in inputs:
        print("No behaviour input: all titles are lexical.")
        return spark.createDataFrame([], spark_schema(RETRIEVAL_TABLE))
    catalog_df, queries_df = inputs["catalog"].df, inputs["queries"].df
    behaviour_df = inputs["behaviour"].df
    if "judgments" in inputs:
        _require_judged_queries(inputs)
        behaviour_df, judged_df = split_judged(behaviour_df, queries_df, inputs["judgments"].df)
        print(f"Behaviour rows of judged pairs, left out: {judged_df.count():,}")
    return behaviour_titles(behaviour_df, queries_df, catalog_df, config.num_titles, config.min_count)


def _require_judged_queries(inputs: Mapping[str, Input]) -> None:
    """Refuse judgments that join nothing: titles would be chosen because of labels, without a word.

    Raises:
        InputError: there are judgments, and none is of a query that is there.
    """
    judged_df = inputs["judgments"].df.select("market", "query_id")
    example = judged_df.head()
    if example is not None and judged_df.join(inputs["queries"].df, ["market", "query_id"], "left_semi").isEmpty():
        judgments, queries = inputs["judgments"].path, inputs["queries"].path
        raise InputError(
            f"judgments {judgments!r}: expected query ids of queries {queries!r}, got none, for example "
            f"{example['query_id']!r} of market {example['market']!r}. Nothing was written. Name the right column "
            "under columns: {query_id: ...}, or leave judgments out: behaviour of judged pairs is then kept."
        )


def print_summary(queries_df: DataFrame, retrieval_df: DataFrame, markets: Iterable[str]) -> None:
    """For each market, how many of its queries have titles, by source."""
    source_df = retrieval_df.where("rank = 1").select("market", "query_id", "source")
    counts_df = (
        queries_df.join(source_df, ["market", "query_id"], "left")
        .groupBy("market")
        .agg(
            F.count("*").alias("queries"),
            F.count_if(F.col("source") == "behaviour").alias("behaviour"),
            F.count_if(F.col("source") == "lexical").alias("lexical"),
            F.count_if(F.col("source") == "translated").alias("translated"),
            F.count_if(F.col("source") == "semantic").alias("semantic"),
        )
    )
    counts = {row["market"]: row for row in counts_df.collect()}
    names = ("queries", "behaviour", "lexical", "translated", "semantic", "no titles")
    print(f"{'market':<8}" + "".join(f"{name:>12}" for name in names))
    for market in markets:
        queries, *found = counts[market][1:] if market in counts else (0, 0, 0, 0, 0)
        print(f"{market:<8}" + "".join(f"{count:>12,}" for count in (queries, *found, queries - sum(found))))
