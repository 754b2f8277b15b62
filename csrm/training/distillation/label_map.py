"""Scores of any ranker as label probabilities: an ordered logistic regression on judged pairs.

A score counts by its place among the scores of its market and of its query, so that neither its scale nor its centre
matter, and one map serves a market that has no labels.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.optimize import brentq, minimize
from scipy.special import expit

from csrm.scoring.vote import LabelMap

_WIDEST = 10.0
"""Largest distance of a threshold from the next, as a logarithm."""
_LARGEST = 50.0
"""Largest slope and threshold."""
ASSUMED_SLOPES = (0.0, 1.0)
"""Where no judged pair tells how far scores can be trusted: a score that is one standard deviation above the mean of
its query raises the odds of a better label by e."""


def score_features(scores: np.ndarray, markets: Sequence[str], queries: Sequence[str]) -> np.ndarray:
    """Places of scores among those of their market and of their query, in standard deviations of the market.

    Args:
        scores: finite, on any scale, shape (num_pairs,).
        markets: of each pair.
        queries: of each pair, unique within their market.

    Returns:
        Shape (num_pairs, 2); about 0 in a market whose scores are all equal.

    >>> score_features(np.array([5.0, 7.0, 9.0, 11.0]), ["us"] * 4, ["a", "a", "b", "b"]).round(2).tolist()
    [[-1.34, -0.45], [-0.45, 0.45], [0.45, -0.45], [1.34, 0.45]]
    """
    frame = pd.DataFrame({"market": list(markets), "query": list(queries), "score": scores})
    of_market = frame.groupby("market")["score"]
    spread = of_market.transform(lambda values: values.std(ddof=0) if values.nunique() > 1 else 1.0)
    above_market = frame["score"] - of_market.transform("mean")
    above_query = frame["score"] - frame.groupby(["market", "query"])["score"].transform("mean")
    return np.stack([above_market / spread, above_query / spread], axis=1)


def fit_label_map(features: np.ndarray, given: np.ndarray, num_labels: int) -> LabelMap:
    """The map under which the given labels are most probable, with a standard normal prior of the slopes.

    Args:
        features: of about unit spread, as of `score_features`, shape (num_pairs, features), at least one pair.
        given: number of each pair's label, least relevant first, shape (num_pairs,).
        num_labels: how many labels there are; some may be given to no pair.
    """
    num_slopes = features.shape[1]

    def map_of(values: np.ndarray) -> LabelMap:
        steps = np.exp(values[num_slopes + 1 :])
        return LabelMap(values[:num_slopes], values[num_slopes] + np.concatenate([[0.0], np.cumsum(steps)]))

    def loss(values: np.ndarray) -> float:
        own = map_of(values).probabilities(features)[np.arange(len(given)), given]
        slopes = values[:num_slopes]
        return float(-np.log(np.maximum(own, 1e-12)).sum() + slopes @ slopes / 2) / len(given)

    bounds = [(0.0, _LARGEST)] * num_slopes + [(-_LARGEST, _LARGEST)] + [(-_WIDEST, _WIDEST)] * (num_labels - 2)
    start = np.array([0.5] * num_slopes + [0.0] + [0.0] * (num_labels - 2))
    return map_of(minimize(loss, start, method="L-BFGS-B", bounds=bounds).x)


def assumed_label_map(features: np.ndarray, label_shares: np.ndarray) -> LabelMap:
    """The map with ASSUMED_SLOPES under which pairs have labels as often as others were given them.

    Args:
        features: of `score_features`, of the pairs to map.
        label_shares: of the given labels, least relevant first, shape (num_labels,), sum 1.
    """
    slopes = np.array(ASSUMED_SLOPES)
    values = features @ slopes
    reached = np.cumsum(label_shares[::-1])[::-1][1:].clip(1e-6, 1 - 1e-6)
    ends = values.min() - _LARGEST, values.max() + _LARGEST
    thresholds = [brentq(lambda place, share=share: expit(values - place).mean() - share, *ends) for share in reached]
    return LabelMap(slopes, np.array(thresholds))
