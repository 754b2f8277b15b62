"""What a report knows of a run: its row, the runs around it, and what it changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pandas as pd

NUM_PLOT_BINS = 25
"""Of the score distributions, of equal width over [0, 1]."""
SMALLEST_MOVE = 1e-5
"""A score that moved by less is the same score: a pair's neighbours in its pack move it so far."""
MOST_CHARACTERS = 140
"""Shown of a text or an id; the rest is said by its full length."""


@dataclass(frozen=True)
class Text:
    """A text, or its beginning where it is longer than MOST_CHARACTERS."""

    beginning: str
    num_characters: int
    """Of the whole text."""

    @property
    def is_cut(self) -> bool:
        return len(self.beginning) < self.num_characters


def shortened(text: object) -> Text:
    """A text that is at hand in full."""
    full = str(text)
    return Text(full[:MOST_CHARACTERS], len(full))


Key = tuple[str, str]
"""Market, and the id of a query or a product in it."""


@dataclass(frozen=True)
class Texts:
    """Texts of the queries or products that a page names; what is not known is left out."""

    present: Mapping[Key, Text] = field(default_factory=dict)
    """As the run read them."""
    earlier: Mapping[Key, Text] = field(default_factory=dict)
    """As the run read them that had published the state before."""


@dataclass(frozen=True)
class Comparison:
    """The scores that a run published, or would have, beside those that were published before.

    Its state is "before" or "after" (the run). A move is the new score less the old one, of a pair that has both.
    """

    bins: pd.DataFrame
    """market, state, grade, bin, num_pairs: the bin counts from 0 to NUM_PLOT_BINS - 1; -1 holds scores outside
    [0, 1] and those that are no number."""
    summary: pd.DataFrame
    """market, state, mean, p10, p50, p90 of the scores in [0, 1]."""
    changes: pd.DataFrame
    """market, operation (insert, update, delete, and pending: not scored yet), num_pairs, num_moved, mean_move and
    largest_move (the two without sign)."""
    queries: pd.DataFrame
    """Those whose scores moved most, most first: market, id, num_up, num_down, total_move (without signs), and the pair
    that moved most: other_id (the product), before, after."""
    products: pd.DataFrame
    """The same of products; other_id is the query."""
    lost_queries: pd.DataFrame
    """Those that lost most pairs, most first: market, id, num_lost, num_left (pairs with a score after the run)."""
    lost_products: pd.DataFrame
    """The same of products."""


@dataclass(frozen=True)
class RunFindings:
    """What is known of one run."""

    runs: Sequence[Mapping[str, Any]]
    """Rows of scoring_runs, newest first: the run itself, and those that started before it."""
    num_newer: int = 0
    """Runs that started later."""
    comparison: Comparison | None = None
    rejected: pd.DataFrame | None = None
    """market, reason, num_pairs; None where it is no longer known by market."""
    samples: pd.DataFrame | None = None
    """Of the rejected pairs, a few for each reason: market, query_id, product_id, reason."""
    queries: Texts = Texts()
    products: Texts = Texts()
    languages: Mapping[str, str] = field(default_factory=dict)
    """Market to the language of its texts, BCP 47: a browser draws Han characters by it."""
    notes: Sequence[str] = ()
    """What could not be read, one sentence each."""
    taken_back: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Run to what later commits that are no run's did to what it had published, one sentence each."""
    interventions: Sequence[tuple[datetime, str]] = ()
    """Rollbacks, retirements and changes by others since the oldest of `runs`: time, UTC, and a sentence."""
