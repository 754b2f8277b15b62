"""Packs with their training targets, in one file on disk: a training set of any size takes little memory."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from csrm.scoring.packing import Group, PackBatch, build_packs, merge_packs
from csrm.scoring.prompts import Translation
from csrm.scoring.scorer import pair_texts
from csrm.scoring.tokenization import PromptTokenizer

_PACKS_PER_BLOCK = 64
_ARRAYS = ("input_ids", "position_ids", "group_ids", "segment_ids", "last_index")
_SCHEMA = pa.schema(
    [
        *((name, pa.list_(pa.int32())) for name in _ARRAYS),
        ("targets", pa.list_(pa.list_(pa.float32()))),
        ("is_translation", pa.bool_()),
        ("keys", pa.list_(pa.string())),
    ]
)


class TrainingPack(NamedTuple):
    """One pack, and what is to be learnt from it."""

    pack: PackBatch
    targets: np.ndarray
    """Shape (pairs, labels), float32: each pair's weight times its distribution over the labels."""
    is_translation: bool
    """Whether the text after each prefix is learnt; such a pack has no pairs."""
    keys: Sequence[str]
    """What it holds, for messages: market, query_id and product_id of each pair, or the source texts."""


def judged_packs(
    batches: Iterable[pd.DataFrame], tokenizer: PromptTokenizer, pack_tokens: int
) -> Iterator[TrainingPack]:
    """Pack judged pairs in their order.

    Args:
        batches: group_number (rows of a group share one prefix and stand side by side), market, query_id, product_id,
            csrm.scoring.PAIR_COLUMNS, and target: each row's TrainingPack.targets.
    """
    for batch in batches:
        if batch.empty:
            continue
        queries, products = zip(*pair_texts(batch), strict=True)
        starts = np.flatnonzero(np.diff(batch["group_number"].to_numpy(), prepend=-1))
        prefixes = tokenizer.prefix_ids([queries[start] for start in starts])
        suffixes = tokenizer.suffix_ids(products)
        ends = [*starts[1:], len(batch)]
        groups = [Group(prefix, suffixes[start:end]) for prefix, start, end in zip(prefixes, starts, ends, strict=True)]
        targets = np.stack(batch["target"].to_list()).astype(np.float32)
        keys = (batch["market"] + " " + batch["query_id"] + " " + batch["product_id"]).to_numpy()
        for pack in build_packs(groups, pack_tokens):
            rows = pack.pair_index[0]
            yield TrainingPack(pack, targets[rows], False, keys[rows].tolist())


def with_dropped_titles(
    batches: Iterable[pd.DataFrame], drop_all: float, drop_each: float, seed: int
) -> Iterator[pd.DataFrame]:
    """Leave out retrieved titles at random, the same ones for all pairs of a group.

    Args:
        batches: group_number and retrieved_titles.
        drop_all: share of groups that lose all their titles.
        drop_each: probability that one title of another group is left out.
        seed: of the choice.
    """
    rng = np.random.default_rng(seed)
    kept: dict[int, tuple[str, ...]] = {}
    for batch in batches:
        group = None
        for group, titles in zip(batch["group_number"], batch["retrieved_titles"], strict=True):
            if group not in kept:
                chances = rng.random(1 + len(titles))
                kept[group] = (
                    tuple(title for title, chance in zip(titles, chances[1:], strict=True) if chance >= drop_each)
                    if chances[0] >= drop_all
                    else ()
                )
        yield batch.assign(retrieved_titles=batch["group_number"].map(kept))
        kept = {} if group is None else {group: kept[group]}  # it may go on in the next batch


def with_translations(
    packs: Iterable[TrainingPack], translations: Iterator[TrainingPack], share: float
) -> Iterator[TrainingPack]:
    """Packs with translations among them, so that these are not forgotten.

    Args:
        translations: without end.
        share: translation packs for each other pack.
    """
    owed = 0.0
    for pack in packs:
        yield pack
        owed += share
        while owed >= 1:
            yield next(translations)
            owed -= 1


def translation_packs(
    texts: Iterable[Sequence[Translation]], tokenizer: PromptTokenizer, pack_tokens: int, text_tokens: int
) -> Iterator[TrainingPack]:
    """Pack translations in their order.

    Args:
        texts: batches.
        text_tokens: most tokens of each text.
    """
    nothing = np.empty((1, 0), dtype=np.int64)
    for batch in texts:
        groups = [Group(given, [learnt]) for given, learnt in tokenizer.translation_ids(batch, text_tokens)]
        for pack in build_packs(groups, pack_tokens):
            keys = [batch[number].source_text for number in pack.pair_index[0]]
            without_pairs = pack._replace(last_index=nothing, pair_index=nothing)
            yield TrainingPack(without_pairs, np.empty((0, 0), dtype=np.float32), True, keys)


def write_packs(packs: Iterable[TrainingPack], path: Path) -> int:
    """Write packs to a file that PackFile reads. Returns how many they were."""
    packs = iter(packs)
    num_packs = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        while block := list(islice(packs, _PACKS_PER_BLOCK)):
            columns = [[getattr(pack.pack, name)[0] for pack in block] for name in _ARRAYS]
            columns.append([pack.targets.tolist() for pack in block])
            columns.append([pack.is_translation for pack in block])
            columns.append([list(pack.keys) for pack in block])
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
            num_packs += len(block)
    return num_packs


class PackFile(torch.utils.data.Dataset[TrainingPack]):
    """Packs of a file, read from disk when they are asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        blocks = range(self._reader.num_record_batches)
        self._num_packs = sum(self._reader.get_batch(block).num_rows for block in blocks)

    def __len__(self) -> int:
        return self._num_packs

    def __getitem__(self, index: int) -> TrainingPack:
        if not 0 <= index < self._num_packs:
            raise IndexError(index)
        row = self._reader.get_batch(index // _PACKS_PER_BLOCK).slice(index % _PACKS_PER_BLOCK, 1)
        arrays = {name: row.column(name).flatten().to_numpy().astype(np.int64)[None] for name in _ARRAYS}
        targets = row.column("targets").flatten()
        num_pairs = len(targets)
        return TrainingPack(
            PackBatch(**arrays, pair_index=np.arange(num_pairs, dtype=np.int64)[None]),
            targets.flatten().to_numpy().reshape(num_pairs, -1 if num_pairs else 0),
            row.column("is_translation")[0].as_py(),
            row.column("keys").flatten().to_pylist(),
        )

    def __getstate__(self) -> dict[str, Path]:
        return {"path": self._path}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]


def collate(packs: Sequence[TrainingPack], num_labels: int) -> dict[str, Any]:
    """One batch: inputs of PackedRelevanceModel.forward, and the keys of what it holds."""
    batch = merge_packs([pack.pack for pack in packs])
    targets = np.zeros((*batch.pair_index.shape, num_labels), dtype=np.float32)
    for row, pack in enumerate(packs):
        if len(pack.targets):
            targets[row, : len(pack.targets)] = pack.targets
    is_translation = np.array([[pack.is_translation] for pack in packs]) & (batch.segment_ids > 0)
    arrays = {**batch.model_inputs(), "targets": targets, "is_translation": is_translation}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {**tensors, "keys": [key for pack in packs for key in pack.keys]}
