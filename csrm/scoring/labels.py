"""Labels of a model: the tokens it answers with, the grade each stands for, and the gain of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import ConfigDict

from csrm.errors import ConfigError


@dataclass(frozen=True)
class Label:
    """One answer of the model.

    >>> Label(name="yes", token=" yes", gain=1.0)
    Label(name='yes', token=' yes', gain=1.0)

    Raises:
        ConfigError: the gain is not in [0, 1].
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    """Grade that a reader of the scores sees, for example yes, or E."""
    token: str
    """Text of the answer after the cue, with its leading space; exactly one token of the tokenizer."""
    gain: float
    """Relevance of the answer, in [0, 1]."""

    def __post_init__(self) -> None:
        if not 0 <= self.gain <= 1:
            raise ConfigError(f"label {self.name!r}: its gain is {self.gain}, expected 0 to 1.")


BINARY_LABELS = (Label("no", " no", 0.0), Label("yes", " yes", 1.0))
"""Relevant or not."""
ESCI_LABELS = (
    Label("I", " no", 0.0),
    Label("C", " goes", 0.01),
    Label("S", " similar", 0.1),
    Label("E", " yes", 1.0),
)
"""Exact, substitute, complement, irrelevant, with the gains of Reddy et al. 2022 (arXiv:2206.06588).

The answers are words that large vocabularies hold as one token; a model may bring others.
"""


def check_labels(labels: Sequence[Label]) -> None:
    """Refuse labels by which no two pairs could have different scores, or grades.

    Raises:
        ValueError: there are not two, two have one name, or all have one gain.

    >>> check_labels(ESCI_LABELS)
    """
    names = [label.name for label in labels]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"labels: expected at least two of different names, got {names}")
    if len({label.gain for label in labels}) == 1:
        raise ValueError(
            f"labels: all have the gain {labels[0].gain:g}, so every pair would have this score; give the most "
            "relevant one the largest gain"
        )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of labels from their logits, shape (num_pairs, num_labels), float64; each row's sum is 1.

    >>> softmax(np.log([[0.2, 0.8]])).round(3).tolist()
    [[0.2, 0.8]]
    """
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probabilities: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    return probabilities


def expected_gain(logits: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Relevance scores of pairs from the logits of their label tokens.

    Args:
        logits: shape (num_pairs, num_labels), any float dtype, finite.
        gains: gain of each label in [0, 1], shape (num_labels,), in the order of the logits.

    Returns:
        Expected gain under the softmax over labels, shape (num_pairs,), float32, in [0, 1].

    Raises:
        ValueError: shapes do not agree, or a logit is not finite (the message names the first such row).

    >>> logits = np.log([[0.2, 0.8], [0.5, 0.5]])
    >>> expected_gain(logits, gains=np.array([0.0, 1.0]))
    array([0.8, 0.5], dtype=float32)
    """
    if logits.ndim != 2 or logits.shape[1] != len(gains):
        raise ValueError(f"logits: expected shape (num_pairs, {len(gains)}), got {logits.shape}")
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ValueError(f"logits: row {row} is not finite: {logits[row].tolist()}")
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    scores = (weights @ np.asarray(gains, dtype=np.float64)) / weights.sum(axis=1)
    return np.clip(scores, 0.0, 1.0).astype(np.float32)
