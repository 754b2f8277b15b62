"""Export a trained model to a bundle for ONNX Runtime, after proof that it scores as the model does.

python export/export_bundle.py --config conf/export_bundle.yaml --precision auto --device cpu
"""

import gc
import json
import logging
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from pydantic import Field
from tokenizers import Tokenizer

from csrm.bundle import (
    GOLDEN_NAME,
    KIND,
    MODEL_NAME,
    PLOT_NAME,
    TOKENIZER_NAME,
    Bundle,
    BundleSettings,
    Origin,
    Parity,
    Precision,
    PrecisionReport,
    TensorSpec,
    bundle_card,
    load_bundle,
    load_scorer,
)
from csrm.cli import job_parser, run_job
from csrm.config import Settings, load_config
from csrm.errors import BundleError, ConfigError, InputError, ParityError
from csrm.golden import GoldenPairs, choose_golden_pairs
from csrm.labels import Label, expected_gain
from csrm.manifest import check_replaceable, file_digest, replace_folder, verify_manifest, write_manifest
from csrm.onnx_backend import graph_tensors, load_pack_scorer, require_device
from csrm.onnx_install import require_one_onnxruntime
from csrm.scoring import PackScorer, PairScorer
from csrm.tokenization import PromptTokenizer
from csrm.training.base_model import BaseModel, load_language_model
from csrm.training.data import JudgedInputs, JudgedPairs
from csrm.training.model import PackedRelevanceModel, torch_pack_scorer
from csrm.training.stage import KIND as MODEL_KIND
from csrm.training.stage import ModelCard, load_trained
from export.families import check_model, check_weights
from export.packed_onnx import export_packed_graph
from export.parity import SCORE_TOLERANCE, check_parity, compare_logits, pack_spread
from export.precision import RECIPES, Recipe, check_locations, write_precision
from export.quality import gate, measure_quality, plot_precisions

MIN_PACK_TOLERANCE = 1e-5
"""Float32 sums in another order differ by less."""
SPREAD_PAIRS = 24
"""Pairs that are scored in 20 packings, and that speed is measured with."""
_MERGE_PAIRS = 32
logger = logging.getLogger(__name__)


class ExportConfig(Settings):
    """Settings of the export."""

    model_dir: str
    """Folder that jobs/train.py wrote."""
    bundle_dir: str
    """Where the bundle goes; replaced, in one piece, when the proof holds."""
    markets: dict[str, str] = Field(min_length=1)
    """Market to language: whose pairs the proof runs over."""
    inputs: JudgedInputs
    """Real prompts for the proof, and labelled pairs for the quality gate."""
    precision: Literal["auto", "fp32", "fp16", "int8", "int4"] = "fp32"
    """auto: the fastest that passes the quality gate on the device. fp16 is for GPUs only."""
    device: str = "cpu"
    """Device that will score, and that everything is proven on: cpu, cuda or cuda:<number>."""
    parity_pairs: int = Field(default=256, ge=1)
    """Pairs whose scores are compared with torch's, drawn at random; fewer where there are fewer."""
    quality_split: str = "dev"
    """Split whose pairs the quality gate ranks; it should not be one that the model was trained on."""
    quality_pairs: int = Field(default=1200, ge=1)
    """Pairs of the quality gate at most, as whole queries. Fewer are faster and give wider intervals."""
    grade_labels: dict[str, str] | None = None
    """Grade of a judgment to the name of its label; None where both have the same names."""


@dataclass(frozen=True)
class _Graph:
    """A graph at one precision, ready to score."""

    path: Path
    recipe: Recipe
    pack_scorer: PackScorer
    report: PrecisionReport


