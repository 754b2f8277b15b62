"""A bundle: a folder with everything that scores pairs, the same on every machine.

| file | what |
| --- | --- |
| model.onnx | packed graph: inputs of PackBatch to `logits` (packs, pairs, labels); above 2 GB with model.onnx_data |
| tokenizer.json | tokenizer |
| golden.json | pairs with the scores of the trained model; some are scored again whenever the bundle is loaded |
| precisions.png | size, speed and quality of the precisions that were tried, where labelled pairs were given |
| manifest.json | BundleSettings, sha256 of each file, and the digest of the whole, which names the bundle |

    python -m csrm.bundle show FOLDER      what it is, how good, how big, how fast, for which device
    python -m csrm.bundle verify FOLDER    the same, after all its golden pairs were scored here
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import ValidationError, model_validator

from csrm.cli import run_job
from csrm.config import Settings
from csrm.delivery import fetch_folder
from csrm.errors import BundleError, ConfigError
from csrm.golden import GoldenPairs, check_golden_pairs
from csrm.labels import Label
from csrm.manifest import load_manifest
from csrm.prompts import TEMPLATE_VERSION
from csrm.scoring import PairScorer
from csrm.tokenization import Budgets, PromptTokenizer

KIND = "bundle"
FORMAT_VERSION = 2
MODEL_NAME = "model.onnx"
TOKENIZER_NAME = "tokenizer.json"
GOLDEN_NAME = "golden.json"
PLOT_NAME = "precisions.png"
GOLDEN_AT_LOAD = 8
"""Golden pairs that are scored whenever a bundle is loaded: about the pairs of two packs."""

Precision = Literal["fp32", "fp16", "int8", "int4"]


class Estimate(Settings):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


class Quality(Settings):
    """How well the scores of one precision rank labelled pairs, against those of fp32."""

    num_pairs: int
    num_queries: int
    auc: float
    """ROC-AUC of the label with the highest gain."""
    ndcg: float
    """nDCG@10, mean over queries."""
    auc_loss: Estimate
    """What fp32 has more; the interval is over queries, which both precisions share."""
    ndcg_loss: Estimate
    spearman: float
    """Rank correlation with the scores of fp32."""
    largest_shift: float
    """Largest difference of a score from that of fp32."""
    mean_shift: float


class PrecisionReport(Settings):
    """One precision that the export tried."""

    precision: Precision
    recipe: str
    """How its weights are stored and multiplied."""
    num_bytes: int
    """Of the graph with its weights."""
    pairs_per_s: float
    """On the machine of the export; compare within one bundle only."""
    pack_spread: float | None
    """Largest difference of one pair's score between 20 packs; None where the gate had refused it before."""
    quality: Quality | None = None
    """None where no labelled pairs were given."""
    verdict: str
    """passed, or what did not hold."""


class Parity(Settings):
    """How far the exported fp32 graph is from the trained model, over the same real pairs."""

    num_pairs: int
    largest_score_difference: float
    largest_logit_difference: float
    logit_margin_std: float
    """Standard deviation over the pairs of the last label's logit minus the first's: near 0, any two models agree."""
    tolerance: float
    """Largest difference of two scores that was allowed."""


class TensorSpec(Settings):
    """An input or output of the graph."""

    type: str
    shape: tuple[int | str, ...]


class Origin(Settings):
    """Where the weights come from; digests are sha256."""

    base_model: str
    """Name of the model that was trained."""
    base_model_files: dict[str, str]
    """File to digest."""
    adapter: str | None = None
    """Digest of the adapters that were merged into it; None where all weights were trained."""
    trained_model: str | None = None
    """Digest of the trained folder."""
    training_run: str | None = None
    """Digest of all that the training follows from: packs, start and tuning."""


