"""Tables and a plot of the study's results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from legs import Leg

from csrm.metrics import resampled_pair_metrics

FOLDER = Path(__file__).parent
NUM_RESAMPLES = 2_000
REFERENCE = "labels only"


class Estimate:
    """A mean over seeds with its 95% interval: percentile bootstrap over queries, the same resamples for every row."""

    def __init__(self, values: np.ndarray) -> None:
        """Args:
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
    _, query_of_pair = np.unique(pairs["query_id"].to_numpy(), return_inverse=True)
    num_queries = int(query_of_pair.max()) + 1
    draws = np.random.default_rng(0).multinomial(num_queries, np.full(num_queries, 1 / num_queries), size=NUM_RESAMPLES)
    weights = np.vstack([np.ones((1, num_queries), dtype=draws.dtype), draws])
    relevant = (pairs["grade"] == "yes").to_numpy()
    return resampled_pair_metrics(relevant, np.asarray(scores)[chosen], query_of_pair, weights)[:, 0]


def leg_table(leg: Leg, measured: pd.DataFrame, results: Sequence[Mapping[str, Any]], rows: Sequence[str]) -> str:
    """One line a row of the grid: ROC-AUC of each kind of pair, and the difference to REFERENCE with the same seeds."""
    kinds = list(leg.kinds)
    header = ["queries", "noise", "row", "seeds"]
    header += [text for kind in kinds for text in (f"AUC, {leg.kinds[kind]}", f"to {REFERENCE}")]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    found = {(one["num_queries"], one["noise"], one["row"], one["seed"]): one["scores"] for one in results}
    for num_queries, noise in sorted({key[:2] for key in found}):
        for row in rows:
            seeds = sorted(key[3] for key in found if key[:3] == (num_queries, noise, row))
            if not seeds:
                continue
            cells = [f"{num_queries:,}", f"{noise:.0%}", row, str(len(seeds))]
            for kind in kinds:
                of_row = {seed: aucs(measured, kind, found[num_queries, noise, row, seed]) for seed in seeds}
                cells.append(f"{Estimate(np.mean(list(of_row.values()), axis=0)):.3f}")
                both = [seed for seed in seeds if (num_queries, noise, REFERENCE, seed) in found and row != REFERENCE]
                differences = [
                    of_row[seed] - aucs(measured, kind, found[num_queries, noise, REFERENCE, seed]) for seed in both
                ]
                cells.append(f"{Estimate(np.mean(differences, axis=0)):+.3f}" if both else "")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def english_table(results: Sequence[Mapping[str, Any]], rows: Sequence[str]) -> str:
    """nDCG@10 on the human labels in English."""
    lines = ["| row | seeds | ESCI nDCG@10 | Chorus nDCG@10 |", "| --- | --- | --- | --- |"]
    for row in rows:
        of_row = [one["english"] for one in results if one["row"] == row and one["english"]]
        if of_row:
            cells = []
            for name in ("ESCI", "Chorus"):
                values = np.mean([one[name] for one in of_row], axis=0)
                draws = np.random.default_rng(0).integers(0, len(values), size=(NUM_RESAMPLES, len(values)))
                cells.append(f"{Estimate(np.array([values.mean(), *values[draws].mean(axis=1)])):.3f}")
            lines.append("| " + " | ".join([row, str(len(of_row)), *cells]) + " |")
    return "\n".join(lines)


def write_report(
    results: Sequence[Mapping[str, Any]], measured: Mapping[str, tuple[Leg, pd.DataFrame]], rows: Sequence[str]
) -> None:
    """Write report.md and report.svg beside the results, and print the tables.

    Args:
        measured: name of each leg to the leg and its test pairs, in the order of the results' scores.
        rows: of the grid, in the order to show them.
    """
    parts = []
    for name, (leg, pairs) in measured.items():
        of_leg = [one for one in results if one["leg"] == name]
        if of_leg:
            parts.append(f"## {name}\n\n{leg_table(leg, pairs, of_leg, rows)}")
    if any(one["english"] for one in results):
        parts.append(f"## Labels in English, none of them learnt\n\n{english_table(results, rows)}")
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
