"""16 bits: right for models whose activations are as large as those of real ones, refused where they do not fit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from csrm.errors import BundleError, ParityError
from csrm.export.half import Peak, check_range, fuse_norms, largest_activation, write_half, write_rounded
from csrm.export.packed_onnx import export_packed_graph
from csrm.scoring.packing import Pack, build_packs
from csrm.scoring.runtime import load_pack_scorer, open_session
from csrm.training.model.relevance import PackedRelevanceModel, torch_pack_scorer
from tests.export.loud_models import largest_norm_input, make_loud
from tests.export.test_families import LABEL_IDS, random_groups, tiny_model

NORMS = {"qwen2": 5, "qwen3": 9, "llama": 5, "mistral": 5, "gemma3": 25}
"""One model of each family, and how many norms it has: two or four a layer, two more for queries and keys, the last."""
LARGEST_ERROR = {"fp16": 0.01, "bf16": 0.05}
"""Of a label logit, as a share of the range of all; these seeded models round worse than trained ones."""


def packs() -> list[Pack]:
    return list(build_packs(random_groups(), pack_tokens=120))


def logits_of(scorer: Callable[[Pack], np.ndarray]) -> np.ndarray:
    return np.concatenate([scorer(pack) for pack in packs()])


def graph_logits(path: Path) -> np.ndarray:
    return logits_of(load_pack_scorer(path, "cpu", threads=1)[0])


def error_of(logits: np.ndarray, expected: np.ndarray) -> float:
    """Largest error as a share of the range; infinite where a logit is no number."""
    return float(np.nan_to_num(np.abs(logits - expected).max(), nan=np.inf) / np.ptp(expected))


def loud_model(name: str, norm_input: float) -> PackedRelevanceModel:
    return make_loud(PackedRelevanceModel(tiny_model(name), LABEL_IDS).eval(), packs(), norm_input)


def fused_graph(model: PackedRelevanceModel, folder: Path) -> Path:
    """fused.onnx, with fp32.onnx beside it."""
    export_packed_graph(model, folder / "fp32.onnx")
    fuse_norms(folder / "fp32.onnx", folder / "fused.onnx")
    return folder / "fused.onnx"


def rounded_logits(fused: Path, precision: str) -> np.ndarray:
    paths = [fused.with_name(f"{precision}{suffix}.onnx") for suffix in ("", "-rounded")]
    write_half(fused, precision, paths[0])
    write_rounded(*paths)
    return graph_logits(paths[1])


def norms_blocked_one_by_one(source: Path, path: Path) -> None:
    """What CSRM did before: onnxruntime's converter with every node of a norm in its block list."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(source)
    norms = [node.name for node in model.graph.node if "norm" in node.name]
    onnx.save(convert_float_to_float16(model, keep_io_types=True, node_block_list=norms), path)


@pytest.mark.parametrize("name", NORMS)
def test_a_loud_model_has_the_logits_of_the_quiet_one(name: str) -> None:
    model = PackedRelevanceModel(tiny_model(name), LABEL_IDS).eval()
    quiet = logits_of(torch_pack_scorer(model))
    assert largest_norm_input(model, packs()) < 100
    make_loud(model, packs(), 70_000)
    assert largest_norm_input(model, packs()) == pytest.approx(70_000, rel=0.02)
    assert error_of(logits_of(torch_pack_scorer(model)), quiet) < 1e-4


@pytest.mark.parametrize("name", NORMS)
def test_where_norms_read_1000_float16_is_right_and_blocking_norms_one_by_one_was_not(
    name: str, tmp_path: Path
) -> None:
    fused = fused_graph(loud_model(name, 1000), tmp_path)
    expected = graph_logits(tmp_path / "fp32.onnx")
    assert 700 < largest_activation(fused, packs()).value < 1020  # the last layer computes last tokens only
    assert 0 < error_of(rounded_logits(fused, "fp16"), expected) <= LARGEST_ERROR["fp16"]
    assert error_of(graph_logits(tmp_path / "fp16.onnx"), expected) <= LARGEST_ERROR["fp16"]
    norms_blocked_one_by_one(tmp_path / "fp32.onnx", tmp_path / "before.onnx")
    assert error_of(graph_logits(tmp_path / "before.onnx"), expected) > 0.4


