"""The page about an evaluation: the metrics, what other rankings do better, and the queries and pairs to look at."""

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from csrm.evaluation.calibration import calibrated_probability, reliability, scored_markets
from csrm.evaluation.metrics import METRICS, OVERALL, QUERY_COLUMNS, RANDOM
from csrm.evaluation.report import SCORE, format_estimate
from csrm.operations.evaluation import PublishedEvaluation
from csrm.operations.findings import shortened
from csrm.pages.page import is_known, render, rows
from csrm.pages.plots import COLOURS, INK, QUIET, new_figure, svg

if TYPE_CHECKING:
    from markupsafe import Markup

_REASONS = {
    "no_query": "the queries table does not have the query",
    "no_product": "the catalog does not have the product",
    "no_score": "it was no candidate, or it was rejected; `csrm explain` says which",
    "low_rank": "ten other products or more have a higher score",
}


def evaluation_html(measured: PublishedEvaluation, languages: Mapping[str, str], made_at: datetime) -> str:
    """The page.

    Args:
        measured: what was measured.
        languages: market to the language of its texts, by which a browser draws them.
        made_at: when the page was made, UTC.

    Returns:
        HTML that can be written as UTF-8.
    """
    evaluation = measured.evaluation
    rankings = list(evaluation.metrics["ranking"].unique())
    tone, sentences = _verdict(evaluation.differences, _last_market(evaluation.counts))
    texts = measured.judged.dropna(subset=["query"]).drop_duplicates(["market", "query_id"])
    return render(
        "operations/evaluation.html",
        made_at=made_at,
        tone=tone,
        headline=_headline(evaluation.metrics, _last_market(evaluation.counts)),
        sentences=sentences,
        notes=evaluation.notes,
        markets=sorted(
            (_market(row, measured, rankings) for row in rows(evaluation.counts)),
            key=lambda market: market["name"] != OVERALL,
        ),
        rankings=rankings,
        compared=list(measured.moved),
        metrics=METRICS,
        score=SCORE,
        grades=_grades(measured),
        meanings=_meanings(measured),
        worst=rows(measured.worst),
        query_columns=QUERY_COLUMNS,
        moved={name: rows(frame) for name, frame in measured.moved.items()},
        friends=rows(measured.false_friends),
        missing=rows(measured.missing),
        missing_counts=rows(measured.missing.drop_duplicates(["market", "reason"])),
        queries={
            (market, query_id): shortened(query)
            for market, query_id, query in texts[["market", "query_id", "query"]].itertuples(index=False)
        },
        products=measured.titles,
        languages=languages,
        provenance=measured.provenance,
        reasons=_REASONS,
        shortened=shortened,
    )


def _last_market(counts: pd.DataFrame) -> str:
    """All markets together, where there are several."""
    return str(counts["market"].iloc[-1])


def _headline(metrics: pd.DataFrame, market: str) -> str:
    """The first metric of the published scores, with its interval."""
    own = metrics.set_index(["market", "ranking", "metric"])
    return f"{METRICS[0]} {format_estimate(*own.loc[(market, SCORE, METRICS[0]), ['value', 'low', 'high']])}"


def _verdict(differences: pd.DataFrame, market: str) -> tuple[str, list[str]]:
    """The tone, warn where another ranking is better by METRICS[0], else good; what the difference to each is."""
    tone, sentences = "good", []
    own = differences[(differences["market"] == market) & (differences["metric"] == METRICS[0])]
    for row in rows(own):
        estimate = format_estimate(*(np.nan if row[name] is None else row[name] for name in _DIFFERENCE), sign="+")
        if is_known(row["high"]) and row["high"] < 0:
            tone, word = "warn", "is worse"
        elif is_known(row["low"]) and row["low"] > 0:
            word = "is better"
        else:
            word = "is neither better nor worse beyond chance"
        sentences.append(f"By {METRICS[0]}, {SCORE} {word} than {row['ranking']}: {estimate}.")
    return tone, sentences


_DIFFERENCE = ("difference", "low", "high")


def _market(counts: Mapping[Any, Any], measured: PublishedEvaluation, rankings: list[str]) -> dict[str, Any]:
    """What the page shows of a market: its counts, its cells by ranking and metric, its plot."""
    evaluation, market = measured.evaluation, counts["market"]
    metrics = evaluation.metrics[evaluation.metrics["market"] == market]
    values = {(row["ranking"], row["metric"]): row for row in metrics.to_dict("records")}
    own = evaluation.differences[evaluation.differences["market"] == market]
    differences = {(row["ranking"], row["metric"]): row for row in own.to_dict("records")}
    cells = {key: format_estimate(row["value"], row["low"], row["high"]) for key, row in values.items()}
    return {
        "name": market,
        **counts,
        "cells": cells,
        "differences": {
            key: {"shown": format_estimate(row["difference"], row["low"], row["high"], sign="+"), "tone": _tone(row)}
            for key, row in differences.items()
        },
        "plot": _plot(values, rankings, len(evaluation.counts), list(evaluation.counts["market"]).index(market))
        if values
        else None,
    }


