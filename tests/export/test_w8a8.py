"""Products of 8-bit weights by column with 8-bit activations by token."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from csrm.export.graph_files import GraphReader
from csrm.export.packed_onnx import export_packed_graph
from csrm.export.precision import Recipe, write_precision
from csrm.export.w8a8 import TokenQuantizer, channel_maxima
from csrm.scoring.packing import Pack, build_packs
from csrm.training.model.relevance import PackedRelevanceModel
from tests.export.test_families import LABEL_IDS, random_groups, tiny_model

FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "gemma3")
BY_TOKEN = Recipe("int8", bits=8, by_token=True)


def packs() -> list[Pack]:
    return list(build_packs(random_groups(5), 100))


def with_outliers(model: PackedRelevanceModel) -> PackedRelevanceModel:
    """Two channels of what each norm before a product gives are 100 times as large; the scores stay the same."""
    for layer in model.language_model.get_decoder().layers:
        is_gemma = hasattr(layer, "pre_feedforward_layernorm")
        mlp_norm = layer.pre_feedforward_layernorm if is_gemma else layer.post_attention_layernorm
        attention, mlp = layer.self_attn, layer.mlp
        for norm, linears in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (mlp_norm, (mlp.gate_proj, mlp.up_proj)),
        ):
            with torch.no_grad():
                norm.weight[:2] = (1 + norm.weight[:2]) * 100 - 1 if is_gemma else norm.weight[:2] * 100
                for linear in linears:
                    linear.weight[:, :2] /= 100
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def fp32_graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    export_packed_graph(with_outliers(PackedRelevanceModel(tiny_model(request.param), LABEL_IDS).eval()), path)
    return path


def logits(path: Path, **settings: str) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for name, value in settings.items():
        options.add_session_config_entry(f"session.{name}", value)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, pack._asdict())[0] for pack in packs()])


def graph_layers(reader: GraphReader) -> set[str]:
    """Names of the layers of a graph."""
    names = (node.name.split("/") for node in reader.model.graph.node if "layers." in node.name)
    return {part for name in names for part in name if part.startswith("layers.")}


def error(path: Path, expected: np.ndarray) -> float:
    """Root mean square of the error of the logits, as a share of their standard deviation."""
    return float(np.sqrt(np.mean((logits(path) - expected) ** 2)) / expected.std())


def test_smoothing_changes_no_logit(fp32_graph: Path) -> None:
    reader = GraphReader(fp32_graph)
    quantizer = TokenQuantizer(reader, (), channel_maxima(fp32_graph, packs()))
    graph = reader.model.graph
    for tensor in graph.initializer:
        if len(tensor.dims) == 2:
            tensor.CopyFrom(numpy_helper.from_array(quantizer.weight(tensor.name).numpy(), tensor.name))
    onnx.save(reader.model, fp32_graph.with_name("smoothed.onnx"))
    changed = {node.output[0] for node in graph.node if node.name.startswith("smoothed_norm")}
    assert len(changed) == 2 * len(graph_layers(reader))  # the norms before attention and before the MLP
    np.testing.assert_allclose(logits(fp32_graph.with_name("smoothed.onnx")), logits(fp32_graph), atol=1e-4, rtol=1e-4)


def test_rotation_spreads_what_one_token_alone_has_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token has another channel 100 times as large: no factor of a channel helps."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(64, 48)).astype(np.float32)
    large = rng.permutation(64)
    tokens = rng.normal(size=(1, 64, 64)).astype(np.float32)
    tokens[0, np.arange(64), large] *= 100
    write_product(weight, tmp_path / "fp32.onnx")
    exact = run_product(tmp_path / "fp32.onnx", tokens)

    def error_of(name: str) -> float:
        write_precision(tmp_path / "fp32.onnx", BY_TOKEN, tmp_path / name)
        return float(np.sqrt(np.mean((run_product(tmp_path / name, tokens) - exact) ** 2)))

    rotated = error_of("rotated.onnx")
    monkeypatch.setattr("csrm.export.w8a8.MOST_ROTATED", 1)
    assert 0 < rotated < 0.6 * error_of("plain.onnx")


def test_smoothing_takes_most_of_the_error_of_outliers(fp32_graph: Path, tmp_path: Path) -> None:
    expected = logits(fp32_graph)
    write_precision(fp32_graph, BY_TOKEN, tmp_path / "plain.onnx")
    write_precision(fp32_graph, BY_TOKEN, tmp_path / "smoothed.onnx", maxima=channel_maxima(fp32_graph, packs()))
    assert 0 < error(tmp_path / "smoothed.onnx", expected) < 0.1
    assert error(tmp_path / "smoothed.onnx", expected) < 0.5 * error(tmp_path / "plain.onnx", expected)


def test_every_product_but_the_label_rows_is_of_integers(fp32_graph: Path, tmp_path: Path) -> None:
    write_precision(fp32_graph, BY_TOKEN, tmp_path / "model.onnx")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    kinds = [node.op_type for node in nodes if "_proj" in node.name and "MatMul" in node.op_type]
    num_layers = len(graph_layers(GraphReader(fp32_graph)))
    assert kinds == ["MatMulIntegerToFloat"] * 7 * num_layers
    assert [node.op_type for node in nodes if node.output[0] == "logits"] != ["MatMulIntegerToFloat"]
    shared = [node for node in nodes if node.op_type == "QuantizeLinear"]
    assert len(shared) == 4 * num_layers  # q, k and v read one tensor, and gate and up another


def test_layers_that_are_named_stay_in_float_and_read_what_they_read(fp32_graph: Path, tmp_path: Path) -> None:
    recipe = Recipe("int8", bits=8, by_token=True, float_layers=("down_proj", "o_proj"))
    write_precision(fp32_graph, recipe, tmp_path / "model.onnx", maxima=channel_maxima(fp32_graph, packs()))
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    floats = [node.name for node in nodes if node.op_type == "MatMul" and "_proj" in node.name]
    assert len(floats) == 2 * len(graph_layers(GraphReader(fp32_graph)))
    assert all("down_proj" in name or "o_proj" in name for name in floats)
    assert error(tmp_path / "model.onnx", logits(fp32_graph)) < 0.1


def test_no_sum_of_products_leaves_16_bits(fp32_graph: Path, tmp_path: Path) -> None:
    """A CPU without VNNI adds two products in 16 bits; onnxruntime's exact way gives the same integers."""
    write_precision(fp32_graph, BY_TOKEN, tmp_path / "model.onnx")
    levels = [
        numpy_helper.to_array(tensor)
        for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer
        if tensor.data_type == TensorProto.INT8
    ]
    assert len(levels) == 7 * len(graph_layers(GraphReader(fp32_graph)))
    assert 2 * 255 * max(int(np.abs(level.astype(int)).max()) for level in levels) <= np.iinfo(np.int16).max
    np.testing.assert_array_equal(
        logits(tmp_path / "model.onnx", x64quantprecision="1"), logits(tmp_path / "model.onnx")
    )


