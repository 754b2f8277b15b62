"""Weights in safetensors, checked by their headers: whole files, and every tensor in the file that the index names."""

import json
from pathlib import Path

from csrm.errors import ConfigError

WEIGHTS_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"
_HEADER_LENGTH_BYTES = 8


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name of each tensor of a model's folder to its shape; see tensor_files."""
    return {name: shape for name, (_, shape) in _tensors(folder).items()}


def tensor_files(folder: Path) -> dict[str, Path]:
    """The tensors of a model's folder, from the headers of its files. No weight is read.

    Args:
        folder: in the format of save_pretrained, with one file or with an index of several.

    Returns:
        Name of each tensor to its file.

    Raises:
        ConfigError: a file is missing or cut off, or is none of safetensors, or lacks tensors that the index puts
            there; all problems in one message.
    """
    return {name: path for name, (path, _) in _tensors(folder).items()}


def _tensors(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """See tensor_files; name to file and shape."""
    if (folder / WEIGHTS_NAME).exists():
        wanted: dict[str, list[str]] = {WEIGHTS_NAME: []}
    elif (folder / INDEX_NAME).exists():
        wanted = _indexed(folder)
    else:
        raise ConfigError(
            f"base_model: {str(folder)!r} has no {WEIGHTS_NAME} and no {INDEX_NAME}. Copy the model again."
        )
    tensors: dict[str, tuple[Path, tuple[int, ...]]] = {}
    problems = []
    for name, expected in wanted.items():
        try:
            found = _header(folder / name)
        except ValueError as error:
            problems.append(f"{name} {error}")
            continue
        tensors |= {tensor: (folder / name, shape) for tensor, shape in found.items()}
        if absent := sorted(set(expected) - found.keys()):
            problems.append(f"{name} lacks {len(absent)} tensors that {INDEX_NAME} puts there, such as {absent[0]}")
    if problems:
        raise ConfigError(f"base_model: weights in {str(folder)!r}: {'; '.join(problems)}. Copy the model again.")
    return tensors


def _indexed(folder: Path) -> dict[str, list[str]]:
    """File to the tensors that the index puts there.

    Raises:
        ConfigError: the index cannot be read.
    """
    try:
        places = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
        files: dict[str, list[str]] = {name: [] for name in sorted(set(places.values()))}
        for tensor, name in places.items():
            files[name].append(tensor)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"base_model: {str(folder / INDEX_NAME)!r} cannot be read: {error!r}. Copy the model again."
        ) from error
    return files


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of one file.

    Raises:
        ValueError: it is missing or not whole; what it is, as the rest of a sentence.
    """
    if not path.is_file():
        raise ValueError("is missing")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_POINTER))
        if start == _POINTER:
            raise ValueError("is a pointer of Git LFS, not the weights (git lfs pull brings them)")
        length = int.from_bytes(start[:_HEADER_LENGTH_BYTES], "little")
        if not 0 < length <= size - _HEADER_LENGTH_BYTES:
            raise ValueError(f"is no safetensors file, or was cut off: it has {size:,} bytes")
        file.seek(_HEADER_LENGTH_BYTES)
        text = file.read(length)
    try:
        tensors = {name: value for name, value in json.loads(text).items() if name != "__metadata__"}
        shapes = {name: tuple(map(int, value["shape"])) for name, value in tensors.items()}
        end = max((int(value["data_offsets"][1]) for value in tensors.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"has no header of safetensors ({error!r})") from error
    if (expected := _HEADER_LENGTH_BYTES + length + end) != size:
        raise ValueError(f"has {size:,} bytes, expected {expected:,}: it was cut off, or is still being copied")
    return shapes
