import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from csrm.bundle import load_bundle, load_scorer
from csrm.errors import BundleError, ConfigError, DeviceError
from csrm.manifest import write_manifest


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def test_a_bundle_scores_the_same_wherever_it_lies(
    tiny_bundle: Path, bundle_copy: Path, pairs_pdf: pd.DataFrame
) -> None:
    first, second = load_scorer(tiny_bundle, "cpu", threads=1), load_scorer(bundle_copy, "cpu")
    assert first.digest == second.digest == load_bundle(tiny_bundle).digest
    assert first.provider == "CPUExecutionProvider"
    scores = [scorer.score(pairs_pdf)["relevance_score"] for scorer in (first, second)]
    np.testing.assert_allclose(*scores, atol=1e-6)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "bundle.json", "parity.json"])
def test_a_flipped_byte_in_any_file_is_found(bundle_copy: Path, name: str) -> None:
    data = bytearray((bundle_copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle_copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} has another content"):
        load_scorer(bundle_copy, "cpu")


def test_the_digest_depends_on_the_budgets(bundle_copy: Path) -> None:
    before = load_bundle(bundle_copy).digest
    settings = json.loads((bundle_copy / "bundle.json").read_text())
    settings["budgets"]["query"] = 40
    (bundle_copy / "bundle.json").write_text(json.dumps(settings))
    write_manifest(bundle_copy, "bundle")
    assert load_bundle(bundle_copy).digest != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format_version is 99, this CSRM reads 1"),
        ({"template_version": 99}, "template_version is 99"),
        ({"pack_tokens": 10}, "pack_tokens is 10, but a prefix with one suffix may take 352"),
        ({"surprise": 1}, "is not the settings of a bundle"),
        ({"labels": 3}, "is not the settings of a bundle"),
    ],
)
def test_settings_of_another_version_are_refused(bundle_copy: Path, change: dict, message: str) -> None:
    settings = json.loads((bundle_copy / "bundle.json").read_text())
    (bundle_copy / "bundle.json").write_text(json.dumps(settings | change))
    write_manifest(bundle_copy, "bundle")
    with pytest.raises(BundleError, match=message):
        load_bundle(bundle_copy)


def test_a_graph_that_is_no_graph_is_named(bundle_copy: Path) -> None:
    (bundle_copy / "model.onnx").write_bytes(b"not a graph")
    write_manifest(bundle_copy, "bundle")
    with pytest.raises(BundleError, match="onnxruntime cannot read it"):
        load_scorer(bundle_copy, "cpu")


def test_a_device_that_is_not_there_is_not_replaced(tiny_bundle: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has CUDA")
    with pytest.raises(DeviceError, match="needs CUDAExecutionProvider"):
        load_scorer(tiny_bundle, "cuda")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", "cuda0"])
def test_an_unknown_device_is_refused(tiny_bundle: Path, device: str) -> None:
    with pytest.raises(ConfigError, match="expected cpu, cuda or cuda:<number>"):
        load_scorer(tiny_bundle, device)
