"""Run the jobs of a night one after the other, each in a process of its own, with the configuration of a folder.

    csrm run night --config my_market

The steps: vectors of texts where there is embed_catalog.yaml, retrieval table, candidates, scores with their audit and
publication, evaluation where there is evaluate.yaml, the report, and the care of the tables. The first step that fails
ends the night with its exit code; a run that its audit rejected gets its report before. On a cluster, use the Airflow
DAG.
"""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from csrm.errors import AuditError, ConfigError


class Step(NamedTuple):
    """One job of a chain."""

    command: str
    is_optional: bool = False
    """Whether it is left out where its configuration file is not there."""
    names_run: bool = False
    """Whether it is told the id of the run."""

    @property
    def file(self) -> str:
        return f"{self.command.replace('-', '_')}.yaml"


NIGHT = (
    Step("embed-catalog", is_optional=True),
    Step("build-retrieval-table"),
    Step("build-candidates"),
    Step("score-catalog", names_run=True),
    Step("evaluate", is_optional=True),
    Step("report", names_run=True),
    Step("maintain"),
)
"""The steps of a night, as those of jobs/dags/csrm_nightly.py."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chain", choices=["night"], help="what to run")
    parser.add_argument("--config", type=Path, default=Path("conf"), metavar="FOLDER", help="folder with a file a job")
    parser.add_argument("--run-id", help="name of the run; default: data date and time of start")
    parser.add_argument("--data-date", help="day whose inputs are scored, YYYY-MM-DD; default: today (UTC)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    folder: Path = args.config
    steps = [step for step in NIGHT if not step.is_optional or (folder / step.file).exists()]
    if missing := [step.file for step in steps if not (folder / step.file).is_file()]:
        raise ConfigError(
            f"--config {str(folder)!r}: expected a folder with a file for each job, it lacks {', '.join(missing)}. "
            "`csrm init FOLDER --catalog ... --queries ...` writes one."
        )
    started_at = datetime.now(UTC)
    data_date = args.data_date or f"{started_at:%Y-%m-%d}"
    run_id = args.run_id or f"{data_date}-{started_at:%H%M%S}"
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    exit_code = 0
    for number, step in enumerate(steps, 1):
        if exit_code and not (exit_code == AuditError.exit_code and step.command == "report"):
            continue
        words = [step.command, "--config", str(folder / step.file)]
        words += ["--run-id", run_id] if step.names_run else []
        words += ["--data-date", data_date] if step.command == "score-catalog" else []
        print(f"[{number}/{len(steps)}] csrm {' '.join(words)}", flush=True)
        ended = _run(words)
        exit_code = exit_code or ended
    if exit_code:
        print(f"run {run_id}: the night ended with exit code {exit_code}; docs/runbook.md says what to do", flush=True)
    else:
        seconds = (datetime.now(UTC) - started_at).total_seconds()
        print(f"run {run_id}: the night is done in {tqdm.format_interval(seconds)}", flush=True)
    return exit_code


def _run(words: Sequence[str]) -> int:
    """Run a command in a process of its own, which ends with this one; returns its exit code."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "csrm", *words])
    try:
        ended = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()  # gives leases back
            process.wait()
    exit_code = ended if ended >= 0 else 128 - ended  # of a signal, as a shell says it
    how = f"failed with exit code {exit_code} after" if exit_code else "done in"
    print(f"csrm {words[0]}: {how} {tqdm.format_interval(time.monotonic() - start)}\n", flush=True)
    return exit_code
