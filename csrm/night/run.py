"""One night in its order: plan, score, compare canaries, audit, publish.

Each step takes what the steps before it returned, and returns what the next ones need. The tables hold the same: a run
that died goes on from them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date, datetime

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from csrm.artefacts.cache import pinned
from csrm.bundle.loading import Bundle, load_bundle
from csrm.cli import Console
from csrm.config import InputSpec
from csrm.errors import AuditError, LeaseError
from csrm.extras import import_eval
from csrm.night.audit import AuditResult, Canary, audit_market, failures
from csrm.night.chunks import Chunk, canary_pairs, in_chunk, stage_scores
from csrm.night.context import RunContext
from csrm.night.first_look import look_at_markets
from csrm.night.leases import Lease, hold_leases
from csrm.night.messages import (
    say_halved_packs,
    say_host_limit,
    say_plan,
    say_publication,
    say_rejected,
    say_rejected_pairs,
    say_scored,
    say_warnings,
    warn_of_languages,
    warn_of_left_markets,
    warn_of_missing_titles,
    warn_of_other_cpu,
    warn_of_query_languages,
)
from csrm.night.outcome import measure_canaries, measure_ndcgs, measure_outcomes
from csrm.night.plan import (
    PlanCounts,
    count_plan,
    num_scoring_partitions,
    plan_pairs,
    query_fields,
    with_rejections,
    with_retrieved_titles,
    with_scoring_layout,
    with_texts,
)
from csrm.night.publish import Publication, publish_changes, run_changes
from csrm.night.published import is_still_published, markets_of_run, published_markets, require_unique_pairs
from csrm.night.runs import (
    check_same_run,
    create_output_tables,
    discard_distrusted,
    find_run,
    read_open_staging,
    read_run_rows,
    record_end,
    record_lost,
    record_run,
    scoring_rate,
    write_run_rows,
)
from csrm.night.settings import ScoringConfig
from csrm.schemas import (
    CANDIDATES,
    CATALOG,
    JUDGMENTS,
    PAIR_KEY,
    QUERIES,
    REJECTED_PAIRS,
    RELEVANCE_SCORES,
    RETRIEVAL_TABLE,
    RUN_PAIRS,
    Table,
)
from csrm.scoring.attempts import forget_attempts
from csrm.spark.catalogs import located_tables
from csrm.spark.inputs import errors_of_inputs, read_inputs, require_unchanged
from csrm.spark.progress import ScoringProgress
from csrm.spark.scoring import ScorerPlace, probe_scorer, with_relevance_score
from csrm.spark.session import build_session, persisted, require_names
from csrm.spark.tables import committed_version, table_id, table_path, table_version
from csrm.spark.workers import end_silent_workers, errors_of_workers, scoring_profile, task_threads


@dataclass(frozen=True)
class RunPlan:
    """What is to be done with each candidate pair."""

    planned_df: DataFrame
    """The run's rows of run_pairs."""
    counts: PlanCounts


@dataclass(frozen=True)
class ScoredRun:
    """The plan after scoring, and the scores that wait in scores_staging."""

    planned_df: DataFrame
    """The run's rows of run_pairs, in which pairs that could not be scored are rejected."""
    staged_df: DataFrame
    """Rows of scores_staging that may be published."""
    counts: PlanCounts
    num_tokens: int
    """Tokens that were computed."""
    num_halved_packs: int
    """Packs for which the device's memory did not suffice."""


@dataclass(frozen=True)
class RunAudit:
    """What the run would change, and what its audit says of that."""

    num_changes: Mapping[str, Mapping[str, int]]
    """Market to operation (insert, update, delete) to rows; a market without changes is left out."""
    results: list[AuditResult]


