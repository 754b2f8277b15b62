"""The packed graph at other precisions: 16 bits (csrm.export.half), or quantised weights by onnxruntime's converter."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from csrm.bundle.contents import Precision
from csrm.export.graph_files import save_graph
from csrm.export.half import write_half


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
            name = "float16" if self.precision == "fp16" else "bfloat16"
            return f"weights and activations in {name}, inside of norms in float32"
        activations = "float32" if self.float_activations else "8-bit"
        kept = f", {' and '.join(self.float_layers)} in float32" if self.float_layers else ""
        return f"{self.bits}-bit weights in blocks of {self.block_size}, {activations} activations{kept}"


RECIPES: dict[Precision, tuple[Recipe, ...]] = {
    "fp32": (Recipe("fp32"),),
    "fp16": (Recipe("fp16", bits=16),),
    "bf16": (Recipe("bf16", bits=16),),
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
        fp32_path: the exported graph; for 16 bits the one that csrm.export.half.fuse_norms made of it.
        path: of the new graph; its weights go beside it above 2 GB.

    Raises:
        ParityError: see csrm.export.half.write_half.
    """
    if recipe.bits == 16:
        write_half(fp32_path, recipe.precision, path)
        return
    model = onnx.load(fp32_path)
    if recipe.bits < 16:
        _shrink_embedding(model)
        model = _quantised(model, recipe)
    save_graph(model, path)


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
