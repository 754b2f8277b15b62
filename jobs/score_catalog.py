"""Score the candidate pairs whose prompt changed, and publish what changed.

From catalog, queries, retrieval_table and candidates to relevance_scores. Every pair is looked at; scored are those
whose published score does not come from the same prompt and bundle. Started again after it died, or after its audit
rejected it, it finds the scores that it had staged.
"""

import argparse
import math
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
from pydantic import Field
from pyspark import StorageLevel
from pyspark.resource import ResourceProfile
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

import csrm
from csrm.attempts import forget_attempts
from csrm.audit import NEVER_ACCEPTED, AuditLimits, AuditResult, Canary, MarketOutcome, audit_market, failures
from csrm.bundle import Bundle, load_bundle
from csrm.cli import Console, add_log_format, job_parser, run_job
from csrm.config import InputSpec, Settings, load_config
from csrm.errors import AuditError, ConfigError, InputError, LeaseError
from csrm.schemas import (
    CANDIDATES,
    CATALOG,
    JUDGMENTS,
    QUERIES,
    REJECTED_PAIRS,
    RELEVANCE_SCORES,
    RETRIEVAL_TABLE,
    RUN_PAIRS,
    SCORES_STAGING,
    Table,
)
from csrm.spark.inputs import Input, errors_of_inputs, read_inputs, require_unchanged
from csrm.spark.leases import LEASE_SECONDS, Lease, hold_leases
from csrm.spark.outcome import measure_canaries, measure_ndcgs, measure_outcomes
from csrm.spark.pairs import (
    NUM_BUCKETS,
    num_scoring_partitions,
    plan_pairs,
    query_fields,
    with_rejections,
    with_retrieved_titles,
    with_scoring_layout,
    with_texts,
)
from csrm.spark.publish import publish_changes, run_changes, say_publication
from csrm.spark.runs import (
    PUBLISHED,
    check_same_run,
    create_output_tables,
    find_run,
    read_open_staging,
    read_run_rows,
    record_end,
    record_run,
    scoring_rate,
    write_run_rows,
)
from csrm.spark.scoring import (
    ScorerInfo,
    ScoringProgress,
    end_silent_workers,
    errors_of_workers,
    probe_scorer,
    scoring_profile,
    task_threads,
    with_relevance_score,
)
from csrm.spark.session import build_session
from csrm.spark.staging import Chunk, canary_pairs, in_chunk, stage_scores
from csrm.spark.tables import attempts_path, read_table, table_path, table_version


class ScoringInputs(Settings):
    """Where the input tables are."""

    catalog: InputSpec
    queries: InputSpec
    candidates: InputSpec | None = None
    """Default: the table that build_candidates wrote into `tables`."""
    retrieval_table: InputSpec | None = None
    """Default: the table that build_retrieval_table wrote into `tables`."""
    judgments: InputSpec | None = None
    """Human grades of pairs: a new bundle's nDCG is compared with the published one's. Default: not compared."""


