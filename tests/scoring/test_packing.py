import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from csrm.scoring.packing import PADDING_GROUP, Group, build_packs

ids = st.lists(st.integers(1, 99), min_size=1, max_size=6)
groups_strategy = st.lists(st.builds(Group, ids, st.lists(ids, max_size=5)), max_size=6)


def test_a_pack_worked_by_hand() -> None:
    groups = [Group([1, 2, 3], [[4, 5], [6]]), Group([7, 8], [[9]])]
    (batch,) = build_packs(groups, pack_tokens=9)
    np.testing.assert_array_equal(batch.input_ids, [[1, 2, 3, 4, 5, 6, 7, 8, 9]])
    np.testing.assert_array_equal(batch.position_ids, [[0, 1, 2, 3, 4, 3, 0, 1, 2]])
    np.testing.assert_array_equal(batch.group_ids, [[0, 0, 0, 0, 0, 0, 1, 1, 1]])
    np.testing.assert_array_equal(batch.segment_ids, [[0, 0, 0, 1, 1, 2, 0, 0, 1]])
    np.testing.assert_array_equal(batch.last_index, [[4, 5, 8]])
    np.testing.assert_array_equal(batch.pair_index, [[0, 1, 2]])


def test_a_group_that_does_not_fit_goes_on_behind_its_prefix() -> None:
    batches = list(build_packs([Group([1, 2], [[3], [4], [5]])], pack_tokens=4))
    assert [batch.input_ids.tolist() for batch in batches] == [[[1, 2, 3, 4]], [[1, 2, 5]]]
    assert [batch.segment_ids.tolist() for batch in batches] == [[[0, 0, 1, 2]], [[0, 0, 1]]]
    assert batches[1].pair_index.tolist() == [[2]]


def test_batches_are_padded_on_the_end() -> None:
    (batch,) = build_packs([Group([1, 2], [[3], [4], [5]])], pack_tokens=4, packs_per_batch=2)
    np.testing.assert_array_equal(batch.input_ids, [[1, 2, 3, 4], [1, 2, 5, 0]])
    np.testing.assert_array_equal(batch.group_ids, [[0, 0, 0, 0], [0, 0, 0, PADDING_GROUP]])
    np.testing.assert_array_equal(batch.pair_index, [[0, 1], [2, -1]])


@given(groups_strategy, st.integers(12, 40), st.integers(1, 3))
def test_every_pair_is_in_exactly_one_pack_with_its_own_prefix(
    groups: list[Group], pack_tokens: int, packs_per_batch: int
) -> None:
    expected = [(list(group.prefix_ids), list(suffix)) for group in groups for suffix in group.suffixes]
    found = {}
    for batch in build_packs(groups, pack_tokens, packs_per_batch):
        assert batch.input_ids.shape[1] <= pack_tokens
        for pack, pairs in enumerate(batch.pair_index):
            for slot in np.flatnonzero(pairs >= 0):
                last = batch.last_index[pack, slot]
                group = batch.group_ids[pack] == batch.group_ids[pack, last]
                own = group & (batch.segment_ids[pack] == batch.segment_ids[pack, last])
                prefix = group & (batch.segment_ids[pack] == 0)
                tokens = batch.input_ids[pack]
                positions = batch.position_ids[pack][prefix | own]
                assert positions.tolist() == list(range(len(positions)))
                assert np.flatnonzero(own)[-1] == last
                found[int(pairs[slot])] = (tokens[prefix].tolist(), tokens[own].tolist())
    assert [found[pair] for pair in range(len(expected))] == expected
    assert len(found) == len(expected)


def test_a_pair_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="pair 1: 2 prefix and 4 suffix tokens"):
        list(build_packs([Group([1, 2], [[3], [4, 5, 6, 7]])], pack_tokens=5))
