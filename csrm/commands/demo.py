"""Two nights on a generated market: retrieval table, candidates, scores, published table, evaluation, changes."""

import sys
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from csrm.cli import job_parser, job_settings, setting_arguments
from csrm.commands import build_candidates, build_retrieval_table, evaluate, generate_market, report, score_catalog
from csrm.config import InputSpec, Settings
from csrm.schemas import CATALOG, QUERIES, RELEVANCE_SCORES
from csrm.spark.inputs import read_input
from csrm.spark.session import build_session
from csrm.spark.tables import read_changes, read_table, table_path, table_version


class DemoConfig(Settings):
    """Settings of the demo."""

    work: str
    """Folder for the inputs, the tables and the evaluation."""
    bundle: str
    """Bundle that scores."""
    seed: int
    """Of the market."""
    products_per_market: int
    queries_per_market: int


def main(argv: Sequence[str] | None = None) -> int:
    args = job_parser(__doc__, "conf/demo.yaml").parse_args(argv)
    config = job_settings(args, DemoConfig)
    tables = f"{config.work}/tables"
    inputs = {
        name: {"path": f"{config.work}/inputs/{name}.parquet", "format": "parquet"}
        for name in ("catalog", "queries", "behaviour", "candidates", "judgments", "parallel_text")
    }
    texts = {name: inputs[name] for name in ("catalog", "queries")}
    judged = {**texts, "judgments": inputs["judgments"]}
    translated = {"parallel_text": inputs["parallel_text"]}

    heading("1/6 Generate a market (Korea, Taiwan, USA): catalog, queries, behaviour, judgments, parallel text")
    generate_market.main(
        setting_arguments(
            seed=config.seed,
            products_per_market=config.products_per_market,
            queries_per_market=config.queries_per_market,
            listed={"tw": "ko"},
            output=f"{config.work}/inputs",
        )
    )
    heading("2/6 Retrieval table: the product titles that augment each query")
    behaviour = {**judged, **translated, "behaviour": inputs["behaviour"]}
    build_retrieval_table.main(setting_arguments(inputs=behaviour, tables=tables))
    heading("3/6 Candidates: the pairs to score, for the full catalog")
    pairs = {**texts, **translated, "candidates": inputs["candidates"]}
    build_candidates.main(setting_arguments(inputs=pairs, tables=tables))
    heading("4/6 Score the catalog, audit, publish")
    exit_code = score_catalog.main(setting_arguments(inputs=texts, tables=tables, bundle=config.bundle))
    if exit_code:
        return exit_code
    heading(
        "5/6 Evaluate against the judgments, which no step before has read but to keep them out of the retrieval table"
    )
    evaluate.main(setting_arguments(inputs=judged, tables=tables, output=f"{config.work}/evaluation"))

    spark = build_session("csrm-demo")
    heading("Best and worst products of three queries in each market")
    for row in extremes(spark, config, inputs).collect():
        print(f"{row.market}  {row.query:<24}  best  {row.best_score:.2f}  {row.best_title[:60]}")
        print(f"{'':<28}  worst {row.worst_score:.2f}  {row.worst_title[:60]}")
    path = table_path(tables, RELEVANCE_SCORES)
    heading("6/6 The next night: one product in a hundred has another title, the rest is not scored again")
    version = table_version(spark, path)
    texts["catalog"] = {**inputs["catalog"], "path": f"{config.work}/inputs/catalog_next_night.parquet"}
    rename_products(inputs["catalog"]["path"], texts["catalog"]["path"])
    exit_code = score_catalog.main(setting_arguments(inputs=texts, tables=tables, bundle=config.bundle))
    if exit_code:
        return exit_code
    heading("What its readers see in the change feed")
    changes_df = read_changes(spark, RELEVANCE_SCORES, path, version)
    counts = changes_df.groupBy("version", "market", "change").count().orderBy("version", "market", "change").collect()
    for row in counts:
        print(f"version {row['version']}  {row['market']}  {row['change']:<17} {row['count']:,} rows")

    heading("A page about this night, and the published table")
    report.main(setting_arguments(inputs=texts, tables=tables, output=f"{config.work}/reports"))
    print(f"tables: {tables}; evaluation with plot: {config.work}/evaluation")
    print("read it without Spark:")
    print(f"""  {sys.executable} -c "from deltalake import DeltaTable; print(DeltaTable('{path}').to_pandas())" """)
    return 0


def rename_products(path: str, renamed_path: str) -> None:
    """A catalog in which each hundredth product has another title."""
    catalog = pq.read_table(path)
    titles = [f"{title} 2" if n % 100 == 0 else title for n, title in enumerate(catalog["title"].to_pylist())]
    place = catalog.column_names.index("title")
    pq.write_table(catalog.set_column(place, "title", pa.array(titles, pa.string())), renamed_path)


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def extremes(spark: SparkSession, config: DemoConfig, inputs: dict[str, dict[str, str]]) -> DataFrame:
    """Three queries of each market with the title and score of their best and worst products."""
    queries_df = read_input(spark, QUERIES, InputSpec(**inputs["queries"])).df.select("market", "query_id", "query")
    catalog_df = read_input(spark, CATALOG, InputSpec(**inputs["catalog"])).df.select("market", "product_id", "title")
    scores_df = read_table(spark, RELEVANCE_SCORES, table_path(f"{config.work}/tables", RELEVANCE_SCORES))
    pair = F.struct("relevance_score", "title")
    by_query_df = (
        scores_df.join(catalog_df, on=["market", "product_id"], how="inner")
        .join(queries_df, on=["market", "query_id"], how="inner")
        .groupBy("market", "query_id", "query")
        .agg(F.max(pair).alias("best"), F.min(pair).alias("worst"))
    )
    place = F.row_number().over(Window.partitionBy("market").orderBy(F.xxhash64("query_id")))
    return (
        by_query_df.withColumn("place", place)
        .where("place <= 3")
        .orderBy("market", "place")
        .selectExpr(
            *("market", "query", "best.title best_title", "best.relevance_score best_score"),
            *("worst.title worst_title", "worst.relevance_score worst_score"),
        )
    )