class ScoringConfig(Settings):
    """Settings of the scoring job."""

    markets: dict[str, str] = Field(min_length=1)
    """Market to the language of its queries that name none (BCP 47)."""
    inputs: ScoringInputs
    tables: str
    """Folder that holds the tables that CSRM writes, any URI."""
    bundle: str
    """Folder of the bundle, the same path on every machine; or its URI, fetched once to each machine."""
    bundle_digest: str | None = None
    """Digest that the bundle must have, or its first characters; default: any."""
    device: str = "cpu"
    """cpu; cuda, which is the GPU that Spark gives a task, or the first one; or cuda:<number>."""
    one_task_per_gpu: bool | None = None
    """Whether a task that scores has a GPU for itself, while joins use every core (stage-level scheduling); default:
    where the device is cuda and spark.executor.resource.gpu.amount is set."""
    use_retrieved_titles: bool = True
    """Whether retrieved titles augment the queries."""
    broadcast_limit_mb: int = Field(default=256, ge=0)
    """Retrieved titles up to this size (estimated, MiB) are broadcast; larger ones are joined by a shuffle."""
    num_partitions: int | None = Field(default=None, ge=1)
    """Partitions to score; default: see num_scoring_partitions."""
    products_per_chunk: int = Field(default=256, ge=1)
    """Products of one query that are scored side by side; a query with more is spread over partitions."""
    chunk_minutes: float = Field(default=10.0, gt=0)
    """About so much work is staged in one commit; a run that dies loses no more of it. Below a minute the start of each
    chunk takes more than its pairs."""
    canary_pairs: int = Field(default=100, ge=0)
    """Unchanged pairs of each market that are scored again, and must have the score that is published."""
    audit: AuditLimits = AuditLimits()
    """Where the audit keeps a run from being published."""
    hang_minutes: float = Field(default=30.0, gt=0)
    """A worker that gives back no scores for so long is ended, and its task tried again; a pair at which that happens
    again is set aside."""
    lease_seconds: float = Field(default=LEASE_SECONDS, gt=1)
    """A run that was silent for so long has lost its markets to whoever asks next."""
    progress_seconds: float = Field(default=10.0, gt=0)
    """Seconds between lines of progress."""


