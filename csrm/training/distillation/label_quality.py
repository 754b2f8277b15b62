"""How good labels and those who judge them are: with the truth where it is known, and what can be said without it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from csrm.evaluation.metrics import resample_weights, resampled_pair_metrics

NUM_CALIBRATION_BINS = 10
NUM_RESAMPLES = 200
"""Of the queries: a standard error of them is right to a twentieth of itself."""


@dataclass(frozen=True)
class Bin:
    """Pairs of similar confidence."""

    num_pairs: int
    confidence: float
    """Mean probability of their most probable label."""
    accuracy: float
    """Share of them whose most probable label is the given one."""


@dataclass(frozen=True)
class Calibration:
    """Whether labels of probability 0.8 are the given ones in 80 % of cases."""

    num_pairs: int
    expected_error: float
    """Mean |confidence - accuracy| over the bins, weighted by their pairs (Guo et al. 2017, "On Calibration of Modern
    Neural Networks"). Against labels of which a share is wrong, a perfect model is off by about that share."""
    bins: tuple[Bin, ...]
    """Bins of equal width that have pairs, the least confident first."""


def calibration(probabilities: np.ndarray, given: np.ndarray) -> Calibration:
    """Reliability of the most probable labels.

    Args:
        probabilities, given: shape (num_pairs, num_labels), rows sum to 1; at least one pair.
    """
    confidence = probabilities.max(axis=1)
    is_given = probabilities.argmax(axis=1) == given.argmax(axis=1)
    places = np.minimum(confidence * NUM_CALIBRATION_BINS, NUM_CALIBRATION_BINS - 1).astype(np.int64)
    inside = [places == place for place in np.unique(places)]
    bins = tuple(Bin(int(rows.sum()), float(confidence[rows].mean()), float(is_given[rows].mean())) for rows in inside)
    error = sum(bin_.num_pairs * abs(bin_.confidence - bin_.accuracy) for bin_ in bins) / len(confidence)
    return Calibration(len(confidence), error, bins)


@dataclass(frozen=True)
class Flips:
    """Where other labels differ from the given ones: a label is flipped where the most probable one is another."""

    num_pairs: int
    num_flipped: int
    transitions: tuple[tuple[int, ...], ...]
    """Pairs of each given label (row) and most probable other label (column)."""
    precision: float | None = None
    """Of the flipped labels whose truth is known: the share that was wrong. None: no truth is known, or no flips."""
    repaired: float | None = None
    """Of the given labels that are known to be wrong: the share that is right in the others. None: there are none."""
    wrong_share: float | None = None
    """Of the given labels whose truth is known: the share that is wrong, the precision of as many flips at random."""

    @property
    def share(self) -> float:
        """Of all given labels."""
        return self.num_flipped / self.num_pairs


def count_flips(given: np.ndarray, others: np.ndarray, true_labels: np.ndarray | None = None) -> Flips:
    """Compare given labels with others, what teachers think or the soft labels.

    Args:
        given, others: shape (num_pairs, num_labels).
        true_labels: number of each pair's right label, -1 where it is not known, shape (num_pairs,).
    """
    num_labels = given.shape[1]
    before, after = given.argmax(axis=1), others.argmax(axis=1)
    transitions = np.bincount(before * num_labels + after, minlength=num_labels**2).reshape(num_labels, num_labels)
    flipped = before != after
    precision = repaired = wrong_share = None
    if true_labels is not None:
        known = true_labels >= 0
        wrong = known & (before != true_labels)
        precision = float(wrong[known & flipped].mean()) if (known & flipped).any() else None
        repaired = float((after == true_labels)[wrong].mean()) if wrong.any() else None
        wrong_share = float(wrong[known].mean()) if known.any() else None
    return Flips(
        len(given),
        int(flipped.sum()),
        tuple(map(tuple, transitions.tolist())),
        precision=precision,
        repaired=repaired,
        wrong_share=wrong_share,
    )


def fold_agreement(
    scores: Sequence[np.ndarray], relevant: Sequence[np.ndarray], queries: Sequence[np.ndarray]
) -> np.ndarray:
    """How well teachers rank the given labels of the fold that each did not see: mean ROC-AUC, weighted by pairs.

    The labels are noisy, but where the noise does not depend on the text, the AUC against them is 0.5 plus a constant
    times (the AUC against the true ones - 0.5), and orders models alike (Menon et al. 2015, "Learning from Corrupted
    Binary Labels via Class-Probability Estimation"). One AUC for each fold: two models' scores are not on one scale.

    Args:
        scores: of each fold's pairs, by the teacher that did not see them.
        relevant: whether their given label is the most relevant one.
        queries: of each fold's pairs.

    Returns:
        Shape (1 + NUM_RESAMPLES,), in [0, 1]: of all queries, then of each resample of them, the same ones for the same
        queries; NaN where no fold has both kinds.
    """
    folds = [fold for fold in zip(scores, relevant, queries, strict=True) if 0 < fold[1].sum() < len(fold[1])]
    if not folds:
        return np.full(1 + NUM_RESAMPLES, np.nan)
    return np.average([resampled_auc(*fold) for fold in folds], axis=0, weights=[len(fold[1]) for fold in folds])


def resampled_auc(
    scores: np.ndarray, relevant: np.ndarray, queries: np.ndarray, num_resamples: int = NUM_RESAMPLES
) -> np.ndarray:
    """ROC-AUC of pairs.

    Args:
        scores: shape (num_pairs,).
        relevant: whether each pair is relevant, shape (num_pairs,), bool.
        queries: of each pair, shape (num_pairs,).

    Returns:
        Shape (1 + num_resamples,), in [0, 1]: of all queries, then of each resample of them, the same ones for the same
        queries; NaN where all or no pairs are relevant.
    """
    names, query_of_pair = np.unique(queries, return_inverse=True)
    weights = resample_weights(len(names), num_resamples, seed=0)
    weights = np.vstack([np.ones_like(weights[:1]), weights])
    return resampled_pair_metrics(relevant, scores, query_of_pair, weights)[:, 0]
