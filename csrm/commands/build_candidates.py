"""Build the candidates, the pairs to score: every product of the catalog is in one or is listed as uncovered."""

import argparse
from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import Field
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from csrm.cli import job_parser
from csrm.config import InputSpec, Markets, Settings, TablesDir, load_config
from csrm.retrieval.candidates import best_pairs, uncovered_products, with_given_pairs
from csrm.retrieval.lexical import bm25_scores, product_terms, query_terms
from csrm.schemas import CANDIDATES, CATALOG, QUERIES, UNCOVERED_PRODUCTS
from csrm.spark.inputs import read_inputs, require_markets
from csrm.spark.session import build_session, persisted
from csrm.spark.tables import overwrite_markets, read_table, table_path


class CandidateInputs(Settings):
    """Input tables."""

    catalog: InputSpec
    queries: InputSpec
    candidates: InputSpec | None = None
    """Given pairs, such as those of search logs, that are scored in any case."""


class CandidateConfig(Settings):
    """Settings of this job."""

    markets: Markets
    """Market to its language; only these markets' rows are read and replaced."""
    inputs: CandidateInputs
    tables: TablesDir
    """Folder of the tables that CSRM writes."""
    products_per_query: Annotated[int, Field(ge=0)] = 50
    """Best products of each query."""
    queries_per_product: Annotated[int, Field(ge=0)] = 2
    """Best queries of each product; 0 leaves products uncovered that are no query's best."""
    max_term_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """A query's terms that more than this share of its market's products have are ignored, but not its rarest one."""


def build_parser() -> argparse.ArgumentParser:
    return job_parser(__doc__, "conf/build_candidates.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = load_config(args.config, CandidateConfig, args.overrides)
    spark = build_session("csrm-build-candidates")
    specs = {CATALOG: config.inputs.catalog, QUERIES: config.inputs.queries}
    if config.inputs.candidates is not None:
        specs[CANDIDATES] = config.inputs.candidates
    inputs = read_inputs(spark, specs, config.markets)
    require_markets(inputs, config.markets)
    catalog_df, queries_df = inputs["catalog"].df, inputs["queries"].df

    path, uncovered_path = (table_path(config.tables, table) for table in (CANDIDATES, UNCOVERED_PRODUCTS))
    with persisted(query_terms(queries_df)) as terms_df:
        with persisted(product_terms(catalog_df)) as products_df:
            scores_df = bm25_scores(products_df, terms_df, config.max_term_share)
            pairs_df = best_pairs(scores_df, config.products_per_query, config.queries_per_product)
            if "candidates" in inputs:
                pairs_df = with_given_pairs(pairs_df, inputs["candidates"].df)
            version = overwrite_markets(pairs_df, CANDIDATES, path, config.markets)
        candidates_df = read_table(spark, CANDIDATES, path, version)
        uncovered_df = uncovered_products(catalog_df, queries_df, terms_df, candidates_df)
        uncovered_version = overwrite_markets(uncovered_df, UNCOVERED_PRODUCTS, uncovered_path, config.markets)

    print_pairs(candidates_df, config.markets)
    print_coverage(catalog_df, read_table(spark, UNCOVERED_PRODUCTS, uncovered_path, uncovered_version), config.markets)
    print(f"Written: {path}, version {version}")
    print(f"Written: {uncovered_path}, version {uncovered_version}")
    return 0


def print_pairs(candidates_df: DataFrame, markets: Iterable[str]) -> None:
    """For each market, its candidate pairs by source."""
    sources = ("given", "query", "product")
    counts = _counts(candidates_df, "source")
    print(f"{'market':<8}{'pairs':>12}" + "".join(f"{source:>12}" for source in sources))
    for market in markets:
        by_source = [counts.get((market, source), 0) for source in sources]
        print(f"{market:<8}{sum(by_source):>12,}" + "".join(f"{count:>12,}" for count in by_source))


def print_coverage(catalog_df: DataFrame, uncovered_df: DataFrame, markets: Iterable[str]) -> None:
    """For each market, how many of its products are in a candidate pair, and why the others are not."""
    num_products = {row["market"]: row["count"] for row in catalog_df.groupBy("market").count().collect()}
    counts = _counts(uncovered_df, "reason")
    reasons = ("no_title", "no_shared_term", "not_among_best")
    print(f"{'market':<8}{'products':>12}" + "".join(f"{name:>22}" for name in ("covered", *reasons)))
    for market in markets:
        total = num_products.get(market, 0)
        uncovered = [counts.get((market, reason), 0) for reason in reasons]
        cells = [f"{count:,} ({count / max(total, 1):.1%})" for count in (total - sum(uncovered), *uncovered)]
        print(f"{market:<8}{total:>12,}" + "".join(f"{cell:>22}" for cell in cells))


def _counts(df: DataFrame, column: str) -> dict[tuple[str, str], int]:
    rows = df.groupBy("market", column).agg(F.count("*").alias("num_rows")).collect()
    return {(row["market"], row[column]): row["num_rows"] for row in rows}
