"""The page about a query: its products, the titles that augment it, and why one product has its score."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from csrm.operations.explanation import QueryExplanation
from csrm.operations.findings import shortened
from csrm.pages.page import number, render, rows, seen

_NUM_PRINTED = 5
"""Products, and parts of a prompt, that a console shows."""


def explanation_html(explanation: QueryExplanation, made_at: datetime) -> str:
    """The page.

    Args:
        explanation: what is known of the query.
        made_at: when the page was made, UTC.

    Returns:
        HTML that can be written as UTF-8.
    """
    products = explanation.products
    labels = list(explanation.probabilities.columns)[::-1]  # best first, as the products
    shown = rows(products.join(explanation.probabilities[labels].add_prefix("p_")))
    explained = next((row for row in shown if row["product_id"] == explanation.product_id), None)
    return render(
        "operations/explanation.html",
        query=explanation.query,
        run=explanation.run,
        version=explanation.version,
        num_scored=explanation.num_scored,
        products=shown,
        explained=explained,
        labels=labels,
        has_grades=bool(products["grade"].notna().any()),
        titles=rows(explanation.titles),
        parts=None if explanation.parts is None else _with_bars(rows(explanation.parts)),
        votes="" if explanation.parts is None else votes_text(explanation.parts.attrs["votes"]),
        history=rows(explanation.history),
        notes=explanation.notes,
        made_at=made_at,
        shortened=shortened,
    )


def _with_bars(parts: list[dict[Any, Any]]) -> list[dict[Any, Any]]:
    """Each part with the width of its bar: the share, in percent, of the largest effect."""
    largest = max((abs(part["effect"]) for part in parts if part["effect"] is not None), default=0.0)
    return [
        {**part, "bar": 0.0 if part["effect"] is None or not largest else 100 * abs(part["effect"]) / largest}
        for part in parts
    ]


def explanation_text(explanation: QueryExplanation) -> str:
    """What a person wants to know first, in a few lines for a console."""
    query = explanation.query
    lines = [f"query {query['query_id']} of {query['market']}: {_beginning(query['query'])}"]
    lines += [f"  {note}" for note in explanation.notes]
    lines.append(f"  {explanation.num_scored:,} products have a score; the best:")
    for row in rows(explanation.products.head(_NUM_PRINTED)):
        score, grade = number(row["relevance_score"], ".4f"), row["predicted_grade"] or ""
        lines.append(f"  {score:>8}  {grade:<4} {_beginning(row['title'])}  [{seen(row['product_id'])}]")
    if explanation.parts is not None:
        score = explanation.parts.attrs["relevance_score"]
        lines.append(f"  what moves the score of {seen(explanation.product_id or '')}, which is {score:.4f} now:")
        if votes := votes_text(explanation.parts.attrs["votes"]):
            lines.append(f"  {votes}")
        parts = [part for part in rows(explanation.parts) if part["effect"] is not None]
        for part in sorted(parts, key=lambda part: -abs(part["effect"]))[:_NUM_PRINTED]:
            lines.append(f"  {part['effect']:+8.4f}  {part['field'].replace('_', ' ')}: {_beginning(part['text'])}")
    return "\n".join(lines)


def votes_text(votes: Mapping[str, float]) -> str:
    """What stands beside the model in a score, in a sentence; empty where nothing does.

    >>> votes_text({"model": 0.4567, "words": 0.5})
    "the model alone gives 0.4567; the share of the query's words that the product names counts as 0.50"
    """
    said = []
    if "words" in votes:
        said.append(f"the share of the query's words that the product names counts as {votes['words']:.2f}")
    if "encoder" in votes:
        said.append(f"the encoder's cosine is {votes['encoder']:.3f}")
    return "; ".join([f"the model alone gives {votes['model']:.4f}", *said]) if said else ""


def _beginning(text: str | None) -> str:
    return "(none)" if text is None else seen(text[:80])
