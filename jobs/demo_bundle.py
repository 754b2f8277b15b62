"""Make the demo's bundle: a tiny model, trained and exported by the real jobs on a generated market of another seed."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from csrm.cli import job_parser, run_job
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
    """Of the market; another one than the demo's, so that the demo scores products and queries it was not trained on."""
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
    inputs = {name: work / "inputs" / f"{name}.parquet" for name in ("catalog", "queries", "behaviour", "judgments")}
    specs = {name: f"{{path: {path}, format: parquet}}" for name, path in inputs.items()}
    texts = ", ".join(f"{name}: {specs[name]}" for name in ("catalog", "queries", "judgments"))
    shutil.rmtree(work, ignore_errors=True)
    generate_market.main(
        settings(
            seed=config.seed,
            products_per_market=config.products_per_market,
            queries_per_market=config.queries_per_market,
            output=work / "inputs",
        )
    )
    build_retrieval_table.main(
        settings(inputs=f"{{{texts}, behaviour: {specs['behaviour']}}}", tables=work / "tables")
    )
    titles = pd.read_parquet(inputs["catalog"])["title"].dropna()
    queries = pd.read_parquet(inputs["queries"])["query"]
    tokenizer = train_byte_tokenizer([*titles, *queries], config.vocab_size)
    base_model = write_tiny_base_model(work / "base_model", tokenizer, config.hidden_size, config.num_layers)
    with_retrieval = f"{{{texts}, retrieval_table: {{path: {work / 'tables' / 'retrieval_table'}}}}}"
    train.main(
        settings(inputs=with_retrieval, base_model=f"{{folder: {base_model}}}", model_dir=work / "model")
    )
    return export_bundle.main(
        settings(inputs=with_retrieval, model_dir=work / "model", bundle_dir=config.bundle_dir)
    )


def settings(**values: object) -> list[str]:
    """Arguments of a job that replace its settings."""
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


if __name__ == "__main__":
    sys.exit(run_job(main))
