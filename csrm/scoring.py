"""From a frame of pairs to their relevance scores, whatever computes the logits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from csrm.labels import Label, expected_gain
from csrm.packing import Group, PackBatch, build_packs
from csrm.prompts import Product, Query
from csrm.tokenization import PromptTokenizer

PackScorer = Callable[[PackBatch], np.ndarray]
"""Logits of a batch of packs, shape (packs, pairs, labels), any float dtype; rows of absent pairs may hold anything."""

PAIR_COLUMNS = ["market", "language", "query", "retrieved_titles", "title", "brand", "category", "attributes"]
"""What a score depends on, apart from the bundle."""


class PairScorer:
    """Scores pairs: prompts, tokens, packs, logits, expected gain."""

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        labels: Sequence[Label],
        pack_scorer: PackScorer,
        pack_tokens: int,
        packs_per_batch: int = 1,
        digest: str = "",
        provider: str = "",
    ) -> None:
        self.labels = tuple(labels)
        self.digest = digest
        """Digest of the bundle; empty for a model that is not one."""
        self.provider = provider
        """What computes the logits, for example CPUExecutionProvider."""
        self.num_tokens = 0
        """Tokens computed so far, prefixes counted once per pack."""
        self.num_prompt_tokens = 0
        """Tokens of the prompts so far, prefixes counted once per pair."""
        self._tokenizer = tokenizer
        self._pack_scorer = pack_scorer
        self._pack_tokens = pack_tokens
        self._packs_per_batch = packs_per_batch

    def score(self, pairs: pd.DataFrame) -> pd.DataFrame:
        """Score pairs.

        Args:
            pairs: columns PAIR_COLUMNS (retrieved_titles: sequence of str or None; attributes: mapping, sequence of
                (name, value), or None). Pairs of one query share their prefix wherever their rows stand.

        Returns:
            relevance_score (float32, in [0, 1]) and predicted_grade (str), on the index of `pairs`.

        Raises:
            ValueError: a logit is not finite (the message names the row).
        """
        logits = self.logits(pairs)
        gains = np.array([label.gain for label in self.labels])
        names = np.array([label.name for label in self.labels], dtype=object)
        return pd.DataFrame(
            {"relevance_score": expected_gain(logits, gains), "predicted_grade": names[logits.argmax(axis=1)]},
            index=pairs.index,
        )

    def logits(self, pairs: pd.DataFrame) -> np.ndarray:
        """Logits of the label tokens, shape (num_pairs, num_labels), float32, in row order."""
        logits = np.empty((len(pairs), len(self.labels)), dtype=np.float32)
        groups, rows = pair_groups(pairs, self._tokenizer)
        self.num_prompt_tokens += sum(
            len(group.prefix_ids) * len(group.suffixes) + sum(map(len, group.suffixes)) for group in groups
        )
        for batch in build_packs(groups, self._pack_tokens, self._packs_per_batch):
            present = batch.pair_index >= 0
            logits[rows[batch.pair_index[present]]] = self._pack_scorer(batch)[present]
            self.num_tokens += int((batch.group_ids >= 0).sum())
        return logits


def pair_groups(pairs: pd.DataFrame, tokenizer: PromptTokenizer) -> tuple[list[Group], np.ndarray]:
    """Pairs as one group for each distinct query, in order of first appearance.

    Returns:
        The groups, and the row number in `pairs` of each pair in the order of the groups, shape (num_pairs,), int64.
    """
    rows_of_query: dict[Query, list[int]] = {}
    products: list[Product] = []
    for row, (query, product) in enumerate(pair_texts(pairs)):
        rows_of_query.setdefault(query, []).append(row)
        products.append(product)
    suffixes = tokenizer.suffix_ids(products)
    prefixes = tokenizer.prefix_ids(list(rows_of_query))
    groups = [
        Group(prefix_ids, [suffixes[row] for row in rows])
        for prefix_ids, rows in zip(prefixes, rows_of_query.values(), strict=True)
    ]
    return groups, np.array([row for rows in rows_of_query.values() for row in rows], dtype=np.int64)


def pair_texts(pairs: pd.DataFrame) -> Iterator[tuple[Query, Product]]:
    """What the prompt of each row says; see PairScorer.score for the columns."""
    for market, language, query, titles, title, brand, category, attributes in zip(
        *(pairs[column] for column in PAIR_COLUMNS), strict=True
    ):
        yield (
            Query(market, language, _text(query), tuple(titles) if titles is not None else ()),
            Product(_text(title), _text(brand), _text(category), _mapping(attributes)),
        )


def _text(value: Any) -> str | None:
    """pandas marks a missing text as None or as NaN."""
    return value if isinstance(value, str) else None


def _mapping(value: Any) -> Mapping[str, str | None] | None:
    """Arrow gives a map as a list of (key, value)."""
    if value is None or isinstance(value, float):
        return None
    return value if isinstance(value, Mapping) else dict(value)
