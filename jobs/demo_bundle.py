"""Make the demo's bundle: a tiny model, trained and exported by the real jobs on a generated market of another seed."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from csrm.cli import job_parser, run_job, setting_arguments
from csrm.config import Settings, load_config
from csrm.training.tiny import train_byte_tokenizer, write_tiny_base_model
from export import export_bundle
from jobs import build_retrieval_table, generate_market, train


class DemoBundleConfig(Settings):
    """Settings of the demo's bundle."""

    work: str
    """Folder for the market, the base model and the trained model."""
    bundle_dir: str
    """Where the bundle goes."""
    seed: int
    """Of the market; not the demo's, so that the demo scores products and queries that it was not trained on."""
    products_per_market: int
    queries_per_market: int
    vocab_size: int
    """Tokens of the tokenizer."""
    hidden_size: int
    num_layers: int


def main(argv: Sequence[str] | None = None) -> int:
    args = job_parser(__doc__ or "", "conf/demo_bundle.yaml").parse_args(argv)
    config = load_config(args.config, DemoBundleConfig, args.overrides)
    work = Path(config.work)
    inputs = {
        name: {"path": work / "inputs" / f"{name}.parquet", "format": "parquet"}
        for name in ("catalog", "queries", "behaviour", "judgments")
    }
    generate_market.main(
        setting_arguments(
            seed=config.seed,
            products_per_market=config.products_per_market,
            queries_per_market=config.queries_per_market,
            output=work / "inputs",
        )
    )
    build_retrieval_table.main(setting_arguments(inputs=inputs, tables=work / "tables"))
    titles = pd.read_parquet(work / "inputs" / "catalog.parquet")["title"].dropna()
    queries = pd.read_parquet(work / "inputs" / "queries.parquet")["query"]
    tokenizer = train_byte_tokenizer([*titles, *queries], config.vocab_size)
    base_model = write_tiny_base_model(work / "base_model", tokenizer, config.hidden_size, config.num_layers)
    judged = {name: inputs[name] for name in ("catalog", "queries", "judgments")}
    judged["retrieval_table"] = {"path": work / "tables" / "retrieval_table"}
    train.main(setting_arguments(inputs=judged, base_model={"folder": base_model}, model_dir=work / "model"))
    return export_bundle.main(setting_arguments(inputs=judged, model_dir=work / "model", bundle_dir=config.bundle_dir))


if __name__ == "__main__":
    sys.exit(run_job(main))
