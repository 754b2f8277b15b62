import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from csrm.artefacts.manifest import MANIFEST_NAME, write_manifest
from csrm.bundle.card import bundle_card
from csrm.bundle.contents import other_cpu
from csrm.bundle.golden import GoldenPairs
from csrm.bundle.loading import GOLDEN_AT_LOAD, load_bundle, load_scorer
from csrm.cli import Console
from csrm.commands.bundle import main
from csrm.errors import BundleError, ConfigError, DeviceError
from csrm.night.messages import warn_of_other_cpu
from csrm.scoring import runtime
from csrm.spark.scoring import ScorerInfo
from tests.faults.bundles import give_one_score

FILES = ["model.onnx", "tokenizer.json", "golden.json", "seen_tokens.bin", "manifest.json"]


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def sealed(folder: Path, **changes: Any) -> Path:
    """A folder that was changed, with a manifest that is right for it: what digests alone cannot find."""
    about = json.loads((folder / MANIFEST_NAME).read_text())["about"]
    write_manifest(folder, "bundle", {**about, **changes})
    return folder


@pytest.mark.parametrize("name", ["tokens_per_call", "threads", "num_golden"])
@pytest.mark.parametrize("number", [0, -1])
def test_numbers_below_one_are_not_the_default(tiny_bundle: Path, name: str, number: int) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: expected a whole number .*from 1, got {number}"):
        load_scorer(tiny_bundle, "cpu", **{name: number})  # type: ignore[arg-type]


def test_a_bundle_scores_the_same_wherever_it_lies(
    tiny_bundle: Path, bundle_copy: Path, pairs_pdf: pd.DataFrame
) -> None:
    first, second = load_scorer(tiny_bundle, "cpu", threads=1), load_scorer(bundle_copy, "cpu")
    assert first.digest == second.digest == load_bundle(tiny_bundle).digest
    assert first.provider == "CPUExecutionProvider"
    assert first.num_tokens == 0
    scores = [scorer.score(pairs_pdf)["relevance_score"] for scorer in (first, second)]
    np.testing.assert_allclose(*scores, atol=1e-6)


