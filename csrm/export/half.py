"""16-bit graphs: norms fused by ONNX Runtime, the rest in float16 or bfloat16; the largest activation of a sample."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from csrm.errors import ParityError
from csrm.export.graph_files import GraphReader, GraphWriter
from csrm.scoring.packing import Pack
from csrm.scoring.runtime import open_session
from csrm.training.model.attention import HIDDEN

FLOAT16_LIMIT = 30_000.0
"""Largest activation of the sample with which float16 may be used. It holds 65,504; other pairs may need more."""
HALF_TYPES: dict[str, tuple[int, torch.dtype]] = {
    "fp16": (TensorProto.FLOAT16, torch.float16),
    "bf16": (TensorProto.BFLOAT16, torch.bfloat16),
}
"""Precision to its type in ONNX and in torch."""
_COMPARE = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Shape", "Cast")
"""Operators whose output is not of the type that they read; a Cast names its type."""
_MOVE = ("Concat", "Expand", "Gather", "Neg", "ReduceMax", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that give the magnitudes that they are given."""


class Peak(NamedTuple):
    """The largest activation of a sample."""

    place: str
    """Name of the tensor, which begins with its layer."""
    value: float
    """Its largest absolute value."""


def fuse_norms(fp32_path: Path, path: Path) -> None:
    """Write a fp32 packed graph with each norm as one node, as ONNX Runtime's optimiser makes it.

    Such a node computes in float32 inside, whatever type it reads. Between the nodes of a norm that is not fused the
    squares would pass through 16 bits: float16 ends at 256 squared. The optimiser gets the structure alone: matrices
    are inputs to it, and none is read.

    Args:
        fp32_path: the exported graph.
        path: of the new graph, in the same folder, where it shares the weights beside the first.

    Raises:
        ParityError: this version of ONNX Runtime leaves a norm in parts.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    model = onnx.load(fp32_path, load_external_data=False)
    matrices = {tensor.name: tensor for tensor in model.graph.initializer if len(tensor.dims) > 1}
    small = [tensor for tensor in model.graph.initializer if tensor.name not in matrices]
    inputs = len(model.graph.input)
    del model.graph.initializer[:]
    model.graph.initializer.extend(small)
    model.graph.input.extend(
        helper.make_tensor_value_info(name, tensor.data_type, tensor.dims) for name, tensor in matrices.items()
    )
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    model = onnx.load(path)
    del model.graph.input[inputs:]
    model.graph.initializer.extend(matrices.values())
    parts = [node.name for node in model.graph.node if node.op_type == "ReduceMean"]
    if parts:
        raise ParityError(
            f"16 bits: onnxruntime {onnxruntime.__version__} leaves {len(parts)} norms in parts, first {parts[0]!r}, "
            "expected each as one node. Export with another version of it, or at precision fp32"
        )
    used = {node.domain for node in model.graph.node} | {""}  # an older runtime refuses versions of unused ones
    opsets = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    onnx.save(model, path)


def largest_activation(fused_path: Path, packs: Iterable[Pack], device: str = "cpu") -> Peak:
    """The largest absolute value among all that a 16-bit graph would compute, taken in float32.

    These are the outputs of every matrix product, norm, residual sum and elementwise step between the embedding and the
    last norm, for every token, padding too. What an attention bias hides is left out: there any large negative number
    will do.

    Args:
        fused_path: graph of fuse_norms; a graph without weights is written beside it.
        packs: of the sample, at least one.
        device: see csrm.scoring.runtime.load_pack_scorer.
    """
    model = onnx.load(fused_path, load_external_data=False)
    graph = model.graph
    floats, exact = _tensors_of(graph, TensorProto.FLOAT), _exact_nodes(graph)
    hidden = {tensor.name for tensor in graph.initializer if _is_mask(tensor)}
    places: list[str] = []
    reductions = []
    for number, node in enumerate(graph.node):
        if hidden.intersection(node.input) and node.op_type not in ("Softmax", "ReduceMax"):
            hidden.update(node.output)
        elif number not in exact and node.op_type not in _MOVE and node.output[0] in floats:
            places.append(node.output[0])
            for operator in ("ReduceMax", "ReduceMin"):
                output = f"{operator} {node.output[0]}"
                reductions.append(helper.make_node(operator, [node.output[0]], [output], keepdims=0))
                graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, []))
    graph.node.extend(reductions)
    path = fused_path.with_name("activations.onnx")
    onnx.save(model, path)
    session, _ = open_session(path, device)
    names = [node.output[0] for node in reductions]
    peaks = np.max([np.abs(session.run(names, pack._asdict())) for pack in packs], axis=0)
    peaks = peaks.reshape(-1, 2).max(axis=1)  # numpy's maximum of a NaN is NaN
    worst = int(np.argmax(peaks))
    return Peak(places[worst].removesuffix("_output_0"), float(peaks[worst]))


def check_range(peak: Peak) -> None:
    """Refuse float16 where activations come near the largest number that it holds.

    Raises:
        ParityError: names the layer, its value, and bf16 as the way out.
    """
    if not peak.value <= FLOAT16_LIMIT:
        raise ParityError(
            f"activations reach {peak.value:,.0f} in {peak.place}, expected at most {FLOAT16_LIMIT:,.0f}: float16 ends "
            "at 65,504. Use bf16, which has the range of float32"
        )


def write_half(fused_path: Path, precision: str, path: Path, *, exact_from: Collection[str] = ()) -> None:
    """Write a graph of fuse_norms with weights and activations in 16 bits.

    Kept in float32: rotary tables up to sine and cosine, whose angles 16 bits cannot hold; the label logits, from the
    last hidden state on, because two of them are often equal in bfloat16; the share of a product's own tokens in what
    it reads, whose logarithms need more digits; the inside of norms, softmax and products.

    Args:
        precision: fp16 or bf16.
        path: of the new graph; see csrm.export.graph_files.GraphWriter.
        exact_from: tensors from which on everything is computed in float32.

    Raises:
        ParityError: a weight is too large for float16.
    """
    reader = GraphReader(fused_path)
    model, graph = reader.model, reader.model.graph
    type_, _ = HALF_TYPES[precision]
    floats, exact = _tensors_of(graph, TensorProto.FLOAT), _exact_nodes(graph, exact_from)
    read_exactly = {name for number in exact for name in graph.node[number].input}
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.name in floats}
    is_half = {name: name not in read_exactly for name in weights}
    for number, node in enumerate(graph.node):
        is_half.update({output: number not in exact for output in node.output if output in floats})
    nodes: list[onnx.NodeProto] = []
    other: dict[str, str] = {}
    """Tensor to the same one in the other type, where both are read."""
    for number, node in enumerate(graph.node):
        wants_half = number not in exact
        for place, name in enumerate(node.input):
            if is_half.get(name, wants_half) == wants_half:
                continue
            if name not in other:
                other[name] = f"{name}_as_{precision if wants_half else 'fp32'}"
                to = type_ if wants_half else TensorProto.FLOAT
                nodes.append(helper.make_node("Cast", [name], [other[name]], to=to))
            node.input[place] = other[name]
        if wants_half and node.op_type == "Cast" and node.output[0] in floats:
            node.attribute[0].i = type_
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    with GraphWriter(path) as writer:
        for tensor in graph.initializer:
            if tensor.name in weights and is_half[tensor.name]:
                tensor.CopyFrom(writer.add(tensor.name, _rounded(reader.weight(tensor.name), tensor.name, precision)))
            elif tensor.data_location == TensorProto.EXTERNAL:
                tensor.CopyFrom(writer.add(tensor.name, reader.weight(tensor.name)))
        writer.save(model)


def write_rounded(half_path: Path, path: Path) -> None:
    """Write a 16-bit graph so that a CPU shows what it computes: in float32, with every value rounded to 16 bits.

    ONNX Runtime's CPU has no products in bfloat16, and keeps float32 between some nodes of a float16 graph, which hides
    an overflow. Here every output of a node goes through its 16-bit type and back, so nothing is hidden.

    Args:
        half_path: graph of write_half.
        path: of the new graph.
    """
    reader = GraphReader(half_path)
    model, graph = reader.model, reader.model.graph
    types = {type_ for type_, _ in HALF_TYPES.values()}
    (type_,) = types & {tensor.data_type for tensor in graph.initializer}
    halves = _tensors_of(graph, type_)
    nodes = []
    half_weights = [tensor for tensor in graph.initializer if tensor.name in halves]
    for tensor in half_weights:
        nodes.append(helper.make_node("Cast", [f"{tensor.name}_16"], [tensor.name], to=TensorProto.FLOAT))
    for node in graph.node:
        nodes.append(node)
        for place, name in enumerate(node.output):
            if name in halves:
                node.output[place] = f"{name}_exact"
                nodes.append(helper.make_node("Cast", [f"{name}_exact"], [f"{name}_16"], to=type_))
                nodes.append(helper.make_node("Cast", [f"{name}_16"], [name], to=TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    with GraphWriter(path) as writer:
        for tensor in half_weights:
            tensor.CopyFrom(writer.add(f"{tensor.name}_16", reader.weight(tensor.name)))
        writer.save(model)


def _tensors_of(graph: onnx.GraphProto, type_: int) -> set[str]:
    """Names of all tensors of a float type; onnx infers none behind a node of ONNX Runtime's own."""
    found = {tensor.name for tensor in graph.initializer if tensor.data_type == type_}
    for node in graph.node:
        if node.op_type == "Cast":
            is_found = node.attribute[0].i == type_
        else:
            is_found = node.op_type not in _COMPARE and not found.isdisjoint(node.input)
        if is_found:
            found.update(output for output in node.output if output)
    return found


