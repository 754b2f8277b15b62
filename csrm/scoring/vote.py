"""What votes in a score beside the model: words that the product names, and an encoder's cosine of query and title."""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Literal, get_args

import numpy as np

from csrm.scoring.labels import Label, expected_gain
from csrm.scoring.prompts import MOST_CHARACTERS, Product, Query, neutralize
from csrm.text import search_terms

Voter = Literal["model", "words", "encoder"]
VOTERS: tuple[Voter, ...] = get_args(Voter)
"""In the order of their features."""
PairTexts = tuple[Query, Product]
MOST_VECTORS = 50_000
"""Vectors of titles, and of queries, that are kept, those used last: 77 MB of 384 dimensions. A product comes with many
queries of a task."""
_LEAST = 1e-30
"""Probability below which its logarithm falls no more."""
_END = 1e-4
_LATIN = "LATIN"
_SHARED = frozenset({"MODIFIER", "IDEOGRAPHIC"})
"""First words in names of letters that several scripts share, such as the Japanese iteration mark."""
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


class Voters:
    """What votes in a score beside the model: the words of query and product, an encoder, or both.

    >>> pair = Query("us", "en", "red mug"), Product("Mug, 0.3 l", attributes={"color": "blue"})
    >>> Voters(counts_words=True).features(np.array([0.5]), [pair]).tolist()
    [[0.0, 0.5]]
    """

    def __init__(self, *, counts_words: bool = False, embed: Embed | None = None) -> None:
        """Make them.

        Args:
            counts_words: whether `named_share` votes.
            embed: an encoder, whose cosine of query and title votes; None: there is none.
        """
        self._counts_words, self._embed = counts_words, embed
        self._known: dict[str, dict[str, np.ndarray]] = {"query": {}, "passage": {}}
        self._first_text: str | None = None

    @property
    def names(self) -> tuple[Voter, ...]:
        """Of the features, in their order; the model is the first."""
        votes = {"model": True, "words": self._counts_words, "encoder": self._embed is not None}
        return tuple(name for name in VOTERS if votes[name])

    def features(self, scores: np.ndarray, texts: Sequence[PairTexts]) -> np.ndarray:
        """Log-odds of the model's scores and what the others say, shape (num_pairs, num_voters), float64.

        Args:
            scores: of the model, in [0, 1], shape (num_pairs,); nearer to an end than 1e-4 they count as if that far.
            texts: query and product of each pair.
        """
        if not len(texts):
            return np.empty((0, len(self.names)))
        inside = np.clip(scores.astype(np.float64), _END, 1 - _END)
        columns = [np.log(inside / (1 - inside))]
        if self._counts_words:
            asked = {text: _asked(text) for text in {query.query for query, _ in texts}}
            columns.append(np.array([_share(asked[query.query], product) for query, product in texts], np.float64))
        if self._embed is not None:
            queries = self._vectors(self._embed, [neutralize(query.query) for query, _ in texts], "query")
            titles = self._vectors(self._embed, [neutralize(product.title) for _, product in texts], "passage")
            columns.append(cosine(queries, titles))
        return np.stack(columns, axis=1)

    def is_healthy(self) -> bool:
        """Whether the encoder still embeds the first text that it could embed; False where it could embed none."""
        if self._embed is None:
            return True
        try:
            return self._first_text is not None and bool(np.isfinite(self._embed([self._first_text], "query")).all())
        except Exception:  # onnxruntime's errors have no common base
            return False

    def forget(self) -> None:
        """Drop the vectors that are kept."""
        for known in self._known.values():
            known.clear()

    def _vectors(self, embed: Embed, texts: Sequence[str], kind: Literal["query", "passage"]) -> np.ndarray:
        known = self._known[kind]
        new = []
        for text in dict.fromkeys(texts):
            if text in known:
                known[text] = known.pop(text)  # to the end: the last to be dropped
            else:
                new.append(text)
        if new:
            known.update(zip(new, embed(new, kind), strict=True))
            self._first_text = new[0] if self._first_text is None else self._first_text
        vectors = np.stack([known[text] for text in texts])
        for text in [*islice(known, max(0, len(known) - MOST_VECTORS))]:
            del known[text]
        return vectors


