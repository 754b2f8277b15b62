"""Build the candidates, the pairs to score: every product of the catalog is in one or is listed as uncovered."""

import argparse
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Annotated

from pydantic import Field
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from csrm.cli import job_parser, job_settings
from csrm.config import InputSpec, Markets, Settings, TablesSettings
from csrm.retrieval.candidates import (
    best_pairs,
    coverage_by_language,
    strongest_pairs,
    uncovered_products,
    with_given_pairs,
    with_pairs_of,
)
from csrm.retrieval.expansion import TITLES_OF_WORDS
from csrm.retrieval.lexical import bm25_scores, product_terms, query_terms
from csrm.retrieval.semantic import SemanticSettings, semantic_scores
from csrm.retrieval.translations import translated_products, translated_scores
from csrm.schemas import CANDIDATES, CATALOG, PARALLEL_TEXT, QUERIES, TEXT_VECTORS, UNCOVERED_PRODUCTS
from csrm.spark.catalogs import located_tables
from csrm.spark.inputs import read_inputs, require_markets
from csrm.spark.session import build_session, persisted
from csrm.spark.tables import overwrite_markets, read_table, table_path


class CandidateInputs(Settings):
    """Input tables."""

    catalog: InputSpec
    queries: InputSpec
    candidates: InputSpec | None = None
    """Given pairs, such as those of search logs, that are scored in any case."""
    parallel_text: InputSpec | None = None
    """Where given, products in another language than a query are also found by the translations of its words."""


class CandidateConfig(TablesSettings):
    """Settings of this job."""

    markets: Markets
    """Market to its language; only these markets' rows are read and replaced."""
    inputs: CandidateInputs
    products_per_query: Annotated[int, Field(ge=0)] = 50
    """Best products of each query."""
    queries_per_product: Annotated[int, Field(ge=0)] = 2
    """Best queries of each product; 0 leaves products uncovered that are no query's best."""
    max_term_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """A query's terms that more than this share of its market's products have are ignored, but not its rarest one."""
    semantic: SemanticSettings | None = None
    """Where given, products that an encoder finds near a query are candidates too, each with its nearest queries."""


