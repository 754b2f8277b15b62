"""How long a night takes and what it needs, for sizes that nobody has run yet: a formula and measured figures.

    csrm capacity --queries 1000000 --products-per-query 100 --bundle FOLDER --gpus 8
    ... --tokens-per-second 150000              # of the model on one GPU, or on one core
    ... --tables FOLDER --run-id R              # the figures of a finished run

A night of Q queries with K products each looks at P = Q K pairs and scores a share x of them. Its seconds are the sum
of

    start               fixed
    inputs, plan, audit, publish
                        fixed + P us / cores
    scoring             fixed + x P (us + 10^6 t / rate) / slots

with `us`, microseconds of one core for a pair, and the fixed seconds of each phase in PHASES; slots, what scores one
pack at a time: a GPU, or a core where there are none; rate, tokens a second of the model in one slot; and t, tokens
computed for a pair. With p tokens of a query, s of a product, calls of at most L tokens, and k products behind one
prefix (x K, for what changed lies among all queries, but at least 1 and at most products_per_chunk),

    t = s + p n / k,  n = 1 where p + k s <= L, else k s / (L - p - s / 2) + 1 / 2

for a query that fits a call stays whole, and one that does not is cut into n parts, each behind its prefix; half a
product of each call stays empty, and half a part of each query.

Bytes follow the pairs: those of the tables (TABLE_BYTES), what is shuffled (SHUFFLED_KEY_BYTES, and SHUFFLED_TEXT times
a pair's text), and the retrieved titles follow the queries, as csrm.night.plan estimates them for their broadcast.

p, s and the length of texts are means over the bundle's golden pairs, which are real ones. The rate is what the
bundle's export measured, --tokens-per-second, or that of a run, which also says how many tokens a pair took, how many
bytes its rows take in the tables, and, if it had 100,000 pairs or more, what Spark costs there.
tests/benchmarks/night_cost.py measures the constants, and compares the formula with nights of other sizes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from csrm.night.settings import PAIRS_PER_TASK, PRODUCTS_PER_CHUNK


class PhaseCost(NamedTuple):
    """What a phase of a night takes beside the model."""

    fixed_s: float
    """Seconds, whatever the night's size."""
    pair_us: float
    """Microseconds of one core for each pair."""


PHASES = {
    "start": PhaseCost(15.7, 0.0),
    "inputs": PhaseCost(11.2, 8.1),
    "plan": PhaseCost(9.4, 10.0),
    "scoring": PhaseCost(9.2, 124.8),
    "audit": PhaseCost(3.6, 29.4),
    "publish": PhaseCost(1.8, 10.4),
}
"""start: of Python and Spark, until the bundle is loaded in a worker. Without the canary, of which a first night has
none."""
TABLE_BYTES = {"scores_staging": 14.7, "run_pairs": 10.1, "relevance_scores": 11.1}
"""Bytes of a pair in each table that grows with the pairs. relevance_scores as one version: rows that a night replaces
stay on storage until jobs/maintain.py, and the change feed of an update holds both."""
SHUFFLED_KEY_BYTES = 80.0
"""Of a candidate pair, in the joins of keys."""
SHUFFLED_TEXT = 0.91
"""Bytes that are shuffled for each byte of a scored pair's text."""
DRIVER_BYTES = 1e9
DRIVER_BYTES_PER_FILE = 3_000.0
"""Of the driver's memory for each staged file, whose entries of Delta's log it collects. Estimated, not measured."""


@dataclass(frozen=True)
class Figures:
    """What the formula needs to know of a bundle, a device and a Spark; means."""

    prefix_tokens: float
    suffix_tokens: float
    prefix_bytes: float
    """Text of a query with its titles, in UTF-8."""
    suffix_bytes: float
    titles_bytes: float
    """Of a query's retrieved titles in a broadcast."""
    tokens_per_call: int
    """Most tokens of one forward pass."""
    tokens_per_s: float
    """Of the model in one slot."""
    phases: Mapping[str, PhaseCost]
    table_bytes: Mapping[str, float]

    def tokens_per_pair(self, products_per_query: float) -> float:
        """Tokens that are computed for a pair, where a query has so many to score; see the formula above."""
        k = min(max(1.0, products_per_query), PRODUCTS_PER_CHUNK)
        p, s = self.prefix_tokens, self.suffix_tokens
        room = self.tokens_per_call - p
        parts = 1.0 if k * s <= room else k * s / (room - s / 2) + 0.5
        return s + p * parts / k


@dataclass(frozen=True)
class Machines:
    """Where a night runs."""

    slots: int
    """What scores one pack at a time: GPUs, or cores where there are none."""
    cores: int
    """Tasks that run at the same time in all phases but scoring."""


@dataclass(frozen=True)
class Needs:
    """What a night takes."""

    num_queries: float
    num_pairs: float
    num_tokens: float
    seconds: Mapping[str, float]
    """Phase to what it takes."""
    titles_bytes: float
    """What is broadcast, where it is."""
    shuffled_bytes: float
    table_bytes: Mapping[str, float]
    num_files: float
    """Of scores_staging."""

    @property
    def hours(self) -> float:
        return sum(self.seconds.values()) / 3600

    @property
    def stored_bytes(self) -> float:
        return sum(self.table_bytes.values())

    @property
    def driver_bytes(self) -> float:
        return DRIVER_BYTES + DRIVER_BYTES_PER_FILE * self.num_files


@dataclass(frozen=True)
class Plan:
    """Nights of any number of queries, alike but for that."""

    figures: Figures
    machines: Machines
    products_per_query: float
    share_scored: float = 1.0
    num_markets: int = 1

    def needs(self, num_queries: float) -> Needs:
        """What a night of so many queries takes: the formula. Everything in it is linear in their number."""
        figures, num_pairs = self.figures, num_queries * self.products_per_query
        num_scored = self.share_scored * num_pairs
        num_tokens = num_scored * figures.tokens_per_pair(self.share_scored * self.products_per_query)
        seconds = {
            name: phase.fixed_s + num_pairs * phase.pair_us / 1e6 / self._width(name)
            for name, phase in figures.phases.items()
        }
        scoring = figures.phases["scoring"]
        work = num_scored * scoring.pair_us / 1e6 + num_tokens / figures.tokens_per_s
        seconds["scoring"] = scoring.fixed_s + work / self.machines.slots
        text = SHUFFLED_TEXT * (figures.prefix_bytes + figures.suffix_bytes)
        return Needs(
            num_queries=num_queries,
            num_pairs=num_pairs,
            num_tokens=num_tokens,
            seconds=seconds,
            titles_bytes=num_queries * figures.titles_bytes,
            shuffled_bytes=num_pairs * SHUFFLED_KEY_BYTES + num_scored * text,
            table_bytes={
                name: size * (num_scored if name == "scores_staging" else num_pairs)
                for name, size in figures.table_bytes.items()
            },
            num_files=num_scored / PAIRS_PER_TASK * self.num_markets,
        )

    def _width(self, phase: str) -> int:
        """Tasks of a phase at a time."""
        return self.machines.slots if phase == "scoring" else self.machines.cores