@pytest.mark.parametrize("name", NORMS)
def test_where_norms_read_200000_float16_is_refused_by_layer_and_value_and_bfloat16_is_right(
    name: str, tmp_path: Path
) -> None:
    fused = fused_graph(loud_model(name, 200_000), tmp_path)
    expected = graph_logits(tmp_path / "fp32.onnx")
    peak = largest_activation(fused, packs())
    assert 140_000 < peak.value < 204_000  # the last layer computes last tokens only
    with pytest.raises(ParityError, match=r"reach (1[4-9]\d|20[0-3]),\d{3} in /model/layers\.\d/Add\w*, .* Use bf16"):
        check_range(peak)
    assert error_of(rounded_logits(fused, "fp16"), expected) == np.inf
    assert 0 < error_of(rounded_logits(fused, "bf16"), expected) <= LARGEST_ERROR["bf16"]


def test_an_activation_that_is_no_number_is_refused() -> None:
    check_range(Peak("/model/layers.1/Add", 30_000))
    for value in (30_001, np.inf, np.nan):
        with pytest.raises(ParityError, match=r"in /model/layers\.1/Add, expected at most 30,000"):
            check_range(Peak("/model/layers.1/Add", value))


@pytest.fixture(scope="module", params=NORMS)
def halves(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Name of a family, and fp16.onnx and bf16.onnx of one folder."""
    folder = tmp_path_factory.mktemp("half")
    fused = fused_graph(PackedRelevanceModel(tiny_model(request.param), LABEL_IDS).eval(), folder)
    for precision in ("fp16", "bf16"):
        write_half(fused, precision, folder / f"{precision}.onnx")
    return request.param, folder


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_norm_is_one_node_and_casts_are_for_rotary_tables_the_last_tokens_and_shares_only(
    halves: tuple[str, Path], precision: str
) -> None:
    name, folder = halves
    graph = onnx.load(folder / f"{precision}.onnx").graph
    makers = {output: node.op_type for node in graph.node for output in node.output}
    assert [node.op_type for node in graph.node].count("SimplifiedLayerNormalization") == NORMS[name]
    assert not {"ReduceMean", "Pow", "Sqrt"} & {node.op_type for node in graph.node}
    casts = [makers.get(node.input[0], node.input[0]) for node in graph.node if node.op_type == "Cast"]
    layers = 4 if name == "gemma3" else 2
    assert casts.count("ReduceMax") == 4 * layers  # the largest scores and weights, of prefixes and of products
    assert casts.count("Unsqueeze") == 1 + layers  # the positions, from whole numbers to float32, and shares
    tables = 2 if name == "gemma3" else 1  # Gemma's sliding layers have one of their own
    assert sorted(maker for maker in casts if maker in ("Sin", "Cos")) == ["Cos"] * tables + ["Sin"] * tables
    assert casts.count("Gather") == 1  # the last tokens
    assert len(casts) == 2 * tables + 2 + 5 * layers


@pytest.mark.parametrize(("precision", "type_"), [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)])
def test_all_weights_but_the_label_rows_and_rotary_frequencies_take_two_bytes(
    halves: tuple[str, Path], precision: str, type_: int
) -> None:
    graph = onnx.load(halves[1] / f"{precision}.onnx").graph
    matrices = [tensor for tensor in graph.initializer if len(tensor.dims) == 2]
    kept = [tuple(tensor.dims) for tensor in matrices if tensor.data_type == TensorProto.FLOAT]
    assert kept == [(48, len(LABEL_IDS))]
    assert {tensor.data_type for tensor in matrices} == {type_, TensorProto.FLOAT}


def test_inputs_and_outputs_are_those_of_the_fp32_graph(halves: tuple[str, Path]) -> None:
    for name in ("fp16", "bf16"):
        for kind in ("input", "output"):
            expected = {tensor.name: tensor.type for tensor in getattr(onnx.load(halves[1] / "fp32.onnx").graph, kind)}
            found = {tensor.name: tensor.type for tensor in getattr(onnx.load(halves[1] / f"{name}.onnx").graph, kind)}
            assert {key: value.tensor_type.elem_type for key, value in found.items()} == {
                key: value.tensor_type.elem_type for key, value in expected.items()
            }


def test_a_graph_imports_only_the_operator_sets_that_it_uses(halves: tuple[str, Path]) -> None:
    """An older ONNX Runtime refuses versions that it does not know, of sets that no node is from."""
    model = onnx.load(halves[1] / "fp16.onnx")
    assert {opset.domain for opset in model.opset_import} == {node.domain for node in model.graph.node}


def test_bfloat16_is_computed_by_no_cpu_and_says_so(halves: tuple[str, Path]) -> None:
    with pytest.raises(BundleError, match=r"onnxruntime cannot read it: .*NOT_IMPLEMENTED"):
        load_pack_scorer(halves[1] / "bf16.onnx", "cpu")


def squares(folder: Path, type_: int, limit: float) -> Path:
    """A 16-bit graph that squares its input and divides it by `limit`."""
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=type_),
        helper.make_node("Mul", ["half", "half"], ["square"]),
        helper.make_node("Mul", ["square", "share"], ["small"]),
        helper.make_node("Cast", ["small"], ["y"], to=TensorProto.FLOAT),
    ]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    graph = helper.make_graph(
        nodes, "squares", tensors[:1], tensors[1:], [helper.make_tensor("share", type_, [1], [1 / limit])]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, folder / "squares.onnx")
    write_rounded(folder / "squares.onnx", folder / "rounded.onnx")
    return folder / "rounded.onnx"


def test_an_overflow_that_the_cpu_would_hide_shows_in_the_rounded_graph(tmp_path: Path) -> None:
    """ONNX Runtime itself computes both products in float32: 300 squared is no overflow there."""
    rounded = squares(tmp_path, TensorProto.FLOAT16, limit=1024)
    values = {"x": np.array([300, 3], np.float32)}
    hidden = open_session(tmp_path / "squares.onnx", "cpu")[0].run(None, values)[0]
    np.testing.assert_allclose(hidden, [90_000 / 1024, 9 / 1024], rtol=1e-3)
    shown = open_session(rounded, "cpu")[0].run(None, values)[0]
    np.testing.assert_array_equal(shown, [np.inf, 9 / 1024])


def test_the_rounded_graph_keeps_eight_bits_of_bfloat16(tmp_path: Path) -> None:
    rounded = squares(tmp_path, TensorProto.BFLOAT16, limit=1.0)
    found = open_session(rounded, "cpu")[0].run(None, {"x": np.array([300, 1.01], np.float32)})[0]
    # Beside 90,000 lie 89,600 and 90,112. 1.01 becomes 1.0078125, whose square 1.015686 becomes 1.015625.
    np.testing.assert_array_equal(found, [90_112, 1.015625])


def test_a_weight_that_float16_cannot_hold_is_refused_by_name(halves: tuple[str, Path], tmp_path: Path) -> None:
    model = onnx.load(halves[1] / "fused.onnx")
    (embedding,) = (
        tensor for tensor in model.graph.initializer if len(tensor.dims) == 2 and "embed_tokens" in tensor.name
    )
    values = np.array(numpy_helper.to_array(embedding))
    values[3, 5] = -70_000
    embedding.raw_data = values.tobytes()
    onnx.save(model, tmp_path / "fused.onnx")
    with pytest.raises(
        ParityError, match=r"weights reach 70,000 in .*embed_tokens.*, expected at most 65,504.* Use bf16"
    ):
        write_half(tmp_path / "fused.onnx", "fp16", tmp_path / "model.onnx")
    write_half(tmp_path / "fused.onnx", "bf16", tmp_path / "model.onnx")


def test_norms_that_stay_in_parts_are_refused(tmp_path: Path) -> None:
    """A mean of squares whose square root is not taken is no norm that ONNX Runtime knows."""
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["square"]),
        helper.make_node("ReduceMean", ["square"], ["y"], name="mean"),
    ]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "mean", tensors[:1], tensors[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "a.onnx")
    with pytest.raises(ParityError, match=r"leaves 1 norms in parts, first 'mean', expected each as one node"):
        fuse_norms(tmp_path / "a.onnx", tmp_path / "b.onnx")
