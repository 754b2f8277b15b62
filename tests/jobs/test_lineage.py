"""A night beside OpenLineage's Spark listener, which writes its events into a file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from csrm.cli import setting_arguments
from csrm.commands import generate_market
from csrm.errors import ConfigError
from csrm.spark.jars import resolve_jars

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]


def documented_settings(events: Path) -> list[str]:
    """Words of spark-submit, as docs/deployment.md has them, with another file for the events."""
    text = (ROOT / "docs" / "deployment.md").read_text()
    block = text.partition("## Lineage")[2].partition("```\n")[2].partition("```")[0]
    words = block.replace("\\\n", " ").split()
    return [
        word.replace("/var/log/csrm/lineage.jsonl", str(events))
        for word in words[1 : words.index("jobs/score_catalog.py")]
    ]


def test_the_listener_sees_what_a_night_reads_and_writes(tmp_path: Path) -> None:
    events, inputs, tables = tmp_path / "lineage.jsonl", tmp_path / "inputs", tmp_path / "tables"
    words = documented_settings(events)
    try:
        resolve_jars(words[words.index("--packages") + 1])
    except ConfigError as error:
        pytest.skip(f"OpenLineage's jar cannot be had: {error}")
    market = setting_arguments(output=str(inputs), markets={"us": "en"}, products_per_market=40, queries_per_market=8)
    assert generate_market.main(market) == 0
    names = ("catalog", "queries", "candidates")
    night = setting_arguments(
        markets={"us": "en"},
        inputs={name: {"path": str(inputs / f"{name}.parquet"), "format": "parquet"} for name in names},
        tables=str(tables),
        bundle=str(ROOT / "conf" / "demo_bundle"),
        use_retrieved_titles=False,
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYSPARK_GATEWAY", "SPARK_"))}
    environment = {**kept, "PYTHONPATH": str(ROOT), "PYSPARK_SUBMIT_ARGS": " ".join([*words, "pyspark-shell"])}
    command = [sys.executable, "jobs/score_catalog.py", *night]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    seen: dict[str, set[str]] = {"inputs": set(), "outputs": set()}
    for line in events.read_text().splitlines():
        event = json.loads(line)
        for side, found in seen.items():
            found |= {dataset["name"] for dataset in event.get(side) or []}
    assert {str(inputs / f"{name}.parquet") for name in names} <= seen["inputs"]
    written = ("relevance_scores", "scores_staging", "run_pairs", "scoring_runs")
    assert {str(tables / name) for name in written} <= seen["outputs"]
