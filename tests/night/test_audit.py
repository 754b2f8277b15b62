"""The audit: each fault fails the check that is there for it, and nothing else."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import ks_2samp

from csrm.config import load_config
from csrm.errors import ConfigError
from csrm.night.audit import (
    NUM_SCORE_BINS,
    AuditLimits,
    Canary,
    FirstLook,
    MarketOutcome,
    accept,
    audit_market,
    failures,
    kolmogorov_smirnov,
    population_stability_index,
)

LIMITS = AuditLimits()
FLAT = np.full(NUM_SCORE_BINS, 10.0)
LOW = np.where(np.arange(NUM_SCORE_BINS) < 20, 50.0, 0.0)

GOOD = MarketOutcome(
    market="tw",
    num_candidates=1_000,
    num_rejected=10,
    num_unchanged=100,
    num_published=500,
    num_new=390,
    num_changed=500,
    num_deleted=5,
    num_missing=0,
    num_repeated=0,
    num_not_finite=0,
    num_out_of_range=0,
    num_queries=50,
    num_covered_queries=49,
    num_products=200,
    num_covered_products=180,
    published_scores=FLAT,
    scores_before=FLAT,
    scores_after=FLAT,
    new_scores=FLAT,
    grades_before={"E": 300, "I": 200},
    grades_after={"E": 600, "I": 400},
    canary=Canary(100, 1e-6, 1e-5),
)


LOOK = FirstLook(num_tokens=1_000, num_unseen=50, num_titles=100, num_cut=5, golden_median=0.5)


def failed(outcome: MarketOutcome, limits: AuditLimits = LIMITS) -> set[str]:
    return {result["name"] for result in audit_market(outcome, limits) if not result["passed"]}


def test_a_run_like_the_night_before_passes_every_check() -> None:
    results = audit_market(GOOD, LIMITS)

    assert failed(GOOD) == set()
    assert {result["name"] for result in results} >= {"complete", "canary", "drift.changed_psi", "drift.grade_shift"}
    assert all(result["market"] == "tw" and result["sentence"].endswith(".") for result in results)


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ({"num_missing": 1}, "complete"),
        ({"num_candidates": 1_001}, "complete"),
        ({"num_repeated": 1}, "unique"),
        ({"num_not_finite": 1}, "finite"),
        ({"num_out_of_range": 1}, "in_range"),
        ({"num_rejected": 60, "num_unchanged": 50}, "rejected_share"),
        ({"num_deleted": 101}, "deleted_share"),
        ({"num_covered_queries": 24}, "query_coverage"),
        ({"num_covered_products": 99}, "product_coverage"),
        ({"canary": Canary(100, 2e-5, 1e-5)}, "canary"),
        ({"canary": Canary(100, float("nan"), 1e-5)}, "canary"),
        ({"grades_after": {"E": 751, "I": 249}}, "drift.grade_shift"),
        ({"is_new_bundle": True, "rank_agreement": 0.4}, "drift.rank_agreement"),
        ({"is_new_bundle": True, "ndcg": (0.70, 0.67)}, "drift.ndcg_loss"),
        ({"first_look": replace(LOOK, num_unseen=201)}, "unseen_tokens"),
        ({"first_look": replace(LOOK, num_cut=21)}, "cut_titles"),
        ({"first_look": LOOK, "scores_before": LOW, "scores_after": LOW, "new_scores": 0 * LOW}, "golden_scores"),
    ],
)
def test_each_fault_fails_its_own_check(fault: dict[str, Any], name: str) -> None:
    assert failed(replace(GOOD, **fault)) == {name}


def test_a_check_is_called_as_its_bound() -> None:
    outcome = replace(GOOD, rank_agreement=0.9, ndcg=(0.70, 0.71), reused_canary=GOOD.canary, first_look=LOOK)
    results = audit_market(outcome, LIMITS) + audit_market(replace(outcome, is_new_bundle=True), LIMITS)
    facts = {"complete", "not_empty", "unique", "finite", "in_range", "canary", "canary_reused"}
    names = {result["name"].removeprefix("drift.") for result in results}
    assert names - facts == set(AuditLimits.model_fields) - {"fewest_pairs"}


def test_a_first_look_warns_and_keeps_no_run_from_being_published() -> None:
    foreign = FirstLook(num_tokens=1_000, num_unseen=900, num_titles=100, num_cut=50, golden_median=1.0)
    outcome = replace(GOOD, num_published=0, num_changed=0, num_new=890, scores_after=0 * LOW, new_scores=LOW)
    results = audit_market(replace(outcome, first_look=foreign), LIMITS)

    assert {result["name"] for result in results if not result["passed"]} == {
        *("unseen_tokens", "cut_titles", "golden_scores")
    }
    assert failures(results) == []
    sentences = {result["name"]: result["sentence"] for result in results}
    assert "never saw 900 of 1,000 tokens of queries and titles" in sentences["unseen_tokens"]
    assert "0 of 1,000 scores reach 1.000" in sentences["golden_scores"]


def test_a_bundle_that_does_not_know_its_training_says_so() -> None:
    outcome = replace(GOOD, first_look=replace(LOOK, num_unseen=None))
    (result,) = [result for result in audit_market(outcome, LIMITS) if result["name"] == "unseen_tokens"]
    assert (result["passed"], result["value"]) == (True, None)
    assert "does not say which tokens its training saw" in result["sentence"]


def test_a_market_without_a_score_is_not_published() -> None:
    empty = replace(GOOD, num_unchanged=0, num_new=0, num_changed=0, num_rejected=1_000, num_published=0)

    assert failed(empty) == {"not_empty", "rejected_share"}


def test_scores_that_moved_fail_and_too_few_of_them_are_not_judged() -> None:
    moved = replace(GOOD, scores_after=LOW, new_scores=LOW)
    few = replace(moved, scores_after=LOW / 10, new_scores=LOW / 10)

    assert failed(moved) == {"drift.changed_psi", "drift.changed_ks", "drift.new_psi", "drift.new_ks"}
    assert {result["name"] for result in failures(audit_market(moved, LIMITS))} == {
        "drift.changed_psi",
        "drift.changed_ks",
    }
    assert failed(few) == set()
    assert "Too few to be judged." in audit_market(few, LIMITS)[-1]["sentence"]


def test_a_new_bundle_is_judged_by_its_order_and_not_by_its_scores() -> None:
    outcome = replace(GOOD, is_new_bundle=True, scores_after=LOW, rank_agreement=0.9, ndcg=(0.70, 0.71))

    names = {result["name"] for result in audit_market(outcome, LIMITS)}

    assert failed(outcome) == set()
    assert {"drift.rank_agreement", "drift.ndcg_loss"} <= names
    assert not names & {"drift.changed_psi", "drift.changed_ks", "drift.grade_shift"}


def test_nothing_is_compared_where_nothing_was_published() -> None:
    first = replace(GOOD, num_published=0, num_changed=0, num_new=890, num_deleted=0, scores_before=0 * FLAT)
    first = replace(first, scores_after=0 * FLAT, published_scores=0 * FLAT, grades_before={}, canary=None)

    assert failed(first) == set()
    assert not any(result["name"].startswith("drift") for result in audit_market(first, LIMITS))


def test_the_population_stability_index_is_that_of_a_hand_worked_case() -> None:
    reference, counts = np.array([49.5, 49.5]), np.array([24.5, 74.5])

    # shares with half a count added: 0.5, 0.5 and 0.25, 0.75
    assert population_stability_index(reference, counts, num_groups=2) == pytest.approx(
        -0.25 * np.log(0.25 / 0.5) + 0.25 * np.log(0.75 / 0.5)
    )
    assert population_stability_index(FLAT, FLAT) == 0


def test_the_kolmogorov_smirnov_distance_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    samples = [np.floor(rng.beta(a, 2, 700) * NUM_SCORE_BINS).astype(int) for a in (2, 3)]
    histograms = [np.bincount(sample, minlength=NUM_SCORE_BINS) for sample in samples]

    assert kolmogorov_smirnov(*histograms) == pytest.approx(ks_2samp(*samples).statistic)


def test_a_person_accepts_what_failed_with_a_reason() -> None:
    results = audit_market(replace(GOOD, scores_after=LOW, num_deleted=200), LIMITS)

    accepted = accept(results, ["drift"], "new season")

    assert {result["name"] for result in failures(accepted)} == {"deleted_share"}
    assert failures(accept(results, ["drift", "deleted_share"], "new season")) == []
    assert {result["name"] for result in accepted if result["accepted"] == "new season"} == {
        "drift.changed_psi",
        "drift.changed_ks",
    }


@pytest.mark.parametrize(
    ("names", "reason", "message"),
    [
        (["canary"], "why not", r"--accept 'canary': no failed check is called so; those of this run are \['complete'"),
        (["complete"], "why not", "can not be accepted. Score again, or discard the run"),
        (["drift"], "  ", "--reason: expected why"),
    ],
)
def test_what_cannot_be_accepted_is_refused(names: list[str], reason: str, message: str) -> None:
    results = audit_market(replace(GOOD, num_missing=1, scores_after=LOW), LIMITS)

    with pytest.raises(ConfigError, match=message):
        accept(results, names, reason)


def test_a_bound_is_a_number_or_a_number_with_its_severity(tmp_path: Any) -> None:
    path = tmp_path / "audit.yaml"
    path.write_text("deleted_share: 0.5\nproduct_coverage: {limit: 0.9}\ncanary_typo: 1\n")
    with pytest.raises(ConfigError, match="canary_typo: Extra inputs are not permitted"):
        load_config(path, AuditLimits)
    path.write_text("deleted_share: 0.5\nproduct_coverage: {limit: 0.9}\nnew_psi: {limit: 0.1, severity: error}\n")

    limits = load_config(path, AuditLimits)

    assert (limits.deleted_share.limit, limits.deleted_share.severity) == (0.5, "error")
    assert (limits.product_coverage.limit, limits.product_coverage.severity) == (0.9, "warning")
    assert (limits.new_psi.limit, limits.new_psi.severity) == (0.1, "error")


@pytest.mark.parametrize(
    ("name", "limit"), [("query_coverage", -0.1), ("product_coverage", -1), ("rank_agreement", -2)]
)
def test_a_lower_limit_that_no_night_could_miss_is_refused(name: str, limit: float) -> None:
    with pytest.raises(ValidationError, match=r"expected at least (0|-1), got .*: it would never fail"):
        AuditLimits.model_validate({name: limit})


@pytest.mark.parametrize(
    "name", ["rejected_share", "deleted_share", "changed_ks", "new_ks", "grade_shift", "ndcg_loss"]
)
def test_a_bound_that_can_never_fail_is_refused(name: str) -> None:
    with pytest.raises(
        ValidationError, match=r"expected at most 1, got 5: it would never fail\. 5 % are written 0\.05"
    ):
        AuditLimits.model_validate({name: 5})
    assert AuditLimits.model_validate({name: 1}) is not None
