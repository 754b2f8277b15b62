"""The packed graph at other precisions: 16 bits (csrm.export.half), or quantised weights by onnxruntime's converter."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from csrm.bundle.contents import Precision
from csrm.export.graph_files import GraphReader, GraphWriter
from csrm.export.half import write_half
from csrm.export.w8a8 import TokenQuantizer, products_with_weights


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
    by_token: bool = False
    """Whether a token's activations share a scale, and a column's weights do; see csrm.export.w8a8."""

    def __str__(self) -> str:
        if self.bits == 32:
            return "weights and activations in float32"
        if self.bits == 16:
            name = "float16" if self.precision == "fp16" else "bfloat16"
            return f"weights and activations in {name}, inside of norms in float32"
        kept = f", {' and '.join(self.float_layers)} in float32" if self.float_layers else ""
        if self.by_token:
            return f"8-bit weights by column, 8-bit activations by token{kept}"
        activations = "float32" if self.float_activations else "8-bit"
        return f"{self.bits}-bit weights in blocks of {self.block_size}, {activations} activations{kept}"


RECIPES: dict[Precision, tuple[Recipe, ...]] = {
    "fp32": (Recipe("fp32"),),
    "fp16": (Recipe("fp16", bits=16),),
    "bf16": (Recipe("bf16", bits=16),),
    "int8": (
        Recipe("int8", bits=8, by_token=True),
        Recipe("int8", bits=8, by_token=True, float_layers=("down_proj",)),
        Recipe("int8", bits=8, by_token=True, float_layers=("down_proj", "o_proj")),
        Recipe("int8", bits=8, block_size=128),
        Recipe("int8", bits=8),
        Recipe("int8", bits=8, float_activations=True),
    ),
    "int4": (Recipe("int4", bits=4), Recipe("int4", bits=4, float_layers=("down_proj", "o_proj"))),
}
"""Recipes of each precision, the fastest first."""


def recipes_for(precision: Precision, device: str) -> list[Recipe]:
    """Recipes of a precision that a device can run, the fastest first.

    >>> [recipe.by_token for recipe in recipes_for("int8", "cuda")]
    [False, False, False]
    """
    return [recipe for recipe in RECIPES[precision] if device == "cpu" or not recipe.by_token]


def write_precision(
    fp32_path: Path, recipe: Recipe, path: Path, *, maxima: Mapping[str, np.ndarray] | None = None
) -> None:
    """Write a fp32 packed graph at another precision.

    Args:
        fp32_path: the exported graph; for 16 bits the one that csrm.export.half.fuse_norms made of it.
        recipe: of another precision than fp32.
        path: of the new graph; see csrm.export.graph_files.GraphWriter.
        maxima: for a recipe by token, see csrm.export.w8a8.channel_maxima; None: activations are not smoothed.

    Raises:
        ParityError: see csrm.export.half.write_half.
    """
    if recipe.bits == 16:
        write_half(fp32_path, recipe.precision, path)
    else:
        _write_quantised(fp32_path, recipe, path, maxima or {})


def _write_quantised(fp32_path: Path, recipe: Recipe, path: Path, maxima: Mapping[str, np.ndarray]) -> None:
    """Matrix products with a constant weight become those of csrm.export.w8a8, or MatMulNBits.

    Embedding rows are stored in float16 and widened after the lookup: most of a small model is its vocabulary.
    """
    reader = GraphReader(fp32_path)
    model, graph = reader.model, reader.model.graph
    quantizer = TokenQuantizer(reader, recipe.float_layers, maxima) if recipe.by_token else _Blocks(reader, recipe)
    floats = (tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT)
    matrices = {tensor.name for tensor in floats if len(tensor.dims) == 2}
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []
    with GraphWriter(path) as writer:
        for node in graph.node:
            name = next((name for name in node.input if name in matrices), None)
            if quantizer.is_product(node):
                made, parts = quantizer.quantised(node)
                weights += [writer.add(part, values) for part, values in parts.items()]
                nodes += made
                continue
            if node.op_type == "Gather" and name and (rows := _as_float16(reader.weight(name))) is not None:
                weights.append(writer.add(name, rows))
                output = node.output[0]
                node.output[0] = f"{output}_float16"
                nodes.append(node)
                node = helper.make_node("Cast", [node.output[0]], [output], to=TensorProto.FLOAT)
            nodes.append(node)
        weights += quantizer.constants()
        written = {tensor.name for tensor in weights}
        read = {name for node in nodes for name in node.input} - written
        for tensor in graph.initializer:
            if tensor.name in matrices & read:
                weights.append(writer.add(tensor.name, quantizer.weight(tensor.name)))
            elif tensor.name in read:
                weights.append(tensor)
        kept = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in weights]
        del graph.node[:], graph.initializer[:]
        graph.node.extend(nodes)
        graph.initializer.extend(kept)
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        writer.save(model)


class _Blocks:
    """Makes products MatMulNBits, by onnxruntime's converter; it quantises activations by row and block itself."""

    def __init__(self, reader: GraphReader, recipe: Recipe) -> None:
        self._reader, self._recipe = reader, recipe
        self._names = {node.name for node in products_with_weights(reader.model.graph, recipe.float_layers)}

    def is_product(self, node: onnx.NodeProto) -> bool:
        return node.name in self._names

    def weight(self, name: str) -> torch.Tensor:
        return self._reader.weight(name)

    def constants(self) -> list[onnx.TensorProto]:
        return []

    def quantised(self, node: onnx.NodeProto) -> tuple[list[onnx.NodeProto], dict[str, torch.Tensor]]:
        from onnxruntime.quantization import matmul_nbits_quantizer

        matmul_nbits_quantizer.logger.setLevel(logging.WARNING)  # it tells of every node
        weight = numpy_helper.from_array(self.weight(node.input[1]).numpy(), node.input[1])
        quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
            helper.make_model(helper.make_graph([node], node.name, [], [], [weight])),
            bits=self._recipe.bits,
            block_size=self._recipe.block_size,
            accuracy_level=1 if self._recipe.float_activations else 4,
        )
        quantizer.process()
        graph = quantizer.model.model.graph
        parts = {part.name: torch.from_numpy(np.array(numpy_helper.to_array(part))) for part in graph.initializer}
        return [graph.node[0]], {part: values for part, values in parts.items() if part in graph.node[0].input}


def _as_float16(rows: torch.Tensor) -> torch.Tensor | None:
    """Embedding rows in float16, where it holds them."""
    low, high = map(float, rows.aminmax())
    return rows.to(torch.float16) if max(-low, high) <= torch.finfo(torch.float16).max else None
