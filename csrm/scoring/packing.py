"""Packs: one prefix followed by the suffixes of many products, scored in one forward pass.

    tokens    [prefix of q1][product 1][product 2][prefix of q2][product 3] pad
    group      0 0 0 0 0 0   0 0 0 0    0 0 0      1 1 1 1 1     1 1 1 1    -1
    segment    0 0 0 0 0 0   1 1 1 1    2 2 2      0 0 0 0 0     1 1 1 1     0
    position   0 1 2 3 4 5   6 7 8 9    6 7 8      0 1 2 3 4     5 6 7 8     0

A token attends to itself and to earlier tokens of its own group that are in the prefix or in its own product. So a
pair's score is that of its own prompt alone, and the prefix is computed once.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

PADDING_GROUP = -1


class PackBatch(NamedTuple):
    """Model inputs of one or more packs, padded on the end to the longest; all int64."""

    input_ids: np.ndarray
    """Shape (packs, tokens)."""
    position_ids: np.ndarray
    """Shape (packs, tokens); restart after the prefix for each product."""
    group_ids: np.ndarray
    """Shape (packs, tokens); which prefix of the pack, from 0; PADDING_GROUP for padding."""
    segment_ids: np.ndarray
    """Shape (packs, tokens); 0 in a prefix, from 1 in its products."""
    last_index: np.ndarray
    """Shape (packs, pairs); place of each pair's last token; 0 where a pack has fewer pairs."""
    pair_index: np.ndarray
    """Shape (packs, pairs); the pair's number in the order given, -1 where a pack has fewer. Not a model input."""

    def model_inputs(self) -> dict[str, np.ndarray]:
        return {name: array for name, array in self._asdict().items() if name != "pair_index"}


class Group(NamedTuple):
    """One query's pairs: a prefix and the suffix of each of its products."""

    prefix_ids: Sequence[int]
    suffixes: Sequence[Sequence[int]]


class _Pack:
    """A pack while it is filled: pieces of tokens, each a prefix or a product."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._pieces: list[Sequence[int]] = []
        self._places: list[tuple[int, int, int]] = []
        """Of each piece its first token's position, its group and its segment."""
        self._pair_index: list[int] = []
        self._num_groups = 0

    def add_prefix(self, ids: Sequence[int]) -> None:
        self._add(ids, 0, self._num_groups, 0)
        self._num_groups += 1

    def add_suffix(self, ids: Sequence[int], start: int, segment: int, pair: int) -> None:
        self._add(ids, start, self._num_groups - 1, segment)
        self._pair_index.append(pair)

    def as_batch(self) -> PackBatch:
        lengths = np.array([len(piece) for piece in self._pieces])
        ends = lengths.cumsum()
        starts, groups, segments = np.array(self._places, dtype=np.int64).T
        rows = (
            np.fromiter(chain.from_iterable(self._pieces), dtype=np.int64, count=self.num_tokens),
            np.arange(self.num_tokens) + np.repeat(starts - ends + lengths, lengths),
            np.repeat(groups, lengths),
            np.repeat(segments, lengths),
            ends[segments > 0] - 1,
            np.array(self._pair_index, dtype=np.int64),
        )
        return PackBatch(*(row[np.newaxis] for row in rows))

    def _add(self, ids: Sequence[int], start: int, group: int, segment: int) -> None:
        self._pieces.append(ids)
        self._places.append((start, group, segment))
        self.num_tokens += len(ids)


def build_packs(groups: Sequence[Group], pack_tokens: int, packs_per_batch: int = 1) -> Iterator[PackBatch]:
    """Fill packs in order; a group that does not fit goes on in the next pack, behind its prefix again.

    Args:
        groups: pairs of each query; pairs are numbered from 0 through all groups in this order.
        pack_tokens: most tokens of a pack.
        packs_per_batch: packs of one forward pass.

    Raises:
        ValueError: a prefix with one of its suffixes has more than pack_tokens tokens, or a part is empty.
    """
    packs: list[PackBatch] = []
    for pack in _filled_packs(groups, pack_tokens):
        packs.append(pack.as_batch())
        if len(packs) == packs_per_batch:
            yield merge_packs(packs)
            packs = []
    if packs:
        yield merge_packs(packs)


def merge_packs(packs: Sequence[PackBatch]) -> PackBatch:
    """One batch of several, each padded on the end to the longest."""
    if len(packs) == 1:
        return packs[0]
    fills = (0, 0, PADDING_GROUP, 0, 0, -1)
    return PackBatch(*(_stacked(arrays, fill) for arrays, fill in zip(zip(*packs, strict=True), fills, strict=True)))


def _stacked(arrays: Sequence[np.ndarray], fill: int) -> np.ndarray:
    stacked = np.full((sum(map(len, arrays)), max(array.shape[1] for array in arrays)), fill, dtype=np.int64)
    row = 0
    for array in arrays:
        stacked[row : row + len(array), : array.shape[1]] = array
        row += len(array)
    return stacked


def _filled_packs(groups: Sequence[Group], pack_tokens: int) -> Iterator[_Pack]:
    pack = _Pack()
    pair = 0
    for prefix_ids, suffixes in groups:
        segment = 0
        in_pack = False
        for suffix_ids in suffixes:
            alone = len(prefix_ids) + len(suffix_ids)
            if alone > pack_tokens or not prefix_ids or not suffix_ids:
                raise ValueError(
                    f"pair {pair}: {len(prefix_ids)} prefix and {len(suffix_ids)} suffix tokens; both must be at "
                    f"least 1 and together at most pack_tokens ({pack_tokens})"
                )
            if pack.num_tokens + (len(suffix_ids) if in_pack else alone) > pack_tokens:
                yield pack
                pack, in_pack = _Pack(), False
            if not in_pack:
                pack.add_prefix(prefix_ids)
                in_pack, segment = True, 0
            segment += 1
            pack.add_suffix(suffix_ids, len(prefix_ids), segment, pair)
            pair += 1
    if pack.num_tokens:
        yield pack
