import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
TOLERANCES = {"fp32": 1e-4, "int8": 0.02, "int4": 0.1}
SCORES = np.array([0.1, 0.5, 0.9])


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("speed")


def test_scores_within_their_tolerance_are_accepted_with_their_differences(speed: ModuleType) -> None:
    int8 = SCORES + np.array([0.0, 0.0, 0.03])
    found = speed.check_scores({"crossencoder": SCORES, "ours-fp32": SCORES + 5e-5, "ours-int8": int8}, TOLERANCES)
    assert found["ours-fp32"]["largest_difference"] == pytest.approx(5e-5)
    assert found["ours-int8"]["largest_difference"] == pytest.approx(0.03)
    assert found["ours-int8"]["mean_difference"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("name", "scores", "message"),
    [
        ("ours-fp32", [0.1, 0.5, 0.9002], "ours-fp32: largest difference from crossencoder is 2.0e-04"),
        ("ours-fp32", [0.1, float("nan"), 0.9], "ours-fp32: largest difference from crossencoder is nan"),
        ("ours-int8", [0.13, 0.53, 0.87], "ours-int8: mean difference from crossencoder is 3.0e-02"),
    ],
)
def test_scores_that_differ_make_a_cell_void(speed: ModuleType, name: str, scores: list[float], message: str) -> None:
    with pytest.raises(speed.VoidError, match=message):
        speed.check_scores({"crossencoder": SCORES, name: np.array(scores)}, TOLERANCES)


def test_scores_of_other_pairs_make_a_cell_void_however_wide_the_tolerance(speed: ModuleType) -> None:
    scores = {"crossencoder": SCORES, "ours-int4": np.array([0.5, 0.9, 0.1])}
    with pytest.raises(speed.VoidError, match="ours-int4: correlation with crossencoder"):
        speed.check_scores(scores, TOLERANCES | {"int4": 1.0})


def test_scores_that_are_all_alike_prove_nothing(speed: ModuleType) -> None:
    with pytest.raises(speed.VoidError, match="standard deviation"):
        speed.check_scores({"crossencoder": SCORES * 1e-3, "ours-fp32": SCORES * 1e-3}, TOLERANCES)


def test_a_ratio_is_the_median_over_turns_of_the_two_runs_of_a_turn(speed: ModuleType) -> None:
    report = importlib.import_module("speed_report")
    cell = {"contenders": {"slow": {"seconds": [4.0, 9.0, 2.0]}, "fast": {"seconds": [2.0, 3.0, 2.0]}}}
    assert report.ratio(cell, "fast", "slow") == (2.0, 1.0, 3.0)
    assert report.ratio(cell, "fast", "absent") is None


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_tiny_benchmark_measures_two_contenders_and_keeps_the_cell(tmp_path: Path) -> None:
    pytest.importorskip("optimum.exporters.onnx")
    command = [sys.executable, str(BENCHMARKS / "speed.py"), "--models", "tiny", "--cells", "tiny/12-ko"]
    command += ["--contenders", "padded-onnx", "ours-fp32", "--repeats", "2", "--scale", "0.2", "--threads", "1"]
    command += ["--work", str(tmp_path / "work"), "--output", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parents[1])}
    subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    (cell,) = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    padded, ours = (cell["contenders"][name] for name in ("padded-onnx", "ours-fp32"))
    assert cell["num_pairs"] == 24
    assert len(padded["seconds"]) == len(ours["seconds"]) == len(cell["matmul"]["fp32"]) == 2
    assert 0 < ours["largest_difference"] < 1e-5
    assert ours["num_tokens"] < padded["num_tokens"] / 2
    assert "| ours, fp32 | **" in (tmp_path / "speed.md").read_text(encoding="utf-8")
    listed = subprocess.run([*command, "--list"], env=environment, check=True, capture_output=True, text=True)
    assert listed.stdout == "tiny/12-ko: done\n"