def export_bundle(
    model_dir: str | Path,
    bundle_dir: Path,
    pairs: pd.DataFrame,
    judged: pd.DataFrame | None = None,
    precision: str = "fp32",
    device: str = "cpu",
    grade_labels: Mapping[str, str] | None = None,
) -> Bundle:
    """Write the bundle of a trained folder.

    Args:
        pairs: real pairs (csrm.scoring.PAIR_COLUMNS) over which the scores of torch and the graph must agree.
        judged: pairs of whole queries with market, query_id and grade, which no precision may rank worse than fp32.
        precision: fp32, fp16, int8, int4, or auto.
        device: that will score.
        grade_labels: see ExportConfig.

    Raises:
        ParityError: scores do not agree, or the precision does not pass its gate; nothing was written.
        ConfigError: the model is not supported, or the precision cannot be proven; said before any work.
        DeviceError: the device is not there.
    """
    model_dir = Path(model_dir)
    check_replaceable(bundle_dir, KIND)
    require_device(device)
    model_digest = verify_manifest(model_dir, MODEL_KIND)
    _check_source(model_dir)
    has_labels = judged is not None and len(judged) > 0
    precisions = _wanted_precisions(precision, device, has_labels)
    unfinished = bundle_dir.with_name(bundle_dir.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    folder = unfinished / "bundle"
    folder.mkdir(parents=True)
    try:
        shutil.copyfile(model_dir / "tokenizer.json", folder / TOKENIZER_NAME)
        with _step("model in torch, adapters merged"):
            model, torch_scorer, card = load_trained(model_dir)
            if card.tuning["method"] == "lora":
                check_merge(model_dir, card, torch_scorer, pairs.iloc[:_MERGE_PAIRS])
        tokenizer = _matching_tokenizer(folder / TOKENIZER_NAME, card, model)
        with _step(f"scores of {len(pairs)} pairs in torch"):
            torch_logits = torch_scorer.logits(pairs)
        with _step("fp32 graph"):
            graph_path = unfinished / "fp32" / MODEL_NAME
            graph_path.parent.mkdir()
            export_packed_graph(model, graph_path)
            check_locations(graph_path)
        del model, torch_scorer
        gc.collect()
        scores = expected_gain(torch_logits, np.array([label.gain for label in card.labels]))
        golden = choose_golden_pairs(pairs, scores, tokenizer, f"torch {torch.__version__}")
        with _step(f"scores of {len(pairs)} pairs in the graph on {device}"):
            pack_scorer, provider = load_pack_scorer(graph_path, device)
            onnx_scorer = PairScorer(tokenizer, card.labels, pack_scorer, card.pack_tokens, provider=provider)
            parity = compare_logits(
                pairs, torch_logits, onnx_scorer.logits(pairs), card.labels, ("torch", provider), SCORE_TOLERANCE
            )
        settings = _settings(card, parity, golden, model_dir, model_digest, graph_path, device)
        write_best_precision(
            graph_path,
            pack_scorer,
            precisions,
            precision == "auto",
            pairs,
            judged,
            grade_labels,
            golden,
            settings,
            folder,
        )
        replace_folder(folder, bundle_dir, KIND)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return load_bundle(bundle_dir)


def write_best_precision(
    fp32_path: Path,
    fp32_scorer: PackScorer,
    precisions: Sequence[Precision],
    may_fall_back: bool,
    pairs: pd.DataFrame,
    judged: pd.DataFrame | None,
    grade_labels: Mapping[str, str] | None,
    golden: GoldenPairs,
    settings: BundleSettings,
    folder: Path,
) -> None:
    """Finish a bundle whose fp32 graph is proven: try precisions, keep the fastest that passes, score the golden pairs.

    Args:
        fp32_path: graph in a folder of its own, beside which other graphs are written.
        precisions: to try.
        may_fall_back: whether fp32 may be kept where no other passes.
        settings: of the fp32 bundle, with neither precisions nor tolerances.
        folder: of the bundle; tokenizer.json is there.

    Raises:
        ParityError: none passed.
    """
    tokenizer = PromptTokenizer.from_file(folder / TOKENIZER_NAME, settings.budgets)
    gains = None if judged is None or judged.empty else _grade_gains(judged, settings.labels, grade_labels)
    trials = _Trials(settings, tokenizer, pairs.iloc[:SPREAD_PAIRS], judged if gains is not None else None, gains)
    with _step("fp32: speed, packs, quality"):
        graphs = [trials.measure(fp32_path, RECIPES["fp32"][0], fp32_scorer)]
    for precision in precisions:
        for number, recipe in enumerate(RECIPES[precision] if precision != "fp32" else ()):
            with _step(f"{precision}: {recipe}"):
                path = fp32_path.parent.with_name(f"{precision}-{number}") / MODEL_NAME
                path.parent.mkdir()
                write_precision(fp32_path, recipe, path)
                check_locations(path)
                graphs.append(trials.measure(path, recipe, load_pack_scorer(path, settings.device)[0]))
            report = graphs[-1].report
            logger.info("  %s", report.verdict)
            if report.verdict == "passed":
                break
    wanted = [
        graph
        for graph in graphs
        if graph.report.verdict == "passed"
        and (graph.recipe.precision in precisions or (may_fall_back and graph.recipe.precision == "fp32"))
    ]
    reports = [graph.report for graph in graphs]
    if not wanted:
        failed = [f"  - {r.precision}, {r.recipe}: {r.verdict}" for r in reports if r.precision in precisions]
        raise ParityError(
            "quality gate: no recipe passed, the bundle was not written:\n" + "\n".join(failed) + "\n"
            "Export at precision auto, which keeps fp32 where nothing else passes, or train longer."
        )
    best = max(wanted, key=lambda graph: graph.report.pairs_per_s)
    for path in best.path.parent.iterdir():
        shutil.move(path, folder / path.name)
    golden.write(folder / GOLDEN_NAME)
    if gains is not None:
        plot_precisions(reports, folder / PLOT_NAME)
    scorer = PairScorer(tokenizer, settings.labels, best.pack_scorer, settings.pack_tokens)
    shift = np.abs(scorer.score(golden.pairs)["relevance_score"] - golden.scores).max()
    finished = settings.model_copy(
        update={
            "precision": best.recipe.precision,
            "precisions": tuple(reports),
            "pack_tolerance": max(MIN_PACK_TOLERANCE, 2 * (best.report.pack_spread or 0.0)),
            "golden_tolerance": SCORE_TOLERANCE if best.recipe.bits == 32 else max(SCORE_TOLERANCE, 2 * float(shift)),
        }
    )
    with _step("golden pairs in the finished bundle"):
        write_manifest(folder, KIND, finished.model_dump(mode="json"))
        load_scorer(folder, settings.device, num_golden=None)


class _Trials:
    """Measures graphs of one model against the first of them, the fp32 graph."""

    def __init__(
        self,
        settings: BundleSettings,
        tokenizer: PromptTokenizer,
        sample: pd.DataFrame,
        judged: pd.DataFrame | None,
        gains: np.ndarray | None,
    ) -> None:
        self._settings, self._tokenizer, self._sample = settings, tokenizer, sample
        self._judged, self._gains = judged, gains
        self._reference: _Graph | None = None
        self._reference_scores = np.empty(0)
        self._reference_seconds = 0.0
        """For the labelled pairs."""

    def measure(self, path: Path, recipe: Recipe, pack_scorer: PackScorer) -> _Graph:
        """Size, speed, spread over packs, and quality where labelled pairs are given."""
        settings, problems, quality = self._settings, [], None
        if self._judged is not None and self._gains is not None:
            start = time.perf_counter()
            try:
                scores = self._scorer(pack_scorer).score(self._judged)["relevance_score"].to_numpy()
            except ValueError as error:
                problems.append(str(error))
            else:
                seconds = time.perf_counter() - start
                if self._reference is None:
                    self._reference_scores, self._reference_seconds = scores, seconds
                queries = (self._judged["market"] + "\t" + self._judged["query_id"].astype(str)).to_numpy()
                quality = measure_quality(queries, self._gains, self._reference_scores, scores)
                if recipe.precision != "fp32":
                    assert self._reference is not None
                    assert self._reference.report.quality is not None
                    problems += gate(quality, self._reference.report.quality)
        spread = None
        if quality is not None and problems:  # refused: its speed is not worth turns of its own
            assert self._reference is not None
            rate = self._reference.report.pairs_per_s * self._reference_seconds / seconds
        else:
            rate = self._pairs_per_s(pack_scorer)
        if not problems:
            spread = pack_spread(self._sample, self._tokenizer, settings.labels, pack_scorer, settings.pack_tokens)
        report = PrecisionReport(
            precision=recipe.precision,
            recipe=str(recipe),
            num_bytes=sum(file.stat().st_size for file in path.parent.iterdir()),
            pairs_per_s=rate,
            pack_spread=spread,
            quality=quality,
            verdict="; ".join(problems) or "passed",
        )
        graph = _Graph(path, recipe, pack_scorer, report)
        if self._reference is None:
            self._reference = graph
        return graph

    def _pairs_per_s(self, pack_scorer: PackScorer) -> float:
        """Of the sample. Taken in turns with fp32, so that what else the machine does falls on both."""
        scorers = [pack_scorer] if self._reference is None else [self._reference.pack_scorer, pack_scorer]
        seconds: list[list[float]] = [[] for _ in scorers]
        for _ in range(3):
            for scorer, taken in zip(scorers, seconds, strict=True):
                start = time.perf_counter()
                self._scorer(scorer).logits(self._sample)
                taken.append(time.perf_counter() - start)
        medians = [statistics.median(taken) for taken in seconds]
        if self._reference is None:
            return len(self._sample) / medians[0]
        return self._reference.report.pairs_per_s * medians[0] / medians[1]

    def _scorer(self, pack_scorer: PackScorer) -> PairScorer:
        return PairScorer(self._tokenizer, self._settings.labels, pack_scorer, self._settings.pack_tokens)


def _wanted_precisions(precision: str, device: str, has_labels: bool) -> list[Precision]:
    """Precisions to try, most of all on a device.

    Raises:
        ConfigError: the precision cannot be proven on the device, or without labelled pairs.
    """
    if precision != "auto" and precision not in get_args(Precision):
        raise ConfigError(f"precision {precision!r}: expected auto or one of {', '.join(get_args(Precision))}.")
    if precision == "fp16" and device == "cpu":
        raise ConfigError("precision 'fp16': is for GPUs; on device cpu use auto, int8 or fp32.")
    if precision == "auto":
        wanted: list[Precision] = ["int8", "int4"] if device == "cpu" else ["fp16", "int8", "int4"]
    else:
        wanted = [precision]  # type: ignore[list-item]
    if wanted != ["fp32"] and not has_labels:
        raise ConfigError(
            f"precision {precision!r}: its quality must be proven on labelled pairs, and there are none in the split "
            "quality_split. Name another split, or export at precision fp32."
        )
    return wanted


def _check_source(model_dir: Path) -> None:
    """Refuse what is not supported before any weight is read."""
    check_weights(model_dir / "weights")
    try:
        card = json.loads((model_dir / "model.json").read_text(encoding="utf-8"))
        method, prompt_tokens = card["tuning"]["method"], card["budgets"]["prefix"] + card["budgets"]["suffix"]
        base_model = BaseModel(**card["base_model"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BundleError(
            f"model {str(model_dir)!r}: model.json cannot be read ({error!r}). Train it again."
        ) from error
    check_model(BaseModel(folder=str(model_dir / "weights")) if method == "full" else base_model, prompt_tokens)


def check_merge(model_dir: Path, card: ModelCard, merged: PairScorer, pairs: pd.DataFrame) -> None:
    """Adapters inside of the weights must score as adapters beside them.

    Raises:
        ParityError: they do not.
    """
    base = load_language_model(BaseModel(**card.base_model))
    adapted = PeftModel.from_pretrained(base, str(model_dir / "weights"))
    tokenizer = PromptTokenizer.from_file(model_dir / "tokenizer.json", card.budgets)
    model = PackedRelevanceModel(adapted, tokenizer.label_ids(card.labels))
    scorer = PairScorer(tokenizer, card.labels, torch_pack_scorer(model), card.pack_tokens, provider="adapters")
    check_parity(pairs, scorer, merged, SCORE_TOLERANCE)


def _matching_tokenizer(path: Path, card: ModelCard, model: PackedRelevanceModel) -> PromptTokenizer:
    """Raises:
    ConfigError: the tokenizer knows tokens that the model has no embedding for.
    """
    num_tokens = Tokenizer.from_file(str(path)).get_vocab_size()
    num_embeddings = model.language_model.get_input_embeddings().weight.shape[0]
    if num_tokens > num_embeddings:
        raise ConfigError(
            f"model {card.base_model}: the tokenizer has {num_tokens} tokens, but the model has embeddings of "
            f"{num_embeddings}. Is it another model's tokenizer? Train the model again."
        )
    return PromptTokenizer.from_file(path, card.budgets)


def _settings(
    card: ModelCard,
    parity: Parity,
    golden: GoldenPairs,
    model_dir: Path,
    model_digest: str,
    graph_path: Path,
    device: str,
) -> BundleSettings:
    base_files = card.base_model_files.items()
    adapter = model_dir / "weights" / "adapter_model.safetensors"
    inputs, outputs = graph_tensors(graph_path)
    packages = ["csrm", "torch", "transformers", "peft", "optimum", "optimum-onnx", "onnx", "onnx-ir", "tokenizers"]
    return BundleSettings(
        labels=card.labels,
        budgets=card.budgets,
        pack_tokens=card.pack_tokens,
        precision="fp32",
        device=device,
        pack_tolerance=0.0,
        golden_tolerance=0.0,
        golden_source=golden.source,
        origin=Origin(
            base_model=BaseModel(**card.base_model).name,
            base_model_files={name: sha256 for name, sha256 in base_files if name.endswith((".gguf", ".safetensors"))},
            adapter=file_digest(adapter) if adapter.exists() else None,
            trained_model=model_digest,
            training_run=card.fingerprint,
        ),
        inputs={name: TensorSpec(type=type_, shape=shape) for name, (type_, shape) in inputs.items()},
        outputs={name: TensorSpec(type=type_, shape=shape) for name, (type_, shape) in outputs.items()},
        parity=parity,
        precisions=(),
        versions={package: version(package) for package in [*packages, require_one_onnxruntime()]},
    )


def _grade_gains(judged: pd.DataFrame, labels: Sequence[Label], grade_labels: Mapping[str, str] | None) -> np.ndarray:
    """Gain of each pair's grade, shape (num_pairs,)."""
    names = judged["grade"].map(grade_labels) if grade_labels else judged["grade"]
    gains = names.map({label.name: label.gain for label in labels})
    if gains.isna().any():
        unknown = sorted(set(judged.loc[gains.isna(), "grade"].astype(str)))
        raise InputError(
            f"judgments: grades {unknown} have no label; labels are {[label.name for label in labels]}. "
            "Name them in the config under grade_labels."
        )
    return gains.to_numpy(dtype=np.float64)


def whole_queries(judged: pd.DataFrame, num_pairs: int) -> pd.DataFrame:
    """Judged pairs of whole queries, in random order of the queries, as many as fit; at least one query."""
    key = ["market", "query_id"]
    order = judged[key].drop_duplicates().sample(frac=1.0, random_state=0)
    sizes = order.merge(judged.groupby(key, as_index=False).size(), on=key, how="left")
    fits = sizes["size"].cumsum() <= num_pairs
    fits.iloc[:1] = True
    return judged.merge(sizes.loc[fits, key], on=key, how="inner")


@contextmanager
def _step(name: str) -> Iterator[None]:
    """Say what is done, and how long it took."""
    logger.info("%s ...", name)
    start = time.monotonic()
    yield
    logger.info("  %.1f s", time.monotonic() - start)


def main(argv: Sequence[str] | None = None) -> int:
    parser = job_parser(__doc__ or "", "conf/export_bundle.yaml")
    parser.add_argument("--precision", help="replaces the setting: auto, fp32, fp16, int8 or int4")
    parser.add_argument("--device", help="replaces the setting: cpu, cuda or cuda:<number>")
    args = parser.parse_args(argv)
    named = [f"{name}={getattr(args, name)}" for name in ("precision", "device") if getattr(args, name)]
    config = load_config(args.config, ExportConfig, [*args.overrides, *named])
    start = time.monotonic()
    with JudgedPairs(config.inputs, config.markets) as pairs:
        sample = pairs.read(num_pairs=config.parity_pairs)
        judged = pairs.read(split=config.quality_split)
    if config.precision != "fp32" or len(judged):
        judged = whole_queries(judged, config.quality_pairs)
    bundle = export_bundle(
        config.model_dir,
        Path(config.bundle_dir),
        sample,
        judged,
        config.precision,
        config.device,
        config.grade_labels,
    )
    print(bundle_card(bundle))
    print(
        f"\nexported in {time.monotonic() - start:.0f} s; look at it again: python -m csrm.bundle show {bundle.folder}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main))