def run_night(
    config: ScoringConfig, run_id: str, *, data_date: date, started_at: datetime, console: Console
) -> Publication | None:
    """Score what changed in some markets, and publish it.

    Args:
        config: settings of the scoring job.
        run_id: name of the run; a run of this name that died goes on.
        data_date: day whose inputs are scored.
        started_at: when the job was started.
        console: says what happens.

    Returns:
        What was published; None where a run of this name was published before, and its state is still there.

    Raises:
        ConfigError: the run id names another run.
        BundleError, DeviceError: the bundle, or the device that was asked for, is not there.
        InputError: an input table has problems, lacks a market, or was changed since it was read.
        AuditError: nothing was published.
        LeaseError: another run holds a market or works under the same id, or took one over.
    """
    config = config.model_copy(update={"bundle": pinned(config.bundle)})  # an alias may move before a worker reads it
    bundle = load_bundle(config.bundle, config.bundle_digest)
    if config.inputs.judgments is not None:
        for module in ("ir_measures", "sklearn"):
            import_eval(module)  # before the work, not after it
    spark = build_session("csrm-score-catalog")
    config = located_tables(spark, config)
    require_names(
        spark, [run_id, *config.markets, config.tables, *(spec.path for spec in _input_specs(config).values())]
    )
    # Before any Spark job: a run that holds a lease may hold all executors too.
    with hold_leases(
        spark, config.tables, list(config.markets), f"run {run_id}", config.lease_seconds, run_id=run_id
    ) as leases:
        earlier = find_run(spark, config.tables, run_id)
        if earlier is not None:
            check_same_run(earlier, config.markets, bundle.digest)
            if is_still_published(spark, config.tables, earlier.asDict()):
                version = earlier["published_version"]
                text = f"run {run_id} was published before: relevance_scores version {version}."
                console.say("already_published", text, run_id=run_id, version=version)
                return None
        warn_of_languages(bundle, config.markets, console)
        context = _start(
            spark,
            config,
            run_id,
            data_date=data_date,
            started_at=started_at,
            bundle=bundle,
            leases=leases,
            is_repeated=earlier is not None,
            console=console,
        )
        if earlier is not None and (num_rows := discard_distrusted(spark, config.tables, earlier)):
            why = "was discarded" if earlier["verdict"] == "discarded" else "had failed its canary"
            text = f"run {run_id}: an earlier attempt {why}; its {num_rows:,} staged scores are made anew."
            console.say("distrusted", text, run_id=run_id, num_rows=num_rows)
        try:
            with errors_of_workers(), errors_of_inputs(spark, context.inputs):
                plan = plan_run(context)
                scored = score_run(context, plan)
                canaries = compare_canaries(context, scored)
                changes_df = run_changes(scored.planned_df, context.published_df, scored.staged_df, run_id)
                with persisted(changes_df):
                    audit = audit_run(context, scored, canaries, changes_df)
                    return publish_run(context, scored, audit, changes_df)
        except LeaseError:
            record_lost(spark, config.tables, context.first_row())
            raise


def plan_run(context: RunContext) -> RunPlan:
    """Decide what is to be done with each candidate pair, and write that to run_pairs and rejected_pairs.

    Raises:
        InputError: a market has no candidates.
    """
    spark, config, run_id = context.spark, context.config, context.run_id
    context.require_leases()
    record_run(spark, config.tables, context.first_row())  # no more a rejected one: it reads what it had staged
    warn_of_left_markets(published_markets(spark, config.tables), config.markets, context.console)
    if config.use_retrieved_titles:
        titled_df = context.inputs["retrieval_table"].df.select("market").distinct()
        warn_of_missing_titles([row["market"] for row in titled_df.collect()], config.markets, context.console)
    of_language = context.inputs["queries"].df.groupBy("language").count().collect()
    num_queries = {row["language"]: row["count"] for row in of_language}
    warn_of_query_languages(context.bundle, num_queries, markets=config.markets, console=context.console)
    require_unique_pairs(spark, context.published_df, table_path(config.tables, RELEVANCE_SCORES))
    context.clock.lap("inputs")
    published_df = context.published_df
    if config.label_probabilities:  # a score without them is not right any more
        published_df = published_df.where("label_probabilities IS NOT NULL")
    planned_df = plan_pairs(
        context.inputs["candidates"].df,
        _augmented_queries(context),
        context.inputs["catalog"].df,
        published_df,
        _usable_staging(context),
        context.scorer.digest,
    ).withColumn("run_id", F.lit(run_id))
    context.require_leases()
    planned_df = _with_own_plan(context, planned_df.sortWithinPartitions("bucket"))
    counts = count_plan(planned_df, config.markets, context.inputs["candidates"].path)
    if counts.rejected or context.is_repeated:
        write_run_rows(planned_df.where("state = 'rejected'"), REJECTED_PAIRS, config.tables, run_id)
    context.clock.lap("plan")
    return RunPlan(planned_df, counts)


