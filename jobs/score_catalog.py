"""Score every candidate pair with a bundle and publish the scores.

From catalog, queries, retrieval_table and candidates to relevance_scores.
"""

import re
import sys
import time
from collections.abc import Sequence
from datetime import UTC, date, datetime
from importlib.metadata import version

from pydantic import Field
from pyspark.sql import SparkSession

import csrm
from csrm.bundle import load_bundle
from csrm.cli import job_parser, run_job
from csrm.config import InputSpec, Settings, load_config
from csrm.errors import AuditError, ConfigError, InputError
from csrm.schemas import (
    CANDIDATES,
    CATALOG,
    QUERIES,
    REJECTED_PAIRS,
    RELEVANCE_SCORES,
    RETRIEVAL_TABLE,
    SCORES_STAGING,
    Table,
)
from csrm.spark.inputs import Input, read_inputs
from csrm.spark.pairs import (
    filter_rejected,
    filter_scorable,
    num_scoring_partitions,
    with_pair_fields,
    with_retrieved_titles,
    with_scoring_layout,
)
from csrm.spark.publish import (
    Publication,
    audit_run,
    check_same_run,
    find_published_run,
    publish_run,
    read_run_rows,
    record_run,
    write_run_rows,
)
from csrm.spark.scoring import ScoringProgress, probe_scorer, task_threads, with_relevance_score
from csrm.spark.session import build_session
from csrm.spark.tables import table_path