def _exact_nodes(graph: onnx.GraphProto, exact_from: Collection[str] = ()) -> set[int]:
    """Numbers of the nodes that stay in float32.

    These are rotary tables; the product that gives the label logits, and what follows; what is computed from the
    largest scores and weights of attention alone, up to the share of a product's own tokens; and what is computed from
    `exact_from`.
    """
    exact = set()
    needed: set[str] = set()
    for number, node in reversed(list(enumerate(graph.node))):
        if node.op_type in ("Sin", "Cos") or not needed.isdisjoint(node.output):
            exact.add(number)
            if node.op_type != "Shape":
                needed.update(node.input)
    products = [number for number, node in enumerate(graph.node) if node.op_type == "MatMul"]
    exact.add(products[-1])
    last = {*exact_from, *graph.node[products[-1]].output}
    floats = _tensors_of(graph, TensorProto.FLOAT) - {tensor.name for tensor in graph.initializer}
    largest: set[str] = set()
    for number, node in enumerate(graph.node):
        read = floats.intersection(node.input)
        if not last.isdisjoint(node.input) or (read and read <= largest):
            exact.add(number)
        if not last.isdisjoint(node.input):
            last.update(node.output)
        if node.op_type == "ReduceMax" or (read and read <= largest):
            largest.update(node.output)
    return exact


def _is_mask(tensor: onnx.TensorProto) -> bool:
    """Whether it is the number that an attention bias hides tokens with."""
    is_scalar = tensor.data_type == TensorProto.FLOAT and int(np.prod(tensor.dims)) == 1
    return is_scalar and float(numpy_helper.to_array(tensor).min()) == HIDDEN


def _rounded(values: torch.Tensor, name: str, precision: str) -> torch.Tensor:
    """A weight in 16 bits.

    Raises:
        ParityError: a number is too large for the type.
    """
    _, dtype = HALF_TYPES[precision]
    if not (peak := max(map(abs, map(float, values.aminmax())))) <= torch.finfo(dtype).max:
        raise ParityError(
            f"weights reach {peak:,.0f} in {name}, expected at most 65,504, where float16 ends. Use bf16, which has "
            "the range of float32"
        )
    return values.to(dtype)
