"""The end of a packed graph computes last tokens only, and gives the same logits."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from csrm.export.last_tokens import keep_last_tokens
from csrm.export.packed_onnx import example_pack, export_packed_graph
from csrm.scoring.packing import Pack
from csrm.training.model.relevance import PackedRelevanceModel, torch_pack_scorer
from tests.export.test_families import FAMILIES, LABEL_IDS, tiny_model


def rows_of_products(path: Path, pack: Pack) -> tuple[np.ndarray, dict[str, int]]:
    """The logits of a pack, and how many rows each weight of a layer is multiplied with, by the name of the product."""
    model = onnx.load(path)
    weights = {tensor.name for tensor in model.graph.initializer}
    matrices = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    products = [node for node in matrices if "layers." in node.name]
    model.graph.output.extend(
        helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None) for node in products
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    logits, *values = session.run(None, pack._asdict())
    return logits, {node.name: value.shape[-2] for node, value in zip(products, values, strict=True)}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_end_of_the_last_layer_multiplies_last_tokens_only_with_the_logits_of_torch(
    name: str, tmp_path: Path
) -> None:
    model, pack = PackedRelevanceModel(tiny_model(name), LABEL_IDS).eval(), example_pack()
    export_packed_graph(model, tmp_path / "model.onnx")
    logits, rows = rows_of_products(tmp_path / "model.onnx", pack)
    np.testing.assert_allclose(logits, torch_pack_scorer(model)(pack), atol=2e-5)
    num_tokens, num_products = pack.input_ids.shape[0], pack.last_index.shape[0]
    last_layer = f"layers.{model.config.num_hidden_layers - 1}/"
    for product, count in rows.items():
        is_end = last_layer in product and ("o_proj" in product or "mlp" in product)
        assert count == (num_products if is_end else num_tokens), product
    assert sum(count == num_products for count in rows.values()) == 4  # o_proj, gate, up, down


def test_a_graph_that_takes_last_tokens_twice_is_refused() -> None:
    nodes = [helper.make_node("Gather", ["x", "last_index"], [name]) for name in ("a", "b")]
    graph = helper.make_graph(nodes, "two", [], [])
    with pytest.raises(ValueError, match=r"one Gather by last_index, got \['Gather', 'Gather'\]"):
        keep_last_tokens(helper.make_model(graph))
