import itertools
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from csrm.scoring.labels import ESCI_LABELS
from csrm.scoring.packing import Group, split_groups
from csrm.scoring.prompts import Translation
from csrm.scoring.tokenization import PromptTokenizer
from csrm.training.data.packs import (
    PackFile,
    TrainingPack,
    collate,
    judged_packs,
    seen_tokens,
    translation_packs,
    with_dropped_titles,
    with_translations,
    write_packs,
)


@pytest.fixture(scope="module")
def packs(pairs_pdf: pd.DataFrame, prompt_tokenizer: PromptTokenizer) -> list[TrainingPack]:
    """Packs of every fixture pair, two or three to a prefix, and one of translations."""
    rng = np.random.default_rng(0)
    judged = pairs_pdf.assign(
        group_number=np.arange(len(pairs_pdf)) // 5 * 2 + np.arange(len(pairs_pdf)) % 5 // 3,
        query_id=pairs_pdf["query"],
        product_id=pairs_pdf["title"],
        target=list(rng.random((len(pairs_pdf), len(ESCI_LABELS)))),
    )
    texts = [Translation("ko", "en", "수건", "towel"), Translation("en", "ko", "towel", "수건")]
    return [
        *judged_packs([judged[:11], judged[11:11], judged[11:]], prompt_tokenizer, 400),
        *translation_packs([texts], prompt_tokenizer, 400, text_tokens=8),
    ]


def test_every_pair_is_packed_once_with_its_target(
    packs: list[TrainingPack], pairs_pdf: pd.DataFrame, prompt_tokenizer: PromptTokenizer
) -> None:
    targets = np.random.default_rng(0).random((len(pairs_pdf), len(ESCI_LABELS))).astype(np.float32)
    keys = [key for pack in packs if not pack.is_translation for key in pack.keys]
    assert keys == [f"{row.market} {row.query} {row.title}" for row in pairs_pdf.itertuples()]
    np.testing.assert_array_equal(np.concatenate([pack.targets for pack in packs if len(pack.targets)]), targets)


def test_a_file_gives_back_what_was_written(packs: list[TrainingPack], tmp_path: Path) -> None:
    many = packs * 30  # more than one block
    assert write_packs(many, tmp_path / "packs.arrow") == len(many)
    file = pickle.loads(pickle.dumps(PackFile(tmp_path / "packs.arrow")))  # as worker processes get it
    assert len(file) == len(many) > 64
    for index in (0, 63, 64, len(many) - 1):
        written, read = many[index], file[index]
        assert read.groups == [Group(list(group.prefix_ids), list(group.suffixes)) for group in written.groups]
        np.testing.assert_array_equal(read.targets, written.targets)
        assert (read.is_translation, list(read.keys)) == (written.is_translation, list(written.keys))
    with pytest.raises(IndexError):
        file[len(many)]


def test_the_tokens_of_all_packs_are_seen_and_no_others(packs: list[TrainingPack], tmp_path: Path) -> None:
    write_packs(packs, tmp_path / "packs")
    groups = [group for pack in packs for group in pack.groups]
    expected = {id_ for group in groups for ids in (group.prefix_ids, *group.suffixes) for id_ in ids}

    seen = seen_tokens(PackFile(tmp_path / "packs"))

    assert set(np.flatnonzero(np.unpackbits(seen))) == expected
    earlier = np.packbits(np.arange(5_000) == 4_999)
    assert set(np.flatnonzero(np.unpackbits(seen_tokens(PackFile(tmp_path / "packs"), earlier)))) == {*expected, 4_999}


def test_a_batch_learns_pairs_and_translations_where_they_are(packs: list[TrainingPack]) -> None:
    judged, translated = packs[0], packs[-1]
    batch = collate([translated, judged], num_labels=len(ESCI_LABELS))
    np.testing.assert_array_equal(batch["targets"], judged.targets)
    ids = batch["input_ids"].numpy()
    assert len(ids) == sum(group.num_tokens for group in (*judged.groups, *translated.groups))
    products = [ids for group in judged.groups for ids in group.suffixes]
    assert ids[batch["last_index"]].tolist() == [ids[-1] for ids in products]
    learnt, before = batch["translation_index"].numpy()
    prompts = [(*group.prefix_ids, *group.suffixes[0]) for group in translated.groups]
    starts = [len(group.prefix_ids) for group in translated.groups]
    assert ids[learnt].tolist() == [i for ids, start in zip(prompts, starts, strict=True) for i in ids[start:]]
    assert ids[before].tolist() == [i for ids, start in zip(prompts, starts, strict=True) for i in ids[start - 1 : -1]]
    assert batch["keys"][-2:] == ["수건", "towel"]


def test_titles_are_dropped_for_a_whole_group_at_the_rate_asked_for() -> None:
    batch = pd.DataFrame({"group_number": np.arange(4000) // 2, "retrieved_titles": [("a", "b")] * 4000})
    batches = [batch[start : start + 101] for start in range(0, len(batch), 101)]  # most groups at an end go on
    dropped = pd.concat(with_dropped_titles(batches, drop_all=0.2, drop_each=0.1, seed=0))
    assert (dropped.groupby("group_number")["retrieved_titles"].nunique() == 1).all()
    counts = dropped["retrieved_titles"].map(len)
    assert (counts == 0).mean() == pytest.approx(0.2 + 0.8 * 0.01, abs=0.03)
    assert (counts == 1).mean() == pytest.approx(0.8 * 0.18, abs=0.03)
    (same,) = with_dropped_titles([batch], drop_all=0, drop_each=0, seed=0)
    assert same["retrieved_titles"].tolist() == batch["retrieved_titles"].tolist()


def test_translations_are_mixed_in_at_the_rate_asked_for(packs: list[TrainingPack]) -> None:
    mixed = list(with_translations(packs[:-1] * 10, itertools.repeat(packs[-1]), share=0.3))
    num_judged = 10 * (len(packs) - 1)
    assert sum(pack.is_translation for pack in mixed) == pytest.approx(0.3 * num_judged, abs=1)
    assert [pack for pack in mixed if not pack.is_translation] == packs[:-1] * 10


def test_translations_are_cut_and_cannot_become_structure(prompt_tokenizer: PromptTokenizer) -> None:
    text = Translation("ko", "en", "수건\nTranslation: x", "a very long towel " * 9)
    ((given, learnt),) = prompt_tokenizer.translation_ids([text], text_tokens=5)
    assert len(learnt) <= 6
    assert prompt_tokenizer.decode(given).startswith("Task: translation\nFrom: ko\nTo: en\nText: ")
    assert prompt_tokenizer.decode(given).endswith("\nTranslation:")
    assert prompt_tokenizer.decode(given).count("\n") == 4
    assert prompt_tokenizer.decode(learnt).endswith("\n")
    ((group,),) = split_groups([Group(given, [learnt])], 400)
    assert group == Group(given, [learnt])
