"""What queries of a taxonomy's market find among products of their own language, and of another one.

    python tests/benchmarks/across_languages.py --taxonomy FOLDER/shopify_taxonomy
    python tests/benchmarks/across_languages.py --taxonomy FOLDER/shopify_taxonomy --encoder build/encoder

Chinese queries of splits dev and test in Taiwan; products listed there in Chinese, and others listed from Korea, in
Korean. A query is a category; every product of a leaf below it is relevant. `words` is BM25. `translated` is BM25 by
the translations of the words, from the parallel text of split train, which has no category or value of the other
splits. With an encoder, `semantic` is the cosine of query and title, among the titles that are listed from Korea;
`fused` is reciprocal rank fusion of the first hundred of all three. precision@3 and recall@100 are means over the
queries that have a relevant product in the language, among its products alone. `found` is the share of these queries
that find anything, `reached` the share of the language's products that are the first hundred of a query or have a
query that finds them, `chance` the precision of a random order.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from csrm.embedding import load_encoder
from csrm.market.categories import Storefront, category_markets
from csrm.market.files import arrow_table
from csrm.market.taxonomy import read_taxonomy_tables
from csrm.retrieval.lexical import bm25_scores, product_terms, query_terms
from csrm.retrieval.nearest import near_pairs
from csrm.retrieval.translations import translated_products, translated_scores
from csrm.schemas import CATALOG, PARALLEL_TEXT, QUERIES
from csrm.spark.session import build_session, persisted

MARKET, LANGUAGE, LISTED = "tw", "zh-TW", "ko"
MAX_TERM_SHARE = 0.2
NUM_FIRST = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--taxonomy", type=Path, required=True, help="folder of the taxonomy")
    parser.add_argument("--encoder", help="folder of an encoder, see docs/encoders.md")
    args = parser.parse_args()
    made = category_markets(args.taxonomy, [Storefront(MARKET, LANGUAGE, LISTED)], [LISTED, LANGUAGE, "en"])
    below = leaves_below(args.taxonomy)
    measured = sorted(set(made.judgments.loc[made.judgments["split"] != "train", "query_id"]))
    catalog = made.catalog.assign(leaf=made.catalog["product_id"].str.partition("_")[0])

    spark = build_session("csrm-across-languages")
    tables = {CATALOG: made.catalog, QUERIES: made.queries, PARALLEL_TEXT: made.parallel_text}
    catalog_df, queries_df, parallel_df = (
        spark.createDataFrame(arrow_table(frame, table)) for table, frame in tables.items()
    )
    with persisted(product_terms(catalog_df)) as products_df, persisted(query_terms(queries_df)) as terms_df:
        found = [firsts(bm25_scores(products_df, terms_df, MAX_TERM_SHARE), catalog_df).assign(source="words")]
    with translated_products(catalog_df, queries_df, parallel_df, {MARKET: LANGUAGE}) as translated:
        assert translated is not None
        scores_df = translated_scores(translated, MAX_TERM_SHARE)
        found.append(firsts(scores_df, catalog_df).assign(source="translated"))
    if args.encoder:
        listed_df = catalog_df.where(F.col("language") == LISTED)
        vectors = embedded(args.encoder, made.catalog[made.catalog["language"] == LISTED], made.queries, measured)
        vectors_df = [spark.createDataFrame(pa.Table.from_pandas(frame, preserve_index=False)) for frame in vectors]
        near_df = near_pairs(*vectors_df, products_per_query=NUM_FIRST)
        found.append(firsts(near_df.withColumnRenamed("similarity", "bm25"), listed_df).assign(source="semantic"))
        found.append(fused(pd.concat(found)))
    ranked = pd.concat(found)

    rows = []
    for language, products in catalog.groupby("language"):
        relevant = {query: set(products.loc[products["leaf"].isin(below[query]), "product_id"]) for query in measured}
        for source in ranked["source"].unique():
            of_source = ranked[(ranked["source"] == source) & (ranked["language"] == language)]
            rows.append({"products": language, "source": source, **measure(of_source, relevant, len(products))})
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.3f"))


def embedded(
    folder: str, catalog: pd.DataFrame, queries: pd.DataFrame, measured: list[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Vectors of titles and of the measured queries."""
    encoder = load_encoder(folder)
    asked = queries[queries["query_id"].isin(measured)]
    products = catalog[["market", "product_id"]].assign(vector=list(encoder.embed(catalog["title"].tolist())))
    return products, asked[["market", "query_id"]].assign(vector=list(encoder.embed(asked["query"].tolist(), "query")))


def fused(ranked: pd.DataFrame) -> pd.DataFrame:
    """Products by reciprocal rank of their places in each source."""
    shown = ranked[ranked["product_rank"] <= NUM_FIRST]
    strength = (1 / (60 + shown["product_rank"])).groupby(
        [shown[name] for name in ("query_id", "language", "product_id")]
    )
    sums = strength.sum().rename("strength").reset_index()
    sums = sums.sort_values(["query_id", "language", "strength", "product_id"], ascending=[True, True, False, True])
    rank = sums.groupby(["query_id", "language"]).cumcount() + 1
    return sums.drop(columns="strength").assign(product_rank=rank, source="fused")


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
    """Each query's first products in each language, and each product's first query: product_rank, query_rank."""
    of_query = Window.partitionBy("query_id", "language").orderBy(F.desc("bm25"), F.asc("product_id"))
    of_product = Window.partitionBy("product_id").orderBy(F.desc("bm25"), F.asc("query_id"))
    return (
        scores_df.join(catalog_df.select("market", "product_id", "language"), ["market", "product_id"])
        .withColumn("product_rank", F.row_number().over(of_query))
        .withColumn("query_rank", F.row_number().over(of_product))
        .where((F.col("product_rank") <= NUM_FIRST) | (F.col("query_rank") == 1))
        .select("query_id", "product_id", "language", "product_rank")
        .toPandas()
    )


def measure(ranked: pd.DataFrame, relevant: dict[str, set[str]], num_products: int) -> dict[str, float]:
    """Means over the queries that have a relevant product."""
    shown = ranked[ranked["product_rank"] <= NUM_FIRST].sort_values("product_rank")
    first = shown.groupby("query_id")["product_id"].agg(list).to_dict()
    asked = [query for query, products in relevant.items() if products]
    hits = {query: [product in relevant[query] for product in first.get(query, [])] for query in asked}
    return {
        "queries": len(asked),
        "found": float(np.mean([query in first for query in asked])),
        "precision@3": float(np.mean([sum(hits[query][:3]) / 3 for query in asked])),
        "recall@100": float(np.mean([sum(hits[query]) / len(relevant[query]) for query in asked])),
        "reached": ranked["product_id"].nunique() / num_products,
        "chance": float(np.mean([len(relevant[query]) for query in asked])) / num_products,
    }


if __name__ == "__main__":
    main()
