"""Precisions tried side by side: size, speed, spread over packs and quality; the fastest that passes is kept."""

import logging
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd

from csrm.artefacts.manifest import GOLDEN_NAME, MODEL_NAME, TOKENIZER_NAME, write_manifest
from csrm.bundle.contents import BUNDLE_KIND, MOST_TOLERANCE, PLOT_NAME, BundleSettings, Precision, PrecisionReport
from csrm.bundle.golden import GoldenPairs
from csrm.bundle.loading import default_tokens_per_call, load_scorer
from csrm.errors import BundleError, ConfigError, DeviceError, InputError, ParityError
from csrm.export.graph_files import check_locations, graph_files
from csrm.export.half import Peak, check_range, fuse_norms, largest_activation
from csrm.export.parity import SCORE_TOLERANCE, pack_spread
from csrm.export.precision import RECIPES, Recipe, recipes_for, write_precision
from csrm.export.quality import gate, measure_quality, plot_precisions
from csrm.export.w8a8 import channel_maxima
from csrm.scoring.labels import Label
from csrm.scoring.packing import Pack
from csrm.scoring.runtime import load_pack_scorer
from csrm.scoring.scorer import PackScorer, PairScorer
from csrm.scoring.tokenization import PromptTokenizer

logger = logging.getLogger(__name__)

MIN_PACK_TOLERANCE = 1e-5
"""Float32 sums in another order differ by less."""
QUALITY_PAIRS = 1_200
"""Most pairs of the quality gate, as whole queries: more take longer, fewer give wider intervals."""
SPREAD_PAIRS = 24
"""Pairs that are scored in 20 packings, and that speed is measured with."""


