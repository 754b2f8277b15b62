"""Export a trained model to a bundle for ONNX Runtime, after proof that both give the same scores."""

import json
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from pydantic import Field

from csrm.bundle import KIND, MODEL_NAME, PARITY_NAME, SETTINGS_NAME, TOKENIZER_NAME, BundleSettings
from csrm.cli import job_parser, run_job
from csrm.config import Settings, load_config
from csrm.manifest import check_replaceable, replace_folder, write_manifest
from csrm.onnx_backend import load_pack_scorer
from csrm.onnx_install import require_one_onnxruntime
from csrm.scoring import PairScorer
from csrm.tokenization import PromptTokenizer
from csrm.training.base_model import BaseModel
from csrm.training.data import JudgedInputs, JudgedPairs
from csrm.training.stage import load_trained
from export.packed_onnx import export_packed_graph
from export.parity import SCORE_TOLERANCE, Parity, check_parity


class ExportConfig(Settings):
    """Settings of the export."""

    model_dir: str
    """Folder that jobs/train.py wrote."""
    bundle_dir: str
    """Where the bundle goes; replaced, in one piece, when the proof holds."""
    markets: dict[str, str]
    """Market to language: whose pairs the proof runs over."""
    inputs: JudgedInputs
    """Real prompts for the proof."""
    parity_pairs: int = Field(default=256, ge=1)
    """Pairs of the proof, drawn at random; fewer where there are fewer."""


def export_bundle(model_dir: str, bundle_dir: Path, pairs: pd.DataFrame) -> Parity:
    """Write the bundle of a trained folder.

    Args:
        pairs: real pairs (csrm.scoring.PAIR_COLUMNS) over which the scores of both forms must agree.

    Raises:
        ParityError: they do not; nothing was written.
    """
    check_replaceable(bundle_dir, KIND)
    model, torch_scorer, card = load_trained(model_dir)
    unfinished = bundle_dir.with_name(bundle_dir.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        export_packed_graph(model, unfinished / MODEL_NAME)
        shutil.copyfile(Path(model_dir) / "tokenizer.json", unfinished / TOKENIZER_NAME)
        pack_scorer, provider = load_pack_scorer(unfinished / MODEL_NAME, "cpu")
        tokenizer = PromptTokenizer.from_file(unfinished / TOKENIZER_NAME, card.budgets)
        onnx_scorer = PairScorer(tokenizer, card.labels, pack_scorer, card.pack_tokens, provider=provider)
        parity = check_parity(pairs, torch_scorer, onnx_scorer, SCORE_TOLERANCE)
        packages = ["csrm", "torch", "transformers", "peft", "optimum", "optimum-onnx", "onnx", "tokenizers"]
        packages.append(require_one_onnxruntime())
        settings = BundleSettings(
            labels=card.labels,
            budgets=card.budgets,
            pack_tokens=card.pack_tokens,
            base_model=BaseModel(**card.base_model).name,
            precision="fp32",
            versions={package: version(package) for package in packages},
        )
        (unfinished / SETTINGS_NAME).write_text(settings.to_json(), encoding="utf-8")
        (unfinished / PARITY_NAME).write_text(json.dumps(parity.to_dict(), indent=2) + "\n", encoding="utf-8")
        write_manifest(unfinished, KIND)
        replace_folder(unfinished, bundle_dir, KIND)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return parity


def main(argv: Sequence[str] | None = None) -> int:
    args = job_parser(__doc__ or "", "conf/export_bundle.yaml").parse_args(argv)
    config = load_config(args.config, ExportConfig, args.overrides)
    start = time.monotonic()
    with JudgedPairs(config.inputs, config.markets) as pairs:
        sample = pairs.read(num_pairs=config.parity_pairs)
    parity = export_bundle(config.model_dir, Path(config.bundle_dir), sample)
    size = sum(path.stat().st_size for path in Path(config.bundle_dir).iterdir())
    print(
        f"bundle {config.bundle_dir}: {size / 1e6:.1f} MB, {time.monotonic() - start:.0f} s; scores within "
        f"{parity.largest_score_difference:.1e} of torch on {parity.num_pairs} pairs (allowed {parity.tolerance:.0e}, "
        f"margin std {parity.logit_margin_std:.2f})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main))
