"""What an encoder adds to a score: label probabilities by the score's log-odds and the cosine of query and title."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np

from csrm.scoring.labels import Label, expected_gain

MOST_VECTORS = 50_000
"""Vectors of titles, and of queries, that are kept, those used last: 77 MB of 384 dimensions. A product comes with many
queries of a task."""
_LEAST = 1e-30
"""Probability below which its logarithm falls no more."""
_END = 1e-4
Embed = Callable[[Sequence[str], Literal["query", "passage"]], np.ndarray]
"""Vectors of texts, shape (texts, dimensions)."""


@dataclass(frozen=True)
class LabelMap:
    """P(label number >= k) = logistic(slopes @ features - thresholds[k - 1]); labels stand least relevant first.

    McCullagh 1980, "Regression Models for Ordinal Data".

    >>> LabelMap(np.array([0.0, 2.0]), np.array([1.0])).probabilities(np.array([[0.0, 0.5], [3.0, -4.5]])).round(2)
    array([[0.5, 0.5],
           [1. , 0. ]])
    """

    slopes: np.ndarray
    """Shape (features,), none below 0: a higher score never makes a better label less probable."""
    thresholds: np.ndarray
    """Shape (num_labels - 1,), ascending."""

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Label probabilities of pairs, shape (num_pairs, num_labels).

        Args:
            features: shape (num_pairs, features).
        """
        values = (features @ self.slopes)[:, None] - self.thresholds
        reached = (1 + np.tanh(values / 2)) / 2  # the logistic function, for values of any size
        ends = np.ones((len(features), 1)), np.zeros((len(features), 1))
        return -np.diff(np.hstack([ends[0], reached, ends[1]]), axis=1)


class Similarity:
    """The vote of an encoder in the scores of a model: label probabilities by the score's log-odds and the cosine.

    >>> def embed(texts, kind):
    ...     return np.array([[len(text), 1.0] for text in texts])
    >>> labels = Label("no", " no", 0.0), Label("yes", " yes", 1.0)
    >>> vote = Similarity(embed, LabelMap(np.array([1.0, 4.0]), np.array([3.0])), labels)
    >>> np.exp(vote.mixed(np.array([[0.0, 0.0]]), ["mouse"], ["mouse"])).astype(float).round(2).tolist()
    [[0.27, 0.73]]
    """

    def __init__(self, embed: Embed, label_map: LabelMap, labels: Sequence[Label]) -> None:
        """Make one.

        Args:
            embed: the encoder.
            label_map: of two features, those of `vote_features`.
            labels: of the model.
        """
        self._embed, self._map, self._gains = embed, label_map, np.array([label.gain for label in labels])
        self._known: dict[str, dict[str, np.ndarray]] = {"query": {}, "passage": {}}
        self._first_text: str | None = None

    def mixed(self, logits: np.ndarray, queries: Sequence[str], titles: Sequence[str]) -> np.ndarray:
        """Logits of the labels by model and encoder together, shape (num_pairs, num_labels), float32.

        Args:
            logits: of the model, shape (num_pairs, num_labels).
            queries: of each pair.
            titles: of each pair.
        """
        if not len(logits):
            return logits
        cosines = cosine(self._vectors(queries, "query"), self._vectors(titles, "passage"))
        features = vote_features(expected_gain(logits, self._gains), cosines)
        found = np.empty(logits.shape, np.float32)
        probabilities = self._map.probabilities(features)
        found[:, np.argsort(self._gains, kind="stable")] = np.log(np.maximum(probabilities, _LEAST))
        return found

    def is_healthy(self) -> bool:
        """Whether the encoder still embeds the first text that it could embed; False where there is none."""
        try:
            return self._first_text is not None and bool(np.isfinite(self._embed([self._first_text], "query")).all())
        except Exception:  # onnxruntime's errors have no common base
            return False

    def forget(self) -> None:
        """Drop the vectors that are kept."""
        for known in self._known.values():
            known.clear()

    def _vectors(self, texts: Sequence[str], kind: Literal["query", "passage"]) -> np.ndarray:
        known = self._known[kind]
        new = []
        for text in dict.fromkeys(texts):
            if text in known:
                known[text] = known.pop(text)  # to the end: the last to be dropped
            else:
                new.append(text)
        if new:
            known.update(zip(new, self._embed(new, kind), strict=True))
            self._first_text = new[0] if self._first_text is None else self._first_text
        vectors = np.stack([known[text] for text in texts])
        for text in [*islice(known, max(0, len(known) - MOST_VECTORS))]:
            del known[text]
        return vectors


def vote_features(scores: np.ndarray, cosines: np.ndarray) -> np.ndarray:
    """Log-odds of a model's scores, and cosines, shape (num_pairs, 2).

    Args:
        scores: in [0, 1], shape (num_pairs,); nearer to an end than 1e-4 they count as if that far.
        cosines: shape (num_pairs,).

    >>> vote_features(np.array([0.5, 1.0]), np.array([0.8, 0.9])).round(2).tolist()
    [[0.0, 0.8], [9.21, 0.9]]
    """
    inside = np.clip(scores.astype(np.float64), _END, 1 - _END)
    return np.stack([np.log(inside / (1 - inside)), cosines], axis=1)


def cosine(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Cosine of each two vectors in the same row, float64; -1 where one has no length.

    >>> cosine(np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([[2.0, 0.0], [1.0, 0.0]]))
    array([ 1., -1.])
    """
    a, b = vectors.astype(np.float64), others.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    products = np.einsum("ij,ij->i", a, b)
    return np.divide(products, lengths, out=np.full(len(a), -1.0), where=lengths > 0)
