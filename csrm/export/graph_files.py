"""Graphs on disk: weights inside of the file, or beside it in the same folder. One weight is in memory at a time."""

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper

from csrm.errors import BundleError

_INLINE_BYTES = 500_000_000
"""Most bytes of weights that a graph holds itself; more go beside it."""
_ALIGNMENT = 4096
"""Where a weight begins beside a graph: at a page, so that a runtime can map it."""
TORCH_TYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT8: torch.int8,
}
"""Types of weights in ONNX to those in torch."""
_ONNX_TYPES = {dtype: type_ for type_, dtype in TORCH_TYPES.items()}


class GraphReader:
    """A graph whose weights are read one at a time.

    Args:
        path: of the graph.

    Attributes:
        model: the graph; weights beside the file are not in it.
    """

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path, load_external_data=False)
        self._folder = path.parent
        self._tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}

    def weight(self, name: str) -> torch.Tensor:
        """A weight by its name, in the type that it is stored in."""
        tensor = self._tensors[name]
        if tensor.data_location != TensorProto.EXTERNAL:
            data = np.frombuffer(bytearray(numpy_helper.to_array(tensor).tobytes()), dtype=np.uint8)
        else:
            data = _read(tensor, self._folder)
        return torch.from_numpy(data).view(TORCH_TYPES[tensor.data_type]).view(list(tensor.dims))


class GraphWriter:
    """Writes a graph weight by weight; leave the context after `save`.

    Args:
        path: of the graph. Weights above 500 MB in all stay beside it.

    Example:
        >>> with GraphWriter(folder / "model.onnx") as writer:                            # doctest: +SKIP
        ...     graph.initializer.extend(writer.add(name, weights[name]) for name in weights)
        ...     writer.save(model)
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data_path = path.with_name(f"{path.name}_data")
        self._file = self._data_path.open("wb")
        self._num_bytes = 0

    def __enter__(self) -> "GraphWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, name: str, values: torch.Tensor) -> onnx.TensorProto:
        """Write a weight to the disk.

        Args:
            name: of the weight in the graph.
            values: of one of TORCH_TYPES.

        Returns:
            What the graph holds of it: its type, its shape and its place.
        """
        self._file.seek(-self._file.tell() % _ALIGNMENT, 1)
        offset = self._file.tell()
        data = values.contiguous().flatten().view(torch.uint8).numpy()
        self._file.write(data.data)
        self._num_bytes += data.nbytes
        tensor = onnx.TensorProto(
            name=name,
            data_type=_ONNX_TYPES[values.dtype],
            dims=values.shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (("location", self._data_path.name), ("offset", offset), ("length", data.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def save(self, model: onnx.ModelProto) -> None:
        """Write the graph, whose weights `add` made, and take them into it where they are few."""
        self._file.close()
        if self._num_bytes <= _INLINE_BYTES:
            take_in(model.graph.initializer, self._path.parent)
            self._data_path.unlink()
        self._path.write_bytes(model.SerializeToString(deterministic=True))


def take_in(tensors: Iterable[onnx.TensorProto], folder: Path) -> None:
    """Take into a graph what lies beside it.

    Args:
        tensors: of the graph; those that it holds itself stay as they are.
        folder: of the graph.
    """
    for tensor in tensors:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        data = _read(tensor, folder)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        tensor.raw_data = data.tobytes()


def _read(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """Bytes of a weight beside its graph."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    size, offset = int(place["length"]), int(place.get("offset", 0))
    return np.fromfile(folder / place["location"], dtype=np.uint8, count=size, offset=offset)


def graph_files(path: Path) -> list[Path]:
    """The files of a graph: itself, and its weights where they are beside it."""
    return [file for file in (path, path.with_name(f"{path.name}_data")) if file.exists()]


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
