"""How much of relevance_scores a reader of one query opens: after a publish, after maintenance, after the next publish.

    python tests/benchmarks/file_skipping.py
    python tests/benchmarks/file_skipping.py --file-mb 8 --liquid     # other sizes of files, other layouts

Publishes random scores for two markets through the real MERGE, a million rows if not told otherwise, and lets Delta
plan reads of single queries: opened are the files that it does not skip, a mean over queries. Seconds are those of the
one commit that made the state. --liquid measures a table that is clustered by market and query in place of its
partitions, which CSRM's are not.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pandas as pd
from delta.tables import DeltaTable
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from csrm.operations.maintenance import cluster_market
from csrm.schemas import RELEVANCE_SCORES
from csrm.spark.commits import merge_changes
from csrm.spark.session import build_session
from csrm.spark.tables import create_table, spark_schema

MARKETS = ("kr", "tw")
NUM_READS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=10_000, help="of each of two markets")
    parser.add_argument("--products", type=int, default=50, help="of each query")
    parser.add_argument("--file-mb", type=float, default=1.0, help="as in conf/maintain.yaml")
    parser.add_argument("--liquid", action="store_true", help="liquid clustering in place of partitions and Z-order")
    args = parser.parse_args()
    spark = build_session("csrm-file-skipping")
    with tempfile.TemporaryDirectory(prefix="csrm-skipping-") as folder:
        rows_df = random_scores(spark, args.queries, args.products)
        table = measure(spark, rows_df, folder, args.file_mb, args.liquid)
    columns = list(table.columns)
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for row in table.itertuples(index=False):
        print("| " + " | ".join(str(value) for value in row) + " |", flush=True)


def random_scores(spark: SparkSession, num_queries: int, num_products: int) -> DataFrame:
    """Columns of relevance_scores and operation; ids look like hashes, so that nothing lies together by chance."""

    def number(*salt: object) -> Column:
        return F.xxhash64("market", "id", *map(F.lit, salt))

    market = F.explode(F.array(*map(F.lit, MARKETS)))
    query_id = F.substring(F.sha2(F.concat("market", F.floor(F.col("id") / num_products).cast("string")), 256), 1, 12)
    return (
        spark.range(num_queries * num_products)
        .withColumn("market", market)
        .select(
            "market",
            query_id.alias("query_id"),
            F.concat_ws("-", F.pmod(number(), F.lit(200_000)), F.pmod("id", F.lit(num_products))).alias("product_id"),
            (F.pmod(number("score"), F.lit(100_000)) / 100_000).cast("float").alias("relevance_score"),
            F.element_at(F.split(F.lit("E,S,C,I"), ","), (F.pmod(number(), F.lit(4)) + 1).cast("int")).alias(
                "predicted_grade"
            ),
            F.repeat(F.lit("d"), 64).alias("bundle_digest"),
            number("key").alias("pair_key"),
            F.timestamp_seconds(1_767_000_000 + F.floor(F.col("id") / 1000)).alias("scored_at"),
            F.lit("run-1").alias("run_id"),
            F.lit("update").alias("operation"),
        )
    )


def measure(spark: SparkSession, rows_df: DataFrame, path: str, file_mb: float, liquid: bool) -> pd.DataFrame:
    """One row for each state of the table."""
    query_ids = [
        row["query_id"]
        for row in rows_df.where(F.col("market") == MARKETS[0])
        .select("query_id")
        .distinct()
        .orderBy(F.xxhash64("query_id"))
        .limit(NUM_READS)
        .collect()
    ]
    states: list[dict[str, object]] = []

    def add(state: str, work: Callable[[], object]) -> None:
        started = time.monotonic()
        work()
        states.append(
            {"state": state, "seconds": f"{time.monotonic() - started:.0f}", **opened(spark, path, query_ids)}
        )

    def publish(changes_df: DataFrame, market: str = MARKETS[0]) -> None:
        market_df = changes_df.where(F.col("market") == market)
        merge_changes(market_df, RELEVANCE_SCORES, path, {"market": market}, {})

    def maintain() -> None:
        if not liquid:
            cluster_market(spark, path, MARKETS[0], file_mb)
            return
        spark.conf.set("spark.databricks.delta.optimize.maxFileSize", str(int(file_mb * 2**20)))
        DeltaTable.forPath(spark, path).optimize().executeCompaction()

    def one_percent_of(column: str) -> DataFrame:
        chosen = F.pmod(F.xxhash64(column, F.lit(len(states))), F.lit(100)) == 0
        return rows_df.where(chosen).withColumn("relevance_score", 1 - F.col("relevance_score"))

    if liquid:
        create_liquid_table(spark, path)
    else:
        create_table(spark, RELEVANCE_SCORES, path)
    publish(rows_df, MARKETS[1])
    add("first publish", lambda: publish(rows_df))
    add("maintenance", maintain)
    add("publish, 1 % of the queries", lambda: publish(one_percent_of("query_id")))
    add("maintenance", maintain)
    add("publish, 1 % of the products", lambda: publish(one_percent_of("product_id")))
    add("maintenance", maintain)
    return pd.DataFrame(states)


def opened(spark: SparkSession, path: str, query_ids: list[str]) -> dict[str, str]:
    """Files and megabytes of the first market, and those that a read of one of its queries opens."""
    market_df = spark.read.format("delta").load(path).where(F.col("market") == MARKETS[0])
    reads = [market_df.where(F.col("query_id") == query_id).inputFiles() for query_id in query_ids]
    files = market_df.inputFiles()
    return {
        "files of the market": str(len(files)),
        "MB": f"{_megabytes(files):.1f}",
        "opened files": f"{sum(map(len, reads)) / len(reads):.1f}",
        "opened MB": f"{sum(map(_megabytes, reads)) / len(reads):.2f}",
    }


def create_liquid_table(spark: SparkSession, path: str) -> None:
    builder = DeltaTable.create(spark).location(path).clusterBy("market", "query_id")
    builder = builder.addColumns(spark_schema(RELEVANCE_SCORES)).property("delta.enableChangeDataFeed", "true")
    builder.property("delta.enableDeletionVectors", "false").execute()


def _megabytes(files: list[str]) -> float:
    return sum(Path(urlsplit(file).path).stat().st_size for file in files) / 1e6


if __name__ == "__main__":
    main()
