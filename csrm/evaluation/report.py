"""The result of an evaluation for people and for programs: a table, a plot, a JSON file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from csrm.evaluation.metrics import METRICS, Evaluation
from csrm.extras import import_eval


def format_evaluation(evaluation: Evaluation) -> str:
    """The result as plain text: for each market one line a metric, one column a ranking.

    >>> from csrm.evaluation import evaluate_scores
    >>> judged = pd.DataFrame(
    ...     [("us", "q1", "p1", "E", 0.9), ("us", "q1", "p2", "I", 0.2)],
    ...     columns=["market", "query_id", "product_id", "grade", "score"],
    ... )
    >>> evaluation = evaluate_scores(
    ...     judged, ["score"], gains={"E": 1.0, "I": 0.0}, relevant_grades=["E"], irrelevant_grades=["I"]
    ... )
    >>> print(format_evaluation(evaluation).splitlines()[0])
    us: 1 of 1 judged queries, 2 of 2 judged pairs have a score
    """
    lines = []
    rankings = list(evaluation.metrics["ranking"].unique())
    table = evaluation.metrics.set_index(["market", "ranking", "metric"])
    for counts in evaluation.counts.to_dict("records"):
        market = counts["market"]
        lines.append(
            f"{market}: {counts['num_queries']:,} of {counts['num_judged_queries']:,} judged queries, "
            f"{counts['num_pairs']:,} of {counts['num_judged']:,} judged pairs have a score"
        )
        lines.append(" " * 20 + "".join(f"{ranking:<23}" for ranking in rankings).rstrip())
        if (market, rankings[0], METRICS[0]) in table.index:
            for metric in METRICS:
                cells = [
                    _format_estimate(*table.loc[(market, name, metric), ["value", "low", "high"]]) for name in rankings
                ]
                lines.append(f"  {metric:<18}" + "".join(f"{cell:<23}" for cell in cells).rstrip())
        lines.append("")
    lines += [f"note: {note}" for note in evaluation.notes]
    return "\n".join(lines).rstrip()


def _format_estimate(value: float, low: float, high: float) -> str:
    if np.isnan(value):
        return "undefined"
    return f"{value:.3f}" if np.isnan(low) else f"{value:.3f} [{low:.3f}, {high:.3f}]"


SCORE = "relevance_score"
BM25 = "bm25"
_COLORS = ("#1f5fa8", "#d9822b", "#8a8a8a")


def plot_evaluation(evaluation: Evaluation, judged: pd.DataFrame, grades: Sequence[str], path: Path) -> None:
    """nDCG@10 of each market and ranking with its interval, and the scores of each grade's pairs."""
    import_eval("matplotlib").use("Agg")
    pyplot = import_eval("matplotlib.pyplot")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")

    ndcg = evaluation.metrics[evaluation.metrics["metric"] == "nDCG@10"]
    markets = list(ndcg["market"].unique())
    rankings = list(ndcg["ranking"].unique())
    for index, ranking in enumerate(rankings):
        rows = ndcg[ndcg["ranking"] == ranking].set_index("market").loc[markets]
        values, lows, highs = (rows[name].to_numpy() for name in ("value", "low", "high"))
        places = [place + (index - (len(rankings) - 1) / 2) * 0.16 for place in range(len(markets))]
        errors = [(values - lows).clip(0), (highs - values).clip(0)]
        color = _COLORS[0] if ranking == SCORE else _COLORS[-1] if index == len(rankings) - 1 else _COLORS[1]
        left.errorbar(places, values, yerr=errors, fmt="o", ms=6, capsize=3, color=color, label=ranking)
    left.set_xticks(range(len(markets)), markets)
    left.set_xlim(-0.6, len(markets) - 0.4)
    left.set_ylim(0, 1.02)
    left.set_title("nDCG@10 over judged pairs, 95% bootstrap interval", fontsize=10, loc="left")
    left.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(rankings), fontsize=9)

    scored = judged.dropna(subset=[SCORE])
    by_grade = {grade: scored.loc[scored["grade"] == grade, SCORE] for grade in grades}
    by_grade = {grade: values for grade, values in by_grade.items() if len(values)}
    right.boxplot(
        list(by_grade.values()),
        whis=(5, 95),
        showfliers=False,
        widths=0.5,
        patch_artist=True,
        boxprops={"facecolor": "#c9dcf2", "edgecolor": _COLORS[0]},
        medianprops={"color": _COLORS[0], "linewidth": 2},
        whiskerprops={"color": _COLORS[0]},
        capprops={"color": _COLORS[0]},
    )
    labels = [f"{grade}\n{len(values):,} pairs" for grade, values in by_grade.items()]
    right.set_xticks(range(1, len(labels) + 1), labels)
    right.set_ylim(-0.02, 1.02)
    right.set_title(f"{SCORE} by judged grade (box 25-75%, whiskers 5-95%)", fontsize=10, loc="left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e4e4")
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write_metrics(evaluation: Evaluation, provenance: dict[str, Any], path: Path) -> None:
    """The result and where it comes from, as JSON; what is undefined is null."""
    content = {
        "metrics": json.loads(evaluation.metrics.to_json(orient="records", double_precision=15)),
        "counts": json.loads(evaluation.counts.to_json(orient="records")),
        "notes": list(evaluation.notes),
        **provenance,
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
