"""What a score means in a market: the probability that a person finds the pair relevant, and what a threshold keeps.

Scores order products; whether 0.6 is good enough to show depends on the market. Judged pairs tell. A logistic curve
over the score's log-odds (Platt 1999, "Probabilistic Outputs for Support Vector Machines") turns a score into a
probability, and precision and recall of thresholds tell what a reader keeps. Both are of pairs like the judged ones: a
pool of other pairs, such as the full catalog, has another share of relevant ones.
"""

from collections.abc import Collection, Iterator

import numpy as np
import pandas as pd

from csrm.evaluation.metrics import OVERALL, resample_weights
from csrm.extras import import_eval

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_NUM_BINS = 10
_NUM_FOLDS = 5
_LEAST = 1e-6
"""Scores are kept so far from 0 and 1: their log-odds are finite."""


def calibration(
    judged: pd.DataFrame, score_column: str, *, relevant_grades: Collection[str], seed: int = 0
) -> pd.DataFrame:
    """The curve from a score to the probability of relevance, for each market, and how far both are off.

        probability = 1 / (1 + exp(-(slope * log(score / (1 - score)) + intercept)))

    The expected calibration error is the mean distance of the mean probability to the share of relevant pairs, over
    ten bins of equal size (Naeini et al. 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning"). That
    of the curve is measured on queries that it was not fitted to, in five folds.

    Args:
        judged: market, query_id, grade and the score column, in [0, 1]; pairs without a score are left out.
        score_column: name of the score.
        relevant_grades: grades that count as relevant.
        seed: of the folds.

    Returns:
        One row for each market, "all markets" last where there are several: market, num_pairs, share_relevant, slope,
        intercept, error (of the score as it is) and calibrated_error. Slope, intercept and calibrated_error are NaN in
        a market where all or no pairs are relevant, or with fewer queries than folds.

    Raises:
        MissingDependencyError: the eval extra is not installed.

    >>> scores = np.tile([0.2, 0.8], 50)
    >>> judged = pd.DataFrame({"market": "us", "query_id": np.repeat(range(10), 10).astype(str), "score": scores})
    >>> judged["grade"] = np.where(np.arange(100) % 4 == 1, "E", "I")  # half of those with 0.8, none of those with 0.2
    >>> curves = calibration(judged, "score", relevant_grades=["E"])
    >>> curves[["market", "share_relevant", "error"]].round(3).to_dict("records")
    [{'market': 'us', 'share_relevant': 0.25, 'error': 0.25}]
    """
    rows = []
    for market, scores, relevant, queries in scored_markets(judged, score_column, relevant_grades):
        curve = _curve(scores, relevant)
        unseen = _of_unseen_queries(scores, relevant, queries, seed)
        rows.append(
            {
                "market": market,
                "num_pairs": len(scores),
                "share_relevant": float(relevant.mean()),
                "slope": curve[0],
                "intercept": curve[1],
                "error": expected_calibration_error(scores, relevant),
                "calibrated_error": np.nan if unseen is None else expected_calibration_error(unseen, relevant),
            }
        )
    return pd.DataFrame(rows)


def calibrated_probability(scores: np.ndarray, *, slope: float, intercept: float) -> np.ndarray:
    """Probability of relevance of scores in [0, 1], by the curve of a market; same shape.

    >>> calibrated_probability(np.array([0.5, 0.8]), slope=1.0, intercept=0.0).round(3).tolist()
    [0.5, 0.8]
    """
    probabilities: np.ndarray = 1 / (1 + np.exp(-(slope * _log_odds(scores) + intercept)))
    return probabilities


def expected_calibration_error(probabilities: np.ndarray, relevant: np.ndarray) -> float:
    """Mean distance of probabilities to the share of relevant pairs, over ten bins of equal size; in [0, 1].

    Args:
        probabilities: in [0, 1], shape (num_pairs,).
        relevant: whether each pair is relevant, shape (num_pairs,), bool.
    """
    distances = [abs(mean - share) * size for mean, share, size in reliability(probabilities, relevant)]
    return float(sum(distances) / len(probabilities))


