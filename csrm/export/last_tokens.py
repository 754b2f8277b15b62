"""Only last tokens go through the end of a packed graph: label logits are read nowhere else."""

from collections import defaultdict

import onnx
from onnx import helper, numpy_helper

_TOKEN_AXIS = 1
"""Of hidden states inside of a graph, which have shape (1, tokens, hidden)."""
_BY_TOKEN = ("Add", "Cast", "Div", "Erf", "Gelu", "Mul", "Neg", "Pow", "Reciprocal", "Sigmoid", "Sqrt", "Sub", "Tanh")
"""Operators that compute each number from the numbers at its place."""


def keep_last_tokens(model: onnx.ModelProto) -> None:
    """Take the last tokens before the last layer's output projection and MLP, instead of after the last norm.

    These steps, and the norms and sums between them, compute each token from itself. The choice of tokens therefore
    moves in front of them, and the logits stay what they were.

    Args:
        model: packed graph, changed in place. Its weights may lie beside it.

    Raises:
        ValueError: the graph does not take the last tokens in one place.
    """
    graph = model.graph
    chosen = [node for node in graph.node if "last_index" in node.input]
    if len(chosen) != 1 or chosen[0].op_type != "Gather":
        raise ValueError(f"expected one Gather by last_index, got {[node.op_type for node in chosen]}")
    (last,) = chosen
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = node.attribute[0].t
        elif node.op_type == "Identity" and node.input[0] in constants:  # equal weights are stored once
            constants[node.output[0]] = constants[node.input[0]]
    readers = defaultdict(set)
    for number, node in enumerate(graph.node):
        for name in node.input:
            readers[name].add(number)
    number_of_last = list(graph.node).index(last)
    moved = {number_of_last}
    """Numbers of the nodes that are behind the choice from now on."""
    for number in range(number_of_last - 1, -1, -1):
        node = graph.node[number]
        if readers[node.output[0]] and readers[node.output[0]] <= moved and _is_by_token(node, constants):
            moved.add(number)
    made = {graph.node[number].output[0] for number in moved}
    nodes: list[onnx.NodeProto] = []
    taken: dict[str, str] = {}
    """Tensor to its rows of the last tokens."""
    for number, node in enumerate(graph.node):
        if number == number_of_last:
            node = helper.make_node("Identity", [last.input[0]], [last.output[0]], name=last.name)
        elif number in moved:
            for place, name in enumerate(node.input):
                if name in made or name in constants:
                    continue
                if name not in taken:
                    taken[name] = f"{name}_of_last_tokens"
                    nodes.append(
                        helper.make_node(
                            "Gather", [name, "last_index"], [taken[name]], name=taken[name], axis=_TOKEN_AXIS
                        )
                    )
                node.input[place] = taken[name]
        nodes.append(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def _is_by_token(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    """Whether a node computes each token's numbers from that token alone."""
    if node.op_type == "MatMul":
        return node.input[1] in constants
    if node.op_type == "ReduceMean":
        axes = constants.get(node.input[1]) if len(node.input) > 1 else None
        return axes is not None and numpy_helper.to_array(axes).tolist() == [-1]
    if node.op_type == "Gather":  # the only sequence of the batch
        index = constants.get(node.input[1])
        return index is not None and not index.dims and numpy_helper.to_array(index) == 0
    return node.op_type in _BY_TOKEN
