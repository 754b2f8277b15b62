"""Embed the titles of the catalog and the queries; only texts that have no vector of this encoder yet."""

import argparse
from collections.abc import Sequence

from pydantic import Field

from csrm.cli import job_parser, job_settings
from csrm.config import InputSpec, Markets, Settings, TablesSettings
from csrm.retrieval.vectors import embed_catalog_and_queries
from csrm.schemas import CATALOG, QUERIES, TEXT_VECTORS
from csrm.spark.catalogs import located_tables
from csrm.spark.inputs import read_inputs, require_markets
from csrm.spark.session import build_session
from csrm.spark.tables import table_path


class EmbeddingInputs(Settings):
    """Input tables."""

    catalog: InputSpec
    queries: InputSpec


class EmbeddingConfig(TablesSettings):
    """Settings of this job."""

    markets: Markets
    """Market to its language; only these markets' texts are embedded."""
    inputs: EmbeddingInputs
    encoder: str
    """Folder of the encoder, the same path on every machine; or its URI."""
    device: str = "cpu"
    """cpu; cuda, which is the GPU that Spark gives a task, or the first one; or cuda:<number>."""
    num_partitions: int | None = Field(default=None, ge=1)
    """Tasks that embed; null: as many as Spark has cores."""


def build_parser() -> argparse.ArgumentParser:
    return job_parser(__doc__, "conf/embed_catalog.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = job_settings(args, EmbeddingConfig)
    spark = build_session("csrm-embed-catalog")
    config = located_tables(spark, config)
    specs = {CATALOG: config.inputs.catalog, QUERIES: config.inputs.queries}
    inputs = read_inputs(spark, specs, config.markets)
    require_markets(inputs, config.markets)
    path = table_path(config.tables, TEXT_VECTORS)
    _, num_new = embed_catalog_and_queries(
        spark,
        inputs["catalog"].df,
        inputs["queries"].df,
        path,
        encoder=config.encoder,
        device=config.device,
        num_partitions=config.num_partitions,
    )
    print(f"catalog: {num_new['passage']:,} new texts embedded")
    print(f"queries: {num_new['query']:,} new texts embedded")
    print(f"Written: {path}")
    return 0
