"""W8A8: weights in 8 bits by column, activations in 8 bits by token, and products of integers."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from csrm.export.graph_files import GraphReader
from csrm.scoring.packing import Pack
from csrm.scoring.runtime import open_session

ACTIVATION_LEVELS = 127
"""Largest integer of an activation, above the zero point of 128."""
WEIGHT_LEVELS = 63
"""Largest integer of a weight. The sum of two products then fits 16 bits, so AVX2 computes the integers of VNNI."""
FEWEST_COLUMNS = 8
"""Of a weight that is quantised."""
SMOOTHING = 0.5
"""Share of the range of activations that moves into weights (alpha in Xiao et al. 2023, SmoothQuant)."""
MOST_ROTATED = 32
"""Channels that are rotated together: more spread outliers no better, and take longer."""
_CONSTANTS: dict[str, Any] = {
    "w8a8_axes": np.array([-1]),
    "w8a8_least": np.float32(1e-20),
    "w8a8_one": np.float32(1),
    "w8a8_scale": np.float32(1 / ACTIVATION_LEVELS),
    "w8a8_zero": np.uint8(128),
}


def products_with_weights(graph: onnx.GraphProto, float_layers: Collection[str] = ()) -> list[onnx.NodeProto]:
    """Matrix products with a constant weight of several columns; label rows have few.

    Args:
        graph: packed graph, or that of an encoder.
        float_layers: parts of the names of products that are left out.
    """
    matrices = {
        tensor.name
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2 and tensor.dims[1] >= FEWEST_COLUMNS
    }
    products = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in matrices]
    return [node for node in products if not any(part in node.name for part in float_layers)]


def channel_maxima(fp32_path: Path, packs: Iterable[Pack], device: str = "cpu") -> dict[str, np.ndarray]:
    """The largest absolute value of each channel that a weight is multiplied with.

    Args:
        fp32_path: the exported graph; a graph that shares its weights is beside it meanwhile.
        packs: of a sample, at least one.
        device: see csrm.scoring.runtime.load_pack_scorer.

    Returns:
        Tensor to its maxima, shape (channels,), float32.
    """
    model = onnx.load(fp32_path, load_external_data=False)
    graph = model.graph
    names = list(dict.fromkeys(node.input[0] for node in products_with_weights(graph)))
    graph.initializer.append(numpy_helper.from_array(np.array([0, 1]), "all_but_channels"))
    for name in names:
        graph.node.append(helper.make_node("Abs", [name], [f"{name}_size"]))
        graph.node.append(
            helper.make_node("ReduceMax", [f"{name}_size", "all_but_channels"], [f"{name}_peak"], keepdims=0)
        )
        graph.output.append(helper.make_tensor_value_info(f"{name}_peak", TensorProto.FLOAT, ["channels"]))
    path = fp32_path.with_name("channels.onnx")
    onnx.save(model, path)
    try:
        session, _ = open_session(path, device)
    finally:
        path.unlink()
    outputs = [f"{name}_peak" for name in names]
    peaks = [session.run(outputs, pack._asdict()) for pack in packs]
    return {name: np.max(found, axis=0) for name, found in zip(names, zip(*peaks, strict=True), strict=True)}


class TokenQuantizer:
    """Makes the products of a packed graph W8A8.

    A token's activations are divided by their largest absolute value, so that one constant scale serves all tokens, and
    the product is multiplied by it again. Channels with large activations are divided by a factor that their rows of
    the weight are multiplied with. The division is part of what made them: a norm's weight, or columns of the weight
    before. It costs nothing, and channels for which there is no such place stay as they are.

    What one token alone has large is spread over the channels beside it: groups of channels are multiplied with a
    Hadamard matrix, whose inverse the weight takes (Ashkboos et al. 2024, QuaRot, arXiv 2404.00456).

    Args:
        reader: of the exported graph; norms in its model are changed.
        float_layers: parts of the names of products that stay in float32.
        maxima: see channel_maxima; empty: nothing is smoothed.
    """

    def __init__(self, reader: GraphReader, float_layers: Collection[str], maxima: Mapping[str, np.ndarray]) -> None:
        self._reader = reader
        self._graph = reader.model.graph
        self._products = products_with_weights(self._graph, float_layers)
        self._names = {node.name for node in self._products}
        self._rows: dict[str, torch.Tensor] = {}
        """Weight to the factors of its rows."""
        self._columns: dict[str, torch.Tensor] = {}
        """Weight to the divisors of its columns."""
        self._scaled: set[str] = set()
        """Activations that are divided by their token's maximum already."""
        self._sizes: set[int] = set()
        """Numbers of channels that are rotated together."""
        self._smooth(maxima)

    def is_product(self, node: onnx.NodeProto) -> bool:
        """Whether a node is to be quantised."""
        return node.name in self._names

    def weight(self, name: str) -> torch.Tensor:
        """A weight, smoothed, in float32."""
        weight = self._reader.weight(name)
        if name in self._rows:
            weight = weight * self._rows[name][:, None]
        return weight / self._columns[name] if name in self._columns else weight

    def quantised(self, node: onnx.NodeProto) -> tuple[list[onnx.NodeProto], dict[str, torch.Tensor]]:
        """The nodes for one product, and the parts of its weight by name."""
        (read, name), (written,) = node.input, node.output
        weight = _rotated(self.weight(name))
        scales = (weight.abs().amax(dim=0) / WEIGHT_LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
        levels = torch.round(weight / scales).to(torch.int8)
        parts = {f"{name}_levels": levels, f"{name}_scales": scales}
        axes, least, one, scale, zero = _CONSTANTS
        nodes: list[onnx.NodeProto] = []
        if read not in self._scaled:
            self._scaled.add(read)
            nodes, turned = self._rotation(read, weight.shape[0])
            nodes += [
                helper.make_node("ReduceMax", [turned, axes], [f"{read}_high"], keepdims=1),
                helper.make_node("ReduceMin", [turned, axes], [f"{read}_low"], keepdims=1),
                helper.make_node("Neg", [f"{read}_low"], [f"{read}_depth"]),
                helper.make_node("Max", [f"{read}_high", f"{read}_depth", least], [f"{read}_size"]),
                helper.make_node("Div", [one, f"{read}_size"], [f"{read}_factor"]),
                helper.make_node("Mul", [turned, f"{read}_factor"], [f"{read}_scaled"]),
                helper.make_node("QuantizeLinear", [f"{read}_scaled", scale, zero], [f"{read}_levels"]),
            ]
        inputs = [f"{read}_levels", f"{name}_levels", scale, f"{name}_scales", zero]
        product = f"{written}_of_scaled"
        nodes += [
            helper.make_node("MatMulIntegerToFloat", inputs, [product], name=node.name, domain="com.microsoft"),
            helper.make_node("Mul", [product, f"{read}_size"], [written]),
        ]
        return nodes, parts

    def constants(self) -> list[onnx.TensorProto]:
        """What the nodes that were made read beside activations and weights."""
        values = dict(_CONSTANTS)
        for size in self._sizes:
            values |= {f"w8a8_rows_{size}": np.array([-1, size]), f"w8a8_hadamard_{size}": hadamard(size)}
        return [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]

    def _rotation(self, read: str, num_channels: int) -> tuple[list[onnx.NodeProto], str]:
        """Nodes that rotate activations, and the tensor that they give."""
        size = rotated_channels(num_channels)
        if size == 1:
            return [], read
        self._sizes.add(size)
        nodes = [
            helper.make_node("Shape", [read], [f"{read}_shape"]),
            helper.make_node("Reshape", [read, f"w8a8_rows_{size}"], [f"{read}_rows"]),
            helper.make_node("MatMul", [f"{read}_rows", f"w8a8_hadamard_{size}"], [f"{read}_turned_rows"]),
            helper.make_node("Reshape", [f"{read}_turned_rows", f"{read}_shape"], [f"{read}_turned"]),
        ]
        return nodes, f"{read}_turned"

    def _smooth(self, maxima: Mapping[str, np.ndarray]) -> None:
        """Find the factors of rows and columns, and divide norms by theirs."""
        readers = Counter(name for node in self._graph.node if node.op_type != "Shape" for name in node.input)
        makers = {output: node for node in self._graph.node for output in node.output}
        constants = _constant_tensors(self._graph)
        weights: dict[str, list[str]] = {}
        for node in self._products:
            weights.setdefault(node.input[0], []).append(node.input[1])
        matrices = {weight.name for weight in self._graph.initializer}
        divided: list[tuple[onnx.NodeProto, int, np.ndarray]] = []
        for tensor, names in weights.items():
            if tensor not in maxima or readers[tensor] != len(names) or any(readers[name] != 1 for name in names):
                continue
            sizes = torch.stack([self._reader.weight(name).abs().amax(dim=1) for name in names]).amax(dim=0)
            factors = _smoothing_factors(torch.from_numpy(maxima[tensor]), sizes)
            for node in _line_of_makers(tensor, makers, readers):
                if node.op_type == "MatMul" and node.input[1] in matrices and readers[node.input[1]] == 1:
                    self._columns[node.input[1]] = factors
                elif node.op_type == "Mul" and (places := [p for p in (0, 1) if node.input[p] in constants]):
                    divided.append((node, places[0], factors.numpy()))
                else:
                    continue
                self._rows |= dict.fromkeys(names, factors)
                break
        for number, (node, place, factors_of_norm) in enumerate(divided):
            norm, smoothed = node.input[place], f"smoothed_norm_{number}"
            self._graph.initializer.append(numpy_helper.from_array(1 / factors_of_norm, f"{smoothed}_divisor"))
            self._graph.node.insert(
                list(self._graph.node).index(node),
                helper.make_node("Mul", [norm, f"{smoothed}_divisor"], [smoothed], name=smoothed),
            )
            node.input[place] = smoothed


def rotated_channels(num_channels: int) -> int:
    """Channels that are rotated together: the largest power of two that divides their number, 32 at most.

    >>> rotated_channels(640), rotated_channels(72), rotated_channels(3)
    (32, 8, 1)
    """
    return math.gcd(num_channels, MOST_ROTATED)


def hadamard(size: int) -> np.ndarray:
    """The Hadamard matrix of a power of two, by Sylvester's construction; orthogonal and symmetric.

    >>> hadamard(2) * np.sqrt(2)
    array([[ 1.,  1.],
           [ 1., -1.]], dtype=float32)
    """
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / np.sqrt(size)).astype(np.float32)