def build_parser() -> argparse.ArgumentParser:
    parser = job_parser(__doc__, "conf/score_catalog.yaml")
    parser.add_argument("--run-id", help="name of the run; default: data date and time of start")
    parser.add_argument("--data-date", help="day whose inputs are scored, YYYY-MM-DD; default: today (UTC)")
    add_log_format(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    console = Console(args.log_format == "json")
    started_at = datetime.now(UTC)
    config = load_config(args.config, ScoringConfig, args.overrides)
    data_date = _data_date(args.data_date, started_at)
    run_id = args.run_id or f"{data_date}-{started_at:%H%M%S}"
    if not re.fullmatch(r"\w[\w.:-]*", run_id):  # it names a folder: not ..
        raise ConfigError(f"--run-id {run_id!r}: expected letters, digits and . : _ - only, none of . : - first.")
    bundle = load_bundle(config.bundle, config.bundle_digest)

    spark = build_session("csrm-score-catalog")
    _end_by_signal()
    # Before any Spark job: a run that holds a lease may hold all executors too.
    with hold_leases(spark, config.tables, list(config.markets), f"run {run_id}", config.lease_seconds) as leases:
        earlier = find_run(spark, config.tables, run_id)
        if earlier is not None:
            check_same_run(earlier, config.markets, bundle.digest)
            if earlier["verdict"] in PUBLISHED:
                version_ = earlier["published_version"]
                text = f"run {run_id} was published before: relevance_scores version {version_}."
                console.say("already_published", text, run_id=run_id, version=version_)
                return 0
        _warn_of_languages(bundle, config.markets, console)
        profile = scoring_profile(spark, config.device, config.one_task_per_gpu)
        scorer = probe_scorer(spark, config.bundle, config.device, task_threads(spark), profile)
        night = Night(config, run_id, data_date, started_at, bundle, scorer, profile, console, earlier is not None)
        clock = _Clock()
        create_output_tables(spark, config.tables)
        inputs = read_inputs(spark, _input_specs(config), config.markets)
        end_silent_workers(spark, config.hang_minutes)
        with errors_of_workers(), errors_of_inputs(spark, inputs):
            return score_and_publish(spark, night, inputs, leases, clock)


@dataclass(frozen=True)
class Night:
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


def score_and_publish(
    spark: SparkSession, night: Night, inputs: Mapping[str, Input], leases: Mapping[str, Lease], clock: "_Clock"
) -> int:
    """A run, from its inputs to its row of scoring_runs; its markets are held by the leases.

    Raises:
        InputError: a market has no candidates, or an input was changed since it was read.
        AuditError: nothing was published.
        LeaseError: another run took over a market.
    """
    config, run_id, console = night.config, night.run_id, night.console
    scores_path = table_path(config.tables, RELEVANCE_SCORES)
    base_version = table_version(spark, scores_path)
    published_df = read_table(spark, RELEVANCE_SCORES, scores_path, base_version).where(
        F.col("market").isin(*sorted(config.markets))
    )
    row = _first_row(night, inputs, base_version) | {"seconds": clock.seconds}
    record_run(spark, config.tables, row)
    clock.lap("inputs")

    planned_df = plan_pairs(
        inputs["candidates"].df,
        _augmented_queries(inputs, config),
        inputs["catalog"].df,
        published_df,
        read_open_staging(spark, config.tables, config.markets, run_id),
        night.scorer.digest,
    ).withColumn("run_id", F.lit(run_id))
    write_run_rows(planned_df.sortWithinPartitions("bucket"), RUN_PAIRS, config.tables, run_id)
    planned_df = read_run_rows(spark, RUN_PAIRS, config.tables, run_id)
    counts = _count_plan(planned_df, inputs["candidates"], config)
    if counts.rejected or night.is_repeated:
        write_run_rows(planned_df.where("state = 'rejected'"), REJECTED_PAIRS, config.tables, run_id)
    row |= {name: getattr(counts, name) for name in ("num_candidates", "num_unchanged", "num_reused", "rejected")}
    pairs_per_s = scoring_rate(spark, config.tables, night.scorer.digest, row["device"]) or _exported_rate(spark, night)
    clock.lap("plan")
    _say_plan(night, row, counts.num_to_score, pairs_per_s)

    def score(chunk: Chunk) -> DataFrame:
        pairs_df = planned_df.where("state = 'to_score'").where(chunk.holds(F.col("bucket")))
        queries_df = _augmented_queries(inputs, config, chunk)
        return _scored(spark, night, pairs_df, chunk.num_pairs, queries_df, inputs["catalog"].df, progress)

    lines = console if console.as_json else None
    with ScoringProgress(spark, counts.num_to_score, config.progress_seconds, lines) as progress:
        attempt = f"csrm-staging/{run_id}/{night.started_at.timestamp()}"
        stage_scores(spark, config.tables, attempt, counts.to_score, score, 60 * config.chunk_minutes, pairs_per_s)
    clock.lap("scoring")
    _say_scored(console, counts.num_to_score, clock.seconds["scoring"], progress.share_saved)
    staged_df = read_open_staging(spark, config.tables, config.markets, run_id)
    if not staged_df.where("reason IS NOT NULL").isEmpty():
        write_run_rows(with_rejections(planned_df, staged_df), RUN_PAIRS, config.tables, run_id)
        planned_df = read_run_rows(spark, RUN_PAIRS, config.tables, run_id)
        write_run_rows(planned_df.where("state = 'rejected'"), REJECTED_PAIRS, config.tables, run_id)
        counts = _count_plan(planned_df, inputs["candidates"], config)
        _say_rejected_pairs(console, counts.rejected)
    row |= {name: getattr(counts, name) for name in ("num_reused", "rejected")}
    row |= {"num_scored": counts.num_to_score}
    row |= {name: getattr(progress, name).value for name in ("num_tokens", "num_halved_packs")}
    _say_halved_packs(console, row["num_halved_packs"])

    canaries = {}
    if counts.num_unchanged and config.canary_pairs:
        canaries = _score_canaries(spark, night, planned_df, published_df, inputs)
    forget_attempts(attempts_path(config.tables, run_id))
    clock.lap("canary")

    changes_df = run_changes(planned_df, published_df, staged_df, run_id).persist(StorageLevel.MEMORY_AND_DISK)
    try:
        outcomes = _outcomes(night, inputs, planned_df, published_df, changes_df, canaries)
        row["audit"] = results = [
            result for outcome in outcomes.values() for result in audit_market(outcome, config.audit)
        ]
        clock.lap("audit")
        _say_warnings(console, results)
        if failures(results):
            record_end(spark, config.tables, row, "rejected")
            raise AuditError(_say_rejected(night, results))
        require_unchanged(spark, inputs)
        num_changes = {market: outcome.num_changes for market, outcome in outcomes.items() if outcome.num_changes}
        metadata = {"run_id": run_id, "bundle_digest": night.scorer.digest}
        try:
            publication = publish_changes(spark, config.tables, changes_df, num_changes, leases, metadata)
        except LeaseError:
            record_end(spark, config.tables, row, "superseded")
            console.say("superseded", "", run_id=run_id)
            raise
    finally:
        changes_df.unpersist()
    clock.lap("publish")
    row["changes"] = publication.totals
    verdict = "published" if num_changes else "already_published"
    record_end(spark, config.tables, row, verdict, publication.version)
    say_publication(console, verdict, run_id, publication, config.tables)
    return 0


def _data_date(text: str | None, started_at: datetime) -> date:
    if text is None:
        return started_at.date()
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"--data-date {text!r}: expected YYYY-MM-DD.") from error


