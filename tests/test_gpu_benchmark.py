"""tests/benchmarks/bench_gpu.py on a machine without a GPU: all of it but the device."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent / "benchmarks" / "bench_gpu.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(BENCHMARK.parents[2])}

pytestmark = pytest.mark.slow


def run_benchmark(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARK), *words]
    return subprocess.run(command, env=ENVIRONMENT, check=False, capture_output=True, text=True)


def test_without_a_cuda_device_it_says_so_and_ends_with_exit_code_2() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    found = run_benchmark()
    assert found.returncode == 2
    assert "bench_gpu needs a CUDA device: device 'cuda': " in found.stderr
    assert found.stdout == ""


@pytest.mark.long
@pytest.mark.timeout(900)
def test_on_a_cpu_padding_prefix_caching_and_packs_give_the_same_scores(tmp_path: Path) -> None:
    pytest.importorskip("optimum.exporters.onnx")
    words = ["--device", "cpu", "--tiny", "--torch-precision", "fp32", "--pairs", "60", "--batch", "40"]
    words += ["--repeats", "1", "--tokens-per-call", "1024", "--work", str(tmp_path)]
    found = run_benchmark(*words)
    assert found.returncode == 0, found.stderr
    cells = {row[0]: row for row in map(read_row, found.stdout.splitlines()) if row}
    contenders = {"ours-fp32", "ours-fp16", "torch-packs", "torch-padded", "torch-prefix"}
    assert contenders < set(cells)
    heading = cells["contender"]
    for name in contenders - {"ours-fp16"}:
        assert float(cells[name][heading.index("score difference, largest")]) < 1e-5
    assert 0 < float(cells["ours-fp16"][heading.index("score difference, largest")]) < 0.05
    tokens = {name: float(cells[name][heading.index("tokens a pair")]) for name in contenders}
    assert tokens["torch-prefix"] <= tokens["ours-fp32"] == tokens["torch-packs"] < tokens["torch-padded"] / 2
    slopes = [row for row in map(read_row, found.stdout.splitlines()) if row[:2] == ["tiny", "fp16"]]
    assert [int(row[2].replace(",", "")) > 500 for row in slopes] == [True] * 3
    assert "MatMul (CPU) x " in cells["slope-tiny-fp16, 6 layers, 1,047 tokens"][1]

    again = run_benchmark(*words, "--minutes", "0")  # nothing is left to be measured
    assert again.returncode == 0, again.stderr
    assert again.stderr.count(": measured before") == 6
    assert table(again.stdout) == table(found.stdout)
    other = run_benchmark(*words, "--minutes", "0", "--products-per-query", "3")  # those rows are of other settings
    assert other.returncode == 3
    assert other.stdout.count("not run: no time was left") == 6


def table(text: str) -> list[list[str]]:
    return [row for row in map(read_row, text.splitlines()) if row]


def read_row(line: str) -> list[str]:
    return re.split(r"\s*\|\s*", line.strip("| ")) if line.startswith("|") else []
