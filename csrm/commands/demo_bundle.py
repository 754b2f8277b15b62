"""Make the demo's bundle: a tiny model, trained from Korean labels alone and exported by the real jobs.

It learns on generated markets of another seed than the demo's; those of Taiwan and the USA give it no label. It starts
as a word matcher, and learns other languages from Korean pairs that are put into them. Distillation is left out: it has
gained nothing where labels do not err.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from csrm.cli import job_parser, job_settings, setting_arguments
from csrm.commands import build_candidates, build_retrieval_table, export_bundle, generate_market, train
from csrm.config import Settings
from csrm.training.model.tiny import write_base_model_of_market

LABELLED_MARKET = "kr"


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
    translation_steps: int
    learning_rate: float
    """These two replace those of conf/train.yaml. A small rate keeps what the base model starts with: it matches words
    before it learns anything, see csrm.training.model.matching."""


def main(argv: Sequence[str] | None = None) -> int:
    args = job_parser(__doc__, "conf/demo_bundle.yaml").parse_args(argv)
    config = job_settings(args, DemoBundleConfig)
    work = Path(config.work)
    inputs = {
        name: {"path": work / "inputs" / f"{name}.parquet", "format": "parquet"}
        for name in ("catalog", "queries", "behaviour", "candidates", "judgments", "parallel_text")
    }
    generate_market.main(
        setting_arguments(
            seed=config.seed,
            products_per_market=config.products_per_market,
            queries_per_market=config.queries_per_market,
            output=work / "inputs",
        )
    )
    texts = {name: inputs[name] for name in ("catalog", "queries")}
    tables = work / "tables"
    behaviour = {**texts, "behaviour": inputs["behaviour"], "judgments": inputs["judgments"]}
    build_retrieval_table.main(setting_arguments(inputs=behaviour, tables=tables))
    build_candidates.main(setting_arguments(inputs={**texts, "candidates": inputs["candidates"]}, tables=tables))
    base_model = write_base_model_of_market(
        work / "inputs", work / "base_model", config.vocab_size, config.hidden_size, config.num_layers
    )
    texts["retrieval_table"] = {"path": tables / "retrieval_table"}
    judged = {**texts, "judgments": inputs["judgments"]}
    settings = {
        "inputs": judged,
        "base_model": {"folder": base_model},
        "translation.parallel_text": inputs["parallel_text"],
        "translation.max_steps": config.translation_steps,
        "translation.num_held_out": 1,
        "translation.mixed_share": 0.0,
        "tuning.learning_rate": config.learning_rate,
        "tuning.random_negatives": 0.5,
        "tuning.drop_all_titles": 0.3,
        "tuning.ranking_weight": 1.0,
        "tuning.eval_steps": 0,  # dev is Korean, and the demo has two other markets
        "distillation": None,
        "model_dir": work / "model",
    }
    train.main(setting_arguments(**settings))
    judged["judgments"] = {**inputs["judgments"], "path": _with_korean_dev_alone(work / "inputs")}
    exported = {"model_dir": work / "model", "bundle_dir": config.bundle_dir, "vote.words": True}
    return export_bundle.main(setting_arguments(inputs=judged, **exported))


def _with_korean_dev_alone(folder: Path) -> Path:
    """Judgments of which only Korean ones are of split dev: no label of another market chooses how words count."""
    judgments, path = pd.read_parquet(folder / "judgments.parquet"), folder / "judgments_of_export.parquet"
    is_unseen = (judgments["split"] == "dev") & (judgments["market"] != LABELLED_MARKET)
    judgments.assign(split=judgments["split"].mask(is_unseen, "test")).to_parquet(path, index=False)
    return path
