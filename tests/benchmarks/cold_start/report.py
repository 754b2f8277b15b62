"""Tables and a plot of the study's results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from legs import Leg, ndcg
from scipy.special import logit

from csrm.scoring.scorer import pair_texts
from csrm.scoring.vote import named_share
from csrm.training.distillation.label_quality import resampled_auc

FOLDER = Path(__file__).parent
NUM_RESAMPLES = 2_000
WHOLE = "all but distillation"
"""What a user is advised to train."""
WITH_E5, SEEDS_AS_ONE = f"{WHOLE} + e5", "its seeds as one"
JOINT_ROWS = (WITH_E5, SEEDS_AS_ONE, f"{SEEDS_AS_ONE} + e5")
ENGLISH_JOINT_ROWS = ("words", f"{WHOLE} + words", WITH_E5, f"{WITH_E5} + words")
COMPARISONS = (
    *((f"+ {technique}", "labels only") for technique in ("translation", "titles", "title pairs", "distillation")),
    *(("all", f"all but {technique}") for technique in ("translation", "titles", "title pairs", "distillation")),
    ("all", "labels only"),
    ("all", "translated labels"),
    ("all", "labels of the target"),
    ("all", "labels of the target + titles"),
    ("all but distillation", "labels of the target + titles"),
    ("all but distillation", "labels only"),
    ("+ titles and distillation", "+ titles"),
    ("+ titles and label smoothing", "+ titles"),
    ("+ titles and pruning by cleanlab", "+ titles"),
    ("all", "+ titles and label smoothing"),
    ("all", "+ titles and pruning by cleanlab"),
    (WITH_E5, WHOLE),
    (SEEDS_AS_ONE, WHOLE),
    (f"{SEEDS_AS_ONE} + e5", WHOLE),
    ("+ label smoothing", "labels only"),
    ("+ pruning by cleanlab", "labels only"),
)
"""Rows whose difference says what a technique gives, or the whole against what else one would do."""


def joint_results(results: Sequence[Mapping[str, Any]], e5: str) -> list[Mapping[str, Any]]:
    """Rows that need no training: the mean score of all seeds of WHOLE, and either with an encoder beside it.

    Model and encoder weigh the same: the sum of log-odds and cosine, each in standard deviations. No label chooses it.

    Args:
        results: of the trained rows, and of the encoder.
        e5: row of the encoder.
    """
    cosines = {one["leg"]: np.array(one["scores"]) for one in results if one["row"] == e5}
    found: list[Mapping[str, Any]] = []
    for panel in sorted({(one["leg"], one["num_queries"], one["noise"]) for one in results if one["row"] == WHOLE}):
        if panel[0] not in cosines:
            continue
        of_panel = [
            one for one in results if (one["leg"], one["num_queries"], one["noise"], one["row"]) == (*panel, WHOLE)
        ]
        mean = np.mean([one["scores"] for one in of_panel], axis=0)
        for one in of_panel:
            joint = {WITH_E5: fused(np.array(one["scores"]), cosines[panel[0]])}
            if len(of_panel) > 1:
                joint |= {SEEDS_AS_ONE: mean, f"{SEEDS_AS_ONE} + e5": fused(mean, cosines[panel[0]])}
            found += [{**one, "row": row, "scores": scores, "english": None} for row, scores in joint.items()]
    return found


def fused(scores: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """Sum of the scores' log-odds and of other values of the pairs, each in standard deviations."""
    odds: np.ndarray = logit(scores.clip(1e-3, 1 - 1e-3))
    parts = [(values - values.mean()) / values.std() for values in (odds, *others)]
    return np.sum(parts, axis=0)


def joint_english(
    results: Sequence[Mapping[str, Any]], e5: str, judged: Mapping[str, pd.DataFrame]
) -> list[Mapping[str, Any]]:
    """Rows of the English labels that need no training: words alone, and WHOLE with words, an encoder, or both.

    Args:
        results: of the trained rows, and of the encoder.
        e5: row of the encoder.
        judged: see legs.read_english.
    """
    words = {
        name: np.array([named_share(query.query, product) for query, product in pair_texts(pairs)])
        for name, pairs in judged.items()
    }
    cosines = next((one.get("english_scores") for one in results if one["row"] == e5), None)
    rows: list[tuple[str, Mapping[str, np.ndarray]]] = [("words", words)]
    for one in results:
        if one["row"] == WHOLE and cosines is not None and one.get("english_scores"):
            of_model = {name: np.array(scores) for name, scores in one["english_scores"].items()}
            beside = {name: np.array(cosines[name]) for name in judged}
            rows += [
                (ENGLISH_JOINT_ROWS[1], {name: fused(of_model[name], words[name]) for name in judged}),
                (ENGLISH_JOINT_ROWS[2], {name: fused(of_model[name], beside[name]) for name in judged}),
                (ENGLISH_JOINT_ROWS[3], {name: fused(of_model[name], beside[name], words[name]) for name in judged}),
            ]
    return [
        {"row": row, "english": {name: ndcg(judged[name], values) for name, values in scores.items()}}
        for row, scores in rows
    ]


