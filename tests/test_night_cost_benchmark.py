import datetime
import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from csrm.bundle.loading import load_bundle
from csrm.capacity.figures import Run, bundle_figures
from csrm.capacity.formula import PHASES, SHUFFLED_KEY_BYTES, SHUFFLED_TEXT, Machines, Plan

BENCHMARKS = Path(__file__).parent / "benchmarks"
DEMO_BUNDLE = BENCHMARKS.parents[1] / "conf" / "demo_bundle"


@pytest.fixture
def night_cost(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("psutil")
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("night_cost")


def night(pairs: int, seconds: float, **stages: float) -> dict[str, Any]:
    names = ("start", "inputs", "plan", "scoring", "audit", "publish")
    return {
        "pairs": pairs,
        "seconds": seconds,
        "stages": dict.fromkeys(names, 0.0) | stages,
        "settings": {"cores": 2},
    }


def test_a_marginal_cost_is_that_of_the_pairs_which_a_night_has_more(night_cost: ModuleType) -> None:
    nights = [night(100_000, 60.0, plan=6.0), night(300_000, 70.0, plan=7.0), night(1_000_000, 140.0, plan=7.7)]
    assert night_cost.marginal(nights) == pytest.approx([50.0, 100.0])
    assert night_cost.marginal(nights, "plan") == pytest.approx([5.0, 1.0])


def test_the_constants_of_a_stage_are_a_line_through_the_smallest_and_the_largest_night(night_cost: ModuleType) -> None:
    nights = [
        night(100_000, 30.0, start=12.0, plan=6.0, publish=3.0),
        night(1_000_000, 40.0, start=13.0, plan=9.6, publish=4.8),
    ]
    costs = night_cost.measured_stages(nights)
    assert costs["start"] == (12.0, 0.0)
    assert costs["plan"] == (5.6, 8.0)  # of two cores
    assert costs["publish"] == (2.8, 4.0)


def test_memory_in_use_is_the_least_that_a_late_collection_left(night_cost: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "gc-1.log").write_text(
        "[0.1s][info][gc] Using G1\n"
        "[0.5s][info][gc] GC(0) Pause Young (Normal) (G1 Evacuation Pause) 30M->20M(2048M) 4.1ms\n"
        "[1.0s][info][gc] GC(1) Pause Young (Normal) (G1 Evacuation Pause) 900M->80M(2048M) 4.1ms\n"
        "[1.5s][info][gc] GC(2) Pause Remark 60M->60M(2048M) 4.1ms\n"
        "[2.0s][info][gc] GC(3) Pause Full (System.gc()) 300M->70M(2048M) 30.0ms\n"
        "[2.5s][info][gc] GC(4) Pause Young (Normal) (G1 Evacuation Pause) 1G->90M(2G) 4.1ms\n"
    )
    (tmp_path / "gc-2.log").write_text("[0.2s][info][gc] GC(0) Pause Young (Allocation Failure) 9K->8K(2M) 1.0ms\n")
    assert night_cost.heap_in_use(tmp_path) == 70 * 2**20


def test_stages_follow_each_other_up_to_the_end_of_a_run(night_cost: ModuleType) -> None:
    seconds = [("publish", 3.0), ("scoring", 20.0), ("plan", 7.0), ("canary", 0.0), ("inputs", 6.0), ("audit", 5.0)]
    row = {"seconds": seconds, "finished_at": datetime.datetime(1970, 1, 1, 0, 1, 40, tzinfo=datetime.UTC)}
    windows = night_cost.stage_windows(row)
    assert list(windows) == ["inputs", "plan", "scoring", "canary", "audit", "publish"]
    assert windows["plan"] == (65.0, 72.0)
    assert windows["scoring"] == (72.0, 92.0)
    assert windows["publish"] == (97.0, 100.0)


def foretold_cell(bundle: str, num_pairs: int) -> dict[str, Any]:
    """A cell as csrm.capacity foretells it, of 500 queries on two cores."""
    machines, figures = Machines(2, 2), bundle_figures(load_bundle(DEMO_BUNDLE), 10_000.0)
    needs = Plan(figures, machines, num_pairs / 500).needs(500)
    text = SHUFFLED_TEXT * (figures.prefix_bytes + figures.suffix_bytes)
    tasks = {"seconds": 10.0, "jvm_seconds": 5.0, "shuffled": 0.0, "spilled": 0.0}
    run = Run("", num_pairs, num_pairs, round(needs.num_tokens), num_pairs / 500, needs.seconds, figures.table_bytes)
    return {
        "bundle": bundle,
        "pairs": num_pairs,
        "settings": {"queries": 500, "products": 5_000, "cores": 2},
        "machine": {"date": "", "commit": "", "processor": "", "memory_gib": 1, "load_average": 0.0},
        "seconds": sum(needs.seconds.values()),
        "stages": needs.seconds,
        "run": asdict(run),
        "num_files": dict.fromkeys(figures.table_bytes, 1),
        "memory": dict.fromkeys(("jvm", "heap", "driver", "worker", "worker_first", "worker_last", "workers"), 2**20),
        "tasks": {
            "plan": tasks | {"shuffled": SHUFFLED_KEY_BYTES * num_pairs},
            "scoring": tasks | {"shuffled": text * num_pairs},
        },
        "bare_us": {"model": 1.0, "beside": 2.0},
    }


def test_nights_that_are_as_foretold_are_reported_so(night_cost: ModuleType) -> None:
    cells = [foretold_cell(name, pairs) for name in ("none", "demo") for pairs in (100_000, 10_000, 30_000)]
    text = night_cost.report(cells)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    compared = {(row[0], row[1]): row[4] for row in rows if row[-1].endswith("%")}
    whats = ("seconds", "tokens", "bytes of the tables", "bytes shuffled")
    assert compared == {(pairs, what): "+0%" for pairs in ("10,000", "100,000") for what in whats}
    assert ["demo", "30,000", "100,000"] in [row[:3] for row in rows]
    assert f"SHUFFLED_KEY_BYTES = {SHUFFLED_KEY_BYTES:.0f}\nSHUFFLED_TEXT = {SHUFFLED_TEXT:.2f}" in text
    assert f'"start": PhaseCost({PHASES["start"].fixed_s}, 0.0),' in text
    assert f'"plan": PhaseCost({PHASES["plan"].fixed_s}, {PHASES["plan"].pair_us}),' in text


@pytest.mark.long
@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_tiny_night_is_measured_kept_and_reported(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    command = [sys.executable, str(BENCHMARKS / "night_cost.py"), "--bundles", "none", "--pairs", "200"]
    command += ["--queries", "20", "--products", "100", "--work", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parents[1])}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cell = json.loads((tmp_path / "none_200.json").read_text())
    assert cell["pairs"] == cell["run"]["num_scored"] == 200
    assert cell["run"]["products_per_query"] == 10
    assert sum(cell["stages"].values()) == pytest.approx(cell["seconds"])
    assert min(cell["stages"].values()) > 0
    assert set(cell["run"]["table_bytes"]) == {"scores_staging", "run_pairs", "relevance_scores"}
    assert min(cell["memory"].values()) > 0
    assert cell["tasks"]["scoring"]["shuffled"] > 0
    assert cell["bare_us"]["beside"] > cell["bare_us"]["model"] > 0
    assert "| none | 200 | " in done.stdout
    again = subprocess.run([*command, "--report"], env=environment, check=True, capture_output=True, text=True)
    assert again.stdout == done.stdout
