"""Progress of a scoring job: pairs, pairs/s, tokens/s and time left."""

import sys
import threading
import time
from typing import Any, TextIO

from pyspark import Accumulator
from pyspark.sql import SparkSession
from tqdm import tqdm

from csrm.cli import Console


class ScoringProgress:
    """Pairs, pairs/s, tokens/s and time left while a run scores; use it as a context manager.

    Counts arrive when a task ends. A terminal gets a tqdm bar, anything else is told at an interval.
    """

    def __init__(
        self,
        spark: SparkSession,
        num_pairs: int,
        interval_s: float = 10.0,
        console: Console | None = None,
        stream: TextIO = sys.stderr,
    ) -> None:
        """Make the counters; nothing is printed yet.

        Args:
            spark: the session.
            num_pairs: to score.
            interval_s: seconds between two lines.
            console: says the lines; None: they are written to the stream.
            stream: a terminal gets a bar.
        """
        self.num_pairs: Accumulator[int] = spark.sparkContext.accumulator(0)
        self.num_tokens: Accumulator[int] = spark.sparkContext.accumulator(0)
        self.num_prompt_tokens: Accumulator[int] = spark.sparkContext.accumulator(0)
        self.num_halved_packs: Accumulator[int] = spark.sparkContext.accumulator(0)
        self.waited_ms: Accumulator[int] = spark.sparkContext.accumulator(0)
        self.scored_ms: Accumulator[int] = spark.sparkContext.accumulator(0)
        self.counters = (
            *(self.num_pairs, self.num_tokens, self.num_prompt_tokens),
            *(self.num_halved_packs, self.waited_ms, self.scored_ms),
        )
        """What score_pair_batches counts, in its order."""
        self.seconds = 0.0
        """That the block took."""
        self._total = num_pairs
        self._interval_s = interval_s
        self._console = console
        self._stream = stream
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._report, name="csrm-progress", daemon=True)
        self._started = 0.0

    def __enter__(self) -> "ScoringProgress":
        self._started = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._started
        self._stopped.set()
        self._thread.join()

    @property
    def share_saved(self) -> float:
        """Share of the prompts' tokens that sharing a query's prefix saved, in [0, 1)."""
        num_prompt_tokens = self.num_prompt_tokens.value
        return 1 - self.num_tokens.value / num_prompt_tokens if num_prompt_tokens else 0.0

    @property
    def share_waited(self) -> float:
        """Share of the model's time in which it waited for the host to prepare pairs, in [0, 1]."""
        total_ms = self.waited_ms.value + self.scored_ms.value
        return self.waited_ms.value / total_ms if total_ms else 0.0

    def _report(self) -> None:
        if self._stream.isatty() and self._console is None:
            with tqdm(total=self._total, unit=" pairs", file=self._stream) as bar:
                while not self._stopped.wait(min(self._interval_s, 1.0)):
                    self._update(bar)
                self._update(bar)
            return
        said = None
        while not self._stopped.wait(self._interval_s):
            seconds = time.monotonic() - self._started
            if self._console is None:
                line = self.line(seconds)
                if line != said:  # while no task has ended, there is nothing new to say
                    self._stream.write(line + "\n")
                    self._stream.flush()
                said = line
            else:
                counts = {"num_pairs": self.num_pairs.value, "num_tokens": self.num_tokens.value}
                self._console.say("progress", "", seconds=seconds, total=self._total, **counts)

    def _update(self, bar: Any) -> None:
        seconds = time.monotonic() - self._started
        bar.set_postfix_str(f"{self.num_tokens.value / seconds:,.0f} tokens/s", refresh=False)
        bar.update(self.num_pairs.value - bar.n)

    def line(self, seconds: float) -> str:
        """State after some seconds, as one line."""
        num_pairs, num_tokens = self.num_pairs.value, self.num_tokens.value
        if not num_pairs:
            return f"scoring {self._total:,} pairs: workers start; counts come with each task that ends"
        pairs_per_s = num_pairs / seconds
        left = f"{(self._total - num_pairs) / pairs_per_s:,.0f} s left"
        return (
            f"scored {num_pairs:,} of {self._total:,} pairs, {pairs_per_s:,.0f} pairs/s, "
            f"{num_tokens / seconds:,.0f} tokens/s, {self.share_saved:.0%} saved by shared prefixes, {left}"
        )