def score_run(context: RunContext, plan: RunPlan) -> ScoredRun:
    """Score the planned pairs chunk by chunk into scores_staging; those that cannot be scored are rejected."""
    spark, config, console, run_id = context.spark, context.config, context.console, context.run_id
    num_pairs = plan.counts.num_to_score
    rate = scoring_rate(spark, config.tables, context.scorer.digest, context.device_text)
    pairs_per_s = rate or _exported_rate(context)
    say_plan(context, plan.counts, pairs_per_s, is_of_export=rate is None)

    def score(chunk: Chunk) -> DataFrame:
        pairs_df = plan.planned_df.where("state = 'to_score'").where(chunk.holds(F.col("bucket")))
        return _with_scores(context, pairs_df, chunk.num_pairs, _augmented_queries(context, chunk), progress)

    attempt = f"csrm-staging/{run_id}/{context.started_at.timestamp()}"
    with ScoringProgress(spark, num_pairs, console=console if console.as_json else None) as progress:
        stage_scores(spark, config.tables, attempt, plan.counts.to_score, score, 60 * config.chunk_minutes, pairs_per_s)
    context.clock.lap("scoring")
    say_scored(console, num_pairs, context.clock.seconds["scoring"], progress.share_saved)

    planned_df, counts = plan.planned_df, plan.counts
    staged_df = _usable_staging(context)
    if not staged_df.where("reason IS NOT NULL").isEmpty():
        context.require_leases()
        planned_df = _with_own_plan(context, with_rejections(planned_df, context.published_df, staged_df))
        write_run_rows(planned_df.where("state = 'rejected'"), REJECTED_PAIRS, config.tables, run_id)
        counts = count_plan(planned_df, config.markets, context.inputs["candidates"].path)
        say_rejected_pairs(console, counts.rejected)
    say_halved_packs(console, progress.num_halved_packs.value)
    say_host_limit(console, progress.share_waited)
    return ScoredRun(planned_df, staged_df, counts, progress.num_tokens.value, progress.num_halved_packs.value)


def compare_canaries(context: RunContext, scored: ScoredRun) -> dict[tuple[str, str], Canary]:
    """Score a sample of unchanged and of reused pairs again, and say how far the scores are from the earlier ones."""
    config, canaries = context.config, {}
    if (scored.counts.num_unchanged or scored.counts.num_reused) and config.canary_pairs:
        sample_df = canary_pairs(
            scored.planned_df,
            context.published_df,
            scored.staged_df,
            num_pairs=config.canary_pairs,
            seed=context.run_id,
        )
        with persisted(sample_df):
            num_pairs = 2 * config.canary_pairs * len(config.markets)
            scored_df = _with_scores(context, sample_df, num_pairs, _augmented_queries(context))
            both_df = sample_df.join(scored_df.select(*PAIR_KEY, "relevance_score"), on=list(PAIR_KEY), how="left")
            compared = both_df.select("market", "state", "earlier_score", "relevance_score").toPandas()
        canaries = measure_canaries(compared, context.bundle.settings.pack_tolerance)
    forget_attempts(context.attempts_dir)
    context.clock.lap("canary")
    return canaries


def audit_run(
    context: RunContext, scored: ScoredRun, canaries: Mapping[tuple[str, str], Canary], changes_df: DataFrame
) -> RunAudit:
    """Measure what the changes would make of each market, and hold that against the limits.

    Args:
        changes_df: as of run_changes; read several times.
    """
    inputs, ndcgs = context.inputs, {}
    if "judgments" in inputs:
        gains = {label.name: label.gain for label in context.bundle.settings.labels}
        ndcgs = measure_ndcgs(inputs["judgments"].df, changes_df, gains)
    outcomes = measure_outcomes(
        scored.planned_df,
        context.published_df,
        changes_df,
        inputs["queries"].df,
        inputs["catalog"].df,
        context.scorer.digest,
        canaries,
        ndcgs,
    )
    first = [market for market, outcome in outcomes.items() if outcome.is_first]
    looks = look_at_markets(context.bundle, first, queries_df=inputs["queries"].df, catalog_df=inputs["catalog"].df)
    results = [
        result
        for market, outcome in outcomes.items()
        for result in audit_market(replace(outcome, first_look=looks.get(market)), context.config.audit)
    ]
    context.clock.lap("audit")
    say_warnings(context.console, results)
    num_changes = {market: outcome.num_changes for market, outcome in outcomes.items() if outcome.num_changes}
    return RunAudit(num_changes, results)


def publish_run(context: RunContext, scored: ScoredRun, audit: RunAudit, changes_df: DataFrame) -> Publication:
    """Publish the changes where the audit passed, and write how the run ended into its row of scoring_runs.

    Raises:
        AuditError: the audit rejected the run.
        InputError: an input was changed since it was read.
        LeaseError: another run took over a market.
    """
    spark, tables, console, run_id = context.spark, context.config.tables, context.console, context.run_id
    row = context.first_row() | {
        "num_candidates": scored.counts.num_candidates,
        "num_unchanged": scored.counts.num_unchanged,
        "num_reused": scored.counts.num_reused,
        "num_scored": scored.counts.num_to_score,
        "rejected": scored.counts.rejected,
        "num_tokens": scored.num_tokens,
        "num_halved_packs": scored.num_halved_packs,
        "audit": audit.results,
    }
    context.require_leases()
    if failures(audit.results):
        record_end(spark, tables, row, "rejected")
        raise AuditError(say_rejected(context, audit.results))
    require_unchanged(spark, context.inputs)
    metadata = {"run_id": run_id, "bundle_digest": context.scorer.digest}
    try:
        publication = publish_changes(spark, tables, changes_df, audit.num_changes, context.leases, metadata)
    except LeaseError:
        done = {market: audit.num_changes[market] for market in markets_of_run(spark, tables, row)}
        version = table_version(spark, table_path(tables, RELEVANCE_SCORES)) if done else None
        record_end(spark, tables, row | {"changes": Publication(version or 0, done).totals}, "superseded", version)
        console.say("superseded", "", run_id=run_id)
        raise
    context.clock.lap("publish")
    verdict = "published" if audit.num_changes else "already_published"
    record_end(spark, tables, row | {"changes": publication.totals}, verdict, publication.version)
    say_publication(console, verdict, run_id, publication, tables)
    return publication


