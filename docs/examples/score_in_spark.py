"""Score the pairs of any Spark DataFrame: the scorer is a pandas UDF.

    python docs/examples/score_in_spark.py
    spark-submit docs/examples/score_in_spark.py my_bundle

The bundle must have the same path on every machine, or be a URI. Each Python worker loads it once.
"""

import argparse

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

import csrm
from csrm.spark.session import build_session

PAIRS = [
    ("us", "en", "frying pan", ["Cast Iron Frying Pan, 11-Inch"], "Wireless Mouse"),
    ("us", "en", "frying pan", ["Cast Iron Frying Pan, 11-Inch"], "Navy Nonstick Skillet, 9.5-Inch"),
    ("us", "en", "conditioner", ["Hair Conditioner for Dry Hair, 500ml"], "Creme Rinse for Damaged Hair, 350ml"),
    ("us", "en", "conditioner", ["Hair Conditioner for Dry Hair, 500ml"], "Stainless Steel Travel Mug"),
]
"""Market, language, query, titles that were retrieved for the query, and the product's title."""


def best_products(pairs_df: DataFrame, bundle: str) -> DataFrame:
    """The best product of each query: market, query, title, relevance_score.

    Args:
        pairs_df: market, language, query, retrieved_titles, title; one row per pair.
        bundle: folder of a bundle, or its URI.
    """
    score = csrm.relevance_score_udf(bundle)
    pair = F.struct("market", "language", "query", "retrieved_titles", "title")
    place = F.row_number().over(Window.partitionBy("market", "query").orderBy(F.desc("relevance_score")))
    scored_df = pairs_df.withColumn("relevance_score", score(pair))
    best_df = scored_df.withColumn("place", place).where("place = 1")
    return best_df.select("market", "query", "title", "relevance_score").orderBy("market", "query")


def main() -> None:
    parser = argparse.ArgumentParser(description="Score the pairs of a Spark DataFrame.")
    parser.add_argument("bundle", nargs="?", default="conf/demo_bundle", help="folder of a bundle, or its URI")
    args = parser.parse_args()

    spark = build_session("csrm-example")  # any session does; this one is quiet where it is local
    schema = "market string, language string, query string, retrieved_titles array<string>, title string"
    for row in best_products(spark.createDataFrame(PAIRS, schema), args.bundle).collect():
        print(f"{row['market']}  {row['query']:<12}  {row['relevance_score']:.3f}  {row['title']}")


if __name__ == "__main__":
    main()