@dataclass(frozen=True)
class _Graph:
    """A graph at one precision, ready to score."""

    path: Path
    recipe: Recipe
    pack_scorer: PackScorer
    report: PrecisionReport


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
    tokenizer = PromptTokenizer.from_file(folder / TOKENIZER_NAME, settings.budgets, template=settings.template)
    gains = None if judged is None or judged.empty else grade_gains(judged, settings.labels, grade_labels)
    trials = _Trials(settings, tokenizer, pairs.iloc[:SPREAD_PAIRS], judged if gains is not None else None, gains)
    with logged_step("fp32: speed, packs, quality"):
        graphs = [trials.measure(fp32_path, RECIPES["fp32"][0], fp32_scorer)]
    reports = [graphs[0].report]
    for precision in precisions:
        if precision == "bf16" and any(report.precision == "fp16" and report.verdict == "passed" for report in reports):
            continue  # as fast as fp16, and less exact
        for number, recipe in enumerate(recipes_for(precision, settings.device) if precision != "fp32" else ()):
            with logged_step(f"{precision}: {recipe}"):
                path = fp32_path.parent.with_name(f"{precision}-{number}") / MODEL_NAME
                path.parent.mkdir()
                try:
                    pack_scorer = trials.make(fp32_path, recipe, path, pairs)
                except (ParityError, BundleError, DeviceError) as error:
                    reports.append(trials.refused(recipe, str(error)))
                else:
                    graphs.append(trials.measure(path, recipe, pack_scorer))
                    reports.append(graphs[-1].report)
            logger.info("  %s", reports[-1].verdict)
            if reports[-1].verdict == "passed":
                break
    wanted = [
        graph
        for graph in graphs
        if graph.report.verdict == "passed"
        and (graph.recipe.precision in precisions or (may_fall_back and graph.recipe.precision == "fp32"))
    ]
    if not wanted:
        failed = [f"  - {r.precision}, {r.recipe}: {r.verdict}" for r in reports if r.precision in precisions]
        raise ParityError(
            "quality gate: no recipe passed, the bundle was not written:\n" + "\n".join(failed) + "\n"
            "Export at precision auto, which keeps fp32 where nothing else passes, or train longer."
        )
    best = max(wanted, key=lambda graph: graph.report.pairs_per_s)
    for path in graph_files(best.path):
        shutil.move(path, folder / path.name)
    golden.write(folder / GOLDEN_NAME)
    if gains is not None:
        plot_precisions(reports, folder / PLOT_NAME)
    shift = np.abs(trials.scorer(best.pack_scorer).score_parts(golden.pairs) - golden.scores).max()
    finished = settings.model_copy(
        update={
            "precision": best.recipe.precision,
            "precisions": tuple(reports),
            "pack_tolerance": min(MOST_TOLERANCE, max(MIN_PACK_TOLERANCE, 2 * (best.report.pack_spread or 0.0))),
            "golden_tolerance": SCORE_TOLERANCE
            if best.recipe.bits == 32
            else min(MOST_TOLERANCE, max(SCORE_TOLERANCE, 2 * float(shift))),
        }
    )
    with logged_step("golden pairs in the finished bundle"):
        write_manifest(folder, BUNDLE_KIND, finished.model_dump(mode="json"))
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
        self._tokens_per_call = default_tokens_per_call(settings.device)
        self._judged, self._gains = judged, gains
        self._reference: _Graph | None = None
        self._reference_scores = np.empty(0)
        self._reference_seconds = 0.0
        """For the labelled pairs."""
        self._peak: Peak | None = None
        self._maxima: dict[str, np.ndarray] = {}

    def make(self, fp32_path: Path, recipe: Recipe, path: Path, pairs: pd.DataFrame) -> PackScorer:
        """Write a graph by a recipe, ready to score.

        Args:
            fp32_path: see write_best_precision.
            path: of the new graph.
            pairs: the sample whose activations must fit float16, and give the ranges of their channels.

        Raises:
            ParityError: an activation or a weight is too large for float16, or norms are not fused.
            BundleError, DeviceError: the device has no kernel for the graph.
        """
        device, source = self._settings.device, fp32_path
        if recipe.bits == 16:
            source = fp32_path.with_name("fused.onnx")
            if self._peak is None:
                fuse_norms(fp32_path, source)
                self._peak = largest_activation(source, self._packs(pairs), device)
        if recipe.precision == "fp16":
            assert self._peak is not None
            check_range(self._peak)
        if recipe.by_token and not self._maxima:
            self._maxima = channel_maxima(fp32_path, self._packs(pairs), device)
        write_precision(source, recipe, path, maxima=self._maxima)
        check_locations(path)
        return load_pack_scorer(path, device)[0]

    def refused(self, recipe: Recipe, reason: str) -> PrecisionReport:
        """The report of a recipe whose graph could not be made."""
        return PrecisionReport(
            precision=recipe.precision,
            recipe=str(recipe),
            num_bytes=0,
            pairs_per_s=0.0,
            pack_spread=None,
            largest_activation=self._largest_activation(recipe),
            verdict=reason,
        )

    def measure(self, path: Path, recipe: Recipe, pack_scorer: PackScorer) -> _Graph:
        """Size, speed, spread over packs, and quality where labelled pairs are given."""
        settings, problems, quality = self._settings, [], None
        if self._judged is not None and self._gains is not None:
            start = time.perf_counter()
            try:
                scores = self.scorer(pack_scorer).score(self._judged)["relevance_score"].to_numpy()
            except Exception as error:  # onnxruntime's errors have no common base
                if self._reference is None:
                    raise
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
        if problems and quality is None:  # it failed
            rate = 0.0
        elif problems:  # refused: its speed is not worth turns of its own
            assert self._reference is not None
            rate = self._reference.report.pairs_per_s * self._reference_seconds / seconds
        else:
            rate = self._pairs_per_s(pack_scorer)
        if not problems:
            spread = pack_spread(self._sample, self._tokenizer, settings.labels, pack_scorer, self._tokens_per_call)
        report = PrecisionReport(
            precision=recipe.precision,
            recipe=str(recipe),
            num_bytes=sum(file.stat().st_size for file in graph_files(path)),
            pairs_per_s=rate,
            pack_spread=spread,
            quality=quality,
            largest_activation=self._largest_activation(recipe),
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
                self.scorer(scorer).logits(self._sample)
                taken.append(time.perf_counter() - start)
        medians = [statistics.median(taken) for taken in seconds]
        if self._reference is None:
            return len(self._sample) / medians[0]
        return self._reference.report.pairs_per_s * medians[0] / medians[1]

    def _largest_activation(self, recipe: Recipe) -> float | None:
        return self._peak.value if self._peak and recipe.bits == 16 and np.isfinite(self._peak.value) else None

    def _packs(self, pairs: pd.DataFrame) -> list[Pack]:
        assert self._reference is not None
        return [pack for _, pack in self.scorer(self._reference.pack_scorer).prepare(pairs).packs]

    def scorer(self, pack_scorer: PackScorer) -> PairScorer:
        """Scorer with a graph, in calls as long as those of a night on the device."""
        return PairScorer(
            self._tokenizer, self._settings.labels, pack_scorer=pack_scorer, tokens_per_call=self._tokens_per_call
        )


def wanted_precisions(precision: str, device: str, has_labels: bool) -> list[Precision]:
    """Precisions to try on a device, in order; bf16 is left out where fp16 passes before it.

    Raises:
        ConfigError: the precision cannot be proven on the device, or without labelled pairs.
    """
    if precision != "auto" and precision not in get_args(Precision):
        raise ConfigError(f"precision {precision!r}: expected auto or one of {', '.join(get_args(Precision))}.")
    if precision in ("fp16", "bf16") and device == "cpu":
        raise ConfigError(f"precision {precision!r}: is for GPUs; on device cpu use auto, int8 or fp32.")
    if precision == "auto":
        wanted: list[Precision] = ["int8", "int4"] if device == "cpu" else ["fp16", "bf16", "int8", "int4"]
    else:
        wanted = [precision]  # type: ignore[list-item]
    if wanted != ["fp32"] and not has_labels:
        raise ConfigError(
            f"precision {precision!r}: its quality must be proven on labelled pairs, and there are none in the split "
            "quality_split. Name another split, or export at precision fp32."
        )
    return wanted


def grade_gains(judged: pd.DataFrame, labels: Sequence[Label], grade_labels: Mapping[str, str] | None) -> np.ndarray:
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
def logged_step(name: str) -> Iterator[None]:
    """Say what is done, and how long it took."""
    logger.info("%s ...", name)
    start = time.monotonic()
    yield
    logger.info("  %.1f s", time.monotonic() - start)