def _tone(row: Mapping[Any, Any]) -> str:
    """The tone, good or bad where the interval excludes no difference; of a defect rate, less is good."""
    sign = -1 if row["metric"].startswith("defect") else 1
    low, high = sorted((sign * row["low"], sign * row["high"]))
    return "good" if low > 0 else "bad" if high < 0 else ""


def _plot(
    values: Mapping[tuple[str, str], Mapping[Any, Any]], rankings: list[str], num_markets: int, index: int
) -> "Markup":
    """All metrics of a market, one row each, and in it one point with its interval for each ranking."""
    figure, axes = new_figure("", "", 4.4, 0.9 + len(METRICS) * (0.25 + 0.14 * len(rankings)))
    for place, ranking in enumerate(rankings):
        own = [values[(ranking, metric)] for metric in METRICS]
        value, low, high = (np.array([row[name] for row in own], dtype=float) for name in ("value", "low", "high"))
        heights = np.arange(len(METRICS)) + (place - (len(rankings) - 1) / 2) * 0.8 / len(rankings)
        errors = np.nan_to_num([value - low, high - value]).clip(0)
        colour = QUIET if ranking == RANDOM else COLOURS[place % len(COLOURS)]
        axes.errorbar(value, heights, xerr=errors, fmt="o", ms=4, capsize=2, color=colour, label=ranking)
    axes.set_yticks(range(len(METRICS)), METRICS)
    axes.set_ylim(len(METRICS) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", color=QUIET, alpha=0.25)
    axes.spines["bottom"].set_color(INK)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    first = values[(rankings[0], METRICS[0])]["value"]
    return svg(
        figure,
        f"Market {index + 1} of {num_markets}: the five metrics of {len(rankings)} rankings with 95 % intervals; "
        f"{METRICS[0]} of {rankings[0]} is {first:.3f}",
    )


def _meanings(measured: PublishedEvaluation) -> list[dict[Any, Any]]:
    """What a score means in each market: its curve, its plot, and what stays at each threshold."""
    thresholds = {str(market): rows(frame) for market, frame in measured.thresholds.groupby("market")}
    relevant_grades = measured.provenance["config"]["relevant_grades"]
    markets = scored_markets(measured.judged, SCORE, relevant_grades)
    return [
        {
            **curve,
            "is_overall": curve["market"] == OVERALL,
            "thresholds": thresholds[market],
            "plot": _reliability_plot(scores, relevant, curve, index, len(measured.curves)),
        }
        for index, (curve, (market, scores, relevant, _)) in enumerate(zip(rows(measured.curves), markets, strict=True))
    ]


def _reliability_plot(
    scores: np.ndarray, relevant: np.ndarray, curve: Mapping[Any, Any], index: int, num_markets: int
) -> "Markup":
    """Share of relevant pairs of ten bins of the score, and of the probability that the curve makes of it."""
    figure, axes = new_figure("mean score or probability", "share relevant", 3.4, 3.0)
    kinds = {SCORE: scores}
    if is_known(curve["slope"]):
        kinds["probability by the curve"] = calibrated_probability(
            scores, slope=curve["slope"], intercept=curve["intercept"]
        )
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle="--")
    for place, (name, values) in enumerate(kinds.items()):
        means, shares, _ = zip(*reliability(values, relevant), strict=True)
        axes.plot(means, shares, marker="o", ms=4, color=COLOURS[place], label=name)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    return svg(
        figure,
        f"Market {index + 1} of {num_markets}: share of relevant pairs by score, in ten bins; the calibration error is "
        f"{curve['error']:.3f}",
    )


def _grades(measured: PublishedEvaluation) -> list[dict[Any, Any]]:
    """The published scores of the pairs of each market and human grade, best grade first."""
    scored = measured.judged.dropna(subset=[SCORE])
    grouped = scored.groupby(["market", "grade"])[SCORE]
    frame = grouped.quantile(np.array([0.1, 0.5, 0.9])).unstack().set_axis(["p10", "p50", "p90"], axis=1)
    frame = frame.assign(num_pairs=grouped.size(), mean=grouped.mean()).reset_index()
    gains = measured.provenance["config"]["gains"]
    frame = frame.assign(gain=frame["grade"].map(gains))
    return rows(frame.sort_values(["market", "gain", "grade"], ascending=[True, False, True]))