class Vote:
    """The scores of a model and what votes beside it, as label probabilities.

    >>> labels = Label("no", " no", 0.0), Label("yes", " yes", 1.0)
    >>> vote = Vote(Voters(counts_words=True), LabelMap(np.array([1.0, 4.0]), np.array([3.0])), labels)
    >>> pair = Query("us", "en", "mouse"), Product("Silent Mouse")
    >>> np.exp(vote.mixed(np.array([[0.0, 0.0]]), [pair])).astype(float).round(2).tolist()
    [[0.27, 0.73]]
    """

    def __init__(self, voters: Voters, label_map: LabelMap, labels: Sequence[Label]) -> None:
        """Make one.

        Args:
            voters: beside the model.
            label_map: of their features.
            labels: of the model.
        """
        self.voters = voters
        self._map, self._gains = label_map, np.array([label.gain for label in labels])

    def mixed(self, logits: np.ndarray, texts: Sequence[PairTexts]) -> np.ndarray:
        """Logits of the labels by all together, shape (num_pairs, num_labels), float32.

        Args:
            logits: of the model, shape (num_pairs, num_labels).
            texts: query and product of each pair.
        """
        if not len(logits):
            return logits
        found = np.empty(logits.shape, np.float32)
        probabilities = self._map.probabilities(self.voters.features(expected_gain(logits, self._gains), texts))
        found[:, np.argsort(self._gains, kind="stable")] = np.log(np.maximum(probabilities, _LEAST))
        return found


def named_share(query: str | None, product: Product) -> float:
    """Share of the query's different terms that the product's text has, in [0, 1].

    Terms are those of `csrm.text.search_terms`; the text is title, brand, category and attribute values, as BM25 reads
    them, of which MOST_CHARACTERS count. A term that cannot be compared counts as half: one in a script that the text
    has no letter of, and one in Latin letters where the text has another script that the query lacks. A Korean title
    with a size in cm or a brand in Latin letters says nothing of an English word.

    >>> product = Product("Mug, 0.3 l", brand="Arkenby", attributes={"color": "blue"})
    >>> named_share("blue mug", product), named_share("red mug", product), named_share("\u8336\u676f", product)
    (1.0, 0.5, 0.5)
    """
    return _share(_asked(query), product)


def _asked(query: str | None) -> Mapping[str, frozenset[str]]:
    """A query's different terms with the scripts of their letters."""
    return {term: _scripts(term) for term in search_terms((query or "")[:MOST_CHARACTERS])}


def _share(asked: Mapping[str, frozenset[str]], product: Product) -> float:
    """`named_share` of a query's terms."""
    if not asked:
        return 0.5
    named = set(search_terms(_text(product)))
    scripts = _scripts("".join(named))
    others = scripts - {_LATIN}
    if others and not others & frozenset().union(*asked.values()):
        scripts = others
    return sum(1.0 if term in named else 0.0 if own <= scripts else 0.5 for term, own in asked.items()) / len(asked)


def _text(product: Product) -> str:
    """What BM25 reads of a product, attribute values by the names' order: maps have none."""
    attributes = product.attributes or {}
    parts = (product.title, product.brand, product.category, *(attributes[name] for name in sorted(attributes)))
    text, room = [], MOST_CHARACTERS
    for part in parts:
        if part and room > 0:
            text.append(part[:room])
            room -= len(part)
    return " ".join(text)


def _scripts(text: str) -> frozenset[str]:
    return frozenset(_script(character) for character in set(text) if character.isalpha()) - _SHARED


@cache
def _script(letter: str) -> str:
    """First word of the letter's name in Unicode: LATIN, CYRILLIC, CJK, HANGUL, HIRAGANA."""
    return re.split("[ -]", unicodedata.name(letter, ""), maxsplit=1)[0]


def cosine(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Cosine of each two vectors in the same row, float64; -1 where one has no length.

    >>> cosine(np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([[2.0, 0.0], [1.0, 0.0]]))
    array([ 1., -1.])
    """
    a, b = vectors.astype(np.float64), others.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    products = np.einsum("ij,ij->i", a, b)
    return np.divide(products, lengths, out=np.full(len(a), -1.0), where=lengths > 0)