def _rotated(weight: torch.Tensor) -> torch.Tensor:
    """A weight for rotated activations."""
    size = rotated_channels(weight.shape[0])
    groups = weight.view(weight.shape[0] // size, size, weight.shape[1])
    return (torch.from_numpy(hadamard(size)) @ groups).reshape(weight.shape)


def _smoothing_factors(activations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Divisors of channels, around 1; a channel that is 0 on either side stays as it is."""
    factors = activations**SMOOTHING / weights ** (1 - SMOOTHING)
    is_used = (activations > 0) & (weights > 0)
    if not is_used.any():
        return torch.ones_like(factors)
    return torch.where(is_used, factors / factors[is_used].median(), 1.0)


def _constant_tensors(graph: onnx.GraphProto) -> set[str]:
    """Weights, and what is computed from them alone."""
    found = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if all(name in found for name in node.input):
            found.update(node.output)
    return found


def _line_of_makers(
    tensor: str, makers: Mapping[str, onnx.NodeProto], readers: Mapping[str, int]
) -> Iterator[onnx.NodeProto]:
    """Nodes whose scaled output scales a tensor and nothing else: its maker, and factors of an elementwise product."""
    while (node := makers.get(tensor)) is not None and node.op_type == "Cast" and readers[node.input[0]] == 1:
        tensor = node.input[0]
    if node is None:
        return
    yield node
    if node.op_type == "Mul":
        factors = [makers[name] for name in node.input if name in makers and readers[name] == 1]
        yield from sorted(factors, key=lambda factor: factor.op_type != "MatMul")
