"""The page about a market that is to be opened: how many queries find a good product, then which do not, and why."""

from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from csrm.operations.findings import shortened
from csrm.operations.launch_findings import NUM_SCORE_STEPS, LaunchFindings
from csrm.pages.page import render, rows
from csrm.pages.plots import COLOURS, INK, QUIET, new_figure, svg

if TYPE_CHECKING:
    from markupsafe import Markup

MOST_SEGMENTS = 12
"""Segments of one dimension that are shown; those with most queries."""
_DIMENSIONS = {
    "frequency": "How often it is asked",
    "length": "Its length",
    "language": "Its language",
    "category": "Category of its best product",
}
_ORDER = ["head", "torso", "tail", "no term", "1 term", "2 terms", "3 or 4 terms", "5 or more terms"]
_STATES = {
    "good": "has a good product here",
    "weak": "was asked here, and has no good product",
    "not_scored": "no query here has this text and a score",
    "untranslated": "could not be put into the market's language",
}
_REASONS = {
    "reached": "a query has it as a good product",
    "low_score": "its best score is below the threshold",
    "no_scored_pair": "no pair with it has a score",
    "no_shared_term": "no candidate: no query shares a term with it, nor a translation of one",
    "too_dissimilar": "no candidate: no query shares a term with it or is near it in meaning",
    "not_among_best": "no candidate: it is not among the best of any query",
    "no_title": "no candidate: it had no title",
}


def launch_report_html(findings: LaunchFindings, made_at: datetime) -> str:
    """The page.

    Args:
        findings: what is known of the market.
        made_at: when the page was made, UTC.

    Returns:
        HTML that can be written as UTF-8.
    """
    whole = overall(findings)
    return render(
        "operations/launch_report.html",
        found=findings,
        made_at=made_at,
        whole=whole,
        tone="good" if not whole["num_without"] else "warn",
        reach=_reach(findings.products),
        plot=_plot(findings),
        segments=_segments(findings.segments),
        queries=rows(findings.queries),
        foreign_queries=rows(findings.foreign_queries),
        terms=rows(findings.terms),
        unreached=rows(findings.unreached),
        reasons=_REASONS,
        live=_live(findings.live),
        live_queries=rows(findings.live_queries),
        states=_STATES,
        shortened=shortened,
    )


def launch_summary(findings: LaunchFindings) -> str:
    """The result as plain text, a few lines."""
    whole = overall(findings)
    lines = [
        f"{findings.market}: {whole['num_queries']:,} queries, {whole['num_without']:,} without a product of score "
        f"{findings.threshold:g} or more, {whole['num_foreign']:,} whose best titles are all from abroad; "
        f"{findings.num_terms:,} terms that no title has; {whole['num_unreached']:,} of {whole['num_products']:,} "
        "products that no query reaches"
    ]
    for one in _live(findings.live):
        counts = ", ".join(f"{one['states'].get(state, {}).get('num_queries', 0):,} {state}" for state in _STATES)
        lines.append(f"{findings.market}: {one['num_queries']:,} queries of {one['origin']}: {counts}")
    return "\n".join(lines)


def overall(findings: LaunchFindings) -> dict[str, Any]:
    """The market's own counts: those of its segment of all queries, num_products, num_unreached."""
    segments = findings.segments[findings.segments["dimension"] == "all"]
    names = ("num_queries", "num_without", "num_unscored", "num_foreign", "searches", "searches_without")
    whole: dict[str, Any] = dict.fromkeys(names, 0)
    for row in rows(segments):
        whole |= {name: row[name] for name in names}
    products = findings.products
    whole["num_products"] = int(products["num_products"].sum())
    whole["num_unreached"] = int(products.loc[products["reason"] != "reached", "num_products"].sum())
    return whole


def _segments(segments: pd.DataFrame) -> list[dict[str, Any]]:
    """Of each dimension that has more than one value known: its rows, in their order or the largest first."""
    found = []
    for dimension, title in _DIMENSIONS.items():
        own = segments[segments["dimension"] == dimension]
        if dimension == "frequency" and set(own["value"]) == {"not known"}:
            continue
        place = own["value"].map({value: number for number, value in enumerate(_ORDER)}).fillna(len(_ORDER))
        own = own.assign(place=place).sort_values(["place", "num_queries", "value"], ascending=[True, False, True])
        found.append(
            {"title": title, "rows": rows(own.head(MOST_SEGMENTS)), "num_more": max(0, len(own) - MOST_SEGMENTS)}
        )
    return found


def _reach(products: pd.DataFrame) -> list[dict[str, Any]]:
    """Products of each language, the most first: num_products, num_unreached, and reason to products."""
    found = []
    for language, own in products.groupby("language", dropna=False):
        reasons = dict(zip(own["reason"], own["num_products"].astype(int), strict=True))
        total = sum(reasons.values())
        unreached = {name: count for name, count in reasons.items() if name != "reached"}
        found.append(
            {
                "language": language if isinstance(language, str) else "none known",
                "num_products": total,
                "num_unreached": sum(unreached.values()),
                "reasons": sorted(unreached.items(), key=lambda item: (-item[1], item[0])),
            }
        )
    return sorted(found, key=lambda one: (-one["num_products"], one["language"]))


def _live(live: pd.DataFrame) -> list[dict[str, Any]]:
    """Of each live market: its queries and searches, and of each state."""
    found = []
    for origin, own in live.groupby("origin"):
        states = {str(row["state"]): row for row in rows(own)}
        found.append(
            {
                "origin": origin,
                "num_queries": int(own["num_queries"].sum()),
                "searches": sum(searches) if (searches := [*own["searches"].dropna()]) else None,
                "states": states,
            }
        )
    return found


def _plot(findings: LaunchFindings) -> "Markup":
    figure, axes = new_figure("relevance score", "queries with such a product", 4.4, 2.4)
    scores = np.linspace(0, 1, NUM_SCORE_STEPS + 1)
    axes.step(scores, findings.curve, where="mid", color=COLOURS[0], linewidth=1.6)
    axes.axvline(findings.threshold, color=QUIET, linewidth=1.2, linestyle="--")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.tick_params(labelsize=8)
    axes.spines["bottom"].set_color(INK)
    return svg(
        figure,
        f"Share of queries whose best product has at least each score; {_share(findings):.0%} at "
        f"{findings.threshold:g}",
    )


def _share(findings: LaunchFindings) -> float:
    """Share of queries with a good product."""
    whole = overall(findings)
    return 1 - whole["num_without"] / whole["num_queries"] if whole["num_queries"] else 0.0
