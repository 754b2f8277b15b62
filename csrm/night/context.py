"""What is fixed when a run starts, and the clock of its phases."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import cached_property
from importlib.metadata import version
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

import csrm
from csrm.bundle.loading import Bundle
from csrm.cli import Console, without_credentials
from csrm.night.leases import Lease
from csrm.night.settings import ScoringConfig
from csrm.schemas import RELEVANCE_SCORES
from csrm.spark.inputs import Input
from csrm.spark.scoring import ScorerInfo, ScorerPlace
from csrm.spark.storage import attempts_path
from csrm.spark.tables import read_table, table_path


class PhaseClock:
    """Wall-clock seconds of each phase of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """Phase to seconds."""
        self._last = time.monotonic()

    def lap(self, phase: str) -> None:
        """End a phase, which began where the one before it ended."""
        now = time.monotonic()
        self.seconds[phase], self._last = now - self._last, now


@dataclass(frozen=True)
class RunContext:
    """What is fixed when a run starts."""

    spark: SparkSession
    config: ScoringConfig
    run_id: str
    data_date: date
    started_at: datetime
    bundle: Bundle
    place: ScorerPlace
    scorer: ScorerInfo
    inputs: Mapping[str, Input]
    """Name of each input table to what was read of it."""
    leases: Mapping[str, Lease]
    """Market to the lease that the run holds; that of its id is under RUN_ID."""
    base_version: int
    """Version of relevance_scores that the run compares with."""
    table_id: str
    """Delta's id of relevance_scores, which its versions belong to."""
    is_repeated: bool
    """Whether there was an attempt before, which may have left rows."""
    console: Console
    clock: PhaseClock = field(default_factory=PhaseClock)

    @cached_property
    def published_df(self) -> DataFrame:
        """The published scores of the run's markets, as the run found them."""
        path = table_path(self.config.tables, RELEVANCE_SCORES)
        scores_df = read_table(self.spark, RELEVANCE_SCORES, path, self.base_version)
        return scores_df.where(F.col("market").isin(*sorted(self.config.markets)))

    def require_leases(self) -> None:
        """Refuse to write what another run may have taken over.

        Raises:
            LeaseError: a lease has ended, or another run took it.
        """
        for lease in self.leases.values():
            lease.require()

    @property
    def device_text(self) -> str:
        """Device and provider, as scoring_runs names them."""
        return f"{self.config.device} ({self.scorer.provider})"

    @property
    def attempts_dir(self) -> str:
        """Folder in which the run's workers note what they are at."""
        return attempts_path(self.config.tables, self.run_id)

    def first_row(self) -> dict[str, Any]:
        """The run's row of scoring_runs when the run begins; its seconds are those of the clock."""
        return {
            "run_id": self.run_id,
            "data_date": self.data_date,
            "markets": sorted(self.config.markets),
            "started_at": self.started_at,
            "verdict": "running",
            "inputs": {
                name: without_credentials(read.path) + ("" if read.version is None else f"@v{read.version}")
                for name, read in self.inputs.items()
            },
            "bundle_digest": self.scorer.digest,
            "precision": self.bundle.settings.precision,
            "device": self.device_text,
            "versions": {"csrm": csrm.__version__, **{name: version(name) for name in ("pyspark", "delta-spark")}},
            "base_version": self.base_version,
            "table_id": self.table_id,
            "seconds": self.clock.seconds,
        }
