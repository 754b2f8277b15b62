"""Score the candidate pairs whose prompt changed, and publish what changed.

From catalog, queries, retrieval_table and candidates to relevance_scores. Every pair is looked at; scored are those
whose published score does not come from the same prompt and bundle. Started again after it died, or after its audit
rejected it, it finds the scores that it had staged.
"""

import argparse
import re
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, date, datetime

from csrm.bundle.loading import load_bundle
from csrm.cli import Console, add_log_format, job_parser
from csrm.config import load_config
from csrm.errors import ConfigError
from csrm.night.context import PhaseClock, RunContext
from csrm.night.leases import hold_leases
from csrm.night.messages import warn_of_languages
from csrm.night.run import input_specs, score_and_publish
from csrm.night.runs import (
    PUBLISHED,
    check_same_run,
    create_output_tables,
    find_run,
)
from csrm.night.settings import ScoringConfig
from csrm.spark.inputs import errors_of_inputs, read_inputs
from csrm.spark.scoring import probe_scorer
from csrm.spark.session import build_session
from csrm.spark.workers import end_silent_workers, errors_of_workers, scoring_profile, task_threads


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
        warn_of_languages(bundle, config.markets, console)
        profile = scoring_profile(spark, config.device, config.one_task_per_gpu)
        scorer = probe_scorer(spark, config.bundle, config.device, task_threads(spark), profile)
        night = RunContext(config, run_id, data_date, started_at, bundle, scorer, profile, console, earlier is not None)
        clock = PhaseClock()
        create_output_tables(spark, config.tables)
        inputs = read_inputs(spark, input_specs(config), config.markets)
        end_silent_workers(spark, config.hang_minutes)
        with errors_of_workers(), errors_of_inputs(spark, inputs):
            return score_and_publish(spark, night, inputs, leases, clock)


def _data_date(text: str | None, started_at: datetime) -> date:
    if text is None:
        return started_at.date()
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"--data-date {text!r}: expected YYYY-MM-DD.") from error


def _end_by_signal() -> None:
    """SIGTERM, which Airflow and Kubernetes send, ends the run as Ctrl-C does: leases are given back."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