class ScoringInputs(Settings):
    """Where the input tables are."""

    catalog: InputSpec
    queries: InputSpec
    candidates: InputSpec | None = None
    """Default: the table that build_candidates wrote into `tables`."""
    retrieval_table: InputSpec | None = None
    """Default: the table that build_retrieval_table wrote into `tables`."""


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
    """cpu, cuda, or cuda:<number>."""
    use_retrieved_titles: bool = True
    """Whether retrieved titles augment the queries."""
    broadcast_limit_mb: int = Field(default=256, ge=0)
    """Retrieved titles up to this size (estimated, MiB) are broadcast; larger ones are joined by a shuffle."""
    num_partitions: int | None = Field(default=None, ge=1)
    """Partitions to score; default: see num_scoring_partitions."""
    products_per_chunk: int = Field(default=256, ge=1)
    """Products of one query that are scored side by side; a query with more is spread over partitions."""
    max_rejected_share: float = Field(default=0.05, ge=0, le=1)
    """Largest share of a market's candidates without a query or product text; more and nothing is published."""
    progress_seconds: float = Field(default=10.0, gt=0)
    """Seconds between lines of progress."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = job_parser(__doc__, "conf/score_catalog.yaml")
    parser.add_argument("--run-id", help="name of the run; default: data date and time of start")
    parser.add_argument("--data-date", help="day whose inputs are scored, YYYY-MM-DD; default: today (UTC)")
    args = parser.parse_args(argv)
    started_at = datetime.now(UTC)
    config = load_config(args.config, ScoringConfig, args.overrides)
    data_date = _data_date(args.data_date, started_at)
    run_id = args.run_id or f"{data_date}-{started_at:%H%M%S}"
    if not re.fullmatch(r"[\w.:-]+", run_id):
        raise ConfigError(f"--run-id {run_id!r}: expected letters, digits and . : _ - only.")

    bundle_digest = load_bundle(config.bundle, config.bundle_digest).digest

    spark = build_session("csrm-score-catalog")
    earlier = find_published_run(spark, config.tables, run_id)
    if earlier is not None:
        check_same_run(earlier, config.markets, bundle_digest)
        print(f"run {run_id} was published before: relevance_scores version {earlier['published_version']}.")
        return 0
    scorer = probe_scorer(spark, config.bundle, config.device, task_threads(spark))

    clock = _Clock()
    inputs = read_inputs(spark, _input_specs(config), config.markets)
    market_candidates = _count_candidates(inputs["candidates"], config)
    num_candidates = sum(market_candidates.values())
    num_partitions = config.num_partitions or num_scoring_partitions(
        num_candidates, spark.sparkContext.defaultParallelism // task_threads(spark)
    )
    print(
        f"run {run_id}: {num_candidates:,} candidate pairs of {', '.join(sorted(config.markets))}; "
        f"bundle {scorer.digest[:12]} on {config.device} ({scorer.provider}); {num_partitions} partitions",
        flush=True,
    )
    clock.lap("inputs")

    queries_df = inputs["queries"].df
    if config.use_retrieved_titles:
        queries_df = with_retrieved_titles(queries_df, inputs["retrieval_table"].df, config.broadcast_limit_mb)
    else:
        queries_df = queries_df.selectExpr("*", "cast(array() as array<string>) AS retrieved_titles")
    fields_df = with_pair_fields(inputs["candidates"].df, queries_df, inputs["catalog"].df, config.markets)
    write_run_rows(filter_rejected(fields_df, run_id), REJECTED_PAIRS, config.tables, run_id)
    rejected = _count_rejected(spark, config.tables, run_id)
    num_rejected = sum(rejected.values())
    if rejected:
        print(f"rejected {num_rejected:,} pairs: " + ", ".join(f"{n:,} {reason}" for reason, n in rejected.items()))
    clock.lap("rejected")

    pairs_df = with_scoring_layout(filter_scorable(fields_df, scorer.digest), num_partitions, config.products_per_chunk)
    with ScoringProgress(spark, num_candidates - num_rejected, config.progress_seconds) as progress:
        scores_df = with_relevance_score(
            pairs_df, config.bundle, config.device, scorer.digest, run_id, task_threads(spark), progress
        )
        write_run_rows(scores_df, SCORES_STAGING, config.tables, run_id)
    clock.lap("scoring")

    audit = audit_run(spark, config.tables, run_id, market_candidates, config.max_rejected_share)
    clock.lap("audit")
    publication = None
    if not audit.failed:
        publication = publish_run(spark, config.tables, run_id, config.markets, scorer.digest)
    clock.lap("publish")
    record_run(
        spark,
        config.tables,
        {
            "run_id": run_id,
            "data_date": data_date,
            "markets": sorted(config.markets),
            "started_at": started_at,
            "finished_at": datetime.now(UTC),
            "inputs": {name: _named_version(read) for name, read in inputs.items()},
            "bundle_digest": scorer.digest,
            "device": f"{config.device} ({scorer.provider})",
            "versions": {"csrm": csrm.__version__, **{name: version(name) for name in ("pyspark", "delta-spark")}},
            "num_candidates": num_candidates,
            "num_scored": audit.num_staged,
            "num_rejected": num_rejected,
            "seconds": clock.seconds,
            "audit": audit.results,
            "verdict": _verdict(publication),
            "published_version": publication.version if publication else None,
        },
    )
    if publication is None:
        failed = [f"  - {r['market']}: {r['name']}: {r['value']}, expected {r['bound']}" for r in audit.failed]
        raise AuditError(
            f"run {run_id}: the audit rejected it, nothing was published:\n" + "\n".join(failed) + "\n"
            f"Its scores are kept in {table_path(config.tables, SCORES_STAGING)}, the pairs without text in "
            f"{table_path(config.tables, REJECTED_PAIRS)}."
        )
    _print_end(config, run_id, audit.num_staged, clock, publication)
    return 0


def _data_date(text: str | None, started_at: datetime) -> date:
    if text is None:
        return started_at.date()
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"--data-date {text!r}: expected YYYY-MM-DD.") from error


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
    return specs


def _count_candidates(candidates: Input, config: ScoringConfig) -> dict[str, int]:
    """Market to its candidate pairs; every market has some."""
    counts = {row["market"]: row["count"] for row in candidates.df.groupBy("market").count().collect()}
    empty = sorted(config.markets.keys() - counts.keys())
    if empty:
        raise InputError(
            f"input candidates at {candidates.path!r}: no pairs for the markets {empty}; it has {sorted(counts)} of "
            f"{sorted(config.markets)}. Build their candidates, or take them out of 'markets'."
        )
    return counts


def _count_rejected(spark: SparkSession, tables: str, run_id: str) -> dict[str, int]:
    rows = read_run_rows(spark, REJECTED_PAIRS, tables, run_id).groupBy("reason").count().orderBy("reason").collect()
    return {row["reason"]: row["count"] for row in rows}


def _named_version(read: Input) -> str:
    return read.path if read.version is None else f"{read.path}@v{read.version}"


def _verdict(publication: Publication | None) -> str:
    if publication is None:
        return "rejected"
    return "published" if publication.num_changes else "already_published"


def _print_end(config: ScoringConfig, run_id: str, num_scored: int, clock: "_Clock", publication: Publication) -> None:
    scores_path = table_path(config.tables, RELEVANCE_SCORES)
    print(
        f"scored {num_scored:,} pairs in {clock.seconds['scoring']:.1f} s, "
        f"{num_scored / clock.seconds['scoring']:,.0f} pairs/s, with start and write"
    )
    if publication.num_changes:
        print(f"published run {run_id}: relevance_scores version {publication.version}")
        for market, operations in publication.num_changes.items():
            print(f"  {market}: " + ", ".join(f"{count:,} {name}" for name, count in operations.items()))
    else:
        print(f"already published: relevance_scores version {publication.version} has these scores, nothing changed")
    print(f"table   {scores_path}")
    print(f"read it spark.read.format('delta').option('versionAsOf', {publication.version}).load('{scores_path}')")


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
