"""Scores of pairs: one pandas operator for the scoring job, and a pandas UDF for any DataFrame."""

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TextIO

import numpy as np
import pandas as pd
from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark import Accumulator, TaskContext
from pyspark.errors import PySparkException
from pyspark.resource import ResourceProfile, ResourceProfileBuilder, TaskResourceRequests
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.functions import pandas_udf
from tqdm import tqdm

from csrm import errors
from csrm.attempts import Attempts, open_attempts
from csrm.bundle import load_bundle, load_scorer
from csrm.cli import Console
from csrm.errors import BundleError, ConfigError, CsrmError, InputError, ScoringError
from csrm.schemas import SCORES_STAGING
from csrm.scoring import PAIR_COLUMNS, PairScorer, PreparedPairs

_PAIRS_PER_CALL = 1_024
_KEY_COLUMNS = ["market", "query_id", "product_id", "pair_key"]
_OPTIONAL_COLUMNS = ["retrieved_titles", "brand", "category", "attributes"]


@dataclass(frozen=True)
class ScorerInfo:
    """What a worker found when it loaded the bundle."""

    digest: str
    provider: str


@lru_cache(maxsize=1)
def _loaded_scorer(bundle_dir: str, device: str, threads: int, digest: str) -> PairScorer:
    """Load once per Python worker process; Spark calls the operator many times in one.

    The digest is part of the key: workers outlive a bundle that is replaced at its path.

    Raises:
        BundleError: the bundle at the path has another digest.
    """
    scorer = load_scorer(bundle_dir, device, threads)
    if scorer.digest != digest:
        raise BundleError(
            f"bundle {bundle_dir!r}: expected digest {digest}, this worker has {scorer.digest}. "
            "Put the same bundle on every machine, and leave it alone during a run."
        )
    return scorer


def task_threads(spark: SparkSession) -> int:
    """Threads of one forward pass: the cores that Spark gives a task, since tasks run side by side."""
    return int(spark.sparkContext.getConf().get("spark.task.cpus", "1") or "1")


def scoring_profile(spark: SparkSession, device: str, one_task_per_gpu: bool | None = None) -> ResourceProfile | None:
    """Resources of a task that scores: a GPU for itself, while the tasks of other stages use every core.

    Args:
        spark: the session.
        device: as in with_relevance_score.
        one_task_per_gpu: None: where the device is cuda and Spark's executors have GPU resources.

    Returns:
        The profile; None where a task that scores has what any task has.

    Raises:
        ConfigError: it was asked for, and the executors have no GPU resources.
    """
    conf = spark.sparkContext.getConf()
    has_gpus = int(conf.get("spark.executor.resource.gpu.amount", "0") or "0") > 0
    if one_task_per_gpu and not has_gpus:
        raise ConfigError(
            "one_task_per_gpu: expected executors with GPU resources, found none. Submit the job with "
            "--conf spark.executor.resource.gpu.amount=1, or leave this setting out."
        )
    if not has_gpus or not (device == "cuda" if one_task_per_gpu is None else one_task_per_gpu):
        return None
    return ResourceProfileBuilder().require(TaskResourceRequests().cpus(task_threads(spark)).resource("gpu", 1)).build


def task_device(device: str) -> str:
    """The device of this task: cuda is the GPU that Spark gave it, if it gave one."""
    context = TaskContext.get()
    gpu = context.resources().get("gpu") if context is not None else None
    return f"cuda:{gpu.addresses[0]}" if device == "cuda" and gpu is not None else device


def end_silent_workers(spark: SparkSession, minutes: float) -> None:
    """Have Spark kill Python workers that give no sign of life for so long; their tasks are tried again."""
    spark.conf.set("spark.sql.execution.pyspark.udf.idleTimeoutSeconds", str(max(1, round(60 * minutes))))
    spark.conf.set("spark.sql.execution.pyspark.udf.killOnIdleTimeout", "true")


@contextmanager
def errors_of_workers() -> Iterator[None]:
    """Where Spark fails in the block, raise what CSRM raised in a worker, as if it had been raised here.

    Raises:
        CsrmError: of a worker; ScoringError where it was something else that failed.
    """
    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        text = str(error)
        found = re.search(r"^csrm\.errors\.(\w+): (.+?)$", text, re.MULTILINE)
        if found is not None and hasattr(errors, found[1]):
            raise getattr(errors, found[1])(found[2]) from error
        raise ScoringError(
            f"Spark gave up: {_cause(text)}\nEach market is as it was or published whole, and what was staged is kept: "
            "start it again. The log of the executor that is named says more."
        ) from error


