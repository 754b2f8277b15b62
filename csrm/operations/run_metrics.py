"""A run's row as metrics for Prometheus, in the text format that node_exporter's textfile collector reads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from csrm.extras import import_eval
from csrm.night.runs import PUBLISHED
from csrm.pages.page import seen

_COUNTS = ("candidates", "unchanged", "reused", "scored")


def write_run_metrics(runs: Sequence[Mapping[str, Any]], path: Path, *, is_taken_back: bool = False) -> None:
    """Replace the file by the metrics of a run, in one piece: a scrape never reads half of it.

    Args:
        runs: rows of scoring_runs with times in UTC: the run, then those before it, newest first; see read_runs.
        path: of the file, which the collector expects to end in .prom; its folder must exist.
        is_taken_back: whether the scores that the run published were rolled back, retired or changed by others since.

    Raises:
        MissingDependencyError: prometheus_client is not installed (extra eval).
        OSError: the file cannot be written.
    """
    client = import_eval("prometheus_client")
    registry = client.CollectorRegistry()

    def gauge(name: str, help_text: str, values: Mapping[Any, float | None], *labels: str) -> None:
        metric = client.Gauge(f"csrm_{name}", help_text, labels, registry=registry)
        for key, value in values.items():
            if value is not None:
                (metric.labels(*map(seen, key)) if labels else metric).set(value)

    run = runs[0]
    described = ("run_id", "verdict", "bundle_digest", "precision", "device")
    gauge(
        "run_info",
        "The run that the metrics are of; always 1.",
        {tuple(run[name] for name in described): 1},
        *described,
    )
    gauge("run_started_timestamp_seconds", "Start of the run.", {(): run["started_at"].timestamp()})
    finished_at = run["finished_at"]
    gauge(
        "run_finished_timestamp_seconds",
        "End of the run; not there while it runs, or where it died.",
        {(): finished_at and finished_at.timestamp()},
    )
    is_published = run["verdict"] in PUBLISHED and not is_taken_back
    gauge("run_is_published", "1 where the run's scores are published still, else 0.", {(): is_published})
    gauge("run_pairs", "Candidate pairs, by what was done.", {(name,): run[f"num_{name}"] for name in _COUNTS}, "state")
    for name, label, help_text in (
        ("rejected", "reason", "Pairs that could not be scored."),
        ("changes", "operation", "Published rows that the run changed."),
    ):
        gauge(f"run_{name}", help_text, {(key,): value for key, value in (run[name] or {}).items()}, label)
    gauge("run_stage_seconds", "Time of each stage.", {(key,): value for key, value in run["seconds"].items()}, "stage")
    results = json.loads(run["audit"] or "[]")
    values = {(result["market"], result["name"]): result["value"] for result in results}
    gauge("run_audit_value", "What a check of the audit measured.", values, "market", "check")
    failed = {(result["market"], result["name"], result["severity"]): not result["passed"] for result in results}
    gauge("run_audit_failed", "1 where a check of the audit failed, else 0.", failed, "market", "check", "severity")
    published = next((row["finished_at"] for row in runs if row["verdict"] in PUBLISHED), None)
    gauge(
        "last_published_timestamp_seconds",
        "End of the newest run that published, among those of the report.",
        {(): published and published.timestamp()},
    )
    client.write_to_textfile(str(path), registry)