def test_the_files_of_a_bundle_are_those_that_are_tampered_with_here(tiny_bundle: Path) -> None:
    assert sorted(path.name for path in tiny_bundle.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_flipped_byte_in_any_file_is_one_error(bundle_copy: Path, name: str, share: float) -> None:
    data = bytearray((bundle_copy / name).read_bytes())
    data[int(share * len(data))] ^= 1
    (bundle_copy / name).write_bytes(data)
    expected = r"manifest|is a '|not as it was made" if name == MANIFEST_NAME else f"{name} has another content"
    with pytest.raises(BundleError, match=expected):
        load_scorer(bundle_copy, "cpu")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_one_error(bundle_copy: Path, name: str) -> None:
    data = (bundle_copy / name).read_bytes()
    (bundle_copy / name).write_bytes(data[: len(data) // 2])
    expected = "manifest.json is not JSON" if name == MANIFEST_NAME else rf"{name} has \d+ bytes, expected {len(data)}"
    with pytest.raises(BundleError, match=expected):
        load_scorer(bundle_copy, "cpu")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_one_error(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).unlink()
    expected = "manifest.json cannot be read" if name == MANIFEST_NAME else f"{name} is missing"
    with pytest.raises(BundleError, match=expected):
        load_scorer(bundle_copy, "cpu")


def test_the_digest_depends_on_the_settings(bundle_copy: Path) -> None:
    before = load_bundle(bundle_copy).digest
    budgets = json.loads((bundle_copy / MANIFEST_NAME).read_text())["about"]["budgets"]
    assert load_bundle(sealed(bundle_copy, budgets={**budgets, "query": 40})).digest != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, "format_version is 1, this CSRM reads 3"),
        ({"format_version": 99}, "format_version is 99, this CSRM reads 3"),
        ({"template_version": 99}, "template_version is 99"),
        ({"format_version": 2}, "format_version is 2, this CSRM reads 3. Export the model again"),
        ({"surprise": 1}, "does not describe a bundle"),
        ({"labels": 3}, "does not describe a bundle"),
        ({"labels": [{"name": "a", "token": " a", "gain": 2.0}]}, "does not describe a bundle.*its gain is 2"),
        ({"labels": []}, "labels: .* at least 2"),
        ({"golden_tolerance": 1e9}, r"golden_tolerance: .* less than or equal to 0.5 \(got 1000000000.0\)"),
        ({"golden_tolerance": -1e-4}, "golden_tolerance: .* greater than or equal to 0"),
        ({"pack_tolerance": float("nan")}, "pack_tolerance: .* a finite number"),
        ({"precisions": []}, r"precision is fp32, expected one that precisions measured: \[\]"),
        ({"budgets": {"query": -3}}, "budgets.*query is -3"),
    ],
)
def test_settings_of_another_version_are_refused(bundle_copy: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        load_bundle(sealed(bundle_copy, **changes))


@pytest.mark.parametrize("name", [*FILES, "more"])
def test_a_link_in_a_bundle_is_refused_and_a_link_to_it_is_not(bundle_copy: Path, name: str) -> None:
    outside = bundle_copy.parent / "outside"
    if name == "more":
        outside.mkdir()
    else:
        (bundle_copy / name).rename(outside)
    (bundle_copy.parent / "current").symlink_to(bundle_copy, target_is_directory=True)
    (bundle_copy / name).symlink_to(outside)
    with pytest.raises(BundleError, match=f"{name} is a symbolic link"):
        load_bundle(bundle_copy)
    (bundle_copy / name).unlink()
    if name != "more":
        outside.rename(bundle_copy / name)
    assert load_bundle(bundle_copy.parent / "current").digest == load_bundle(bundle_copy).digest


def test_a_bfloat16_bundle_is_refused_on_the_cpu_with_the_way_out(bundle_copy: Path) -> None:
    report = load_bundle(bundle_copy).settings.report.model_dump()
    sealed(bundle_copy, precision="bf16", precisions=[{**report, "precision": "bf16"}])
    assert load_bundle(bundle_copy).settings.precision == "bf16"
    with pytest.raises(BundleError, match=r"is bf16, which .* on GPUs only; got device 'cpu'\. Score with device cuda"):
        load_scorer(bundle_copy, "cpu")


def test_a_bundle_of_the_first_format_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text('{"format_version": 1}')
    write_manifest(tmp_path, "bundle")
    manifest = json.loads((tmp_path / MANIFEST_NAME).read_text())
    del manifest["about"]
    (tmp_path / MANIFEST_NAME).write_text(json.dumps({**manifest, "manifest_version": 1}))
    with pytest.raises(BundleError, match=r"format_version is 1, this CSRM reads 3\. Export the model again"):
        load_bundle(tmp_path)


def test_another_bundle_than_the_one_that_was_pinned_is_refused(tiny_bundle: Path) -> None:
    digest = load_bundle(tiny_bundle).digest
    assert load_scorer(tiny_bundle, "cpu", threads=1, digest=digest).digest == digest
    assert load_bundle(tiny_bundle, digest[:12]).digest == digest
    with pytest.raises(BundleError, match=f"expected digest 0123, got {digest}"):
        load_scorer(tiny_bundle, "cpu", threads=1, digest="0123")


def other_weights(folder: Path) -> None:
    """The same graph with other numbers in it: what a mix-up of two trainings looks like."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(folder / "model.onnx")
    weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = onnx.numpy_helper.to_array(weights)
    weights.raw_data = np.roll(values, 1, axis=0).tobytes()
    onnx.save(model, folder / "model.onnx")


def other_tokenizer(folder: Path) -> None:
    """The vocabulary in another order."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = (vocabulary[token] for token in ("t", "e"))
    vocabulary["t"], vocabulary["e"] = second, first
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def no_graph(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"not a graph")


def graph_with_other_inputs(folder: Path) -> None:
    onnx = pytest.importorskip("onnx")
    tensors = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "other", tensors[:1], tensors[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.save(model, folder / "model.onnx")


def no_golden_pairs(folder: Path) -> None:
    (folder / "golden.json").write_text("{}")


def weights_outside(folder: Path) -> None:
    """A graph whose weights lie beside the bundle."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(folder / "model.onnx")
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    shutil.move(folder / "weights", folder.parent / "weights")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights"
    (folder / "model.onnx").write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_weights, r"golden pair \d+ .*expected score 0\.\d+ \(torch .*, got 0\.\d+ with CPUExecutionProvider of"),
        (other_tokenizer, r"golden pair 0 .*The tokenizer is another model's"),
        (no_graph, "onnxruntime cannot read it"),
        (graph_with_other_inputs, r"expected inputs \['group_index', .*got inputs \['x'\] and outputs \['y'\]"),
        (no_golden_pairs, "golden.json does not hold golden pairs"),
        (weights_outside, "onnxruntime cannot read it: .*weights"),
        (give_one_score, r"tell pairs apart, got 0\.277500 to 0\.277500 \(torch\) for 30 pairs.*: train it again"),
    ],
)
def test_a_bad_bundle_whose_digests_are_right_never_scores(
    bundle_copy: Path, change: Callable[[Path], None], message: str
) -> None:
    change(bundle_copy)
    with pytest.raises(BundleError, match=message):
        load_scorer(sealed(bundle_copy), "cpu")


def test_labels_of_several_tokens_are_refused(bundle_copy: Path) -> None:
    labels = json.loads((bundle_copy / MANIFEST_NAME).read_text())["about"]["labels"]
    labels[0]["token"] = " certainly not relevant"
    with pytest.raises(BundleError, match=r"' certainly not relevant' is \d+ tokens"):
        load_scorer(sealed(bundle_copy, labels=labels), "cpu")


def test_golden_pairs_hold_their_tolerance_and_are_spread(tiny_bundle: Path, bundle_copy: Path) -> None:
    golden = load_bundle(tiny_bundle).golden_pairs()
    assert len(golden) == 30
    assert np.ptp(golden.first(GOLDEN_AT_LOAD).scores) >= 0.5 * np.ptp(golden.scores) >= 0.1
    moved = GoldenPairs(golden.source, golden.pairs, golden.prompt_ids, golden.scores + 1.1e-4)
    moved.write(bundle_copy / "golden.json")
    with pytest.raises(BundleError, match=r"allowed difference 1\.0e-04"):
        load_scorer(sealed(bundle_copy), "cpu")


def test_golden_pairs_of_one_prompt_need_not_differ_and_those_of_a_few_are_judged_by_all(tiny_bundle: Path) -> None:
    golden = load_bundle(tiny_bundle).golden_pairs()
    one = GoldenPairs("torch", golden.pairs.iloc[[0, 0]], [golden.prompt_ids[0]] * 2, np.array([0.5, 0.5]))
    one.require_different(1e-4)
    golden.first(1).require_different(1e-4)

    rare = np.where(np.arange(len(golden)) == len(golden) - 1, 1.0, 0.0)
    GoldenPairs("torch", golden.pairs, golden.prompt_ids, rare).require_different(1e-4)
    with pytest.raises(BundleError, match="which a graph may miss by 1"):
        GoldenPairs("torch", golden.pairs, golden.prompt_ids, rare).require_different(1.0)


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


def test_the_card_says_what_a_bundle_is(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle)
    card = bundle_card(bundle)
    for part in (
        bundle.digest,
        "fp32, proven on cpu",
        "E 1 (' yes')",
        "activations in float32",
    ):
        assert part in card


def test_the_command_line_shows_and_verifies(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(tiny_bundle)]) == 0
    assert "verified" not in capsys.readouterr().out
    assert main(["verify", str(tiny_bundle)]) == 0
    assert "30 golden pairs have their scores on cpu (CPUExecutionProvider)" in capsys.readouterr().out


def test_the_command_line_lists_the_bundles_of_a_folder_the_newest_first(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("older", "team/newer", "broken")):
        copy = Path(shutil.copytree(tiny_bundle, tmp_path / name))
        os.utime(copy / "manifest.json", (number * 86_400, number * 86_400))
    (tmp_path / "broken" / "model.onnx").write_bytes(b"")
    (tmp_path / "no_bundle").mkdir()
    (tmp_path / "no_bundle" / "manifest.json").write_text("{}")

    assert main(["list", str(tmp_path)]) == 0

    header, *rows = capsys.readouterr().out.splitlines()
    digest = load_bundle(tiny_bundle).digest[:12]
    assert header.split()[:3] == ["exported", "digest", "precision"]
    assert [row[:10] for row in rows] == ["1970-01-03", "1970-01-02", "1970-01-01"]
    assert "cannot be used: bundle" in rows[0]
    assert [(digest in row, row.split()[-1]) for row in rows[1:]] == [
        (True, str(tmp_path / "team" / "newer")),
        (True, str(tmp_path / "older")),
    ]


def test_a_folder_without_a_bundle_cannot_be_listed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a folder of this machine with bundles in it, found none"):
        main(["list", str(tmp_path)])


def test_the_command_line_ends_with_2_where_nothing_is_proven(bundle_copy: Path) -> None:
    (bundle_copy / "model.onnx").write_bytes(b"")
    command = [sys.executable, "-m", "csrm.bundle", "verify", str(bundle_copy)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: bundle ")
    assert "Traceback" not in result.stderr


def test_of_several_recipes_of_one_precision_the_bundle_is_the_one_that_passed(tiny_bundle: Path) -> None:
    settings = load_bundle(tiny_bundle).settings
    refused = settings.report.model_copy(update={"precision": "int8", "verdict": "ROC-AUC: -0.1", "pairs_per_s": 1.0})
    passed = refused.model_copy(update={"verdict": "passed", "pairs_per_s": 2.0})
    tried = (settings.report, refused, passed)

    assert settings.model_copy(update={"precision": "int8", "precisions": tried}).report == passed
    assert settings.report.precision == settings.precision


def test_eight_bits_that_were_chosen_on_another_cpu_are_named(tiny_bundle: Path) -> None:
    settings = load_bundle(tiny_bundle).settings.model_copy(update={"cpu_features": ("avx2", "avx512_vnni")})
    eight = settings.model_copy(update={"precision": "int8"})
    assert other_cpu(eight, ["avx2"]) == (
        "int8 was the fastest on a CPU with avx2, avx512_vnni; this one has avx2, where another precision may be "
        "faster. Export the bundle on such a machine"
    )
    assert other_cpu(eight, ["avx512_vnni", "avx2"]) is None
    assert other_cpu(eight, []) is None  # not Linux
    assert other_cpu(settings, ["avx2"]) is None  # fp32
    assert other_cpu(eight.model_copy(update={"cpu_features": ()}), ["avx2"]) is None  # an older bundle


def test_a_night_on_another_cpu_says_so(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = load_bundle(tiny_bundle)
    changed = bundle.settings.model_copy(update={"precision": "int8", "cpu_features": ("avx2", "avx512_vnni")})
    eight = dataclasses.replace(bundle, settings=changed)
    warn_of_other_cpu(eight, ScorerInfo(bundle.digest, "CPUExecutionProvider", ("avx2",)), Console())
    assert capsys.readouterr().out.startswith("warning: bundle: int8 was the fastest on a CPU with avx2, avx512_vnni;")
    warn_of_other_cpu(bundle, ScorerInfo(bundle.digest, "CPUExecutionProvider", ("avx2",)), Console())
    assert not capsys.readouterr().out


def test_a_bundle_that_is_replaced_while_it_is_loaded_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model, tokenizer and golden pairs would be those of the other one, under the digest of the first."""
    folder = Path(shutil.copytree("conf/demo_bundle", tmp_path / "bundle"))
    digest = load_bundle(folder).digest
    load_pack_scorer = runtime.load_pack_scorer

    def replaced_before(*arguments: Any) -> Any:
        sealed(folder, golden_source="another bundle")
        return load_pack_scorer(*arguments)

    monkeypatch.setattr(runtime, "load_pack_scorer", replaced_before)
    with pytest.raises(BundleError, match=f"was replaced while it was loaded: expected digest {digest}"):
        load_scorer(folder, "cpu", threads=1)


def test_grade_costs_change_the_grades_and_the_digest_but_no_score(bundle_copy: Path, pairs_pdf: pd.DataFrame) -> None:
    bundle = load_bundle(bundle_copy)
    assert "grade_costs" not in json.loads((bundle_copy / MANIFEST_NAME).read_text())["about"]
    before = load_scorer(bundle_copy, "cpu").score(pairs_pdf)
    costly = before["predicted_grade"].iloc[0]
    names = [label.name for label in bundle.settings.labels]

    sealed(bundle_copy, grade_costs={name: {costly: 1_000.0} for name in names if name != costly})

    after = load_scorer(bundle_copy, "cpu").score(pairs_pdf)
    assert load_bundle(bundle_copy).digest != bundle.digest
    assert costly not in set(after["predicted_grade"])
    pd.testing.assert_series_equal(after["relevance_score"], before["relevance_score"])
    sealed(bundle_copy, grade_costs={"worst": {costly: 1.0}})
    with pytest.raises(BundleError, match=r"does not describe a bundle: grade_costs: \['worst'\] are no labels"):
        load_bundle(bundle_copy)
