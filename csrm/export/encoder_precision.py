"""Encoders at other precisions: a smaller graph, behind a gate of recall@10 on judged pairs."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from csrm.bundle.contents import Precision
from csrm.embedding.contents import Recall
from csrm.errors import ParityError
from csrm.export.graph_files import take_in
from csrm.export.half import fuse_norms, write_half, write_rounded
from csrm.export.precision import Recipe, recipes_for, write_precision

HIDING = -30_000.0
"""Added to the scores of tokens that attention must not see, where scores are in float16."""
PLACES = 10
"""Places of a query's ranking in which its relevant titles are counted."""


@dataclass(frozen=True)
class JudgedTexts:
    """Queries with their relevant titles, and all titles among which these are searched; each text once a market."""

    queries: Sequence[tuple[str, str]]
    """Market and text."""
    titles: Sequence[tuple[str, str]]
    """Market and text."""
    relevant: Sequence[Collection[int]]
    """For each query, places of its relevant titles, at least one."""


def recall(queries: np.ndarray, titles: np.ndarray, judged: JudgedTexts) -> float:
    """Mean share of a query's relevant titles that are among the ten of its market that are nearest to it.

    Args:
        queries: vectors of the queries, shape (queries, dimensions).
        titles: vectors of the titles, shape (titles, dimensions).
        judged: the texts.

    >>> judged = JudgedTexts([("us", "tent")], [("us", "a tent"), ("us", "a shoe")], [{0}])
    >>> recall(np.array([[1.0, 0.0]]), np.array([[0.9, 0.1], [0.0, 1.0]]), judged)
    1.0
    """
    of_title = np.array([market for market, _ in judged.titles])
    a, b = (vectors.astype(np.float64) for vectors in (queries, titles))
    lengths = np.linalg.norm(b, axis=1)
    shares = []
    for vector, (market, _), relevant in zip(a, judged.queries, judged.relevant, strict=True):
        similarities = np.divide(b @ vector, lengths, out=np.full(len(b), -1.0), where=lengths > 0)
        similarities[of_title != market] = -np.inf
        best = np.argsort(-similarities, kind="stable")[:PLACES]
        shares.append(len(set(best.tolist()) & set(relevant)) / len(relevant))
    return float(np.mean(shares))


def write_gated(
    fp32_path: Path,
    precision: Precision,
    path: Path,
    *,
    measure: Callable[[Path], float],
    recall_of_torch: float,
    max_loss: float,
    num_queries: int,
    device: str = "cpu",
) -> Recall:
    """Write the graph at a precision by the fastest recipe that loses no more recall than is allowed.

    Args:
        fp32_path: the exported graph.
        precision: fp16 or int8.
        path: of the new graph.
        measure: recall@10 of the vectors that a graph gives.
        recall_of_torch: recall@10 of the model in torch.
        max_loss: most recall@10 that may be lost.
        num_queries: that recall is measured with, for the message.
        device: that measures.

    Returns:
        What was measured.

    Raises:
        ParityError: each recipe loses more; the message has what each has.
    """
    path.parent.mkdir(exist_ok=True)
    _take_in_all_but_matrices(fp32_path)
    tried = []
    for recipe in recipes_for(precision, device):
        if recipe.float_layers:  # named as in decoders
            continue
        measured = _write(fp32_path, recipe, path)
        found = measure(measured)
        if found >= recall_of_torch - max_loss:
            return Recall(value=found, of_torch=recall_of_torch, num_queries=num_queries, recipe=str(recipe))
        tried.append(f"{recipe}: {found:.4f}")
    raise ParityError(
        f"encoder at {precision}: expected recall@{PLACES} of {recall_of_torch - max_loss:.4f} or more on "
        f"{num_queries} judged queries (torch has {recall_of_torch:.4f}, max_recall_loss is {max_loss:g}); got "
        f"{'; '.join(tried)}. "
        "Nothing was written. Export it at precision fp32, or allow a larger loss."
    )


def _write(fp32_path: Path, recipe: Recipe, path: Path) -> Path:
    """Write the graph, and give the path of one that computes on any device what it does."""
    if recipe.bits != 16:
        write_precision(fp32_path, recipe, path)
        return path
    fused, rounded = fp32_path.with_name("fused.onnx"), path.with_name("rounded.onnx")
    fuse_norms(fp32_path, fused)
    _soften_masks(fused)
    write_half(fused, recipe.precision, path, exact_from=_last_hidden_states(fp32_path))
    write_rounded(path, rounded)
    return rounded


def _take_in_all_but_matrices(path: Path) -> None:
    """Leave only matrices beside a graph. Above 2 GB, Optimum puts norms and constants there, too."""
    model = onnx.load(path, load_external_data=False)
    constants = [attribute.t for node in model.graph.node for attribute in node.attribute if attribute.HasField("t")]
    small = [
        tensor
        for tensor in model.graph.initializer
        if len(tensor.dims) < 2 or tensor.data_type != onnx.TensorProto.FLOAT
    ]
    take_in([*constants, *small], path.parent)
    onnx.save(model, path)


def _soften_masks(path: Path) -> None:
    """Replace the lowest float32 number, with which models hide tokens, by one that float16 and its sums can hold."""
    model = onnx.load(path, load_external_data=False)  # single numbers are in the graph itself
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and int(np.prod(tensor.dims)) == 1:
            value = numpy_helper.to_array(tensor)
            if value.min() < HIDING:
                tensor.CopyFrom(numpy_helper.from_array(np.full_like(value, HIDING), tensor.name))
    onnx.save(model, path)


def _last_hidden_states(path: Path) -> set[str]:
    """What the pooling reads of the model, and its mask: sums over tokens, and lengths, stay in float32."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    of_model = {output for node in nodes if node.name.startswith("/model/") for output in node.output}
    pooling = [node for node in nodes if not node.name.startswith("/model/")]
    masks = {node.output[0] for node in pooling if node.op_type == "Cast"}
    return ({name for node in pooling for name in node.input} & of_model) | masks
