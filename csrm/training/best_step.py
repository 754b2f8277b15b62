"""The step that is kept: a training measures the dev split while it runs, and the weights of its best step remain."""

import hashlib
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from accelerate import PartialState
from accelerate.utils import gather_object

from csrm.evaluation.metrics import PAIR_METRICS, QUERY_METRICS, evaluate_scores
from csrm.schemas import PAIR_KEY
from csrm.scoring.scorer import PairScorer
from csrm.training.settings import TrainConfig, grade_gains
from csrm.training.time_limit import FORWARD_SHARE

SCORE = "relevance_score"
DEV_SCORES = "dev_scores.parquet"
"""File of a checkpoint and of a trained folder: the scores that it gives the dev split."""
METRICS = {"roc_auc": PAIR_METRICS[0], "ndcg_at_10": QUERY_METRICS[0]}
"""Name in a history to the metric; the first one chooses the step, as it chooses the round of a distillation: its gains
stand out from their error more than those of nDCG@10 (tests/benchmarks/noisy_labels.py)."""
MOST_EVALUATIONS = 6
MOST_SHARE = 0.1
"""Of the training's time, that all evaluations but the last may take; that one is the measure of the model."""


@dataclass(frozen=True)
class DevSplit:
    """Judged pairs that a training is measured by."""

    pairs: pd.DataFrame
    """Pairs with their texts: columns of csrm.training.data.judged.JudgedPairs.read."""
    gains: Mapping[str, float]
    """Gain of each grade."""
    relevant: Set[str]
    """Grades of the largest gain."""
    irrelevant: Set[str]
    """Grades of the least gain."""

    @classmethod
    def of(cls, pairs: pd.DataFrame, config: TrainConfig) -> "DevSplit | None":
        """The dev split of a training; None where it cannot choose a step: all or no pairs are of the best grade."""
        gains, relevant, irrelevant = grade_gains(config)
        is_relevant = pairs["grade"].isin(relevant)
        return cls(pairs, gains, relevant, irrelevant) if is_relevant.any() and not is_relevant.all() else None

    def digest(self) -> str:
        """Digest of the pairs, in hexadecimal, with their texts and grades."""
        text = self.pairs.to_json(orient="records") + repr(sorted(self.gains.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    def scores(self, scorer: PairScorer) -> pd.DataFrame:
        """Scores of the pairs, on their index; under several processes each scores a part of the queries."""
        state = PartialState()
        queries = self.pairs.groupby(["market", "query_id"], sort=False).ngroup()
        own = self.pairs[queries % state.num_processes == state.process_index]
        return pd.concat(gather_object([scorer.score(own)])).loc[self.pairs.index]

    def metrics(self, scores: pd.DataFrame) -> dict[str, float]:
        """METRICS by their names, over all markets."""
        table = evaluate_scores(
            self.pairs.assign(**{SCORE: scores[SCORE]}),
            [SCORE],
            gains=self.gains,
            relevant_grades=self.relevant,
            irrelevant_grades=self.irrelevant,
            num_resamples=2,  # of the intervals, which nobody asks for here
        ).metrics
        values = table[table["ranking"] == SCORE].groupby("metric")["value"].last()  # the last market is all of them
        return {name: float(values[metric]) for name, metric in METRICS.items()}

    def write_scores(self, path: Path, scores: pd.DataFrame) -> None:
        """Write the scores with the keys of their pairs."""
        pd.concat([self.pairs[[*PAIR_KEY]], scores], axis=1).to_parquet(path, index=False)


def known_scores(model_dir: Path, pairs: pd.DataFrame) -> pd.DataFrame | None:
    """Judged pairs with the scores that the kept step of a training gave them; None where it did not measure them."""
    path = model_dir / DEV_SCORES
    if not path.exists():
        return None
    scores = pd.read_parquet(path)
    if not scores[[*PAIR_KEY]].equals(pairs[[*PAIR_KEY]].reset_index(drop=True)):
        return None
    return pairs.assign(**{name: scores[name].to_numpy() for name in scores.columns.drop([*PAIR_KEY])})


def evaluation_steps(steps: int, pairs_per_step: float, num_dev: int, wanted: int | None) -> int | None:
    """Steps between two evaluations; None: the model is measured when it is trained.

    Args:
        steps: of the training.
        pairs_per_step: judged pairs that a step learns, on average.
        num_dev: pairs of the dev split.
        wanted: the setting tuning.eval_steps.

    >>> evaluation_steps(600, pairs_per_step=40.0, num_dev=1_000, wanted=None)  # six, the last one at the end
    100
    >>> evaluation_steps(600, pairs_per_step=40.0, num_dev=3_000, wanted=None)  # 1,000 pairs' time each: 10 % is 2,400
    200
    >>> evaluation_steps(600, pairs_per_step=40.0, num_dev=9_000, wanted=None)
    >>> evaluation_steps(600, pairs_per_step=40.0, num_dev=9_000, wanted=300)
    300
    """
    if wanted is not None:
        return wanted or None
    before_last = MOST_SHARE * steps * pairs_per_step / (FORWARD_SHARE * num_dev)
    num_evaluations = min(MOST_EVALUATIONS, 1 + int(before_last), steps)
    return None if num_evaluations < 2 else math.ceil(steps / num_evaluations)


class KeptStep(NamedTuple):
    """The step that dev chose."""

    step: int
    num_steps: int
    """Steps of the training."""
    value: float
    """ROC-AUC on dev."""
    last_value: float
    """ROC-AUC on dev of the last step that was measured."""

    def __str__(self) -> str:
        last = "" if self.step == self.num_steps else f", {self.last_value:.4f} at the last that was measured"
        return (
            f"dev chose step {self.step:,} of {self.num_steps:,}: {PAIR_METRICS[0]} {self.value:.4f}{last}. So dev "
            "flatters the model: measure it on a split that chose nothing"
        )


def kept_step(history: Sequence[Mapping[str, float]], step: int | None) -> KeptStep | None:
    """The step that dev chose, with what dev shows there and at the end; None where dev chose none.

    Args:
        history: see csrm.training.stage.train_stage.
        step: the step whose weights are kept.
    """
    name = f"dev_{next(iter(METRICS))}"
    values = {int(entry["step"]): entry[name] for entry in history if name in entry}
    if step is None or step not in values:
        return None
    return KeptStep(step, int(history[-1]["step"]), values[step], values[max(values)])


def joined_history(entries: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, float]]:
    """Trainer's log: one entry a step that has a loss, with the dev metrics that were measured after it.

    Args:
        entries: of the log, in their order.
        names: what is kept of an entry.
    """
    history: list[dict[str, float]] = []
    for entry in entries:
        if "loss" in entry:
            history.append({name: entry[name] for name in names if name in entry})
        elif history and entry["step"] == history[-1]["step"]:
            history[-1] |= {f"dev_{name}": entry[f"eval_{name}"] for name in METRICS if f"eval_{name}" in entry}
    return history


def mean_loss(history: Sequence[Mapping[str, float]]) -> float:
    """Mean over the steps, of entries that are means over the steps since the one before."""
    steps = [entry["step"] for entry in history]
    return float(np.average([entry["loss"] for entry in history], weights=np.diff(steps, prepend=0)))