class BundleSettings(Settings):
    """What `manifest.json` says about a bundle, under `about`."""

    format_version: int = FORMAT_VERSION
    template_version: int = TEMPLATE_VERSION
    labels: tuple[Label, ...]
    budgets: Budgets
    pack_tokens: int
    """Most tokens of a pack."""
    precision: Precision
    device: str
    """Device that it was proven on: cpu or cuda."""
    pack_tolerance: float
    """How far one pair's score may differ between two packs, or two runs."""
    golden_tolerance: float
    """How far a golden pair's score may be from that of the trained model."""
    golden_source: str
    """What computed the golden scores."""
    origin: Origin
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    parity: Parity
    precisions: tuple[PrecisionReport, ...]
    """Those that the export tried, this bundle's own among them."""
    versions: dict[str, str]
    """Package to version that made the bundle."""

    @model_validator(mode="after")
    def _room_for_a_pair(self) -> "BundleSettings":
        longest = self.budgets.prefix + self.budgets.suffix
        if self.pack_tokens < longest:
            raise ValueError(
                f"pack_tokens is {self.pack_tokens}, but a prefix with one suffix may take {longest} tokens. "
                "Raise pack_tokens or lower the budgets"
            )
        return self


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are as they were exported."""

    folder: Path
    settings: BundleSettings
    digest: str
    num_bytes: int

    def prompt_tokenizer(self) -> PromptTokenizer:
        """Raises:
        BundleError: its labels are not one token each.
        """
        try:
            tokenizer = PromptTokenizer.from_file(self.folder / TOKENIZER_NAME, self.settings.budgets)
            tokenizer.label_ids(self.settings.labels)
        except Exception as error:  # tokenizers raises Exception itself
            raise BundleError(f"bundle {str(self.folder)!r}: {TOKENIZER_NAME}: {error}") from error
        return tokenizer

    def golden_pairs(self) -> GoldenPairs:
        return GoldenPairs.read(self.folder / GOLDEN_NAME)


def load_bundle(folder: str | Path, digest: str | None = None) -> Bundle:
    """Open a bundle and check every file's digest.

    Args:
        folder: a path, or the URI of a folder, which is fetched once and kept (see csrm.delivery).
        digest: what the bundle's digest must be, or begin with; None: any.

    Raises:
        BundleError: a file is missing or changed, the bundle is not the one that the digest names, or it is for another
            version of CSRM.
    """
    folder = fetch_folder(folder, KIND)
    manifest = load_manifest(folder, KIND)
    where = f"bundle {str(folder)!r}"
    if digest and not manifest.digest.startswith(digest):
        raise BundleError(
            f"{where}: expected digest {digest}, got {manifest.digest}. "
            "Put the bundle there that the configuration names, or name this one."
        )
    for name, expected in (("format_version", FORMAT_VERSION), ("template_version", TEMPLATE_VERSION)):
        found = manifest.about.get(name, 1)
        if found != expected:
            raise BundleError(
                f"{where}: {name} is {found!r}, this CSRM reads {expected}. "
                "Export the model again, or use the CSRM that exported it."
            )
    try:
        settings = BundleSettings.model_validate(manifest.about)
    except (ValidationError, ConfigError) as error:
        raise BundleError(f"{where}: does not describe a bundle: {error}") from error
    return Bundle(folder, settings, manifest.digest, sum(entry.bytes for entry in manifest.files.values()))


def load_scorer(
    folder: str | Path,
    device: str,
    threads: int | None = None,
    digest: str | None = None,
    num_golden: int | None = GOLDEN_AT_LOAD,
) -> PairScorer:
    """Scorer of a bundle on a device, after it gave the golden scores there.

    Args:
        folder: see load_bundle.
        device: cpu, cuda, or cuda:<number>.
        threads: threads of one forward pass on the CPU; None for one per core.
        digest: see load_bundle.
        num_golden: golden pairs to score; None for all.

    Raises:
        BundleError: see load_bundle; or a golden pair has another score here.
        DeviceError: the device is not there, or the runtime would use another one.
    """
    from csrm.onnx_backend import load_pack_scorer  # onnxruntime is needed to score, not to read a bundle

    bundle = load_bundle(folder, digest)
    settings = bundle.settings
    pack_scorer, provider = load_pack_scorer(bundle.folder / MODEL_NAME, device, threads)
    tokenizer = bundle.prompt_tokenizer()
    scorer = PairScorer(
        tokenizer=tokenizer,
        labels=settings.labels,
        pack_scorer=pack_scorer,
        pack_tokens=settings.pack_tokens,
        digest=bundle.digest,
        provider=provider,
    )
    golden = bundle.golden_pairs()
    try:
        check_golden_pairs(
            golden if num_golden is None else golden.first(num_golden),
            tokenizer,
            scorer,
            settings.golden_tolerance,
            f"{provider} of {_runtime()} ({settings.precision}; exported with {_made_with(settings)})",
        )
    except BundleError as error:
        raise BundleError(f"bundle {str(bundle.folder)!r} on device {device!r}: {error}") from error
    scorer.num_tokens = scorer.num_prompt_tokens = 0  # only what is asked for is counted
    return scorer


def bundle_card(bundle: Bundle) -> str:
    """What a bundle is, how good, how big, how fast, and for which device; plain text."""
    settings, origin, parity = bundle.settings, bundle.settings.origin, bundle.settings.parity
    labels = ", ".join(f"{label.name} {label.gain:g} ({label.token!r})" for label in settings.labels)
    trained = f", trained model {origin.trained_model[:12]}" if origin.trained_model else ""
    lines = [
        f"bundle      {bundle.folder}",
        f"digest      {bundle.digest}",
        f"model       {origin.base_model}{trained}{', adapters merged' if origin.adapter else ''}",
        f"precision   {settings.precision}, proven on {settings.device}; {bundle.num_bytes / 1e6:,.1f} MB",
        f"labels      {labels}",
        f"prompt      template {settings.template_version}; at most {settings.budgets.prefix} tokens of a query and "
        f"{settings.budgets.suffix} of a product; packs of {settings.pack_tokens}",
        f"parity      fp32 within {parity.largest_score_difference:.1e} of the trained model on {parity.num_pairs} "
        f"pairs, allowed {parity.tolerance:.0e}; margin std {parity.logit_margin_std:.2f}",
        f"tolerance   {settings.pack_tolerance:.1e} between packs; {settings.golden_tolerance:.1e} from golden scores "
        f"({settings.golden_source})",
        f"made with   {_made_with(settings)}",
        "",
        *_precision_lines(settings.precisions),
    ]
    return "\n".join(lines)


def _precision_lines(precisions: Sequence[PrecisionReport]) -> list[str]:
    lines = [
        f"{'precision':<10} {'MB':>6} {'pairs/s':>8}  {'pack spread':<11}  {'ROC-AUC (loss, 95 %)':<33}  "
        f"{'nDCG@10 (loss, 95 %)':<33}  {'shift max':<9}  {'mean':<6}  Spearman"
    ]
    for row in precisions:
        spread = "" if row.pack_spread is None else f"{row.pack_spread:.1e}"
        cells = f"{row.precision:<10} {row.num_bytes / 1e6:>6,.1f} {row.pairs_per_s:>8,.1f}  {spread:<11}"
        if row.quality is not None:
            quality = row.quality
            losses = ((quality.auc, quality.auc_loss), (quality.ndcg, quality.ndcg_loss))
            cells += "".join(f"  {_loss_text(value, loss):<33}" for value, loss in losses)
            cells += f"  {quality.largest_shift:<9.4f}  {quality.mean_shift:.4f}  {quality.spearman:.4f}"
        lines.append(cells)
        lines.append(f"{'':<10} {row.recipe}: {row.verdict}")
    return lines


def _loss_text(value: float, loss: Estimate) -> str:
    return f"{value:.4f} ({loss.value:+.4f} [{loss.low:+.4f}, {loss.high:+.4f}])"


def _runtime() -> str:
    from csrm.onnx_install import require_one_onnxruntime

    name = require_one_onnxruntime()
    return f"{name} {version(name)}"


def _made_with(settings: BundleSettings) -> str:
    return ", ".join(f"{package} {number}" for package, number in settings.versions.items())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m csrm.bundle", description="Look at a bundle, or prove it here.")
    parser.add_argument("action", choices=["show", "verify"])
    parser.add_argument("folder", help="folder of the bundle, or its URI")
    parser.add_argument("--device", default="cpu", help="verify: cpu, cuda or cuda:<number>")
    args = parser.parse_args(argv)
    bundle = load_bundle(args.folder)
    print(bundle_card(bundle))
    if args.action == "verify":
        scorer = load_scorer(bundle.folder, args.device, num_golden=None)
        print(
            f"\nverified: every file is as it was exported, and {len(bundle.golden_pairs())} golden pairs have their "
            f"scores on {args.device} ({scorer.provider})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main))
