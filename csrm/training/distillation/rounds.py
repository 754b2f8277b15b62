"""Multi-round self-distillation: models that did not see a label say how much they believe it.

    round 0    train on the given labels
    round r    teachers, one for each fold of the queries: trained on the other folds with the labels of round r - 1,
               they judge this one (with a single fold: the model of round r - 1, which saw them, judges all);
               soft label = (1 - teacher_share) * given label + teacher_share * teacher's probabilities;
               a student starts again from the first weights and learns the soft labels

The best round is kept, by the dev split or by how well teachers agree with the labels of folds that they did not see.
A model that confirms itself also looks sure; `Round` holds what tells the two apart.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from pydantic import Field, model_validator
from scipy.special import softmax

from csrm.config import Settings
from csrm.errors import InputError
from csrm.schemas import PAIR_KEY
from csrm.scoring.labels import Label
from csrm.scoring.scorer import PairScorer
from csrm.training.data.judged import UNLABELLED, Fold, JudgedPairs
from csrm.training.distillation.label_quality import Calibration, Flips, calibration, count_flips, fold_agreement
from csrm.training.distillation.pseudo_labels import UnlabelledPairs
from csrm.training.distillation.soft_labels import (
    TRAIN,
    TargetsOf,
    read_beliefs,
    read_labelled,
    read_queries,
    rows_of,
    write_beliefs,
    write_shuffled_labels,
    write_soft_labels,
)

logger = logging.getLogger(__name__)


class Distillation(Settings):
    """How labels are repaired."""

    rounds: int = Field(default=2, ge=1)
    """Rounds after the first, at most; they stop when the metric that chooses stops gaining."""
    choose_by: Literal["dev", "agreement"] = "dev"
    """What chooses the round: dev, the ROC-AUC of the dev split; agreement, for a market without one: that of the
    teachers against the given labels of the fold that they did not see. Wrong labels lower it for every round alike, as
    long as they do not depend on the text: labels that follow words (clicks on what a search engine found by them)
    reward the round that repeats their errors. A later round's teachers learnt from soft labels whose teachers had seen
    the fold, so it is flattered a little: a model that confirms itself gains here. Prefer even a small dev split."""
    num_folds: int = Field(default=2, ge=1)
    """Parts of the queries. More parts give teachers that saw more, and cost more: a round trains one model for each
    part, on all others, and the student. 1 is the cheap way: the round before is the teacher of all pairs, so a round
    trains one model. It has fitted the labels that it judges: the longer it trained, the more it believes wrong
    ones, so give it few epochs, or teacher_epochs; and what it says of them is no measure of it. Where labels are so
    few that half of them teach much less, it can still find more than two folds (tests/benchmarks/label_issues.py)."""
    teacher_epochs: float | None = Field(default=None, gt=0)
    """Passes of a teacher over its pairs, fewer than tuning's so that it stops before it knows wrong labels by heart
    (they are learnt last: Liu et al. 2020, "Early-Learning Regularization"); with num_folds 1 it is then a model of its
    own. None: as long as a student."""
    teacher_share: float = Field(default=0.5, gt=0, le=1)
    """Share of the teachers in a soft label; the rest is the given label. Up to 0.5, a doubted label is made
    softer, but remains the most probable one; above, they can outvote it."""
    unlabelled: UnlabelledPairs | None = None
    """Pairs that nobody judged; all teachers judge them, and students learn the mean."""
    min_gain: float = Field(default=0.005, ge=0)
    """A round is kept in place of an earlier one, and followed by another, only if it gains more of the metric than
    this and than the standard error of the gain over queries (after the one-standard-error rule of Breiman et al. 1984,
    "Classification and Regression Trees"): a few dozen queries order rounds by chance, and teachers who know little
    make labels worse."""
    control: bool = False
    """Train a second student in each round on the same soft labels given to random pairs of the same label. What it
    gains comes from softer labels, not from repaired ones. Costs a training a round."""

    @model_validator(mode="after")
    def _the_choice_can_be_made(self) -> "Distillation":
        if self.choose_by == "agreement":
            if self.num_folds == 1:
                raise ValueError("choose_by agreement needs teachers that did not see their fold: set num_folds to 2")
            if self.control:
                raise ValueError("control needs choose_by dev: the control is measured on the dev split")
        return self


class DevMetrics(NamedTuple):
    """How well a model judges the dev split."""

    ndcg: float
    """nDCG@10."""
    aucs: np.ndarray
    """ROC-AUC of the most relevant label, of all queries and of resamples of them, see resampled_auc; it chooses the
    round, for its gains stand out from their error more than those of nDCG@10 (tests/benchmarks/noisy_labels.py)."""


@dataclass(frozen=True)
class Round:
    """One round: what it learnt, how good it is, and signs of a model that confirms itself."""

    round_index: int
    model_dir: Path
    soft_labels: Path | None
    """What it learnt; None: the given labels."""
    dev_auc: float | None = None
    """ROC-AUC of the student on the dev split, which chooses the round; None where agreement chooses."""
    dev_ndcg: float | None = None
    """nDCG@10 of the same; it chooses nothing."""
    agreement: float | None = None
    """Of teachers that learnt this round's labels without a fold, with that fold's given labels: ROC-AUC; None where
    there are no such teachers."""
    control_auc: float | None = None
    """Dev ROC-AUC of the student that learnt the same soft labels on random pairs."""
    doubts: Flips | None = None
    """Where its teachers find another label more probable than the given one; None in round 0."""
    flips: Flips | None = None
    """Where its soft labels do, which mix the teachers with the given label; None in round 0."""
    calibration: Calibration | None = None
    """Of the teachers that made the soft labels, against the given labels."""
    dev_calibration: Calibration | None = None
    """The same against the dev labels, each dev pair judged by each teacher."""
    num_unlabelled: int = 0
    """Pseudo-labelled pairs that it learnt."""
    gain_error: float | None = None
    """Standard error over queries of what it gains over the round kept before; None in round 0."""
    resampled: np.ndarray = field(default_factory=lambda: np.zeros(1), repr=False, compare=False)
    """What chooses the round, on resamples of the queries: the same ones in every round."""

    @property
    def metric(self) -> float:
        """What chooses the round."""
        value = self.agreement if self.dev_auc is None else self.dev_auc
        assert value is not None
        return value


class TrainStudent(Protocol):
    """Trains a model; what has ended before with the same inputs is not trained again."""

    def __call__(
        self,
        output_dir: Path,
        soft_labels: Path | None = None,
        without: Fold | None = None,
        epochs: float | None = None,
    ) -> PairScorer:
        """Train one model.

        Args:
            soft_labels: what to learn; None: the given labels.
            without: leave out the queries of this fold.
            epochs: replaces the configured length.

        Returns:
            A scorer whose digest names the trained model.
        """


@dataclass(frozen=True)
class RoundSetup:
    """What all rounds share."""

    pairs: JudgedPairs
    """Those of split train are learnt."""
    settings: Distillation
    labels: Sequence[Label]
    train: TrainStudent
    targets_of: TargetsOf
    work_dir: Path
    """Gets a folder for each model, and Parquet files of each teacher's beliefs and each round's soft labels."""
    dev_split: str | None
    """Calibration is measured on it."""
    dev_metrics: Callable[[PairScorer], DevMetrics] | None
    """Of a model; None where agreement chooses."""
    seed: int = 0
    """Of the folds and of the control."""


def self_distill(setup: RoundSetup) -> list[Round]:
    """Train rounds until the metric stops gaining. What has ended in work_dir is not run again.

    Writes `rounds.json` after each round.

    Returns:
        The rounds, in order; the folder of the best one is there.

    Raises:
        InputError: no query of the dev split has a relevant pair, or, where agreement chooses, no fold has both kinds
            of pairs.
    """
    settings = setup.settings
    digest = setup.pairs.digest()
    round_ = Round(0, setup.work_dir / "round-0", None)
    rounds: list[Round] = []
    while True:
        if setup.dev_metrics is not None:
            round_ = _measured(round_, setup, setup.dev_metrics)
            rounds = _with(rounds, round_, setup.work_dir, settings.min_gain)
            if not _goes_on(rounds, settings):
                return rounds
        beliefs = _beliefs(round_, setup, digest)
        round_ = _with_agreement(round_, beliefs, setup)
        rounds = _with(rounds, round_, setup.work_dir, settings.min_gain)
        if setup.dev_metrics is None and not _goes_on(rounds, settings):
            best = best_round(rounds, settings.min_gain)
            setup.train(best.model_dir, best.soft_labels)
            return rounds
        round_ = _next_round(round_, beliefs, setup)


def check_folds(settings: Distillation, pairs: JudgedPairs, seed: int) -> None:
    """Every fold must have queries.

    Raises:
        InputError: one has none.
    """
    num_folds = settings.num_folds
    if num_folds == 1:
        return
    sizes = [pairs.num_queries(TRAIN, Fold(number, num_folds, seed)) for number in range(num_folds)]
    if 0 in sizes:
        raise InputError(
            f"judgments: distillation.num_folds is {num_folds}, but fold {sizes.index(0)} has none of the {sum(sizes)} "
            f"queries of split {TRAIN}. Bring more judged queries, or lower num_folds."
        )


def best_round(rounds: Sequence[Round], min_gain: float) -> Round:
    """The last of those that gained more than `min_gain` and their error over the one kept before: first the first."""
    best = rounds[0]
    for round_ in rounds[1:]:
        if round_.metric - best.metric > max(min_gain, gain_error(round_, best)):
            best = round_
    return best


def gain_error(round_: Round, best: Round) -> float:
    """Standard error over queries of what a round gains over an earlier one."""
    return float(np.nanstd(round_.resampled - best.resampled))


def _goes_on(rounds: Sequence[Round], settings: Distillation) -> bool:
    last = rounds[-1]
    best = best_round(rounds, settings.min_gain)
    if len(rounds) > 1:
        before = best_round(rounds[:-1], settings.min_gain)
        logger.info(
            "round %d: gains %+.4f over round %d, standard error %.4f over queries: %s",
            last.round_index,
            last.metric - before.metric,
            before.round_index,
            last.gain_error,
            "kept" if best is last else f"not kept, for it is not above both {settings.min_gain:g} and its error",
        )
    return best is last and last.round_index < settings.rounds


def _with(rounds: Sequence[Round], round_: Round, work_dir: Path, min_gain: float) -> list[Round]:
    """The rounds with this one in its place, on disk too."""
    before = rounds[: round_.round_index]
    if before:
        round_ = dataclasses.replace(round_, gain_error=gain_error(round_, best_round(before, min_gain)))
    changed = [*before, round_]
    partial = work_dir / "rounds.json.partial"
    written = [{name: value for name, value in asdict(each).items() if name != "resampled"} for each in changed]
    text = json.dumps(written, indent=2, default=str) + "\n"
    partial.write_text(text, encoding="utf-8")
    partial.replace(work_dir / "rounds.json")
    return changed


def _measured(round_: Round, setup: RoundSetup, dev_metrics: Callable[[PairScorer], DevMetrics]) -> Round:
    """The round with its student's dev metrics, and its control's."""
    metrics = dev_metrics(setup.train(round_.model_dir, round_.soft_labels))
    if math.isnan(metrics.aucs[0]):
        raise InputError(
            f"judgments: all or no pairs of split {setup.dev_split!r} are of the most relevant label, so it cannot "
            "choose a round. Judge more pairs of it, or set distillation.choose_by to agreement."
        )
    logger.info("round %d: dev ROC-AUC %.4f, nDCG@10 %.4f", round_.round_index, metrics.aucs[0], metrics.ndcg)
    control_auc = None
    if setup.settings.control and round_.soft_labels is not None:
        control_dir = setup.work_dir / f"round-{round_.round_index}-control"
        shuffled = setup.work_dir / f"round-{round_.round_index}-control_labels.parquet"
        write_shuffled_labels(shuffled, round_.soft_labels, setup.seed)
        control_auc = float(dev_metrics(setup.train(control_dir, shuffled)).aucs[0])
        logger.info("round %d: dev ROC-AUC %.4f with the same flips on random pairs", round_.round_index, control_auc)
    return dataclasses.replace(
        round_,
        dev_auc=float(metrics.aucs[0]),
        dev_ndcg=metrics.ndcg,
        control_auc=control_auc,
        resampled=metrics.aucs[1:],
    )


def _beliefs(round_: Round, setup: RoundSetup, pairs_digest: str) -> list[Path]:
    """What teachers that learnt this round's labels think of the pairs that they did not see: one file for each."""
    settings, index = setup.settings, round_.round_index + 1
    paths = []
    splits = [TRAIN, UNLABELLED, *([setup.dev_split] if setup.dev_split is not None else [])]
    for number in range(settings.num_folds):
        fold = Fold(number, settings.num_folds, setup.seed) if settings.num_folds > 1 else None
        name = f"round-{index}-teacher-{number}"
        is_round_before = fold is None and settings.teacher_epochs is None
        teacher = setup.train(
            round_.model_dir if is_round_before else setup.work_dir / name,
            round_.soft_labels,
            fold,
            settings.teacher_epochs,
        )
        paths.append(setup.work_dir / f"{name}-beliefs.parquet")
        follows_from = [teacher.digest, pairs_digest, fold, splits] if teacher.digest else None
        write_beliefs(paths[-1], _judge(teacher, setup, fold, splits), follows_from)
    return paths