def write_product(weight: np.ndarray, path: Path) -> None:
    """A graph of one product."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="layers.0/q_proj/MatMul")],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "tokens", weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "tokens", weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)


def run_product(path: Path, tokens: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": tokens})[0])


def test_a_product_is_that_of_the_integers_by_hand(tmp_path: Path) -> None:
    """Tokens of very different sizes, one of zeros; a column of zeros. Three channels are not rotated."""
    weight = np.zeros((3, 9), dtype=np.float32)
    weight[:, :3] = [[0.25, 0, -6.3], [-1.0, 0, 2.1], [1.0, 0, 0.0]]
    tokens = np.array([[[1, -1, 4], [1000, 250, -250], [0, 0, 0]]], dtype=np.float32)
    write_product(weight, tmp_path / "fp32.onnx")
    write_precision(tmp_path / "fp32.onnx", BY_TOKEN, tmp_path / "model.onnx")
    found = run_product(tmp_path / "model.onnx", tokens)
    # activations: a quarter of 127 is 32; weights: columns in steps of 1/63, nothing, and 0.1
    integers = np.array([[[32, -32, 127], [127, 32, -32], [0, 0, 0]]]) @ np.array(
        [[16, 0, -63], [-63, 0, 21], [63, 0, 0]]
    )
    expected = integers * np.array([[[4], [1000], [0]]]) / 127 * np.array([1 / 63, 0, 0.1])
    np.testing.assert_allclose(found[:, :, :3], expected, rtol=1e-5, atol=1e-6)
    assert not found[:, :, 3:].any()
