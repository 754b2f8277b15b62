import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from csrm.scoring.packing import PADDING, Group, build_packs, lay_out, split_groups

ids = st.lists(st.integers(1, 99), min_size=1, max_size=6)
groups_strategy = st.lists(st.builds(Group, ids, st.lists(ids, max_size=5)), max_size=6)


def test_a_pack_worked_by_hand() -> None:
    pack = lay_out([Group([1, 2, 3], [[4, 5], [6]]), Group([7, 8], [[9]])])
    np.testing.assert_array_equal(pack.input_ids, [1, 2, 3, 7, 8, 4, 5, 6, 9])
    np.testing.assert_array_equal(pack.position_ids, [0, 1, 2, 0, 1, 3, 4, 3, 2])
    np.testing.assert_array_equal(pack.group_index, [[0, 1, 2, 5, 6, 7], [3, 4, 8, PADDING, PADDING, PADDING]])
    np.testing.assert_array_equal(pack.prefix_index, [[0, 1, 2], [3, 4, PADDING]])
    np.testing.assert_array_equal(pack.product_index, [[5, 6], [7, PADDING], [8, PADDING]])
    np.testing.assert_array_equal(pack.group_place, [0, 1, 2, 6, 7, 3, 4, 5, 8])
    np.testing.assert_array_equal(pack.product_place, [0, 1, 2, 4])
    np.testing.assert_array_equal(pack.last_index, [6, 7, 8])
    assert {array.dtype for array in pack} == {np.dtype(np.int64)}


def test_a_group_longer_than_a_pack_goes_on_behind_its_prefix() -> None:
    parts = list(split_groups([Group([1, 2], [[3], [4], [5]])], pack_tokens=4))
    assert parts == [[Group([1, 2], [[3], [4]])], [Group([1, 2], [[5]])]]


def test_a_group_that_fits_a_pack_stays_whole() -> None:
    groups = [Group([1], [[2]]), Group([1], [[3], [4], [5]]), Group([1], [[6]])]
    assert list(split_groups(groups, pack_tokens=5)) == [groups[:1], groups[1:2], groups[2:]]
    assert list(split_groups(groups, pack_tokens=6)) == [groups[:2], groups[2:]]
    assert list(split_groups(groups, pack_tokens=8)) == [groups]


@given(groups_strategy, st.integers(12, 40))
def test_every_pair_is_in_one_pack_with_its_own_prefix_in_order(groups: list[Group], pack_tokens: int) -> None:
    """What attention reads by the indexes, and nothing else, is the prompt of each pair."""
    expected = [([*group.prefix_ids, *suffix], [*suffix]) for group in groups for suffix in group.suffixes]
    found = []
    for pack in build_packs(groups, pack_tokens):
        assert len(pack.input_ids) <= pack_tokens
        group_of = np.full(len(pack.input_ids), -1)
        for number, row in enumerate(pack.group_index):
            group_of[row[row >= 0]] = number
        np.testing.assert_array_equal(pack.group_index.ravel()[pack.group_place], np.arange(len(pack.input_ids)))
        own_tokens = pack.product_index.ravel()[pack.product_place]
        np.testing.assert_array_equal(own_tokens, np.arange(len(pack.input_ids))[-len(own_tokens) :])
        for row, last in zip(pack.product_index, pack.last_index, strict=True):
            own = row[row >= 0]
            assert own[-1] == last
            (group,) = set(group_of[own].tolist())
            prefix = pack.prefix_index[group]
            places = np.concatenate([prefix[prefix >= 0], own])
            assert pack.position_ids[places].tolist() == list(range(len(places)))
            found.append((pack.input_ids[places].tolist(), pack.input_ids[own].tolist()))
    assert found == expected


def test_a_pack_ends_before_its_index_has_too_many_places() -> None:
    short, long = Group([1], [[2]]), Group([1], [[2]] * 9)
    assert list(split_groups([short, short, long], 100, most_places=29)) == [[short, short], [long]]
    assert list(split_groups([short, short, long], 100, most_places=30)) == [[short, short, long]]
    assert list(split_groups([long, short], 100, most_places=1)) == [[long], [short]]  # a group alone is never refused


def test_a_pair_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="pair 1: 2 prefix and 4 suffix tokens"):
        list(build_packs([Group([1, 2], [[3], [4, 5, 6, 7]])], pack_tokens=5))
