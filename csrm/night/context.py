"""What is fixed when a run starts, what its plan counts, and its clock."""

import time
from dataclasses import dataclass
from datetime import date, datetime

import numpy as np
from pyspark.resource import ResourceProfile

from csrm.bundle.loading import Bundle
from csrm.cli import Console
from csrm.night.settings import ScoringConfig
from csrm.spark.scoring import ScorerInfo


@dataclass(frozen=True)
class RunContext:
    """What is fixed when a run starts."""

    config: ScoringConfig
    run_id: str
    data_date: date
    started_at: datetime
    bundle: Bundle
    scorer: ScorerInfo
    profile: ResourceProfile | None
    console: Console
    is_repeated: bool
    """Whether there was an attempt before, which may have left rows."""


@dataclass(frozen=True)
class PlanCounts:
    """Pairs of a plan."""

    num_candidates: int
    num_unchanged: int
    num_reused: int
    rejected: dict[str, int]
    """Reason to pairs."""
    to_score: np.ndarray
    """Pairs to score in each bucket, shape (NUM_BUCKETS,)."""

    @property
    def num_to_score(self) -> int:
        return int(self.to_score.sum())


class PhaseClock:
    """Wall-clock seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage], self._last = now - self._last, now
