"""What runs on a GPU gives what it gives on the CPU."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none here"),
]
DEMO_BUNDLE = Path(__file__).parents[1] / "conf" / "demo_bundle"


def test_the_demo_bundle_has_its_golden_scores() -> None:
    from csrm.bundle.loading import load_scorer

    scorer = load_scorer(DEMO_BUNDLE, "cuda", num_golden=None)  # raises where they differ
    assert scorer.provider == "CUDAExecutionProvider"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_model_that_a_gpu_trained_scores_the_same_on_the_cpu(
    method: str, train_on: Callable, pairs_pdf: pd.DataFrame, loud_base_model: Path, tmp_path: Path
) -> None:
    from csrm.training.model.base import BaseModel
    from csrm.training.trained import load_trained, trained_scorer

    graded = pairs_pdf.assign(grade=["ESCI"[place % 4] for place in range(len(pairs_pdf))])
    base = BaseModel(folder=str(loud_base_model))
    settings = {"method": method, "max_steps": 20, "learning_rate": 3e-3, "pairs_per_prefix": 2}
    trained = train_on(graded, base, tmp_path / "model", **settings)
    assert torch.cuda.max_memory_allocated() > 0
    on_gpu = trained_scorer(tmp_path / "model", "fp32").score(graded)["relevance_score"].to_numpy()
    _, on_cpu, _ = load_trained(tmp_path / "model")
    expected = on_cpu.score(graded)["relevance_score"].to_numpy()
    assert expected.std() > 0.01
    np.testing.assert_allclose(on_gpu, expected, atol=2e-3)
    np.testing.assert_allclose(trained.score(graded)["relevance_score"].to_numpy(), expected, atol=2e-3)


@pytest.mark.parametrize(("precision", "largest_error"), [("fp16", 0.01), ("bf16", 0.05)])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama", "mistral", "gemma3"])
def test_16_bits_are_right_on_a_gpu_where_norms_read_as_much_as_in_real_models(
    name: str, precision: str, largest_error: float, tmp_path: Path
) -> None:
    pytest.importorskip("optimum.exporters.onnx")
    from csrm.export.half import write_half
    from csrm.scoring.runtime import load_pack_scorer
    from tests.export.test_half import error_of, fused_graph, graph_logits, logits_of, loud_model

    fused = fused_graph(loud_model(name, 25_000), tmp_path)
    expected = graph_logits(tmp_path / "fp32.onnx")
    write_half(fused, precision, tmp_path / "half.onnx")
    scorer, provider = load_pack_scorer(tmp_path / "half.onnx", "cuda")
    assert provider == "CUDAExecutionProvider"
    assert 0 < error_of(logits_of(scorer), expected) <= largest_error
