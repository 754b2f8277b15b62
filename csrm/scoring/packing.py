"""Packs: prefixes, each with the suffixes of its products, in one row of tokens that one forward pass scores.

    tokens    [prefix of q1][prefix of q2][product 1 of q1][product 2 of q1][product 3, of q2]
    position   0 1 2 3 4 5   0 1 2         6 7 8 9          6 7 8            3 4 5

A token attends to itself and to earlier tokens of its own prefix and its own product. So a pair's score is that of its
own prompt alone, and a prefix is computed once for all its products. Nothing is padded but the indexes, by which
attention alone reads the row: groups to their prefixes, and products to themselves.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

PADDING = -1
"""Ends a row of an index that is shorter than the longest one."""


class Pack(NamedTuple):
    """Model inputs of one forward pass, all int64. Tokens stand in one row: all prefixes, then all products."""

    input_ids: np.ndarray
    """Shape (tokens,)."""
    position_ids: np.ndarray
    """Shape (tokens,); those of a product follow its prefix."""
    group_index: np.ndarray
    """Shape (groups, most tokens of a group); places in the row of a group's tokens: prefix, then products."""
    prefix_index: np.ndarray
    """Shape (groups, most tokens of a prefix); places of a prefix's tokens."""
    product_index: np.ndarray
    """Shape (products, most tokens of a product); places of a product's tokens."""
    group_place: np.ndarray
    """Shape (tokens,); where each token of the row is in group_index, counted through its rows."""
    product_place: np.ndarray
    """Shape (tokens of products,); where each of the last tokens of the row is in product_index."""
    last_index: np.ndarray
    """Shape (products,); place in the row of each product's last token, in the order of the groups' suffixes."""


class Group(NamedTuple):
    """One query's pairs: a prefix and the suffix of each of its products."""

    prefix_ids: Sequence[int]
    suffixes: Sequence[Sequence[int]]

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix and of all suffixes."""
        return len(self.prefix_ids) + sum(map(len, self.suffixes))


def lay_out(groups: Sequence[Group]) -> Pack:
    """One pack of groups, each with at least one suffix.

    >>> pack = lay_out([Group([1, 2, 3], [[4, 5], [6]])])
    >>> pack.input_ids.tolist(), pack.position_ids.tolist(), pack.last_index.tolist()
    ([1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 3], [4, 5])
    """
    pieces = [*(group.prefix_ids for group in groups), *chain.from_iterable(group.suffixes for group in groups)]
    num_groups = len(groups)
    lengths = np.array([len(piece) for piece in pieces])
    ends = lengths.cumsum()
    starts = ends - lengths
    num_tokens = int(ends[-1])
    products = np.array([len(group.suffixes) for group in groups])
    group_of_product = np.repeat(np.arange(num_groups), products)
    prefix_lengths = lengths[:num_groups]
    offsets = np.concatenate([np.zeros(num_groups, dtype=np.int64), prefix_lengths[group_of_product]])
    prefix_index = _index(starts[:num_groups], prefix_lengths)
    product_index = _index(starts[num_groups:], lengths[num_groups:])
    own_lengths = np.bincount(group_of_product, lengths[num_groups:], num_groups).astype(np.int64)
    group_index = _index(starts[:num_groups], prefix_lengths + own_lengths)
    jumps = starts[num_groups:][np.cumsum(products) - products] - ends[:num_groups]
    is_product = np.arange(group_index.shape[1]) >= prefix_lengths[:, None]
    group_index = np.where((group_index >= 0) & is_product, group_index + jumps[:, None], group_index)
    group_place = np.empty(num_tokens, dtype=np.int64)
    places = np.flatnonzero(group_index >= 0)
    group_place[group_index.ravel()[places]] = places
    return Pack(
        input_ids=np.fromiter(chain.from_iterable(pieces), dtype=np.int64, count=num_tokens),
        position_ids=np.arange(num_tokens) + np.repeat(offsets - starts, lengths),
        group_index=group_index,
        prefix_index=prefix_index,
        product_index=product_index,
        group_place=group_place,
        product_place=np.flatnonzero(product_index >= 0),
        last_index=ends[num_groups:] - 1,
    )


def build_packs(groups: Sequence[Group], pack_tokens: int, *, most_places: int | None = None) -> Iterator[Pack]:
    """Packs of groups in their order, see split_groups."""
    return map(lay_out, split_groups(groups, pack_tokens, most_places=most_places))


def split_groups(groups: Sequence[Group], pack_tokens: int, *, most_places: int | None = None) -> Iterator[list[Group]]:
    """The groups of each pack, in order. Pairs stay in order too, and none is left out.

    A group that fits a pack stays whole. A longer one goes on in the next pack, behind its prefix again.

    Args:
        groups: pairs of each query; one without pairs is left out.
        pack_tokens: most tokens of a pack.
        most_places: most places of the group_index of a pack with several groups, padding among them: what attention
            computes and holds is in proportion to it. None: any number.

    Raises:
        ValueError: a prefix with one of its suffixes has more than pack_tokens tokens, or a part is empty.

    >>> [[len(group.suffixes) for group in part] for part in split_groups([Group([1, 2], [[3], [4], [5]])], 4)]
    [[2], [1]]
    """
    pack: list[Group] = []
    room = pack_tokens
    longest = 0
    num_pairs = 0
    for group in groups:
        for suffix_ids in group.suffixes:
            alone = len(group.prefix_ids) + len(suffix_ids)
            if alone > pack_tokens or not group.prefix_ids or not suffix_ids:
                raise ValueError(
                    f"pair {num_pairs}: {len(group.prefix_ids)} prefix and {len(suffix_ids)} suffix tokens; both must "
                    f"be at least 1 and together at most pack_tokens ({pack_tokens})"
                )
            num_pairs += 1
        for part in _parts(group, pack_tokens):
            num_tokens = part.num_tokens
            num_places = (len(pack) + 1) * max(longest, num_tokens)
            if pack and (num_tokens > room or (most_places is not None and num_places > most_places)):
                yield pack
                pack, room, longest = [], pack_tokens, 0
            pack.append(part)
            room -= num_tokens
            longest = max(longest, num_tokens)
    if pack:
        yield pack


def _parts(group: Group, pack_tokens: int) -> Iterator[Group]:
    """The group, in so many parts that each fits a pack."""
    suffixes: list[Sequence[int]] = []
    num_tokens = len(group.prefix_ids)
    for suffix_ids in group.suffixes:
        if num_tokens + len(suffix_ids) > pack_tokens:
            yield Group(group.prefix_ids, suffixes)
            suffixes, num_tokens = [], len(group.prefix_ids)
        suffixes.append(suffix_ids)
        num_tokens += len(suffix_ids)
    if suffixes:
        yield Group(group.prefix_ids, suffixes)


def _index(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Rows of so many places from each start; PADDING on their ends."""
    steps = np.arange(lengths.max())
    return np.where(steps < lengths[:, None], starts[:, None] + steps, PADDING)
