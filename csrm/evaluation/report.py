"""The result of an evaluation for people and for programs: a text and a JSON file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from csrm.evaluation.metrics import METRICS, Evaluation

SCORE = "relevance_score"
BM25 = "bm25"
ENCODER = "encoder"
_WIDTH = 23


def format_evaluation(evaluation: Evaluation) -> str:
    """The result as plain text: for each market one line a metric, one column a ranking.

    Where there are rankings to compare with, the differences follow, the first ranking's value less theirs.

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
    key = ["market", "ranking", "metric"]
    table = evaluation.metrics.set_index(key)[["value", "low", "high"]]
    compared = list(evaluation.differences["ranking"].unique())
    differences = evaluation.differences.set_index(key)[["difference", "low", "high"]]
    for counts in evaluation.counts.to_dict("records"):
        market = counts["market"]
        lines.append(
            f"{market}: {counts['num_queries']:,} of {counts['num_judged_queries']:,} judged queries, "
            f"{counts['num_pairs']:,} of {counts['num_judged']:,} judged pairs have a score"
        )
        has_scores = (market, rankings[0], METRICS[0]) in table.index
        lines += _table(rankings, table.loc[market] if has_scores else None)
        if has_scores and compared:
            lines.append(f"  {rankings[0]} less")
            lines += _table(compared, differences.loc[market], sign="+")
        lines.append("")
    lines += [f"note: {note}" for note in evaluation.notes]
    return "\n".join(lines).rstrip()


def _table(rankings: list[str], estimates: pd.DataFrame | None, sign: str = "") -> list[str]:
    """A head and one line a metric; the head alone where there are no estimates."""
    lines = [("", rankings)]
    if estimates is not None:
        for metric in METRICS:
            own = [estimates.loc[(name, metric), list(estimates.columns)] for name in rankings]
            lines.append((metric, [format_estimate(*estimate, sign=sign) for estimate in own]))
    width = max([_WIDTH, *(len(cell) + 2 for _, cells in lines for cell in cells)])
    return [f"  {name:<18}{''.join(f'{cell:<{width}}' for cell in cells)}".rstrip() for name, cells in lines]


def format_estimate(value: float, low: float, high: float, *, sign: str = "") -> str:
    """A value with its interval as text; with sign "+", a positive number has its sign.

    >>> format_estimate(0.0625, -0.01, 0.135, sign="+")
    '+0.062 [-0.010, +0.135]'
    """
    if np.isnan(value):
        return "undefined"
    if np.isnan(low):
        return f"{value:{sign}.3f}"
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def format_calibration(curves: pd.DataFrame) -> str:
    """One line for each market: how far its scores are from the share of relevant pairs, see calibration.

    >>> curves = pd.DataFrame(
    ...     [("us", 0.05, 0.8, -0.1, 0.01), ("kr", 0.2, np.nan, np.nan, np.nan)],
    ...     columns=["market", "error", "slope", "intercept", "calibrated_error"],
    ... )
    >>> print(format_calibration(curves))
    us: calibration error 0.050; 0.010 with slope 0.800 and intercept -0.100 over the log-odds
    kr: calibration error 0.200; no curve, the judged pairs are too few or all alike
    """
    return "\n".join(
        f"{row['market']}: calibration error {row['error']:.3f}; "
        + (
            "no curve, the judged pairs are too few or all alike"
            if np.isnan(row["calibrated_error"])
            else f"{row['calibrated_error']:.3f} with slope {row['slope']:.3f} and intercept {row['intercept']:.3f} "
            "over the log-odds"
        )
        for row in curves.to_dict("records")
    )


def write_metrics(
    evaluation: Evaluation, curves: pd.DataFrame, thresholds: pd.DataFrame, provenance: dict[str, Any], path: Path
) -> None:
    """The result and where it comes from, as JSON; what is undefined is null."""

    def records(frame: pd.DataFrame) -> Any:
        return json.loads(frame.to_json(orient="records", double_precision=15))

    content = {
        "metrics": records(evaluation.metrics),
        "differences": records(evaluation.differences),
        "calibration": records(curves),
        "thresholds": records(thresholds),
        "counts": records(evaluation.counts),
        "notes": list(evaluation.notes),
        **provenance,
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