def _judge(
    teacher: PairScorer, setup: RoundSetup, fold: Fold | None, splits: Sequence[str]
) -> Iterator[tuple[pd.DataFrame, np.ndarray]]:
    """Label probabilities of the fold, and of all pairs of the other splits."""
    for split in splits:
        for batch in setup.pairs.batches(split, fold if split == TRAIN else None):
            yield batch, softmax(teacher.logits(batch), axis=1)


def _with_agreement(round_: Round, beliefs: Sequence[Path], setup: RoundSetup) -> Round:
    """The round with its teachers' agreement, where there are teachers that did not see a fold."""
    if len(beliefs) == 1:
        return round_
    gains = np.array([label.gain for label in setup.labels])
    folds = [(read_queries(path, TRAIN), *read_beliefs(path, TRAIN, setup.targets_of)) for path in beliefs]
    agreements = fold_agreement(
        [teacher @ gains for _, teacher, _ in folds],
        [given.argmax(axis=1) == gains.argmax() for *_, given in folds],
        [queries for queries, *_ in folds],
    )
    if not math.isnan(agreements[0]):
        resampled = agreements[1:] if setup.dev_metrics is None else round_.resampled
        return dataclasses.replace(round_, agreement=float(agreements[0]), resampled=resampled)
    if setup.dev_metrics is None:
        raise InputError(
            "judgments: in no fold are some of the given labels the most relevant one and some not, so agreement "
            "cannot choose a round. Bring more judged pairs."
        )
    return round_