def _cause(text: str) -> str:
    """The line of a failure that says what it was: Spark's own about a task, where there is one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "Job aborted due to stage failure" in line), lines[0])


def probe_scorer(
    spark: SparkSession, bundle_dir: str, device: str, threads: int, profile: ResourceProfile | None = None
) -> ScorerInfo:
    """Load the bundle in a worker, where the scores will be made, and say what it is.

    Args:
        profile: as in with_relevance_score, as the others.

    Raises:
        CsrmError: what loading raised there: BundleError, DeviceError, ...
    """

    def probe(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for _ in batches:
            try:
                scorer = _loaded_scorer(bundle_dir, task_device(device), threads, load_bundle(bundle_dir).digest)
                found = (scorer.digest, scorer.provider, "", "")
            except CsrmError as error:
                found = ("", "", type(error).__name__, str(error))
            yield pd.DataFrame([found], columns=["digest", "provider", "error", "message"])

    schema = "digest string, provider string, error string, message string"
    row = spark.range(0, 1, 1, 1).mapInPandas(probe, schema, profile=profile).head()
    assert row is not None
    if row["error"]:
        raise getattr(errors, row["error"])(row["message"])
    return ScorerInfo(row["digest"], row["provider"])


def score_pair_batches(
    batches: Iterator[pd.DataFrame],
    scorer: PairScorer,
    on_scored: Callable[[int, int, int, int], None],
    attempts: Attempts | None = None,
) -> Iterator[pd.DataFrame]:
    """Scores of Arrow batches of pairs, or why they have none, in the order of their rows; tested without Spark.

    Args:
        batches: market, query_id, product_id, pair_key and PAIR_COLUMNS; pairs of one query best side by side.
        scorer: a loaded bundle.
        on_scored: called after each step of at most 1,024 pairs with the number of pairs, of tokens that were computed,
            of tokens of their prompts, whose prefixes are computed once a pack, and of packs that had to be halved.
        attempts: of earlier processes that may have died at one of these pairs; None: there were none.
    """
    steps = (
        batch.iloc[start : start + _PAIRS_PER_CALL].reset_index(drop=True)
        for batch in batches
        for start in range(0, len(batch), _PAIRS_PER_CALL)
    )
    try:
        ready = _prepared_ahead(steps, scorer) if attempts is None else ((step, None) for step in steps)
        for pairs, prepared in ready:
            before = np.array(_counts(scorer))
            scores = scorer.score_or_reject(pairs, prepared) if attempts is None else attempts.score(scorer, pairs)
            on_scored(len(pairs), *(np.array(_counts(scorer)) - before).tolist())
            yield pd.concat([pairs[_KEY_COLUMNS], scores], axis=1)
    finally:
        if attempts is not None:
            attempts.close()


def _prepared_ahead(
    steps: Iterator[pd.DataFrame], scorer: PairScorer
) -> Iterator[tuple[pd.DataFrame, PreparedPairs | None]]:
    """Each step's pairs with their packs, which a thread makes while the step before is scored: a GPU does not wait.

    None where they cannot be made: score_or_reject finds out why.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="csrm-prepare") as pool:
        waiting: tuple[pd.DataFrame, Future[PreparedPairs]] | None = None
        for pairs in steps:
            following = pairs, pool.submit(scorer.prepare, pairs)
            if waiting is not None:
                yield _once_prepared(*waiting)
            waiting = following
        if waiting is not None:
            yield _once_prepared(*waiting)


def _once_prepared(pairs: pd.DataFrame, preparing: Future[PreparedPairs]) -> tuple[pd.DataFrame, PreparedPairs | None]:
    return pairs, None if preparing.exception() else preparing.result()


def _counts(scorer: PairScorer) -> tuple[int, int, int]:
    return scorer.num_tokens, scorer.num_prompt_tokens, scorer.num_halved_packs


