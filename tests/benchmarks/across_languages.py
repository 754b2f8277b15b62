"""What queries find by words, by translations of these and by meaning: in a taxonomy's market and on real judgments.

    python tests/benchmarks/across_languages.py --taxonomy FOLDER/shopify_taxonomy
    python tests/benchmarks/across_languages.py --taxonomy FOLDER/shopify_taxonomy --encoder build/encoder
    python tests/benchmarks/across_languages.py --data FOLDER --encoder build/encoder

The taxonomy's market: Chinese queries of splits dev and test in Taiwan; products listed there in Chinese, and others
listed from Korea, in Korean. A query is a category; every product of a leaf below it is relevant. The folder of --data
holds chorus_icecat and esci_us, or one of them: English queries, products with their titles; those of label 3 and E
are relevant, those that nobody judged are not.

`words` is BM25. `translated` is BM25 by the translations of the words, from the parallel text of split train, which
has no category or value of the other splits. With an encoder, `meaning` is what the jobs search by: the cosine of
vectors seen from the market's centre, queries moved to the titles that their words find. `fused` is reciprocal rank
fusion of the first hundred of each, as of build_retrieval_table. `united K` is the first K of each, as
build_candidates unites them, each product where its best source has it; its recall is that of all of them.

precision@3 and recall@100 are means over the queries that have a relevant product in the language, among its products
alone. `found` is the share of these queries that find anything, `pairs` the products of a query that recall counts,
`reached` the share of the language's products that are the first hundred of a query or have a query that finds them,
`chance` the precision of a random order.
"""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from csrm.embedding import Encoder, load_encoder
from csrm.embedding.contents import TextKind
from csrm.market.categories import Storefront, category_markets
from csrm.market.files import arrow_table
from csrm.market.taxonomy import read_taxonomy_tables
from csrm.retrieval.candidates import strongest_pairs
from csrm.retrieval.expansion import TITLES_OF_WORDS, compared_vectors
from csrm.retrieval.lexical import bm25_scores, product_terms, query_terms
from csrm.retrieval.nearest import near_pairs
from csrm.retrieval.translations import translated_products, translated_scores
from csrm.schemas import CATALOG, PARALLEL_TEXT, QUERIES, Table
from csrm.spark.session import build_session, persisted

MAX_TERM_SHARE = 0.2
NUM_FIRST = 100
UNITED = (50, 100)
"""K of `united K`; the first is what the jobs have where nothing else is said."""


@dataclass(frozen=True)
class Judged:
    """A market whose relevant pairs are known."""

    name: str
    language: str
    """Of the market."""
    catalog: pd.DataFrame
    """Columns of `schemas.CATALOG`."""
    queries: pd.DataFrame
    """Columns of `schemas.QUERIES`."""
    relevant: dict[str, set[str]]
    """Query that is measured to its relevant products."""
    parallel_text: pd.DataFrame | None = None
    """Columns of `schemas.PARALLEL_TEXT`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--taxonomy", type=Path, help="folder of the taxonomy")
    parser.add_argument("--data", type=Path, help="folder that has chorus_icecat or esci_us")
    parser.add_argument("--encoder", help="folder of an encoder, see docs/encoders.md")
    args = parser.parse_args()
    markets = [] if args.taxonomy is None else [taxonomy_market(args.taxonomy)]
    for name, read in (("chorus_icecat", read_chorus), ("esci_us", read_esci)):
        if args.data is not None and (args.data / name).is_dir():
            markets.append(read(args.data / name))
    if not markets:
        parser.error("expected --taxonomy, or --data with a folder chorus_icecat or esci_us")
    encoder = load_encoder(args.encoder) if args.encoder else None
    spark = build_session("csrm-across-languages")
    for market in markets:
        ranked = ranked_products(spark, market, encoder)
        rows = []
        for language, products in market.catalog.groupby("language"):
            ids = set(products["product_id"])
            relevant = {query: found & ids for query, found in market.relevant.items()}
            for source in ranked["source"].unique():
                of_source = ranked[(ranked["source"] == source) & (ranked["language"] == language)]
                rows.append({"products": language, "source": source, **measure(of_source, relevant, len(products))})
        print(f"{market.name}: {len(market.queries):,} queries, {len(market.catalog):,} products")
        print(pd.DataFrame(rows).to_string(index=False, float_format="%.3f"), flush=True)


def taxonomy_market(folder: Path) -> Judged:
    """Taiwan, with products from Korea; measured are categories of splits dev and test."""
    made = category_markets(folder, [Storefront("tw", "zh-TW", "ko")], ["ko", "zh-TW", "en"])
    below = leaves_below(folder)
    measured = sorted(set(made.judgments.loc[made.judgments["split"] != "train", "query_id"]))
    by_leaf = made.catalog["product_id"].groupby(made.catalog["product_id"].str.partition("_")[0]).agg(set).to_dict()
    relevant = {query: set().union(*(by_leaf.get(leaf, set()) for leaf in below[query])) for query in measured}
    return Judged("taxonomy", "zh-TW", made.catalog, made.queries, relevant, made.parallel_text)


def read_chorus(folder: Path) -> Judged:
    """Products of an electronics shop: titles are short, and sometimes a model's name only."""
    judged = read_tsv(folder / "judgments.tsv.gz")
    products = judged.drop_duplicates("product_id")
    return english_market("chorus_icecat", products, judged.assign(query_id=judged["query"]), "3")


