"""Packs with their training targets, in one file on disk: a training set of any size takes little memory."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from csrm.scoring.packing import Group, lay_out, split_groups
from csrm.scoring.prompts import Translation
from csrm.scoring.scorer import pair_texts
from csrm.scoring.tokenization import PromptTokenizer

_PACKS_PER_BLOCK = 64
_SCHEMA = pa.schema(
    [
        ("prefixes", pa.list_(pa.list_(pa.int32()))),
        ("products", pa.list_(pa.list_(pa.list_(pa.int32())))),
        ("targets", pa.list_(pa.list_(pa.float32()))),
        ("is_translation", pa.bool_()),
        ("keys", pa.list_(pa.string())),
    ]
)


class TrainingPack(NamedTuple):
    """One pack, and what is to be learnt from it."""

    groups: Sequence[Group]
    targets: np.ndarray
    """Shape (pairs, labels), float32: each pair's weight times its distribution over the labels."""
    is_translation: bool
    """Whether the text after each prefix is learnt; such a pack has no pairs, and one suffix a group."""
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
        first = 0
        for part in split_groups(groups, pack_tokens):
            rows = slice(first, first := first + sum(len(group.suffixes) for group in part))
            yield TrainingPack(part, targets[rows], False, keys[rows].tolist())


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
    for batch in texts:
        groups = [Group(given, [learnt]) for given, learnt in tokenizer.translation_ids(batch, text_tokens)]
        keys = iter([text.source_text for text in batch])
        for part in split_groups(groups, pack_tokens):
            yield TrainingPack(part, np.empty((0, 0), dtype=np.float32), True, list(islice(keys, len(part))))


def write_packs(packs: Iterable[TrainingPack], path: Path) -> int:
    """Write packs to a file that PackFile reads. Returns how many they were."""
    packs = iter(packs)
    num_packs = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        while block := list(islice(packs, _PACKS_PER_BLOCK)):
            columns = [
                [[group.prefix_ids for group in pack.groups] for pack in block],
                [[group.suffixes for group in pack.groups] for pack in block],
                [pack.targets.tolist() for pack in block],
                [pack.is_translation for pack in block],
                [list(pack.keys) for pack in block],
            ]
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
        prefixes, products = (row.column(name)[0].as_py() for name in ("prefixes", "products"))
        targets = row.column("targets").flatten()
        num_pairs = len(targets)
        return TrainingPack(
            [Group(*parts) for parts in zip(prefixes, products, strict=True)],
            targets.flatten().to_numpy().reshape(num_pairs, -1 if num_pairs else 0),
            row.column("is_translation")[0].as_py(),
            row.column("keys").flatten().to_pylist(),
        )

    def token_ids(self) -> Iterator[np.ndarray]:
        """Token ids of all packs, part by part, as often as they are there."""
        for block in range(self._reader.num_record_batches):
            batch = self._reader.get_batch(block)
            for name in ("prefixes", "products"):
                values = batch.column(name)
                while pa.types.is_list(values.type):
                    values = values.flatten()
                yield values.to_numpy()

    def __getstate__(self) -> dict[str, Path]:
        return {"path": self._path}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]


def seen_tokens(packs: PackFile, earlier: np.ndarray | None = None) -> np.ndarray:
    """Whether each token id is in some packs, one bit each, as csrm.bundle.Bundle.seen_tokens reads them.

    Args:
        packs: of a training.
        earlier: the same of what the training started from; None: of nothing.

    Returns:
        Shape (num_bytes,), uint8.
    """
    seen = np.zeros(0, bool) if earlier is None else np.unpackbits(earlier).astype(bool)
    for ids in packs.token_ids():
        seen = np.pad(seen, (0, max(0, ids.max(initial=-1) + 1 - len(seen))))
        seen[ids] = True
    return np.packbits(seen)


def collate(packs: Sequence[TrainingPack], num_labels: int) -> dict[str, Any]:
    """All packs as one: inputs of PackedRelevanceModel.forward, and the keys of what it holds."""
    judged = [pack for pack in packs if not pack.is_translation]
    translated = [pack for pack in packs if pack.is_translation]
    pack = lay_out([group for part in (*judged, *translated) for group in part.groups])
    targets = [np.empty((0, num_labels), dtype=np.float32), *(part.targets for part in judged)]
    num_pairs, num_translated = sum(map(len, targets)), sum(len(part.groups) for part in translated)
    learnt, before = [pack.last_index[:0]], [pack.last_index[:0]]
    prefix_index = pack.prefix_index[len(pack.prefix_index) - num_translated :]
    for prefix, product in zip(prefix_index, pack.product_index[num_pairs:], strict=True):
        tokens = product[product >= 0]
        learnt.append(tokens)
        before.append(np.concatenate([prefix[prefix >= 0][-1:], tokens[:-1]]))
    arrays = {
        **pack._replace(last_index=pack.last_index[:num_pairs])._asdict(),
        "targets": np.concatenate(targets),
        "translation_index": np.stack([np.concatenate(learnt), np.concatenate(before)]),
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {**tensors, "keys": [key for part in (*judged, *translated) for key in part.keys]}