def with_relevance_score(
    pairs_df: DataFrame,
    bundle_dir: str,
    device: str,
    bundle_digest: str,
    run_id: str,
    threads: int = 1,
    progress: "ScoringProgress | None" = None,
    profile: ResourceProfile | None = None,
    attempts_dir: str | None = None,
    is_repeated: bool = False,
) -> DataFrame:
    """Pairs with their scores, or why they have none, as rows of scores_staging. One Python operator.

    Args:
        pairs_df: market, query_id, product_id, pair_key and PAIR_COLUMNS, laid out by with_scoring_layout.
        bundle_dir: the bundle's folder, the same path on every machine.
        device: cpu; cuda, which is the GPU that Spark gives the task, or the first one; or cuda:<number>.
        bundle_digest: digest that the bundle must have on every machine.
        run_id: run that scores.
        threads: threads of one forward pass on the CPU.
        progress: counts what is scored; None where there are no accumulators (Spark Connect).
        profile: see scoring_profile.
        attempts_dir: where attempts of the run note what they are at (see csrm.attempts); None: they do not.
        is_repeated: whether the run was started before. Else the first attempt of a task notes nothing.
    """
    counters = () if progress is None else progress.counters

    def on_scored(*counts: int) -> None:
        for counter, count in zip(counters, counts, strict=False):
            counter.add(count)

    def score(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        scorer = _loaded_scorer(bundle_dir, task_device(device), threads, bundle_digest)
        context = TaskContext.get()
        is_again = is_repeated or (context is not None and context.attemptNumber() > 0)
        attempts = open_attempts(attempts_dir) if is_again and attempts_dir is not None else None
        yield from score_pair_batches(batches, scorer, on_scored, attempts)

    schema = (
        "market string, query_id string, product_id string, pair_key bigint, "
        "relevance_score float, predicted_grade string, reason string"
    )
    return (
        pairs_df.select(*_KEY_COLUMNS, *[name for name in PAIR_COLUMNS if name not in _KEY_COLUMNS])
        .mapInPandas(score, schema, profile=profile)
        .withColumns(
            {
                "bundle_digest": F.lit(bundle_digest),
                "scored_at": F.current_timestamp(),
                "run_id": F.lit(run_id),
            }
        )
        .select(*SCORES_STAGING.column_names)
    )


def relevance_score_udf(bundle_dir: str, device: str = "cpu", threads: int = 1) -> Any:
    """Pandas UDF from a struct of PAIR_COLUMNS to the relevance score (float), for any DataFrame.

    Fields may come in any order; market, language, query and title must be there, the others may be absent. The UDF
    is marked non-deterministic so that Spark does not compute it twice where the plan uses it twice. It scores with the
    bundle that is at the path when it is made: after a bundle is replaced, make a new one.

        score = relevance_score_udf("conf/demo_bundle")
        df.withColumn("relevance_score", score(F.struct("market", "language", "query", "title")))

    Raises:
        BundleError: see load_bundle; in a worker also where its bundle is another one.
    """
    digest = load_bundle(bundle_dir).digest

    def score(batches: Iterator[pd.DataFrame]) -> Iterator[pd.Series]:
        scorer = _loaded_scorer(bundle_dir, task_device(device), threads, digest)
        for batch in batches:
            yield scorer.score(_with_pair_columns(batch))["relevance_score"]

    return pandas_udf(score, "float").asNondeterministic()  # type: ignore[call-overload]


def _with_pair_columns(pairs: pd.DataFrame) -> pd.DataFrame:
    missing = [name for name in PAIR_COLUMNS if name not in pairs.columns and name not in _OPTIONAL_COLUMNS]
    if missing:
        raise InputError(
            f"relevance_score_udf: missing fields {missing}; the struct has {list(pairs.columns)}. "
            f"Pass F.struct of {PAIR_COLUMNS}, of which {_OPTIONAL_COLUMNS} may be left out."
        )
    absent = {name: None for name in _OPTIONAL_COLUMNS if name not in pairs.columns}
    return pairs.assign(**absent)[PAIR_COLUMNS]


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
        """
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
        self.counters = (self.num_pairs, self.num_tokens, self.num_prompt_tokens, self.num_halved_packs)
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

    def _report(self) -> None:
        if self._stream.isatty() and self._console is None:
            with tqdm(total=self._total, unit=" pairs", file=self._stream) as bar:
                while not self._stopped.wait(min(self._interval_s, 1.0)):
                    self._update(bar)
                self._update(bar)
            return
        while not self._stopped.wait(self._interval_s):
            seconds = time.monotonic() - self._started
            if self._console is None:
                self._stream.write(self.line(seconds) + "\n")
                self._stream.flush()
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
        pairs_per_s = num_pairs / seconds
        left = f"{(self._total - num_pairs) / pairs_per_s:,.0f} s left" if num_pairs else "time left not known yet"
        return (
            f"scored {num_pairs:,} of {self._total:,} pairs, {pairs_per_s:,.0f} pairs/s, "
            f"{num_tokens / seconds:,.0f} tokens/s, {self.share_saved:.0%} saved by shared prefixes, {left}"
        )
