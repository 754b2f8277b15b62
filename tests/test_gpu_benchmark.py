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
@pytest.mark.timeout(600)
def test_on_a_cpu_padding_prefix_caching_and_packs_give_the_same_scores(tmp_path: Path) -> None:
    pytest.importorskip("optimum.exporters.onnx")
    words = ["--device", "cpu", "--tiny", "--torch-precision", "fp32", "--pairs", "60", "--batch", "40"]
    found = run_benchmark(*words, "--repeats", "1", "--tokens-per-call", "1024", "--work", str(tmp_path))
    assert found.returncode == 0, found.stderr
    cells = {row[0]: row for row in map(read_row, found.stdout.splitlines()) if row}
    assert set(cells) == {"contender", "---", "ours-fp32", "ours-fp16", "torch-packs", "torch-padded", "torch-prefix"}
    heading = cells["contender"]
    for name in ("torch-packs", "torch-padded", "torch-prefix"):
        assert float(cells[name][heading.index("score difference, largest")]) < 1e-5
    assert 0 < float(cells["ours-fp16"][heading.index("score difference, largest")]) < 0.05
    tokens = {
        name: float(row[heading.index("tokens a pair")])
        for name, row in cells.items()
        if name.startswith(("ours", "torch"))
    }
    assert tokens["torch-prefix"] <= tokens["ours-fp32"] == tokens["torch-packs"] < tokens["torch-padded"] / 2


def read_row(line: str) -> list[str]:
    return re.split(r"\s*\|\s*", line.strip("| ")) if line.startswith("|") else []
