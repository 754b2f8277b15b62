"""One run, from its inputs to its row of scoring_runs: plan, score, canary, audit, publish."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

import csrm
from csrm.config import InputSpec
from csrm.errors import AuditError, InputError, LeaseError
from csrm.night.audit import Canary, MarketOutcome, audit_market, failures
from csrm.night.chunks import Chunk, canary_pairs, in_chunk, stage_scores
from csrm.night.context import PhaseClock, PlanCounts, RunContext
from csrm.night.leases import Lease
from csrm.night.messages import (
    say_halved_packs,
    say_plan,
    say_publication,
    say_rejected,
    say_rejected_pairs,
    say_scored,
    say_warnings,
)
from csrm.night.outcome import measure_canaries, measure_ndcgs, measure_outcomes
from csrm.night.plan import (
    num_scoring_partitions,
    plan_pairs,
    query_fields,
    with_rejections,
    with_retrieved_titles,
    with_scoring_layout,
    with_texts,
)
from csrm.night.publish import publish_changes, run_changes
from csrm.night.runs import read_open_staging, read_run_rows, record_end, record_run, scoring_rate, write_run_rows
from csrm.night.settings import NUM_BUCKETS, ScoringConfig
from csrm.schemas import (
    CANDIDATES,
    CATALOG,
    JUDGMENTS,
    QUERIES,
    REJECTED_PAIRS,
    RELEVANCE_SCORES,
    RETRIEVAL_TABLE,
    RUN_PAIRS,
    Table,
)
from csrm.scoring.attempts import forget_attempts
from csrm.spark.inputs import Input, require_unchanged
from csrm.spark.progress import ScoringProgress
from csrm.spark.scoring import with_relevance_score
from csrm.spark.storage import attempts_path
from csrm.spark.tables import read_table, table_path, table_version
from csrm.spark.workers import task_threads


def score_and_publish(
    spark: SparkSession,
    night: RunContext,
    inputs: Mapping[str, Input],
    leases: Mapping[str, Lease],
    clock: "PhaseClock",
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
    say_plan(night, row, counts.num_to_score, pairs_per_s)

    def score(chunk: Chunk) -> DataFrame:
        pairs_df = planned_df.where("state = 'to_score'").where(chunk.holds(F.col("bucket")))
        queries_df = _augmented_queries(inputs, config, chunk)
        return _scored(spark, night, pairs_df, chunk.num_pairs, queries_df, inputs["catalog"].df, progress)

    lines = console if console.as_json else None
    with ScoringProgress(spark, counts.num_to_score, config.progress_seconds, lines) as progress:
        attempt = f"csrm-staging/{run_id}/{night.started_at.timestamp()}"
        stage_scores(spark, config.tables, attempt, counts.to_score, score, 60 * config.chunk_minutes, pairs_per_s)
    clock.lap("scoring")
    say_scored(console, counts.num_to_score, clock.seconds["scoring"], progress.share_saved)
    staged_df = read_open_staging(spark, config.tables, config.markets, run_id)
    if not staged_df.where("reason IS NOT NULL").isEmpty():
        write_run_rows(with_rejections(planned_df, staged_df), RUN_PAIRS, config.tables, run_id)
        planned_df = read_run_rows(spark, RUN_PAIRS, config.tables, run_id)
        write_run_rows(planned_df.where("state = 'rejected'"), REJECTED_PAIRS, config.tables, run_id)
        counts = _count_plan(planned_df, inputs["candidates"], config)
        say_rejected_pairs(console, counts.rejected)
    row |= {name: getattr(counts, name) for name in ("num_reused", "rejected")}
    row |= {"num_scored": counts.num_to_score}
    row |= {name: getattr(progress, name).value for name in ("num_tokens", "num_halved_packs")}
    say_halved_packs(console, row["num_halved_packs"])

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
        say_warnings(console, results)
        if failures(results):
            record_end(spark, config.tables, row, "rejected")
            raise AuditError(say_rejected(night, results))
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


def input_specs(config: ScoringConfig) -> dict[Table, InputSpec]:
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


def _first_row(night: RunContext, inputs: Mapping[str, Input], base_version: int) -> dict[str, Any]:
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


def _exported_rate(spark: SparkSession, night: RunContext) -> float:
    """Pairs a second that the bundle's export measured, times the tasks that run side by side."""
    settings = night.bundle.settings
    (report,) = (report for report in settings.precisions if report.precision == settings.precision)
    return report.pairs_per_s * (spark.sparkContext.defaultParallelism // task_threads(spark))


def _scored(
    spark: SparkSession,
    night: RunContext,
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
    spark: SparkSession, night: RunContext, planned_df: DataFrame, published_df: DataFrame, inputs: Mapping[str, Input]
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
    night: RunContext,
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
