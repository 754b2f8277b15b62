"""The audit of a run, from what was counted of each market: nothing that looks wrong is published."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator, model_validator

from csrm.config import Settings
from csrm.errors import ConfigError

NUM_SCORE_BINS = 100
"""Bins of equal width over [0, 1] that scores are counted in."""
CANARY, REUSED_CANARY = "canary", "canary_reused"
"""Checks that score pairs again: those that are published, and those that an earlier attempt or run had staged."""
NEVER_ACCEPTED = ("complete", "unique", "finite", "in_range")
"""Checks that no reason overrules: such a state would not be a table of scores."""
AuditResult = dict[str, Any]
"""market, name, value, bound (text), passed, severity (error or warning), sentence, accepted (a reason, or None)."""


class Bound(Settings):
    """Where a check fails, and what follows. A bare number is its limit."""

    limit: float
    severity: Literal["error", "warning"] = "error"
    """A failed error keeps the run from being published; a warning is reported."""


class AuditLimits(Settings):
    """Bounds of the audit; each holds for every market on its own. Shares are in [0, 1].

    A check is called as its bound; those of distributions have `drift.` before it.
    """

    rejected_share: Bound = Bound(limit=0.05)
    """Most candidates that could not be scored."""
    deleted_share: Bound = Bound(limit=0.2)
    """Most published rows that may be deleted: a half-empty candidates table must not empty a market."""
    query_coverage: Bound = Bound(limit=0.5)
    """Fewest queries with a text that have a scored pair."""
    product_coverage: Bound = Bound(limit=0.5, severity="warning")
    """Fewest products with a title that have a scored pair."""
    changed_psi: Bound = Bound(limit=0.25)
    """Largest population stability index between the scores of changed pairs and those published for them."""
    changed_ks: Bound = Bound(limit=0.25)
    """Largest Kolmogorov-Smirnov distance between the same."""
    new_psi: Bound = Bound(limit=0.5, severity="warning")
    """The same for pairs that were not published before, against all published ones."""
    new_ks: Bound = Bound(limit=0.4, severity="warning")
    grade_shift: Bound = Bound(limit=0.1)
    """Largest change of a predicted grade's share."""
    rank_agreement: Bound = Bound(limit=0.5)
    """Where the bundle is new: smallest mean over queries of Spearman's correlation with the published order."""
    ndcg_loss: Bound = Bound(limit=0.02)
    """Where the bundle is new and judgments are given: most nDCG@10 that may be lost."""
    unseen_tokens: Bound = Bound(limit=0.2, severity="warning")
    """Where nothing of the bundle is published: most tokens of queries and titles that its training never saw."""
    cut_titles: Bound = Bound(limit=0.2, severity="warning")
    """Where nothing of the bundle is published: most titles that its budget cuts."""
    golden_scores: Bound = Bound(limit=0.01, severity="warning")
    """Where nothing of the bundle is published: fewest scores that reach the median of its golden pairs."""
    fewest_pairs: int = Field(default=500, ge=1)
    """Distributions and ranks of fewer pairs are reported, not judged."""

    @field_validator(
        *("rejected_share", "deleted_share", "changed_ks", "new_ks", "grade_shift", "ndcg_loss"),
        *("unseen_tokens", "cut_titles"),
    )
    @classmethod
    def _can_fail(cls, bound: Bound) -> Bound:
        if bound.limit > 1:
            raise ValueError(f"expected at most 1, got {bound.limit:g}: it would never fail. 5 % are written 0.05")
        return bound

    @field_validator("query_coverage", "product_coverage", "rank_agreement", "golden_scores")
    @classmethod
    def _can_be_missed(cls, bound: Bound, info: ValidationInfo) -> Bound:
        least = -1 if info.field_name == "rank_agreement" else 0
        if bound.limit < least:
            raise ValueError(f"expected at least {least}, got {bound.limit:g}: it would never fail")
        return bound

    @model_validator(mode="before")
    @classmethod
    def _bare_limits(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        limits = {}
        for name, value in values.items():
            preset = cls.model_fields[name].default if name in cls.model_fields else None
            if isinstance(preset, Bound) and not isinstance(value, Bound):
                given = value if isinstance(value, dict) else {"limit": value}
                value = {**preset.model_dump(), **given}
            limits[name] = value
        return limits


@dataclass(frozen=True)
class Canary:
    """Pairs that were scored before, and again by this run."""

    num_pairs: int
    largest_difference: float
    """NaN where a pair has no score now."""
    tolerance: float
    """That the bundle declares."""


@dataclass(frozen=True)
class FirstLook:
    """A market that a bundle scores for the first time, beside what the bundle was trained and proven on."""

    num_tokens: int
    """Tokens of a sample of its queries and titles."""
    num_unseen: int | None
    """Those that the training never saw; None where the bundle does not say."""
    num_titles: int
    """Titles of the sample."""
    num_cut: int
    """Titles that have more tokens than their budget."""
    golden_median: float
    """Median score of the bundle's golden pairs."""


@dataclass(frozen=True)
class MarketOutcome:
    """What a run would make of one market. Pairs are changed where their key differs from the published one."""

    market: str
    num_candidates: int
    num_rejected: int
    num_unchanged: int
    num_published: int
    """Rows before the run."""
    num_new: int
    num_changed: int
    num_deleted: int
    num_missing: int
    """New and changed pairs without a score."""
    num_repeated: int
    """Rows beyond the first of a pair."""
    num_not_finite: int
    num_out_of_range: int
    num_queries: int
    """Queries with a text."""
    num_covered_queries: int
    num_products: int
    """Products with a title."""
    num_covered_products: int
    published_scores: np.ndarray
    """Rows before the run by score, shape (NUM_SCORE_BINS,), as the following ones."""
    scores_before: np.ndarray
    """Published scores of the changed pairs."""
    scores_after: np.ndarray
    """Their scores now."""
    new_scores: np.ndarray
    """Scores of the new pairs."""
    grades_before: Mapping[str, int] = field(default_factory=dict)
    """Predicted grade to all rows of the market."""
    grades_after: Mapping[str, int] = field(default_factory=dict)
    is_new_bundle: bool = False
    """Whether nothing that is published comes from the run's bundle."""
    rank_agreement: float | None = None
    """See AuditLimits; None where it was not measured."""
    ndcg: tuple[float, float] | None = None
    """nDCG@10 of the published scores and of the run's, over the judged pairs that both have."""
    first_look: FirstLook | None = None
    """None where some of what is published comes from the run's bundle."""
    canary: Canary | None = None
    """None where no published pair is unchanged."""
    reused_canary: Canary | None = None
    """The same for scores that an earlier attempt or run had staged; None where none is reused."""

    @property
    def is_first(self) -> bool:
        """Whether nothing that is published comes from the run's bundle, also where nothing is."""
        return self.is_new_bundle or not self.num_published

    @property
    def num_changes(self) -> dict[str, int]:
        """Operation to published rows that it would change, those of none left out."""
        counts = {"insert": self.num_new, "update": self.num_changed, "delete": self.num_deleted}
        return {operation: count for operation, count in counts.items() if count}


def population_stability_index(reference: np.ndarray, counts: np.ndarray, num_groups: int = 10) -> float:
    """How far a distribution has moved from a reference, at least 0; above 0.25 is usually called a shift.

    The sum over groups of (q - p) ln(q / p), where p and q are the groups' shares (Siddiqi, Credit Risk Scorecards,
    2006). Groups are runs of bins with about equal shares of the reference; half a count is added to each.

    Args:
        reference: counts of ordered bins, shape (num_bins,).
        counts: the same bins of the other distribution.
        num_groups: at most so many groups.
    """
    before = np.cumsum(reference) - reference
    group = np.floor(num_groups * before / max(reference.sum(), 1)).astype(int)
    group = np.unique(np.minimum(group, num_groups - 1), return_inverse=True)[1]
    p, q = (np.bincount(group, weights=values) + 0.5 for values in (reference, counts))
    p, q = p / p.sum(), q / q.sum()
    return float(np.sum((q - p) * np.log(q / p)))


def kolmogorov_smirnov(reference: np.ndarray, counts: np.ndarray) -> float:
    """Largest difference of two cumulative distributions over the same ordered bins, in [0, 1]."""
    p, q = (np.cumsum(values) / max(values.sum(), 1) for values in (reference, counts))
    return float(np.abs(p - q).max())


def audit_market(outcome: MarketOutcome, limits: AuditLimits) -> list[AuditResult]:
    """All results of one market, in the order in which a person would look at them."""
    return [
        *_facts(outcome),
        *_shares(outcome, limits),
        *_canary(outcome),
        *(_new_bundle(outcome, limits) if outcome.is_new_bundle else _changed(outcome, limits)),
        *_new_pairs(outcome, limits),
        *_first_look(outcome, limits),
    ]


def failures(results: Sequence[AuditResult]) -> list[AuditResult]:
    """Results that keep a run from being published."""
    return [r for r in results if not r["passed"] and r["severity"] == "error" and not r["accepted"]]


def accept(results: Sequence[AuditResult], names: Sequence[str], reason: str) -> list[AuditResult]:
    """The results with failed checks accepted by a person.

    Args:
        results: of the audit.
        names: checks, or the part before a point that several share, such as drift.
        reason: why.

    Raises:
        ConfigError: a name that did not fail, or one of a check that is never accepted; or no reason.
    """
    if not reason.strip():
        raise ConfigError("--reason: expected why the run may be published all the same, got nothing.")
    failed = sorted({result["name"] for result in failures(results)})
    for name in names:
        chosen = [other for other in failed if _is_named(other, name)]
        if not chosen:
            raise ConfigError(f"--accept {name!r}: no failed check is called so; those of this run are {failed}.")
        if refused := sorted(set(chosen) & set(NEVER_ACCEPTED)):
            raise ConfigError(f"--accept {name!r}: {refused} can not be accepted. Score again, or discard the run.")
    accepted = {result for result in failed if any(_is_named(result, name) for name in names)}
    return [
        {**result, "accepted": reason} if result["name"] in accepted and not result["passed"] else dict(result)
        for result in results
    ]


def _is_named(name: str, asked: str) -> bool:
    return name == asked or name.startswith(f"{asked}.")


def _facts(outcome: MarketOutcome) -> Iterator[AuditResult]:
    """Checks of what a market's scores are; none of them has a limit."""
    num_fresh = outcome.num_new + outcome.num_changed
    num_pairs = outcome.num_unchanged + num_fresh - outcome.num_missing + outcome.num_rejected
    num_scored = outcome.num_unchanged + num_fresh - outcome.num_missing
    for name, value, bound, passed, sentence in (
        (
            "complete",
            num_pairs,
            f"= {outcome.num_candidates}",
            num_pairs == outcome.num_candidates,
            f"{num_pairs:,} of {outcome.num_candidates:,} candidate pairs have a score or a reason for having none.",
        ),
        ("not_empty", num_scored, ">= 1", num_scored >= 1, f"{num_scored:,} pairs have a score."),
        (
            "unique",
            outcome.num_repeated,
            "= 0",
            outcome.num_repeated == 0,
            f"{outcome.num_repeated:,} pairs are there twice.",
        ),
        (
            "finite",
            outcome.num_not_finite,
            "= 0",
            outcome.num_not_finite == 0,
            f"{outcome.num_not_finite:,} of {num_fresh:,} new and changed scores are no numbers.",
        ),
        (
            "in_range",
            outcome.num_out_of_range,
            "= 0",
            outcome.num_out_of_range == 0,
            f"{outcome.num_out_of_range:,} of {num_fresh:,} new and changed scores are outside of [0, 1].",
        ),
    ):
        yield _result(outcome, name, value, bound, passed, "error", sentence)


def _shares(outcome: MarketOutcome, limits: AuditLimits) -> Iterator[AuditResult]:
    """Checks of how many pairs, queries and products there are."""
    for name, part, whole, limit, text in (
        (
            "rejected_share",
            outcome.num_rejected,
            outcome.num_candidates,
            limits.rejected_share,
            "candidate pairs cannot be scored",
        ),
        (
            "deleted_share",
            outcome.num_deleted,
            outcome.num_published,
            limits.deleted_share,
            "published rows would be deleted",
        ),
    ):
        yield _at_most(outcome, name, part / whole if whole else 0.0, limit, f"{part:,} of {whole:,} {text}.")
    for name, part, whole, limit, text in (
        (
            "query_coverage",
            outcome.num_covered_queries,
            outcome.num_queries,
            limits.query_coverage,
            "queries have a scored pair",
        ),
        (
            "product_coverage",
            outcome.num_covered_products,
            outcome.num_products,
            limits.product_coverage,
            "products have a scored pair",
        ),
    ):
        yield _at_least(outcome, name, part / whole if whole else 0.0, limit, f"{part:,} of {whole:,} {text}.")


def _canary(outcome: MarketOutcome) -> Iterator[AuditResult]:
    for name, canary, kind in (
        (CANARY, outcome.canary, "published"),
        (REUSED_CANARY, outcome.reused_canary, "reused"),
    ):
        if canary is not None:
            sentence = (
                f"{canary.num_pairs:,} {kind} pairs were scored again and differ by {canary.largest_difference:.2g} at "
                f"most; more than the tolerance means another model, device or driver than that of the {kind} scores."
            )
            yield _at_most(outcome, name, canary.largest_difference, Bound(limit=canary.tolerance), sentence)


def _changed(outcome: MarketOutcome, limits: AuditLimits) -> Iterator[AuditResult]:
    before, after = outcome.scores_before, outcome.scores_after
    text = f"{outcome.num_changed:,} changed pairs: their scores against those published for them"
    yield from _moved(outcome, limits, "changed", before, after, limits.changed_psi, limits.changed_ks, text)
    total_before, total_after = (sum(grades.values()) for grades in (outcome.grades_before, outcome.grades_after))
    if not total_before or not total_after:
        return
    shift, grade = max(
        (abs(outcome.grades_after.get(name, 0) / total_after - outcome.grades_before.get(name, 0) / total_before), name)
        for name in {*outcome.grades_before, *outcome.grades_after}
    )
    sentence = f"The share of predicted grade {grade!r} among all pairs moves by {shift:.3f}, more than any other."
    yield _at_most(
        outcome, "drift.grade_shift", shift, limits.grade_shift, sentence, total_after >= limits.fewest_pairs
    )


def _new_bundle(outcome: MarketOutcome, limits: AuditLimits) -> Iterator[AuditResult]:
    if not outcome.num_published:
        return
    if outcome.rank_agreement is not None:
        sentence = (
            "The bundle is new: Spearman's correlation of its order of a query's products with the published one is "
            f"{outcome.rank_agreement:.2f}, mean over queries."
        )
        is_judged = outcome.num_changed >= limits.fewest_pairs
        yield _at_least(
            outcome, "drift.rank_agreement", outcome.rank_agreement, limits.rank_agreement, sentence, is_judged
        )
    if outcome.ndcg is not None:
        before, after = outcome.ndcg
        sentence = (
            f"The bundle is new: nDCG@10 over judged pairs is {after:.3f}, that of the published scores {before:.3f}."
        )
        yield _at_most(outcome, "drift.ndcg_loss", before - after, limits.ndcg_loss, sentence)


def _new_pairs(outcome: MarketOutcome, limits: AuditLimits) -> Iterator[AuditResult]:
    if outcome.num_published:
        text = f"{outcome.num_new:,} new pairs: their scores against all published ones"
        reference, counts = outcome.published_scores, outcome.new_scores
        yield from _moved(outcome, limits, "new", reference, counts, limits.new_psi, limits.new_ks, text)


def _first_look(outcome: MarketOutcome, limits: AuditLimits) -> Iterator[AuditResult]:
    look = outcome.first_look
    if look is None:
        return
    first = "The bundle is new to this market:"
    if look.num_unseen is None:
        sentence = f"{first} it does not say which tokens its training saw. Train and export it again to know."
        bound = f"<= {limits.unseen_tokens.limit:g}"
        yield _result(outcome, "unseen_tokens", math.nan, bound, True, "warning", sentence)
    elif look.num_tokens:
        sentence = (
            f"{first} its training never saw {look.num_unseen:,} of {look.num_tokens:,} tokens of queries and titles. "
            "Where these are many, its language or its products are foreign: look at scores before you rely on them."
        )
        yield _at_most(outcome, "unseen_tokens", look.num_unseen / look.num_tokens, limits.unseen_tokens, sentence)
    if look.num_titles:
        sentence = f"{first} its budget cuts {look.num_cut:,} of {look.num_titles:,} titles."
        yield _at_most(outcome, "cut_titles", look.num_cut / look.num_titles, limits.cut_titles, sentence)
    scores = outcome.new_scores + outcome.scores_after
    if num_scores := int(scores.sum()):
        lowest = min(int(look.golden_median * NUM_SCORE_BINS), NUM_SCORE_BINS - 1)
        num_good = int(scores[lowest:].sum())
        sentence = (
            f"{first} {num_good:,} of {num_scores:,} scores reach {look.golden_median:.3f}, the median of the pairs "
            "that it was proven on."
        )
        is_judged = num_scores >= limits.fewest_pairs
        yield _at_least(outcome, "golden_scores", num_good / num_scores, limits.golden_scores, sentence, is_judged)


def _moved(
    outcome: MarketOutcome,
    limits: AuditLimits,
    kind: str,
    reference: np.ndarray,
    counts: np.ndarray,
    psi: Bound,
    ks: Bound,
    text: str,
) -> Iterator[AuditResult]:
    if not counts.sum():
        return
    measures: tuple[tuple[str, Callable[[np.ndarray, np.ndarray], float], Bound, str], ...] = (
        ("psi", population_stability_index, psi, "population stability index"),
        ("ks", kolmogorov_smirnov, ks, "Kolmogorov-Smirnov distance"),
    )
    is_judged = min(counts.sum(), reference.sum()) >= limits.fewest_pairs
    for name, measure, limit, called in measures:
        value = measure(reference, counts)
        yield _at_most(outcome, f"drift.{kind}_{name}", value, limit, f"{text}: {called} {value:.3f}.", is_judged)


def _at_most(
    outcome: MarketOutcome, name: str, value: float, bound: Bound, sentence: str, is_judged: bool = True
) -> AuditResult:
    passed = value <= bound.limit  # False for NaN
    return _judged(outcome, name, value, f"<= {bound.limit:g}", passed, bound, sentence, is_judged)


def _at_least(
    outcome: MarketOutcome, name: str, value: float, bound: Bound, sentence: str, is_judged: bool = True
) -> AuditResult:
    passed = value >= bound.limit
    return _judged(outcome, name, value, f">= {bound.limit:g}", passed, bound, sentence, is_judged)


def _judged(
    outcome: MarketOutcome,
    name: str,
    value: float,
    bound: str,
    passed: bool,
    limit: Bound,
    sentence: str,
    is_judged: bool,
) -> AuditResult:
    if not is_judged:
        passed, sentence = True, f"{sentence} Too few to be judged."
    return _result(outcome, name, value, bound, passed, limit.severity, sentence)


def _result(
    outcome: MarketOutcome, name: str, value: float, bound: str, passed: bool, severity: str, sentence: str
) -> AuditResult:
    return {
        "market": outcome.market,
        "name": name,
        "value": value if math.isfinite(value) else None,
        "bound": bound,
        "passed": passed,
        "severity": severity,
        "sentence": sentence,
        "accepted": None,
    }