class Estimate:
    """A mean over seeds with its 95% interval: percentile bootstrap over queries, the same resamples for every row."""

    def __init__(self, values: np.ndarray) -> None:
        """Make one.

        Args:
            values: of the data itself, then of each resample.
        """
        self.value = float(values[0])
        self.low, self.high = (float(bound) for bound in np.nanpercentile(values[1:], [2.5, 97.5]))

    def __format__(self, form: str) -> str:
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def aucs(measured: pd.DataFrame, language: str, scores: Sequence[float]) -> np.ndarray:
    """ROC-AUC of the pairs whose product is in a language: of all of them, then of each resample of their queries."""
    chosen = (measured["title_language"] == language).to_numpy()
    pairs = measured[chosen]
    relevant = (pairs["grade"] == "yes").to_numpy()
    return resampled_auc(np.asarray(scores)[chosen], relevant, pairs["query_id"].to_numpy(), NUM_RESAMPLES)


class LegResults:
    """The resampled ROC-AUC of a leg's results."""

    def __init__(self, leg: Leg, measured: pd.DataFrame, results: Sequence[Mapping[str, Any]]) -> None:
        """Make one.

        Args:
            measured: the leg's test pairs, in the order of the results' scores.
        """
        self.kinds = leg.kinds
        self._aucs = {
            (one["num_queries"], one["noise"], one["row"], one["seed"]): {
                kind: aucs(measured, kind, one["scores"]) for kind in leg.kinds
            }
            for one in results
        }
        self.panels = sorted({key[:2] for key in self._aucs})
        """Number of queries and share of wrong labels."""

    def seeds(self, panel: tuple[int, float], row: str) -> list[int]:
        """Those that a row has a result for."""
        return sorted(key[3] for key in self._aucs if key[:3] == (*panel, row))

    def estimates(
        self, panel: tuple[int, float], row: str, minus: tuple[tuple[int, float], str] | None = None
    ) -> tuple[int, list[Estimate]]:
        """Number of seeds, and for each kind of pair the AUC, or its difference to another row with the same seeds."""
        seeds = [seed for seed in self.seeds(panel, row) if minus is None or seed in self.seeds(*minus)]
        found = []
        for kind in self.kinds if seeds else ():
            values = [self._aucs[*panel, row, seed][kind] for seed in seeds]
            if minus is not None:
                values = [
                    value - self._aucs[*minus[0], minus[1], seed][kind]
                    for value, seed in zip(values, seeds, strict=True)
                ]
            found.append(Estimate(np.mean(values, axis=0)))
        return len(seeds), found


def leg_tables(leg: LegResults, rows: Sequence[str]) -> str:
    """ROC-AUC of each row and kind of pair, then differences of rows, then what wrong labels cost each row."""
    levels, differences, costs = [], [], []
    for panel in leg.panels:
        shown = [f"{panel[0]:,}", f"{panel[1]:.0%}"]
        for row in rows:
            num_seeds, values = leg.estimates(panel, row)
            levels.append([*shown, row, str(num_seeds), *(f"{value:.3f}" for value in values)])
            num_seeds, values = leg.estimates(panel, row, ((panel[0], 0.0), row)) if panel[1] else (0, [])
            costs.append([*shown, row, str(num_seeds), *(f"{value:+.3f}" for value in values)])
        for row, other in COMPARISONS:
            num_seeds, values = leg.estimates(panel, row, (panel, other))
            differences.append([*shown, f"{row} - {other}", str(num_seeds), *(f"{value:+.3f}" for value in values)])
    parts = [
        (None, "row", levels),
        ("What it gives, with the same seeds:", "row - row", differences),
        ("What the wrong labels cost, with the same seeds:", "row", costs),
    ]
    texts = []
    for heading, name, lines in parts:
        if lines := [line for line in lines if line[3] != "0"]:
            header = ["queries", "wrong", name, "seeds", *(f"AUC, {kind}" for kind in leg.kinds.values())]
            table = [header, ["---"] * len(header), *lines]
            texts += [heading] if heading else []
            texts.append("\n".join("| " + " | ".join(line) + " |" for line in table))
    return "\n\n".join(texts)


