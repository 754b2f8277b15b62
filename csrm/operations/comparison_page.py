"""The page about two tables of scores: how much changes, then for which queries and pairs."""

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from csrm.operations.comparison import OVERALL, TOP, ScoreComparison
from csrm.operations.findings import shortened
from csrm.pages.page import number, render, rows
from csrm.pages.plots import COLOURS, INK, new_figure, svg

if TYPE_CHECKING:
    from markupsafe import Markup

_MOST_NAMED = 3
"""Products of a query that leave its first ten, and that enter it."""


def comparison_html(comparison: ScoreComparison, languages: Mapping[str, str], made_at: datetime) -> str:
    """The page.

    Args:
        comparison: of the two tables.
        languages: market to the language of its texts, by which a browser draws them.
        made_at: when the page was made, UTC.

    Returns:
        HTML that can be written as UTF-8.
    """
    summary = rows(comparison.summary)
    return render(
        "operations/comparison.html",
        made_at=made_at,
        summary=summary,
        whole=summary[-1],
        plots=_plots(comparison),
        grades=_grades(comparison.grades),
        most_changed=[{**row, **_moves(comparison.changes, row)} for row in rows(comparison.most_changed)],
        regraded=rows(comparison.regraded),
        queries=comparison.query_texts,
        products=comparison.product_texts,
        places=comparison.places,
        languages=languages,
        shortened=shortened,
        top=TOP,
    )


def comparison_text(comparison: ScoreComparison) -> str:
    """The result as plain text, two lines a market."""
    lines = []
    for row in rows(comparison.summary):
        lines.append(
            f"{row['market']}: {row['num_queries']:,} queries and {row['num_pairs']:,} pairs are in both; "
            f"{row['num_pairs_before']:,} pairs before alone, {row['num_pairs_after']:,} after alone"
        )
        regraded = "" if row["regraded"] is None else f"; {row['regraded']:.1%} of grades change"
        lines.append(
            f"  rank correlation {number(row['rank_correlation'], '.3f')} in the mean of queries; the first {TOP} "
            f"change in {number(row['changed_top'], '.1%')} of queries, where {number(row['kept'], '.1%')} of products "
            f"stay in the mean, the first one in {number(row['changed_first'], '.1%')}{regraded}"
        )
    return "\n".join(lines)


def _plots(comparison: ScoreComparison) -> list[tuple[str, "Markup"]]:
    """Of each market: how many queries keep how many of their first ten."""
    markets = [market for market in comparison.summary["market"] if market != OVERALL]
    found = []
    for index, market in enumerate(markets):
        own = comparison.queries[comparison.queries["market"] == market]
        own = own[(own["num_before"] > 0) & (own["num_after"] > 0)]
        if own.empty:
            continue
        share = own["num_kept"] / own[["num_top_before", "num_top_after"]].max(axis=1)
        places = np.floor(share * TOP).astype(int)
        shares = np.bincount(places, minlength=TOP + 1) / len(own)
        figure, axes = new_figure(f"share of the first {TOP} that stays", "share of queries", 3.4, 2.1)
        axes.bar(np.arange(TOP + 1) / TOP, shares, width=0.8 / TOP, color=COLOURS[0])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.tick_params(labelsize=8)
        axes.spines["bottom"].set_color(INK)
        description = f"Market {index + 1} of {len(markets)}: {share.mean():.1%} of the first {TOP} stay in the mean"
        found.append((market, svg(figure, description)))
    return found


def _grades(grades: pd.DataFrame) -> list[dict[str, Any]]:
    """Of each market: the grades after, and of each grade before its pairs by the grade after, with their share."""
    found = []
    for market, own in grades.groupby("market"):
        table = own.pivot_table(index="before_grade", columns="after_grade", values="num_pairs", aggfunc="sum").fillna(
            0
        )
        lines = [
            {
                "grade": grade,
                "num_pairs": int(line.sum()),
                "shares": [(count / line.sum(), after == grade) for after, count in line.items()],
            }
            for grade, line in table.iterrows()
        ]
        found.append({"market": market, "after": list(table.columns), "lines": lines})
    return found


def _moves(changes: pd.DataFrame, query: Mapping[Any, Any]) -> dict[str, Any]:
    """The products that leave a query's first ten, and those that enter it, best first."""
    own = changes[(changes["market"] == query["market"]) & (changes["query_id"] == query["query_id"])]
    left = own[own["before_rank"] <= TOP].sort_values("before_rank")
    entered = own[own["after_rank"] <= TOP].sort_values("after_rank")
    return {"left": rows(left.head(_MOST_NAMED)), "entered": rows(entered.head(_MOST_NAMED))}
