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

from csrm.cli import Console, add_log_format, job_parser, job_settings
from csrm.errors import ConfigError
from csrm.night.run import run_night
from csrm.night.settings import ScoringConfig


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
    config = job_settings(args, ScoringConfig)
    data_date = _data_date(args.data_date, started_at)
    run_id = args.run_id or f"{data_date}-{started_at:%H%M%S}"
    if not re.fullmatch(r"\w[\w.:-]{,99}", run_id):  # it names folders: not .., and no longer than a file's name
        raise ConfigError(
            f"--run-id {run_id!r}: expected at most 100 letters, digits and . : _ - only, none of . : - first."
        )
    _end_by_signal()
    run_night(config, run_id, data_date=data_date, started_at=started_at, console=console)
    return 0


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