def read_esci(folder: Path) -> Judged:
    products = pd.read_parquet(folder / "products.parquet").astype({"product_id": str})
    return english_market("esci_us", products, read_tsv(folder / "judgments.tsv.gz"), "E")


def read_tsv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t", quoting=3, keep_default_na=False, dtype=str)


def english_market(name: str, products: pd.DataFrame, judged: pd.DataFrame, best_label: str) -> Judged:
    """Products with product_id and title; judgments with query_id, query, product_id and label."""
    catalog = products[["product_id", "title"]].assign(market="us", language="en")
    queries = judged[["query_id", "query"]].drop_duplicates("query_id").assign(market="us", language="en")
    relevant = judged[judged["label"] == best_label].groupby("query_id")["product_id"].agg(set).to_dict()
    return Judged(name, "en", with_columns(catalog, CATALOG), with_columns(queries, QUERIES), relevant)


def with_columns(frame: pd.DataFrame, table: Table) -> pd.DataFrame:
    """A frame with all columns of a table, null where it has none."""
    return frame.reindex(columns=table.column_names).astype(object).where(lambda values: values.notna(), None)


def ranked_products(spark: SparkSession, market: Judged, encoder: Encoder | None) -> pd.DataFrame:
    """The first products of each query in each language by each source, and the best query of each product.

    Returns:
        query_id, product_id, language, product_rank, is_shown, source.
    """
    tables = {CATALOG: market.catalog, QUERIES: market.queries}
    catalog_df, queries_df = (spark.createDataFrame(arrow_table(frame, table)) for table, frame in tables.items())
    with persisted(product_terms(catalog_df)) as products_df, persisted(query_terms(queries_df)) as terms_df:
        scores_df = bm25_scores(products_df, terms_df, MAX_TERM_SHARE).withColumnRenamed("bm25", "strength")
        found = [firsts(scores_df, catalog_df).assign(source="words")]
        if encoder is not None:
            near = [firsts(near_df, catalog_df) for near_df in near_in_languages(spark, market, encoder, scores_df)]
            meaning = pd.concat(near).assign(source="meaning")
    if market.parallel_text is not None:
        parallel_df = spark.createDataFrame(arrow_table(market.parallel_text, PARALLEL_TEXT))
        of_market = {market.catalog["market"].iloc[0]: market.language}
        with translated_products(catalog_df, queries_df, parallel_df, of_market) as translated:
            assert translated is not None
            scores_df = translated_scores(translated, MAX_TERM_SHARE).withColumnRenamed("bm25", "strength")
            found.append(firsts(scores_df, catalog_df).assign(source="translated"))
    if encoder is not None:
        found.append(meaning)
    if len(found) > 1:
        of_one_source = pd.concat(found)
        found += [fused(of_one_source), *(united(of_one_source, first) for first in UNITED)]
    return pd.concat(found)


def near_in_languages(
    spark: SparkSession, market: Judged, encoder: Encoder, words_df: DataFrame
) -> Iterator[DataFrame]:
    """Similarities of the queries' nearest products among those of each language, as of semantic_scores."""

    def embedded(frame: pd.DataFrame, key: str, text: str, kind: TextKind) -> DataFrame:
        vectors = list(encoder.embed(frame[text].fillna("").tolist(), kind))
        found = frame[["market", key]].assign(vector=vectors)
        return spark.createDataFrame(pa.Table.from_pandas(found, preserve_index=False))

    compared_df, moved_df = compared_vectors(
        embedded(market.catalog, "product_id", "title", "passage"),
        embedded(market.queries, "query_id", "query", "query"),
        strongest_pairs(words_df, TITLES_OF_WORDS),
    )
    with persisted(compared_df) as products_df, persisted(moved_df) as queries_df:
        for _, products in market.catalog.groupby("language"):
            ids_df = spark.createDataFrame(products[["product_id"]])
            of_language_df = products_df.join(ids_df, "product_id", "left_semi")
            near_df = near_pairs(of_language_df, queries_df, products_per_query=NUM_FIRST, queries_per_product=1)
            yield near_df.withColumnRenamed("similarity", "strength")


