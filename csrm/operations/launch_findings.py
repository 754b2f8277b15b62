"""What a launch report knows of a market: how many of its queries and products the published scores bring together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

NUM_SCORE_STEPS = 50
"""Steps of the curve over [0, 1]: share of queries whose best product has at least so high a score."""


@dataclass(frozen=True)
class LaunchFindings:
    """What is known of one market. Searches are those of the queries' frequencies, NaN where none is known.

    A product is good for a query if their published score reaches the threshold. A text is a `findings.Text`.
    """

    market: str
    language: str
    """Language of the market, BCP 47."""
    threshold: float
    """Score from which a product is good."""
    num_best: int
    """Titles of a query that are looked at."""
    scores_version: int
    """Version of relevance_scores."""
    bundle_digests: Sequence[str]
    """Digests of the bundles that made the scores."""
    curve: Sequence[float]
    """Share of queries with a product of at least each score, from 0 to 1 in NUM_SCORE_STEPS steps."""
    segments: pd.DataFrame
    """dimension (all, category, length, language, frequency), value, num_queries, num_without (a good product),
    num_unscored, num_foreign (whose best titles are all foreign), searches, searches_without."""
    queries: pd.DataFrame
    """Queries without a good product, most searches first: query_id, query, language, searches, score, title."""
    foreign_queries: pd.DataFrame
    """Queries whose best titles are all foreign: query_id, query, language, searches, score, titles (list)."""
    terms: pd.DataFrame
    """Phrases of queries that no title has: term, num_queries, searches, query (one that has it)."""
    num_terms: int
    """Phrases in all."""
    products: pd.DataFrame
    """language, reason (reached, low_score, no_scored_pair, or as in uncovered_products), num_products."""
    unreached: pd.DataFrame
    """Products that no query reaches, a few for each reason: product_id, title, language, reason, score, query."""
    live: pd.DataFrame
    """origin, state (good, weak, not_scored, untranslated), num_queries, searches; empty without live markets."""
    live_queries: pd.DataFrame
    """Those that are not good, a few for each state: origin, query_id, query, translation, state, searches, score."""
    languages: Mapping[str, str] = field(default_factory=dict)
    """Market to the language of its texts, BCP 47, the live ones too."""
    notes: Sequence[str] = ()
    """What could not be known, one sentence each."""