def english_table(results: Sequence[Mapping[str, Any]], rows: Sequence[str], e5: str) -> str:
    """nDCG@10 on the human labels in English, and what it is above the encoder's."""
    lines = [
        "| row | seeds | ESCI nDCG@10 | less e5 | Chorus nDCG@10 | less e5 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    (free,) = [one["english"] for one in results if one["row"] == e5] or [None]
    for row in rows:
        of_row = [one["english"] for one in results if one["row"] == row and one["english"]]
        if of_row:
            cells = []
            for name in ("ESCI", "Chorus"):
                values = np.mean([one[name] for one in of_row], axis=0)
                draws = np.random.default_rng(0).integers(0, len(values), size=(NUM_RESAMPLES, len(values)))
                cells.append(f"{_mean(values, draws):.3f}")
                is_compared = free is not None and row != e5
                cells.append(f"{_mean(values - np.array(free[name]), draws):+.3f}" if is_compared else "")
            lines.append("| " + " | ".join([row, str(len(of_row)), *cells]) + " |")
    return "\n".join(lines)


def _mean(values: np.ndarray, draws: np.ndarray) -> Estimate:
    """Of the queries' values."""
    return Estimate(np.array([values.mean(), *values[draws].mean(axis=1)]))


def write_report(
    results: Sequence[Mapping[str, Any]],
    measured: Mapping[str, tuple[Leg, pd.DataFrame]],
    rows: Sequence[str],
    english: Sequence[Mapping[str, Any]],
    e5: str,
) -> None:
    """Write report.md and report.svg beside the results, and print the tables.

    Args:
        measured: name of each leg to the leg and its test pairs, in the order of the results' scores.
        rows: of the grid, in the order to show them.
        english: see joint_english.
        e5: row of the encoder.
    """
    parts = []
    for name, (leg, pairs) in measured.items():
        of_leg = [one for one in results if one["leg"] == name]
        if of_leg:
            parts.append(f"## {name}\n\n{leg_tables(LegResults(leg, pairs, of_leg), rows)}")
    if any(one["english"] for one in results):
        table = english_table([*results, *english], [*dict.fromkeys([*rows, *ENGLISH_JOINT_ROWS])], e5)
        parts.append(f"## Labels in English, none of them learnt\n\n{table}")
    text = "\n\n".join(parts)
    (FOLDER / "report.md").write_text(f"# Cold start study\n\nMade by study.py.\n\n{text}\n", encoding="utf-8")
    print(text)
    _plot(results, measured, rows)


def _plot(
    results: Sequence[Mapping[str, Any]], measured: Mapping[str, tuple[Leg, pd.DataFrame]], rows: Sequence[str]
) -> None:
    """ROC-AUC of each row, one panel for each leg, noise and kind of pair."""
    panels = sorted({(one["leg"], one["num_queries"], one["noise"]) for one in results})
    sides = [(panel, kind) for panel in panels for kind in measured[panel[0]][0].kinds]
    figure, axes = plt.subplots(len(sides), 1, figsize=(7, 0.6 + 2.2 * len(sides)), squeeze=False, layout="constrained")
    for axis, (panel, kind) in zip(axes[:, 0], sides, strict=True):
        leg, pairs = measured[panel[0]]
        of_panel = [one for one in results if (one["leg"], one["num_queries"], one["noise"]) == panel]
        shown = [row for row in rows if any(one["row"] == row for one in of_panel)]
        for place, row in enumerate(shown):
            values = [aucs(pairs, kind, one["scores"]) for one in of_panel if one["row"] == row]
            estimate = Estimate(np.mean(values, axis=0))
            axis.plot([estimate.low, estimate.high], [place, place], color="tab:blue")
            axis.plot(estimate.value, place, "o", color="tab:blue")
        axis.set_yticks(range(len(shown)), shown)
        axis.invert_yaxis()
        axis.set_title(f"{panel[0]}, {panel[1]:,} queries, {panel[2]:.0%} wrong labels: {leg.kinds[kind]}", fontsize=9)
        axis.set_xlabel("ROC-AUC, 95% interval")
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "study"}):  # text as text; equal for equal results
        figure.savefig(FOLDER / "report.svg", metadata={"Date": None})
    plt.close(figure)