def reliability(probabilities: np.ndarray, relevant: np.ndarray) -> list[tuple[float, float, int]]:
    """Mean probability, share of relevant pairs and number of pairs of each bin, least first.

    Ten bins of equal size; equal probabilities are in one bin, so that their order does not matter.
    """
    _, places, counts = np.unique(probabilities, return_inverse=True, return_counts=True)
    starts = np.cumsum(counts) - counts
    bins = (starts * _NUM_BINS // len(probabilities))[places]
    parts = [np.flatnonzero(bins == number) for number in np.unique(bins)]
    return [(float(probabilities[part].mean()), float(relevant[part].mean()), len(part)) for part in parts]


def threshold_metrics(
    judged: pd.DataFrame,
    score_column: str,
    *,
    relevant_grades: Collection[str],
    num_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Precision and recall of the pairs whose score reaches a threshold, for each market and threshold.

    Intervals are 95% percentile bootstrap intervals over queries, as those of evaluate_scores.

    Args:
        judged, score_column, relevant_grades: see calibration.
        num_resamples: bootstrap resamples.
        seed: of the resamples.

    Returns:
        market, threshold, share_kept (of the pairs), precision, precision_low, precision_high, recall, recall_low,
        recall_high. What has no pairs is NaN, and so are the intervals of one query.

    >>> rows = [("us", "a", "E", 0.9), ("us", "a", "E", 0.4), ("us", "b", "I", 0.6)]
    >>> judged = pd.DataFrame(rows, columns=["market", "query_id", "grade", "score"])
    >>> thresholds = threshold_metrics(judged, "score", relevant_grades=["E"]).set_index("threshold")
    >>> thresholds[["precision", "recall"]].loc[0.5].tolist()
    [0.5, 0.5]
    """
    rows = []
    for market, scores, relevant, queries in scored_markets(judged, score_column, relevant_grades):
        _, query_of_pair = np.unique(queries, return_inverse=True)
        num_queries = int(query_of_pair.max()) + 1
        weights = np.vstack([np.ones(num_queries), resample_weights(num_queries, num_resamples, seed)])

        def counts(selected: np.ndarray, of: np.ndarray = query_of_pair, by: np.ndarray = weights) -> np.ndarray:
            return by @ np.bincount(of, weights=selected, minlength=by.shape[1])

        all_relevant = counts(relevant)
        for threshold in THRESHOLDS:
            kept = scores >= threshold
            kept_relevant = counts(kept & relevant)
            rows.append(
                {
                    "market": market,
                    "threshold": threshold,
                    "share_kept": float(kept.mean()),
                    **_with_interval("precision", kept_relevant, counts(kept), num_queries=num_queries),
                    **_with_interval("recall", kept_relevant, all_relevant, num_queries=num_queries),
                }
            )
    return pd.DataFrame(rows)


def scored_markets(
    judged: pd.DataFrame, score_column: str, relevant_grades: Collection[str]
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Name, scores, relevance and queries of each market, then of "all markets" where there are several.

    Args:
        judged, score_column, relevant_grades: see calibration.
    """
    pairs = judged.dropna(subset=[score_column]).sort_values(["market", "query_id"], kind="stable")
    groups = [(str(market), rows) for market, rows in pairs.groupby("market")]
    for market, rows in [*groups, (OVERALL, pairs)] if len(groups) > 1 else groups:
        queries = (rows["market"].astype(str) + "\n" + rows["query_id"].astype(str)).to_numpy()
        relevant = rows["grade"].isin(set(relevant_grades)).to_numpy()
        yield market, rows[score_column].to_numpy(dtype=np.float64), relevant, queries


def _with_interval(name: str, part: np.ndarray, whole: np.ndarray, *, num_queries: int) -> dict[str, float]:
    """A share and its interval, from that of all queries and of each resample; one query gives no interval."""
    shares = np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
    resampled = shares[1:][np.isfinite(shares[1:])]
    low, high = np.percentile(resampled, [2.5, 97.5]) if len(resampled) and num_queries > 1 else (np.nan, np.nan)
    return {name: float(shares[0]), f"{name}_low": float(low), f"{name}_high": float(high)}


def _log_odds(scores: np.ndarray) -> np.ndarray:
    inside = np.clip(np.asarray(scores, dtype=np.float64), _LEAST, 1 - _LEAST)
    odds: np.ndarray = np.log(inside / (1 - inside))
    return odds


def _curve(scores: np.ndarray, relevant: np.ndarray) -> tuple[float, float]:
    """Slope and intercept, by Platt's targets: finite also where scores tell all apart; NaN where all are alike."""
    num_relevant = int(relevant.sum())
    num_rest = len(relevant) - num_relevant
    if not num_relevant or not num_rest:
        return np.nan, np.nan
    targets = np.where(relevant, (num_relevant + 1) / (num_relevant + 2), 1 / (num_rest + 2))
    regression = import_eval("sklearn.linear_model").LogisticRegression(C=np.inf)
    fitted = regression.fit(
        np.tile(_log_odds(scores), 2)[:, None],
        np.repeat([True, False], len(targets)),
        sample_weight=np.concatenate([targets, 1 - targets]),
    )
    return float(fitted.coef_[0, 0]), float(fitted.intercept_[0])


def _of_unseen_queries(scores: np.ndarray, relevant: np.ndarray, queries: np.ndarray, seed: int) -> np.ndarray | None:
    """Probabilities of each pair by a curve that did not see its query; None: there are too few queries or kinds."""
    names, query_of_pair = np.unique(queries, return_inverse=True)
    if len(names) < _NUM_FOLDS:
        return None
    folds = np.random.default_rng(seed).permutation(len(names)) % _NUM_FOLDS
    probabilities = np.empty(len(scores))
    for fold in range(_NUM_FOLDS):
        unseen = folds[query_of_pair] == fold
        slope, intercept = _curve(scores[~unseen], relevant[~unseen])
        if np.isnan(slope):
            return None
        probabilities[unseen] = calibrated_probability(scores[unseen], slope=slope, intercept=intercept)
    return probabilities
