import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from csrm.scoring.vote import LabelMap
from csrm.training.distillation.label_map import assumed_label_map, fit_label_map, score_features


def test_probabilities_are_differences_of_the_logistic_worked_by_hand() -> None:
    found = LabelMap(np.array([1.0]), np.array([0.0, np.log(3)])).probabilities(np.array([[0.0], [np.log(3)]]))
    # P(>= 1) = 1/2 and P(>= 2) = 1/4 at 0; 3/4 and 1/2 at log 3
    np.testing.assert_allclose(found, [[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]])


def test_the_scale_of_scores_and_that_of_their_market_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    scores, queries = rng.normal(size=40), [f"q{number // 4}" for number in range(40)]
    markets = ["kr"] * 20 + ["us"] * 20
    scaled = np.where(np.array(markets) == "us", 1000 + 30 * scores, scores)
    expected = score_features(scores, markets, queries)
    np.testing.assert_allclose(score_features(scaled, markets, queries), expected)
    np.testing.assert_allclose(expected[:20, 0].mean(), 0, atol=1e-12)
    np.testing.assert_allclose(expected[:20, 0].std(), 1)
    np.testing.assert_allclose(expected[:4, 1].mean(), 0, atol=1e-12)


def test_equal_ids_of_two_markets_are_two_queries_and_equal_scores_have_no_spread() -> None:
    features = score_features(np.array([1.0, 3.0, 5.0, 5.0]), ["kr", "kr", "us", "us"], ["q"] * 4)
    np.testing.assert_allclose(features, [[-1, -1], [1, 1], [0, 0], [0, 0]])
    tenths = np.full(3, 0.1)
    assert pd.Series(tenths).std(ddof=0) > 0  # by rounding, which is no place among scores
    np.testing.assert_allclose(score_features(tenths, ["us"] * 3, ["q"] * 3), 0, atol=1e-12)


def test_the_map_of_a_world_is_found_again() -> None:
    rng = np.random.default_rng(0)
    world = LabelMap(np.array([0.5, 2.0]), np.array([-1.0, 0.0, 1.5]))
    features = rng.normal(size=(20_000, 2))
    probabilities = world.probabilities(features)
    given = (probabilities.cumsum(axis=1) < rng.random(len(features))[:, None]).sum(axis=1)
    found = fit_label_map(features, given, 4)
    np.testing.assert_allclose(found.slopes, world.slopes, atol=0.08)
    np.testing.assert_allclose(found.thresholds, world.thresholds, atol=0.08)


def test_scores_that_run_against_the_labels_say_nothing_and_a_label_may_be_given_to_none() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2_000, 2))
    given = np.where(rng.random(2_000) < expit(-3 * features[:, 0]), 2, 0)
    found = fit_label_map(features, given, 3)
    np.testing.assert_allclose(found.slopes, 0, atol=1e-3)
    probabilities = found.probabilities(features[:1])[0]
    assert probabilities.min() >= 0
    assert probabilities[1] < 1e-3
    assert probabilities[2] == pytest.approx((given == 2).mean(), abs=0.01)


def test_an_assumed_map_gives_labels_as_often_as_they_were_given() -> None:
    features = np.random.default_rng(0).normal(size=(500, 2))
    shares = np.array([0.2, 0.0, 0.5, 0.3])
    found = assumed_label_map(features, shares)
    np.testing.assert_allclose(found.probabilities(features).mean(axis=0), shares, atol=1e-5)
    best = found.probabilities(features)[:, 3]
    assert np.array_equal(np.argsort(best), np.argsort(features[:, 1]))  # by the place within the query