def _next_round(round_: Round, beliefs: Sequence[Path], setup: RoundSetup) -> Round:
    """The round that learns what these teachers think, with all that is known before it is trained."""
    settings, index = setup.settings, round_.round_index + 1
    soft_labels = setup.work_dir / f"round-{index}-soft_labels.parquet"
    write_soft_labels(soft_labels, beliefs, setup.targets_of, settings.teacher_share, settings.unlabelled)
    table = read_labelled(soft_labels)
    given, teacher, soft = (rows_of(table, name) for name in ("given", "teacher", "soft_label"))
    true_labels = _true_labels(table.select([*PAIR_KEY]).to_pandas(), setup)
    doubts, flips = (count_flips(given, others, true_labels) for others in (teacher, soft))
    logger.info("round %d: %.1f%% of labels doubted, %.1f%% flipped", index, 100 * doubts.share, 100 * flips.share)
    dev_calibration = None
    if setup.dev_split is not None:
        dev = [read_beliefs(path, setup.dev_split, setup.targets_of) for path in beliefs]
        dev_calibration = calibration(*(np.concatenate(parts) for parts in zip(*dev, strict=True)))
    return Round(
        index,
        setup.work_dir / f"round-{index}",
        soft_labels,
        doubts=doubts,
        flips=flips,
        calibration=calibration(teacher, given),
        dev_calibration=dev_calibration,
        num_unlabelled=pq.read_metadata(soft_labels).num_rows - len(table),
    )


def _true_labels(keyed: pd.DataFrame, setup: RoundSetup) -> np.ndarray | None:
    """Number of each pair's true label, -1 where it is not known; None where none is."""
    grades = setup.pairs.with_true_grades(keyed)["true_grade"]
    if grades.isna().all():
        return None
    return np.where(grades.notna(), setup.targets_of(grades).argmax(axis=1), -1)
