"""Files of beliefs, what one teacher thinks of pairs, and of soft labels, what a student learns of them."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from csrm.schemas import PAIR_KEY
from csrm.training.data.judged import UNLABELLED
from csrm.training.distillation.pseudo_labels import UnlabelledPairs, pseudo_label_weights

TRAIN = "train"
_KEY_FIELDS = [*((name, pa.string()) for name in PAIR_KEY), ("grade", pa.string())]
BELIEFS_SCHEMA = pa.schema([*_KEY_FIELDS, ("split", pa.string()), ("teacher", pa.list_(pa.float32()))])
SOFT_LABELS_SCHEMA = pa.schema(
    [
        *_KEY_FIELDS,
        ("given", pa.list_(pa.float32())),
        ("teacher", pa.list_(pa.float32())),
        ("soft_label", pa.list_(pa.float32())),
        ("weight", pa.float32()),
    ]
)
_FINGERPRINT = b"csrm_fingerprint"
TargetsOf = Callable[[pd.Series], np.ndarray]
"""Grades to distributions over the labels, shape (pairs, labels)."""


def write_beliefs(path: Path, beliefs: Iterator[tuple[pd.DataFrame, np.ndarray]], follows_from: object) -> None:
    """Write what a teacher thinks, in one piece; a file that follows from the same is left as it is.

    Args:
        beliefs: batches of pairs (key, grade, split) with the probabilities of their labels, shape (pairs, labels).
        follows_from: all that they depend on, as JSON; None: not known, so they are written again.
    """
    fingerprint = hashlib.sha256(json.dumps(follows_from, default=str).encode()).hexdigest().encode()
    if follows_from is not None and path.exists() and pq.read_schema(path).metadata[_FINGERPRINT] == fingerprint:
        return
    tables = (
        pa.table(
            [*(pairs[name].to_list() for name in (*PAIR_KEY, "grade", "split")), probabilities.tolist()],
            schema=BELIEFS_SCHEMA,
        )
        for pairs, probabilities in beliefs
    )
    _write(path, BELIEFS_SCHEMA.with_metadata({_FINGERPRINT: fingerprint}), tables)


def read_beliefs(path: Path, split: str, targets_of: TargetsOf) -> tuple[np.ndarray, np.ndarray]:
    """What a teacher thinks of a split, and what was given: both shape (pairs, labels)."""
    table = pq.read_table(path, columns=["grade", "teacher"], filters=[("split", "==", split)])
    teacher = rows_of(table, "teacher")
    return teacher, targets_of(table["grade"].to_pandas()) if len(table) else np.empty_like(teacher)


def read_queries(path: Path, split: str) -> np.ndarray:
    """The query of each of these pairs, as one text: shape (pairs,)."""
    table = pq.read_table(path, columns=["market", "query_id"], filters=[("split", "==", split)])
    return (table["market"].to_pandas() + "/" + table["query_id"].to_pandas()).to_numpy()


def write_soft_labels(
    path: Path,
    beliefs: Sequence[Path],
    targets_of: TargetsOf,
    teacher_share: float,
    unlabelled: UnlabelledPairs | None,
) -> None:
    """Mix given labels with what their teacher thinks; label the unlabelled pairs with the mean of all teachers.

    Memory: the probabilities of the unlabelled pairs, 4 bytes for each of their labels.

    Args:
        beliefs: one file for each teacher; each judges its own part of the training pairs, and all unlabelled ones.
        teacher_share: of the mixture; the rest is the given label.
        unlabelled: how the unlabelled pairs are weighted; None: there are none.
    """
    _write(path, SOFT_LABELS_SCHEMA, _soft_labels(beliefs, targets_of, teacher_share, unlabelled))


def _soft_labels(
    beliefs: Sequence[Path], targets_of: TargetsOf, teacher_share: float, unlabelled: UnlabelledPairs | None
) -> Iterator[pa.Table]:
    counts: np.ndarray | float = 0.0
    for path in beliefs:
        for table in _tables(path, TRAIN):
            teacher, given = rows_of(table, "teacher"), targets_of(table["grade"].to_pandas())
            counts = counts + given.sum(axis=0)
            mixed = (1 - teacher_share) * given + teacher_share * teacher
            yield _labelled(table, given.tolist(), teacher, mixed, np.ones(len(table), dtype=np.float32))
    if unlabelled is None:
        return
    mean = np.mean([read_beliefs(path, UNLABELLED, targets_of)[0] for path in beliefs], axis=0)
    weights = pseudo_label_weights(mean, counts / np.sum(counts), unlabelled)
    start = 0
    for table in _tables(beliefs[0], UNLABELLED):  # all teachers were asked in the same order
        rows = slice(start, start + len(table))
        yield _labelled(table, [None] * len(table), mean[rows], mean[rows], weights[rows])
        start += len(table)


def _labelled(
    table: pa.Table, given: list[list[float] | None], teacher: np.ndarray, soft_label: np.ndarray, weight: np.ndarray
) -> pa.Table:
    columns = [table[name] for name in (*PAIR_KEY, "grade")]
    return pa.table([*columns, given, teacher.tolist(), soft_label.tolist(), weight], schema=SOFT_LABELS_SCHEMA)


def write_shuffled_labels(path: Path, soft_labels: Path, seed: int) -> None:
    """The same soft labels on random pairs: each goes to another pair of the same given label.

    So as many labels are flipped, from each label to each other, and as softly, but not because of what the pair says:
    a student that learns as well from these did not gain by the teachers' knowledge. Unlabelled pairs stay.
    """
    table = pq.read_table(soft_labels)
    rng = np.random.default_rng(seed)
    source = np.arange(len(table))
    grades = table["grade"].to_pandas()
    for grade in sorted(grades.dropna().unique()):
        rows = np.flatnonzero(grades == grade)
        source[rows] = rng.permutation(rows)
    place = table.schema.get_field_index("soft_label")
    _write(
        path, table.schema, iter([table.set_column(place, "soft_label", table["soft_label"].take(pa.array(source)))])
    )


def label_issues(soft_labels: Path, label_names: Sequence[str]) -> pd.DataFrame:
    """Pairs whose given label the teachers find less probable than another; the clearest first.

    Ranked by self-confidence, the probability of the given label (Northcutt et al. 2021, "Confident Learning").

    Args:
        soft_labels: a round's file.
        label_names: of the labels, in their order.

    Returns:
        market, query_id, product_id, grade, suggested_label, given_probability, suggested_probability.
    """
    table = read_labelled(soft_labels)
    teacher, given = rows_of(table, "teacher"), rows_of(table, "given")
    suggested = teacher.argmax(axis=1)
    issues = table.select([*PAIR_KEY, "grade"]).to_pandas()
    issues["suggested_label"] = np.array(label_names, dtype=object)[suggested]
    issues["given_probability"] = (teacher * given).sum(axis=1)
    issues["suggested_probability"] = teacher.max(axis=1)
    issues = issues[suggested != given.argmax(axis=1)]
    return issues.sort_values(["given_probability", *PAIR_KEY], ignore_index=True)


def read_labelled(soft_labels: Path) -> pa.Table:
    """The rows of a soft-label file that have a given label."""
    return pq.read_table(soft_labels, filters=[("grade", "!=", "")])


def rows_of(table: pa.Table, name: str) -> np.ndarray:
    """A column of lists of one length, shape (rows, length)."""
    column = table.column(name).combine_chunks()
    values: np.ndarray = column.flatten().to_numpy()
    return values.reshape(len(table), -1) if len(table) else values.reshape(0, 0)


def _tables(path: Path, split: str) -> Iterator[pa.Table]:
    for batch in pq.ParquetFile(path).iter_batches():
        table = pa.Table.from_batches([batch])
        chosen = table.filter(pa.compute.equal(table["split"], split))
        if len(chosen):
            yield chosen


def _write(path: Path, schema: pa.Schema, tables: Iterator[pa.Table]) -> None:
    """The file is there when it is whole."""
    partial = path.with_name(path.name + ".partial")
    with pq.ParquetWriter(partial, schema) as writer:
        for table in tables:
            writer.write_table(table)
    partial.replace(path)
