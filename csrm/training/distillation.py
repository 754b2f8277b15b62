"""Multi-round self-distillation: models that did not see a label say how much they believe it.

    round 0    train on the given labels
    round r    teachers, one for each fold of the queries: trained on the other folds, they judge this one;
               soft label = (1 - teacher_share) * given label + teacher_share * teacher's probabilities;
               a student starts again from the first weights and learns the soft labels

The round with the best dev metric is kept.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from scipy.special import softmax

from csrm.config import Settings
from csrm.scoring import PairScorer
from csrm.training.data import Fold, JudgedPairs

logger = logging.getLogger(__name__)

SOFT_LABELS_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("market", "query_id", "product_id", "grade")),
        ("given", pa.list_(pa.float32())),
        ("teacher", pa.list_(pa.float32())),
        ("soft_label", pa.list_(pa.float32())),
    ]
)


class Distillation(Settings):
    """How labels are repaired."""

    rounds: int = Field(default=2, ge=1)
    """Rounds after the first, at most; they stop when the dev metric stops gaining."""
    num_folds: int = Field(default=2, ge=2)
    """Parts of the queries. More parts give teachers that saw more, and cost more: a round trains one model for each
    part, on all others, and the student."""
    teacher_share: float = Field(default=0.5, gt=0, le=1)
    """Share of the teachers in a soft label; the rest is the given label."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the teachers' logits; above 1 they are less sure."""
    min_gain: float = 0.0
    """Least gain of the dev metric over the best round so far for another round to follow."""


@dataclass(frozen=True)
class Round:
    """One round and how good it is."""

    round_index: int
    dev_metric: float
    flipped_share: float
    """Share of the training pairs whose most probable soft label is not the given one; 0 in round 0."""
    model_dir: Path
    soft_labels: Path | None
    """What it learnt; None: the given labels."""


TrainStudent = Callable[[Path, Path | None, Fold | None], PairScorer]
"""(output_dir, soft_labels, without) to a trained model: on the given labels where soft_labels is None, and without the
queries of a fold where one is given."""


def self_distill(
    pairs: JudgedPairs,
    settings: Distillation,
    train: TrainStudent,
    targets_of: Callable[[pd.Series], np.ndarray],
    dev_metric: Callable[[PairScorer], float],
    work_dir: Path,
    seed: int = 0,
) -> list[Round]:
    """Train rounds until the dev metric stops gaining. What has ended in work_dir is not run again.

    Args:
        pairs: judged pairs; those of split train are learnt.
        settings: how.
        train: trains one model.
        targets_of: given labels as distributions, shape (pairs, labels).
        dev_metric: of a model, larger is better.
        work_dir: gets a folder for each model and a Parquet file of soft labels for each round.
        seed: of the folds.

    Returns:
        The rounds, in order.
    """
    student = train(work_dir / "round-0", None, None)
    rounds = [Round(0, dev_metric(student), 0.0, work_dir / "round-0", None)]
    logger.info("round 0: dev %.4f", rounds[0].dev_metric)
    soft_labels: Path | None = None
    for index in range(1, settings.rounds + 1):
        path = work_dir / f"round-{index}-soft_labels.parquet"
        flipped_share = _write_soft_labels(
            path,
            _teach(pairs, settings, train, targets_of, work_dir / f"round-{index}", soft_labels, seed),
        )
        soft_labels = path
        model_dir = work_dir / f"round-{index}"
        student = train(model_dir, soft_labels, None)
        rounds.append(Round(index, dev_metric(student), flipped_share, model_dir, soft_labels))
        logger.info("round %d: dev %.4f, %.1f%% of labels flipped", index, rounds[-1].dev_metric, 100 * flipped_share)
        if rounds[-1].dev_metric - max(one.dev_metric for one in rounds[:-1]) <= settings.min_gain:
            break
    text = json.dumps([asdict(one) for one in rounds], indent=2, default=str) + "\n"
    (work_dir / "rounds.json").write_text(text, encoding="utf-8")
    return rounds


def best_round(rounds: Sequence[Round]) -> Round:
    """The earliest of those with the largest dev metric."""
    return max(rounds, key=lambda one: (one.dev_metric, -one.round_index))


def _teach(
    pairs: JudgedPairs,
    settings: Distillation,
    train: TrainStudent,
    targets_of: Callable[[pd.Series], np.ndarray],
    model_dir: Path,
    soft_labels: Path | None,
    seed: int,
) -> Iterator[pa.Table]:
    """Soft labels of every training pair, from teachers that did not see its query."""
    for index in range(settings.num_folds):
        fold = Fold(index, settings.num_folds, seed)
        teacher = train(model_dir.with_name(f"{model_dir.name}-teacher-{index}"), soft_labels, fold)
        for batch in pairs.batches("train", fold):
            probabilities = softmax(teacher.logits(batch) / settings.temperature, axis=1)
            given = targets_of(batch["grade"])
            mixed = (1 - settings.teacher_share) * given + settings.teacher_share * probabilities
            columns = [batch[name].to_list() for name in ("market", "query_id", "product_id", "grade")]
            yield pa.table(
                [*columns, given.tolist(), probabilities.tolist(), mixed.tolist()], schema=SOFT_LABELS_SCHEMA
            )


def _write_soft_labels(path: Path, tables: Iterator[pa.Table]) -> float:
    """Write the file in one piece; returns the share of pairs whose most probable label is not the given one."""
    partial = path.with_name(path.name + ".partial")
    num_pairs = num_flipped = 0
    with pq.ParquetWriter(partial, SOFT_LABELS_SCHEMA) as writer:
        for table in tables:
            writer.write_table(table)
            num_flipped += int((_rows(table, "soft_label").argmax(1) != _rows(table, "given").argmax(1)).sum())
            num_pairs += len(table)
    partial.replace(path)
    return num_flipped / num_pairs


def _rows(table: pa.Table, name: str) -> np.ndarray:
    """A column of lists of one length, shape (rows, length)."""
    return np.stack(table.column(name).to_numpy())


def label_issues(soft_labels: Path, label_names: Sequence[str]) -> pd.DataFrame:
    """Pairs whose given label the teachers, who did not see it, find less probable than another; the clearest first.

    Ranked by self-confidence, the probability of the given label (Northcutt et al. 2021, "Confident Learning").

    Args:
        soft_labels: a round's file.
        label_names: of the labels, in their order.

    Returns:
        market, query_id, product_id, grade, suggested_label, given_probability, suggested_probability.
    """
    table = pq.read_table(soft_labels)
    teacher, given = _rows(table, "teacher"), _rows(table, "given")
    suggested = teacher.argmax(1)
    issues = table.select(["market", "query_id", "product_id", "grade"]).to_pandas()
    issues["suggested_label"] = np.array(label_names, dtype=object)[suggested]
    issues["given_probability"] = (teacher * given).sum(1)
    issues["suggested_probability"] = teacher.max(1)
    issues = issues[suggested != given.argmax(1)]
    return issues.sort_values(["given_probability", "market", "query_id", "product_id"], ignore_index=True)