def build_parser() -> argparse.ArgumentParser:
    return job_parser(__doc__, "conf/build_candidates.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = job_settings(args, CandidateConfig)
    spark = build_session("csrm-build-candidates")
    config = located_tables(spark, config)
    specs = {CATALOG: config.inputs.catalog, QUERIES: config.inputs.queries}
    if config.inputs.candidates is not None:
        specs[CANDIDATES] = config.inputs.candidates
    if config.inputs.parallel_text is not None:
        specs[PARALLEL_TEXT] = config.inputs.parallel_text
    inputs = read_inputs(spark, specs, config.markets)
    require_markets(inputs, config.markets)
    catalog_df, queries_df = inputs["catalog"].df, inputs["queries"].df
    parallel_df = inputs["parallel_text"].df if "parallel_text" in inputs else None

    path, uncovered_path = (table_path(config.tables, table) for table in (CANDIDATES, UNCOVERED_PRODUCTS))
    with (
        translated_products(catalog_df, queries_df, parallel_df, config.markets) as translated,
        persisted(query_terms(queries_df)) as terms_df,
    ):
        with ExitStack() as kept, persisted(product_terms(catalog_df)) as products_df:
            words_df = bm25_scores(products_df, terms_df, config.max_term_share).withColumnRenamed("bm25", "strength")
            if config.semantic is not None:  # which reads them too
                count = max(config.products_per_query, TITLES_OF_WORDS)
                few_df = strongest_pairs(words_df, count, queries_per_product=config.queries_per_product)
                words_df = kept.enter_context(persisted(few_df))
            pairs_df = best_pairs(words_df, config.products_per_query, config.queries_per_product)
            if translated is not None:
                scores_df = translated_scores(translated, config.max_term_share).withColumnRenamed("bm25", "strength")
                translated_df = best_pairs(scores_df, config.products_per_query, config.queries_per_product)
                pairs_df = with_pairs_of(pairs_df, translated_df, "translated")
            if config.semantic is not None:
                vectors_path = table_path(config.tables, TEXT_VECTORS)
                near_df = semantic_scores(
                    spark,
                    catalog_df,
                    queries_df,
                    words_df,
                    vectors_path=vectors_path,
                    settings=config.semantic,
                    queries_per_product=config.queries_per_product,
                ).withColumnRenamed("similarity", "strength")
                semantic_df = best_pairs(near_df, config.semantic.k, config.queries_per_product)
                pairs_df = with_pairs_of(pairs_df, semantic_df, "semantic")
            if "candidates" in inputs:
                pairs_df = with_given_pairs(pairs_df, inputs["candidates"].df)
            version = overwrite_markets(pairs_df, CANDIDATES, path, config.markets)
        candidates_df = read_table(spark, CANDIDATES, path, version)
        sharing_df = None if translated is None else translated.postings_df
        uncovered_df = uncovered_products(
            catalog_df, queries_df, terms_df, candidates_df, sharing_df, config.semantic is not None
        )
        uncovered_version = overwrite_markets(uncovered_df, UNCOVERED_PRODUCTS, uncovered_path, config.markets)

    print_pairs(candidates_df, config.markets)
    by_language_df = coverage_by_language(catalog_df, queries_df, candidates_df, config.markets)
    uncovered_df = read_table(spark, UNCOVERED_PRODUCTS, uncovered_path, uncovered_version)
    print_coverage(by_language_df, uncovered_df, config.markets)
    print(f"Written: {path}, version {version}")
    print(f"Written: {uncovered_path}, version {uncovered_version}")
    return 0


def print_pairs(candidates_df: DataFrame, markets: Iterable[str]) -> None:
    """For each market, its candidate pairs by source."""
    sources = ("given", "query", "product", "translated", "semantic")
    counts = _counts(candidates_df, "source")
    print(f"{'market':<8}{'pairs':>12}" + "".join(f"{source:>12}" for source in sources))
    for market in markets:
        by_source = [counts.get((market, source), 0) for source in sources]
        print(f"{market:<8}{sum(by_source):>12,}" + "".join(f"{count:>12,}" for count in by_source))


def print_coverage(by_language_df: DataFrame, uncovered_df: DataFrame, markets: Iterable[str]) -> None:
    """Print how many products of each market are covered, why others are not, and what found those of each language."""
    languages = sorted(tuple(row) for row in by_language_df.collect())
    num_products = {market: sum(row[2] for row in languages if row[0] == market) for market in markets}
    counts = _counts(uncovered_df, "reason")
    reasons = ("no_title", "no_shared_term", "too_dissimilar", "not_among_best")
    print(f"{'market':<8}{'products':>12}" + "".join(f"{name:>22}" for name in ("covered", *reasons)))
    for market in markets:
        total = num_products[market]
        uncovered = [counts.get((market, reason), 0) for reason in reasons]
        cells = [f"{count:,} ({count / max(total, 1):.1%})" for count in (total - sum(uncovered), *uncovered)]
        print(f"{market:<8}{total:>12,}" + "".join(f"{cell:>22}" for cell in cells))
    print(f"{'market':<8}{'language':<12}" + "".join(f"{name:>12}" for name in by_language_df.columns[2:]))
    for market in markets:
        for of_market, language, *found in languages:
            if of_market == market:
                print(f"{market:<8}{language:<12}" + "".join(f"{count:>12,}" for count in found))


def _counts(df: DataFrame, column: str) -> dict[tuple[str, str], int]:
    rows = df.groupBy("market", column).agg(F.count("*").alias("num_rows")).collect()
    return {(row["market"], row[column]): row["num_rows"] for row in rows}
