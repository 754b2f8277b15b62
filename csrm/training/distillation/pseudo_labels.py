"""Pseudo-labels: pairs of a market without labels, judged by teachers, each with a weight for how far to trust it."""

from typing import Literal

import numpy as np
from pydantic import Field
from scipy.stats import entropy

from csrm.config import Markets, Settings
from csrm.training.data.judged import UnlabelledInputs


class UnlabelledPairs(Settings):
    """Pairs that nobody judged, usually of the target market: its queries with the best products by BM25."""

    inputs: UnlabelledInputs
    markets: Markets
    """Markets to take, each with the language of its text."""
    pairs_per_query: int = Field(default=8, ge=1)
    """Candidates of each query that are judged, drawn at random; neighbouring ranks teach the same."""
    weight: float = Field(default=0.5, gt=0)
    """Weight of a pair whose label is certain, beside 1 for a given label: no person stands behind it."""
    confidence: Literal["entropy", "max_probability", "none"] = "entropy"
    """How the weight falls with doubt. entropy: 1 - entropy / log(labels), which counts doubt between any of the labels
    (Iscen et al. 2019, "Label Propagation for Deep Semi-supervised Learning"); max_probability: the largest
    probability, stretched so that equal ones give 0; none: it does not fall."""
    class_balanced: bool = True
    """Weight labels so that each has the same share of all pseudo-labels as of the given ones. Without it, the label
    that teachers prefer grows from round to round."""
    max_class_weight: float = Field(default=4.0, ge=1)
    """Largest factor of a label: a few doubtful pairs of a label that is rare here cannot make up for all it lacks."""


def pseudo_label_weights(probabilities: np.ndarray, given_shares: np.ndarray, settings: UnlabelledPairs) -> np.ndarray:
    """Weight of each pseudo-labelled pair: settings.weight x confidence x factor of its most probable label.

    Args:
        probabilities: of the teachers, shape (num_pairs, num_labels), rows sum to 1.
        given_shares: of each label among the given labels, shape (num_labels,).

    Returns:
        Shape (num_pairs,), float32, 0 or more.
    """
    num_labels = len(given_shares)
    if settings.confidence == "entropy":
        weights = 1 - entropy(probabilities, axis=1) / np.log(num_labels)
    elif settings.confidence == "max_probability":
        weights = (probabilities.max(axis=1) * num_labels - 1) / (num_labels - 1)
    else:
        weights = np.ones(len(probabilities))
    weights = weights.clip(0, 1)
    if settings.class_balanced:
        label = probabilities.argmax(axis=1)
        totals = np.bincount(label, weights=weights, minlength=num_labels)
        factors = np.divide(given_shares * totals.sum(), totals, out=np.ones(num_labels), where=totals > 0)
        weights *= factors.clip(max=settings.max_class_weight)[label]
    return (settings.weight * weights).astype(np.float32)
