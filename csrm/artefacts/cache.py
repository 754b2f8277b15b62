"""Artefacts from far away: fetched once to each machine, checked, and shared by all its processes.

A folder on the machine is used where it is. A URI is copied into a cache, whose entries are named by the digest of what
they hold: `s3://...`, `gs://...`, `hdfs://...`, `file://...`, whatever pyarrow.fs reads, and `models:/name/version` or
`models:/name@alias` of MLflow's registry. A process keeps a shared lock on the entries that it uses, so that none is
deleted under it; whoever copies or deletes has the lock alone.
A copy gets its name when it is whole and checked: what a killed process leaves is never used.

Environment: CSRM_CACHE_DIR, the cache (default: csrm in the user's cache folder); CSRM_CACHE_GB, its limit (50).
"""

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.fs as pa_fs

from csrm.artefacts.manifest import MANIFEST_NAME, Manifest, parse_manifest, verify_manifest
from csrm.artefacts.tracking import MODEL_SCHEME, download_model, pinned_model, read_model_text
from csrm.errors import BundleError, ConfigError

DEFAULT_CACHE_GB = 50.0
_PATIENCE_S = 30.0
_Copy = Callable[[Path, Iterable[str]], None]
logger = logging.getLogger(__name__)
_used: dict[Path, BinaryIO] = {}
"""Folder in the cache to the open file whose shared lock keeps it, until the process ends."""


def artefact_kind(place: str | Path) -> str | None:
    """What a folder's manifest says that it is; None where no manifest can be read.

    Args:
        place: a path, or a URI.
    """
    try:
        if is_far(place):
            text, _ = _open(str(place))
        else:
            text = (Path(place) / MANIFEST_NAME).read_text(encoding="utf-8")
        kind = json.loads(text)["kind"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, pa.ArrowException, BundleError):
        return None
    return kind if isinstance(kind, str) else None


def is_far(place: str | Path) -> bool:
    """Whether a place is a URI, and not a folder of this machine."""
    return "://" in str(place) or str(place).startswith(MODEL_SCHEME)


def pinned(place: str) -> str:
    """The place for good: an alias of a registered model becomes its version of now, other places are as they are.

    Raises:
        BundleError: there is no such model or alias.
    """
    return pinned_model(place) if place.startswith(MODEL_SCHEME) else place


def _open(uri: str) -> tuple[str, _Copy]:
    """The text of the manifest at a URI, and what copies the artefact's files into a folder."""
    if uri.startswith(MODEL_SCHEME):
        version = pinned_model(uri)
        return read_model_text(version, MANIFEST_NAME), lambda folder, names: download_model(version, folder)
    filesystem, path = pa_fs.FileSystem.from_uri(uri)

    def copy(folder: Path, names: Iterable[str]) -> None:
        for name in names:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            pa_fs.copy_files(f"{path}/{name}", str(target), filesystem, pa_fs.LocalFileSystem())

    with filesystem.open_input_stream(f"{path}/{MANIFEST_NAME}") as stream:
        return stream.read().decode("utf-8", errors="replace"), copy


def fetch_folder(place: str | Path, kind: str) -> Path:
    """The folder of an artefact on this machine.

    Args:
        place: a path, which is returned as it is, or a URI.
        kind: of the artefact, see csrm.artefacts.manifest.

    Raises:
        BundleError: there is no such artefact, it does not arrive whole, or it does not fit into the cache.
    """
    if not is_far(place):
        return Path(place)
    uri = str(place)
    try:
        text, copy = _open(uri)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise BundleError(f"{kind} {uri!r}: {MANIFEST_NAME} cannot be read: {error}. Is the URI right?") from error
    manifest = parse_manifest(text, f"{kind} {uri!r}", kind)
    cache = cache_dir()
    folder = cache / manifest.digest
    if folder in _used:
        return folder
    lock = (cache / f"{manifest.digest}.lock").open("ab")
    try:
        while True:
            fcntl.flock(lock, fcntl.LOCK_SH)  # waits for whoever copies, not for those that use the entry
            if _is_whole(folder, kind):
                break
            _lock_alone(lock, folder)
            if not _is_whole(folder, kind):  # between the two locks another process may have copied it
                shutil.rmtree(folder, ignore_errors=True)
                _make_room(cache, sum(entry.bytes for entry in manifest.files.values()), manifest.digest)
                _copy(copy, folder, manifest, kind, uri, text)
    except BaseException:
        lock.close()
        raise
    os.utime(folder)
    _used[folder] = lock
    return folder


def cache_dir() -> Path:
    """Folder of the cache on this machine, made where there is none."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "csrm"
    folder = Path(os.environ.get("CSRM_CACHE_DIR") or default)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _cache_bytes() -> float:
    text = os.environ.get("CSRM_CACHE_GB") or str(DEFAULT_CACHE_GB)
    try:
        return float(text) * 1e9
    except ValueError as error:
        raise ConfigError(f"CSRM_CACHE_GB: expected a number of gigabytes, got {text!r}.") from error


def _is_whole(folder: Path, kind: str) -> bool:
    if not folder.exists():
        return False
    try:
        verify_manifest(folder, kind)
    except BundleError as error:
        logger.warning("cache: to be fetched again: %s", error)
        return False
    return True


def _lock_alone(lock: BinaryIO, folder: Path) -> None:
    """Wait until no other process uses the entry.

    Raises:
        BundleError: others use the entry, which is not whole, and do not end.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if folder.exists() and time.monotonic() > deadline:
                raise BundleError(
                    f"cache {str(folder)!r}: was changed while other processes use it. End them, and start again."
                ) from error
            time.sleep(0.1)


def _copy(copy: _Copy, folder: Path, manifest: Manifest, kind: str, uri: str, text: str) -> None:
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    try:
        copy(unfinished, manifest.files)
        (unfinished / MANIFEST_NAME).write_text(text, encoding="utf-8")
        verify_manifest(unfinished, kind)
        unfinished.rename(folder)
    except (OSError, pa.ArrowException, BundleError) as error:
        raise BundleError(f"{kind} {uri!r}: did not arrive whole: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _make_room(cache: Path, num_bytes: int, digest: str) -> None:
    """Delete entries that no process uses, the longest unused first, until the new one fits.

    Raises:
        BundleError: it does not fit, even so.
    """
    limit = _cache_bytes()
    entries = [folder for folder in cache.iterdir() if folder.is_dir() and folder.stem != digest]
    sizes = {folder: _size(folder) for folder in entries}
    for folder in sorted(entries, key=lambda entry: entry.stat().st_mtime):
        if sum(sizes.values()) + num_bytes <= limit:
            return
        with _lock_if_unused(cache / f"{folder.stem}.lock") as is_unused:
            if is_unused:
                logger.info("cache: %s deleted to make room", folder)
                shutil.rmtree(folder)
                del sizes[folder]
    if sum(sizes.values()) + num_bytes > limit:
        raise BundleError(
            f"cache {str(cache)!r}: expected room for {num_bytes / 1e9:.2f} GB, but {sum(sizes.values()) / 1e9:.2f} GB "
            f"of {limit / 1e9:.2f} GB are in use. Raise CSRM_CACHE_GB."
        )


@contextmanager
def _lock_if_unused(path: Path) -> Iterator[bool]:
    with path.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
