"""A model above 2 GB, which no single ONNX file can hold."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

MAX_MEMORY_GB = 8.0

SCRIPT = "import sys; from pathlib import Path; from tests.export.test_large import export; export(Path(sys.argv[1]))"


def export(folder: Path) -> None:
    """Export 2.2 GB of random weights at fp32, at 8 bits and in float16; print what a test asks about."""
    import gc

    import numpy as np
    import torch
    import transformers

    from csrm.export.graph_files import check_locations, graph_files
    from csrm.export.half import fuse_norms, largest_activation
    from csrm.export.packed_onnx import export_packed_graph
    from csrm.export.precision import RECIPES, write_precision
    from csrm.scoring.packing import lay_out
    from csrm.scoring.runtime import load_pack_scorer
    from csrm.training.model.relevance import PackedRelevanceModel, torch_pack_scorer
    from tests.export.test_families import LABEL_IDS, random_groups

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=160,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=8,
        num_attention_heads=16,
        initializer_range=0.02,
    )
    model = PackedRelevanceModel(transformers.LlamaForCausalLM(config), LABEL_IDS).eval()
    pack = lay_out(random_groups()[:2])
    expected = torch_pack_scorer(model)(pack)
    paths = [folder / name / "model.onnx" for name in ("fp32", "int8", "fp16")]
    for path in paths:
        path.parent.mkdir()
    fused = paths[0].with_name("fused.onnx")
    export_packed_graph(model, paths[0])
    del model
    gc.collect()
    write_precision(paths[0], RECIPES["int8"][0], paths[1])
    fuse_norms(paths[0], fused)
    peak = largest_activation(fused, [pack])
    write_precision(fused, RECIPES["fp16"][0], paths[2])
    differences = []
    for path in paths[:3]:
        check_locations(path)
        actual = load_pack_scorer(path, "cpu")[0](pack)
        differences.append(float(np.abs(actual - expected).max() / np.ptp(expected)))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    sizes = [{file.name: file.stat().st_size / 1e9 for file in graph_files(path)} for path in paths[:3]]
    print(json.dumps({"peak": peak.value, "memory_gb": memory, "sizes_gb": sizes, "differences": differences}))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_model_above_2_gb_has_its_weights_beside_the_graph(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    fp32, int8, fp16 = found["sizes_gb"]
    assert sorted(fp32) == ["model.onnx", "model.onnx_data"]
    assert fp32["model.onnx_data"] > 2.1
    assert 0.5 < sum(int8.values()) < 0.8
    assert found["differences"][0] <= 1e-4
    assert found["differences"][1] <= 0.2
    assert 1.05 < sum(fp16.values()) < 1.15
    assert 0 < found["differences"][2] <= 0.01
    assert 0.1 < found["peak"] < 100
    assert found["memory_gb"] < MAX_MEMORY_GB, found


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_benchmark_of_memory_exports_a_trained_folder_and_checks_the_graph(precision: str) -> None:
    benchmark = Path(__file__).parents[1] / "benchmarks" / "export_memory.py"
    command = [sys.executable, str(benchmark), "--layers", "3", "--hidden-size", "64", "--precision", precision]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    heading, _, row = ([cell.strip() for cell in line.strip("| ").split("|")] for line in result.stdout.splitlines())
    cells = dict(zip(heading, row, strict=True))
    assert 0.1 < float(cells["peak, GB"]) < float(cells["limit, GB"]) < 3.1
    assert 0 < float(cells["largest error, share"]) < 0.03
    assert float(cells["range of logits"]) > 1