def fused(ranked: pd.DataFrame) -> pd.DataFrame:
    """Products by reciprocal rank of their places in each source."""
    shown = ranked[ranked["is_shown"]]
    strength = 1 / (60 + shown["product_rank"])
    key = ["query_id", "language", "product_id"]
    sums = strength.groupby([shown[name] for name in key]).sum().rename("strength").reset_index()
    ordered = in_order(sums, ["strength"], ascending=False)
    return ordered.assign(is_shown=ordered["product_rank"] <= NUM_FIRST, source="fused")


def united(ranked: pd.DataFrame, first: int) -> pd.DataFrame:
    """The first products of each source and the best query of each product, by the product's best place."""
    key = ["query_id", "language", "product_id"]
    best = ranked.groupby(key)["product_rank"].min().rename("best").reset_index()
    best = best[(best["best"] <= first) | (best["best"] > NUM_FIRST)]  # the latter are the best queries of products
    ordered = in_order(best, ["best"], ascending=True)
    return ordered.assign(is_shown=ordered["best"] <= first, source=f"united {first}")


def in_order(rows: pd.DataFrame, by: list[str], *, ascending: bool) -> pd.DataFrame:
    """Rows with product_rank; equal ones go to the smaller product."""
    order = ["query_id", "language", *by, "product_id"]
    rows = rows.sort_values(order, ascending=[True, True, *([ascending] * len(by)), True])
    return rows.assign(product_rank=rows.groupby(["query_id", "language"]).cumcount() + 1)


def leaves_below(taxonomy: Path) -> dict[str, set[str]]:
    """Category to the categories below it, at any depth."""
    categories = read_taxonomy_tables(taxonomy, {"categories": ["id", "parent_id"]})["categories"]
    parent = dict(zip(categories["id"], categories["parent_id"], strict=True))
    below: dict[str, set[str]] = {category: set() for category in parent}
    for category in parent:
        above = parent[category]
        while above:
            below[above].add(category)
            above = parent[above]
    return below


def firsts(scores_df: DataFrame, catalog_df: DataFrame) -> pd.DataFrame:
    """Each query's first products in each language, and each product's best query.

    Args:
        scores_df: market, query_id, product_id, strength.
        catalog_df: columns of `schemas.CATALOG`.

    Returns:
        query_id, product_id, language, product_rank, is_shown (among the first hundred).
    """
    of_query = Window.partitionBy("query_id", "language").orderBy(F.desc("strength"), F.asc("product_id"))
    of_product = Window.partitionBy("product_id").orderBy(F.desc("strength"), F.asc("query_id"))
    return (
        scores_df.join(catalog_df.select("market", "product_id", "language"), ["market", "product_id"])
        .withColumn("product_rank", F.row_number().over(of_query))
        .withColumn("query_rank", F.row_number().over(of_product))
        .where((F.col("product_rank") <= NUM_FIRST) | (F.col("query_rank") == 1))
        .withColumn("is_shown", F.col("product_rank") <= NUM_FIRST)
        .select("query_id", "product_id", "language", "product_rank", "is_shown")
        .toPandas()
    )


def measure(ranked: pd.DataFrame, relevant: dict[str, set[str]], num_products: int) -> dict[str, float]:
    """Means over the queries that have a relevant product."""
    shown = ranked[ranked["is_shown"]].sort_values("product_rank")
    first = shown.groupby("query_id")["product_id"].agg(list).to_dict()
    asked = [query for query, products in relevant.items() if products]
    hits = {query: [product in relevant[query] for product in first.get(query, [])] for query in asked}

    def mean(values: Iterable[float]) -> float:
        return float(np.mean([*values]))

    return {
        "queries": len(asked),
        "found": mean(query in first for query in asked),
        "precision@3": mean(sum(hits[query][:3]) / 3 for query in asked),
        "recall@100": mean(sum(hits[query]) / len(relevant[query]) for query in asked),
        "pairs": mean(len(hits[query]) for query in asked),
        "reached": ranked["product_id"].nunique() / num_products,
        "chance": mean(len(relevant[query]) for query in asked) / num_products,
    }


if __name__ == "__main__":
    main()
