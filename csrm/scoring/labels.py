"""Labels of a model: the tokens it answers with, the grade each stands for, and the gain of each."""

from collections.abc import Mapping, Sequence
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


GradeCosts = Mapping[str, Mapping[str, float]]
"""What a pair's true label and another predicted grade cost: {"I": {"E": 10}} for an irrelevant product shown as exact.

A mistake that is not named costs 1, a right grade 0.
"""


def cost_matrix(labels: Sequence[Label], costs: GradeCosts) -> np.ndarray:
    """What each label that a pair has and each grade that is predicted cost.

    Args:
        labels: of the model.
        costs: at least 0, of names of labels.

    Returns:
        Shape (num_labels, num_labels), float64: a row is the label, a column the grade.

    Raises:
        ConfigError: a name is no label, a cost is below 0 or no number, or a right grade costs something.

    >>> cost_matrix(BINARY_LABELS, {"no": {"yes": 5}}).tolist()
    [[0.0, 5.0], [1.0, 0.0]]
    """
    names = [label.name for label in labels]
    matrix = 1.0 - np.eye(len(names))
    for label, row in costs.items():
        for grade, cost in row.items():
            if unknown := sorted({label, grade} - {*names}):
                raise ConfigError(f"grade_costs: {unknown} are no labels of the model; it has {names}.")
            if not 0 <= cost < np.inf or (label == grade and cost):
                expected = "0, for the grade is right" if label == grade else "a number from 0"
                raise ConfigError(f"grade_costs: {label} graded as {grade}: expected {expected}, got {cost}.")
            matrix[names.index(label), names.index(grade)] = cost
    return matrix


def least_cost(logits: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Places of the grades whose expected cost is least, shape (num_pairs,); of equal ones the first.

    Args:
        logits: shape (num_pairs, num_labels), finite.
        costs: as of cost_matrix.

    >>> least_cost(np.log([[0.3, 0.7], [0.1, 0.9]]), np.array([[0.0, 5.0], [1.0, 0.0]])).tolist()
    [0, 1]
    """
    places: np.ndarray = (softmax(logits) @ costs).argmin(axis=1)
    return places


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
