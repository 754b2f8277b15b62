"""The packed graph at other precisions: smaller weights, through onnxruntime's converters."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from csrm.bundle.contents import Precision
from csrm.errors import BundleError

_INLINE_BYTES = 1_900_000_000
"""Above it, weights go beside the graph: a protobuf file holds 2 GB."""


@dataclass(frozen=True)
class Recipe:
    """How a precision is made. Where one fails its gate, the next one of the same precision is more careful."""

    precision: Precision
    bits: int = 32
    block_size: int = 32
    """Weights that share a scale, and activations of one token that do. Larger blocks are faster and less exact."""
    float_layers: tuple[str, ...] = ()
    """Parts of the names of matrix products that stay in float32."""
    float_activations: bool = False
    """Whether products of quantised weights are computed in float32 instead of int8."""

    def __str__(self) -> str:
        if self.bits == 32:
            return "weights and activations in float32"
        if self.bits == 16:
            return "weights and activations in float16, norms in float32"
        activations = "float32" if self.float_activations else "8-bit"
        kept = f", {' and '.join(self.float_layers)} in float32" if self.float_layers else ""
        return f"{self.bits}-bit weights in blocks of {self.block_size}, {activations} activations{kept}"


RECIPES: dict[Precision, tuple[Recipe, ...]] = {
    "fp32": (Recipe("fp32"),),
    "fp16": (Recipe("fp16", bits=16),),
    "int8": (
        Recipe("int8", bits=8, block_size=128),
        Recipe("int8", bits=8),
        Recipe("int8", bits=8, float_activations=True),
    ),
    "int4": (Recipe("int4", bits=4), Recipe("int4", bits=4, float_layers=("down_proj", "o_proj"))),
}
"""Recipes of each precision, the fastest first."""


def write_precision(fp32_path: Path, recipe: Recipe, path: Path) -> None:
    """Write a fp32 packed graph at another precision.

    Args:
        path: of the new graph; its weights go beside it above 2 GB.
    """
    model = onnx.load(fp32_path)
    if recipe.bits == 16:
        model = _half(model)
    elif recipe.bits < 16:
        _shrink_embedding(model)
        model = _quantised(model, recipe)
    save_graph(model, path)


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph, with its weights beside it above 2 GB."""
    is_large = _num_bytes(model) > _INLINE_BYTES
    onnx.save(model, path, save_as_external_data=is_large, location=f"{path.name}_data" if is_large else None)


def check_locations(path: Path) -> None:
    """Weights beside a graph must lie in its folder.

    Raises:
        BundleError: a location is absolute, or leaves the folder.
    """
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and (path.parent / entry.value).resolve().parent != path.parent.resolve():
                raise BundleError(
                    f"graph {str(path)!r}: weights {tensor.name!r} lie in {entry.value!r}, outside of its folder. "
                    "Export the model again."
                )


def _quantised(model: onnx.ModelProto, recipe: Recipe) -> onnx.ModelProto:
    """Matrix products with a constant weight become MatMulNBits, which quantises activations by row and block."""
    from onnxruntime.quantization import matmul_nbits_quantizer

    matmul_nbits_quantizer.logger.setLevel(logging.WARNING)  # it tells of every node
    kept = [node.name for node in model.graph.node if any(part in node.name for part in recipe.float_layers)]
    quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
        model,
        bits=recipe.bits,
        block_size=recipe.block_size,
        accuracy_level=1 if recipe.float_activations else 4,
        nodes_to_exclude=kept,
    )
    quantizer.process()
    quantised: onnx.ModelProto = quantizer.model.model
    return quantised


def _half(model: onnx.ModelProto) -> onnx.ModelProto:
    """float16 but for inputs, outputs and norms, whose squares overflow."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    norms = [node.name for node in model.graph.node if "norm" in node.name]
    halved: onnx.ModelProto = convert_float_to_float16(
        model, keep_io_types=True, node_block_list=norms, max_finite_val=65_504.0
    )
    nodes: dict[str, onnx.NodeProto] = {}
    for node in halved.graph.node:
        nodes.setdefault(node.output[0], node)  # onnxruntime 1.31 casts a value once for each of its readers
    del halved.graph.node[:]
    halved.graph.node.extend(nodes.values())
    return halved


def _shrink_embedding(model: onnx.ModelProto) -> None:
    """Embedding rows are stored in float16 and widened after the lookup: most of a small model is its vocabulary."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for place, node in enumerate(graph.node):
        tensor = weights.get(node.input[0]) if node.op_type == "Gather" else None
        if tensor is None or tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2:
            continue
        rows = numpy_helper.to_array(tensor)
        if np.abs(rows).max() > np.finfo(np.float16).max:
            continue
        tensor.CopyFrom(numpy_helper.from_array(rows.astype(np.float16), tensor.name))
        output = node.output[0]
        node.output[0] = f"{output}_float16"
        graph.node.insert(place + 1, helper.make_node("Cast", [node.output[0]], [output], to=TensorProto.FLOAT))
        return


def _num_bytes(model: onnx.ModelProto) -> int:
    """Of the weights; ModelProto.ByteSize fails above 2 GB."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)
