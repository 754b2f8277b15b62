"""A limit of time for a training: how many steps fit it, by what the first ones take, and the end when it is over."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import TrainerCallback

from csrm.training.data.packs import TrainingPack, collate
from csrm.training.model.relevance import PackedRelevanceModel, task_totals
from csrm.training.tuning import Tuning

_TRIAL_SHARE = 0.1
"""Of the time that is left, after which no more steps are tried."""
_USED_SHARE = 0.9
"""Of the time that is planned with: a machine may become busier."""
FORWARD_SHARE = 1 / 3
"""Of a step's time, that its forward pass takes."""
_MOST_RESERVED = 0.5


@dataclass(frozen=True)
class TimeLimit:
    """When a training must end."""

    minutes: float
    """Of the whole training; a stage that had another limit is another stage."""
    ends_at: float
    """Moment by time.monotonic."""
    share: float = 1.0
    """Part of the time that is left which the stage may take."""
    num_measured: int = 0
    """Pairs that the model scores after the stage, which takes of the time too."""

    @classmethod
    def begin(cls, minutes: float) -> "TimeLimit":
        """A limit that begins now."""
        return cls(minutes, time.monotonic() + 60 * minutes)

    def part(self, share: float = 1.0, num_measured: int = 0) -> "TimeLimit":
        """The limit of one stage of the training."""
        return replace(self, share=share, num_measured=num_measured)

    def seconds(self) -> float:
        """Seconds that the stage may take from now on; 0 where the time is over."""
        return max(0.0, (self.ends_at - time.monotonic()) * self.share)


@dataclass(frozen=True)
class Pace:
    """What a step takes."""

    step_s: float
    pairs_per_step: float
    """Judged pairs in a step."""

    def reserved_s(self, limit: TimeLimit) -> float:
        """Seconds of the limit that scoring the measured pairs afterwards takes, half of it at most."""
        pair_s = self.step_s * FORWARD_SHARE / self.pairs_per_step if self.pairs_per_step else 0.0
        return min(limit.num_measured * pair_s, _MOST_RESERVED * limit.seconds())


def planned_steps(seconds: float, step_s: float, most: int) -> int:
    """Steps that fit some seconds, one at least.

    >>> planned_steps(60.0, step_s=2.0, most=1_000), planned_steps(0.0, step_s=2.0, most=5)
    (27, 1)
    """
    return max(1, min(most, int(_USED_SHARE * seconds / step_s)))


def measure_pace(
    model: PackedRelevanceModel, steps: Sequence[Sequence[TrainingPack]], tuning: Tuning, limit: TimeLimit
) -> Pace:
    """Time some steps without changing a weight; the first one warms up, and counts only where it is alone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    most_s, seconds = _TRIAL_SHARE * limit.seconds(), []
    for packs in steps:
        start = time.monotonic()
        _forward_and_backward(model, packs, tuning, device)
        seconds.append(time.monotonic() - start)
        if sum(seconds) > most_s:
            break
    num_pairs = [sum(len(pack.targets) for pack in packs) for packs in steps[: len(seconds)]]
    return Pace(max(seconds[1:] or seconds), sum(num_pairs) / len(num_pairs))


def _forward_and_backward(
    model: PackedRelevanceModel, packs: Sequence[TrainingPack], tuning: Tuning, device: str
) -> None:
    size = max(1, len(packs) // tuning.accumulation_steps)
    for start in range(0, len(packs), size):
        inputs: dict[str, Any] = collate(packs[start : start + size], num_labels=len(model.label_ids))
        del inputs["keys"]
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        totals = task_totals(inputs["targets"], inputs["translation_index"])
        with torch.autocast(device, torch.bfloat16, enabled=tuning.precision == "bf16"):
            loss = model(**inputs, totals=totals)["loss"]
        loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    model.zero_grad(set_to_none=True)


class EndInTime(TrainerCallback):
    """Ends a training after the step in which its time is over."""

    def __init__(self, ends_at: float) -> None:
        self.ends_at = ends_at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() >= self.ends_at and state.global_step < state.max_steps:
            control.should_training_stop = control.should_log = True