def _start(
    spark: SparkSession,
    config: ScoringConfig,
    run_id: str,
    *,
    data_date: date,
    started_at: datetime,
    bundle: Bundle,
    leases: Mapping[str, Lease],
    is_repeated: bool,
    console: Console,
) -> RunContext:
    """Look at everything that the run needs: the device, the tables, the inputs."""
    profile = scoring_profile(spark, config.device, config.one_task_per_gpu)
    place = ScorerPlace(config.bundle, config.device, task_threads(spark), config.tokens_per_call, profile)
    scorer = probe_scorer(spark, place)
    warn_of_other_cpu(bundle, scorer, console)
    create_output_tables(spark, config.tables)
    scores_path = table_path(config.tables, RELEVANCE_SCORES)
    end_silent_workers(spark, config.hang_minutes)
    return RunContext(
        spark=spark,
        config=config,
        run_id=run_id,
        data_date=data_date,
        started_at=started_at,
        bundle=bundle,
        place=place,
        scorer=scorer,
        inputs=read_inputs(spark, _input_specs(config), config.markets),
        leases=leases,
        base_version=table_version(spark, scores_path),
        table_id=table_id(spark, scores_path),
        is_repeated=is_repeated,
        console=console,
    )


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


def _augmented_queries(context: RunContext, chunk: Chunk | None = None) -> DataFrame:
    """What a prompt says of each query, or of those of a chunk."""
    config, queries_df = context.config, context.inputs["queries"].df
    if not config.use_retrieved_titles:
        queries_df = queries_df.selectExpr("*", "cast(array() as array<string>) AS retrieved_titles")
        return query_fields(queries_df if chunk is None else in_chunk(queries_df, chunk), config.markets)
    retrieval_df = context.inputs["retrieval_table"].df
    if chunk is not None:
        queries_df, retrieval_df = in_chunk(queries_df, chunk), in_chunk(retrieval_df, chunk)
    return query_fields(with_retrieved_titles(queries_df, retrieval_df, config.broadcast_limit_mb), config.markets)


def _usable_staging(context: RunContext) -> DataFrame:
    """Staged scores that the run may publish: those with label probabilities, where it is asked for them."""
    config = context.config
    staged_df = read_open_staging(context.spark, config.tables, config.markets, context.run_id)
    if not config.label_probabilities:
        return staged_df
    return staged_df.where("label_probabilities IS NOT NULL OR reason IS NOT NULL")


def _with_own_plan(context: RunContext, planned_df: DataFrame) -> DataFrame:
    """Write the rows of run_pairs, and read them as this commit left them, whatever others write meanwhile."""
    spark, tables = context.spark, context.config.tables
    carried = write_run_rows(planned_df, RUN_PAIRS, tables, context.run_id)
    version = committed_version(spark, table_path(tables, RUN_PAIRS), carried)
    return read_run_rows(spark, RUN_PAIRS, tables, context.run_id, version=version)


def _exported_rate(context: RunContext) -> float:
    """Pairs a second that the bundle's export measured, times the tasks that run side by side."""
    num_tasks = 1 if context.place.profile is not None else _num_slots(context)  # how many GPUs come is not known yet
    return context.bundle.settings.report.pairs_per_s * num_tasks


def _num_slots(context: RunContext) -> int:
    """Tasks that score side by side where nothing but cores limits them."""
    return max(1, context.spark.sparkContext.defaultParallelism // context.place.threads)


def _with_scores(
    context: RunContext,
    pairs_df: DataFrame,
    num_pairs: int,
    queries_df: DataFrame,
    progress: ScoringProgress | None = None,
) -> DataFrame:
    """Rows of scores_staging for about num_pairs planned pairs."""
    config = context.config
    num_partitions = config.num_partitions or num_scoring_partitions(num_pairs, _num_slots(context))
    texts_df = with_texts(pairs_df, queries_df, context.inputs["catalog"].df)
    return with_relevance_score(
        with_scoring_layout(texts_df, num_partitions, config.products_per_chunk),
        context.place,
        bundle_digest=context.scorer.digest,
        run_id=context.run_id,
        progress=progress,
        attempts_dir=context.attempts_dir,
        is_repeated=context.is_repeated,
        label_probabilities=config.label_probabilities,
    )
