"""Graphs on disk: weights inside of the file, or beside it in the same folder."""

from pathlib import Path

import onnx

from csrm.errors import BundleError

_INLINE_BYTES = 1_900_000_000
"""Above it, weights go beside the graph: a protobuf file holds 2 GB."""


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


def _num_bytes(model: onnx.ModelProto) -> int:
    """Of the weights; ModelProto.ByteSize fails above 2 GB."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)