def _warn_of_languages(bundle: Bundle, markets: Mapping[str, str], console: Console) -> None:
    """A bundle scores any language; only of those of its golden pairs is it known to have been looked at."""
    known = {language for language in bundle.golden_pairs().pairs["language"] if language}
    names = ", ".join(sorted(known))
    for market, language in markets.items():
        if language not in known:
            text = f"market {market!r} is in {language}; the bundle was proven on pairs in {names} only."
            console.say("warning", f"warning: {text}", market=market, sentence=text)


def _end_by_signal() -> None:
    """SIGTERM, which Airflow and Kubernetes send, ends the run as Ctrl-C does: leases are given back."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)


def _input_specs(config: ScoringConfig) -> dict[Table, InputSpec]:
    specs = {
        CATALOG: config.inputs.catalog,
        QUERIES: config.inputs.queries,
        CANDIDATES: config.inputs.candidates or InputSpec(path=table_path(config.tables, CANDIDATES)),
    }
    if config.use_retrieved_titles:
        specs[RETRIEVAL_TABLE] = config.inputs.retrieval_table or InputSpec(
            path=table_path(config.tables, RETRIEVAL_TABLE)
        )
    if config.inputs.judgments is not None:
        specs[JUDGMENTS] = config.inputs.judgments
    return specs


def _first_row(night: Night, inputs: Mapping[str, Input], base_version: int) -> dict[str, Any]:
    """Of scoring_runs, when the run begins."""
    packages = ("pyspark", "delta-spark")
    return {
        "run_id": night.run_id,
        "data_date": night.data_date,
        "markets": sorted(night.config.markets),
        "started_at": night.started_at,
        "verdict": "running",
        "inputs": {name: _named_version(read) for name, read in inputs.items()},
        "bundle_digest": night.scorer.digest,
        "precision": night.bundle.settings.precision,
        "device": f"{night.config.device} ({night.scorer.provider})",
        "versions": {"csrm": csrm.__version__, **{name: version(name) for name in packages}},
        "base_version": base_version,
    }


def _augmented_queries(inputs: Mapping[str, Input], config: ScoringConfig, chunk: Chunk | None = None) -> DataFrame:
    """What a prompt says of each query, or of those of a chunk."""
    queries_df = inputs["queries"].df
    if not config.use_retrieved_titles:
        queries_df = queries_df.selectExpr("*", "cast(array() as array<string>) AS retrieved_titles")
        return query_fields(queries_df if chunk is None else in_chunk(queries_df, chunk), config.markets)
    retrieval_df = inputs["retrieval_table"].df
    if chunk is not None:
        queries_df, retrieval_df = in_chunk(queries_df, chunk), in_chunk(retrieval_df, chunk)
    return query_fields(with_retrieved_titles(queries_df, retrieval_df, config.broadcast_limit_mb), config.markets)


def _count_plan(planned_df: DataFrame, candidates: Input, config: ScoringConfig) -> PlanCounts:
    counts = planned_df.groupBy("market", "state", "reason", "bucket").count().toPandas()
    markets = set(counts["market"])
    if empty := sorted(config.markets.keys() - markets):
        raise InputError(
            f"input candidates at {candidates.path!r}: no pairs for the markets {empty}; it has {sorted(markets)} of "
            f"{sorted(config.markets)}. Build their candidates, or take them out of 'markets'."
        )
    by_state = counts.groupby("state")["count"].sum()
    by_reason = counts.groupby("reason")["count"].sum()
    to_score = counts[counts["state"] == "to_score"]
    return PlanCounts(
        num_candidates=int(counts["count"].sum()),
        num_unchanged=int(by_state.get("unchanged", 0)),
        num_reused=int(by_state.get("staged", 0)),
        rejected={str(reason): int(count) for reason, count in by_reason.items()},
        to_score=np.bincount(to_score["bucket"], weights=to_score["count"], minlength=NUM_BUCKETS).astype(int),
    )


def _exported_rate(spark: SparkSession, night: Night) -> float:
    """Pairs a second that the bundle's export measured, times the tasks that run side by side."""
    settings = night.bundle.settings
    (report,) = (report for report in settings.precisions if report.precision == settings.precision)
    return report.pairs_per_s * (spark.sparkContext.defaultParallelism // task_threads(spark))


def _scored(
    spark: SparkSession,
    night: Night,
    pairs_df: DataFrame,
    num_pairs: int,
    queries_df: DataFrame,
    catalog_df: DataFrame,
    progress: ScoringProgress | None = None,
) -> DataFrame:
    """Rows of scores_staging for about num_pairs planned pairs."""
    config, threads = night.config, task_threads(spark)
    num_partitions = config.num_partitions or num_scoring_partitions(
        num_pairs, spark.sparkContext.defaultParallelism // threads
    )
    texts_df = with_texts(pairs_df, queries_df, catalog_df)
    laid_out_df = with_scoring_layout(texts_df, num_partitions, config.products_per_chunk)
    return with_relevance_score(
        laid_out_df,
        config.bundle,
        config.device,
        night.scorer.digest,
        night.run_id,
        threads,
        progress,
        night.profile,
        attempts_path(config.tables, night.run_id),
        night.is_repeated,
    )


def _score_canaries(
    spark: SparkSession, night: Night, planned_df: DataFrame, published_df: DataFrame, inputs: Mapping[str, Input]
) -> dict[str, Canary]:
    config = night.config
    sample_df = canary_pairs(planned_df, published_df, config.canary_pairs, night.run_id).persist()
    try:
        num_pairs = config.canary_pairs * len(config.markets)
        scored_df = _scored(
            spark, night, sample_df, num_pairs, _augmented_queries(inputs, config), inputs["catalog"].df
        )
        both_df = sample_df.join(scored_df, on=["market", "query_id", "product_id"], how="left")
        compared = both_df.select("market", "published_score", "relevance_score").toPandas()
    finally:
        sample_df.unpersist()
    return measure_canaries(compared, night.bundle.settings.pack_tolerance)


def _outcomes(
    night: Night,
    inputs: Mapping[str, Input],
    planned_df: DataFrame,
    published_df: DataFrame,
    changes_df: DataFrame,
    canaries: Mapping[str, Canary],
) -> dict[str, MarketOutcome]:
    ndcgs = {}
    if "judgments" in inputs:
        gains = {label.name: label.gain for label in night.bundle.settings.labels}
        ndcgs = measure_ndcgs(inputs["judgments"].df, changes_df, gains)
    queries_df, catalog_df, digest = inputs["queries"].df, inputs["catalog"].df, night.scorer.digest
    return measure_outcomes(planned_df, published_df, changes_df, queries_df, catalog_df, digest, canaries, ndcgs)


def _named_version(read: Input) -> str:
    return read.path if read.version is None else f"{read.path}@v{read.version}"


def _say_plan(night: Night, row: Mapping[str, Any], num_to_score: int, pairs_per_s: float) -> None:
    console, rejected, seconds = night.console, row["rejected"], num_to_score / pairs_per_s
    reused = f"{row['num_reused']:,} scored by a run that was not published, " if row["num_reused"] else ""
    estimate = f" in about {_duration(seconds)}" if num_to_score else ""
    console.say(
        "plan",
        f"run {night.run_id}: {row['num_candidates']:,} candidate pairs of {', '.join(row['markets'])}: "
        f"{row['num_unchanged']:,} unchanged, {reused}{num_to_score:,} to score{estimate}; "
        f"bundle {row['bundle_digest'][:12]} ({row['precision']}) on {row['device']}",
        **{name: row[name] for name in ("run_id", "markets", "bundle_digest", "device", "rejected")},
        **{name: row[name] for name in ("num_candidates", "num_unchanged", "num_reused")},
        num_to_score=num_to_score,
        estimated_seconds=round(seconds, 1),
    )
    _say_rejected_pairs(console, rejected)


def _say_rejected_pairs(console: Console, rejected: Mapping[str, int]) -> None:
    if rejected:
        listed = ", ".join(f"{count:,} {reason}" for reason, count in sorted(rejected.items()))
        console.say("rejected_pairs", f"rejected {sum(rejected.values()):,} pairs: {listed}", **rejected)


def _say_halved_packs(console: Console, num_packs: int) -> None:
    if num_packs:
        text = (
            f"halved {num_packs:,} packs, for which the device's memory did not suffice; later ones were made shorter. "
            "Shorter packs take longer: give a task more memory."
        )
        console.say("packs_halved", text, num_packs=num_packs)


def _say_scored(console: Console, num_pairs: int, seconds: float, share_saved: float) -> None:
    if num_pairs:
        text = (
            f"scored {num_pairs:,} pairs in {seconds:.1f} s, {num_pairs / seconds:,.0f} pairs/s with start and write; "
            f"shared prefixes saved {share_saved:.0%} of the tokens"
        )
        console.say("scored", text, num_pairs=num_pairs, seconds=seconds, share_saved=share_saved)


def _say_warnings(console: Console, results: Sequence[AuditResult]) -> None:
    for result in results:
        if not result["passed"] and result["severity"] == "warning":
            console.say("warning", f"warning: {_described(result)}", **result)


def _say_rejected(night: Night, results: Sequence[AuditResult]) -> str:
    """The message of the error that ends a rejected run."""
    failed, tables, run_id = failures(results), night.config.tables, night.run_id
    night.console.say("rejected", "", run_id=run_id, failed=failed)
    names = sorted({result["name"] for result in failed})
    return (
        f"run {run_id}: the audit rejected it, nothing was published:\n"
        + "\n".join(f"  - {_described(result)}" for result in failed)
        + f"\nIts scores are kept in {table_path(tables, SCORES_STAGING)}, the pairs without a score in "
        f"{table_path(tables, REJECTED_PAIRS)}.\n"
        f"Where the state is right all the same: jobs/publish.py --run-id {run_id} "
        + " ".join(f"--accept {name}" for name in names if name not in NEVER_ACCEPTED)
        + f' --reason "..."\nWhere its scores are wrong: jobs/publish.py --run-id {run_id} --discard'
    )


def _described(result: AuditResult) -> str:
    value = _number(result["value"])
    return f"{result['market']}: {result['name']}: {value}, expected {result['bound']}. {result['sentence']}"


def _number(value: float | None) -> str:
    return "no number" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class _Clock:
    """Wall-clock seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage], self._last = now - self._last, now


if __name__ == "__main__":
    sys.exit(run_job(main))
