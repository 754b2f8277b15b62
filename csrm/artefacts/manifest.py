"""What all artefacts have: `manifest.json`, by which whoever opens a folder knows that it is whole and unchanged.

And `golden.json`, by which a model proves itself.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import Field, ValidationError

from csrm.config import Settings
from csrm.errors import BundleError, ConfigError

MANIFEST_NAME = "manifest.json"
MODEL_NAME = "model.onnx"
TOKENIZER_NAME = "tokenizer.json"
GOLDEN_NAME = "golden.json"
"""Inputs with the results that a model must give: it proves itself by them wherever it is loaded."""
MANIFEST_VERSION = 2
"""Version 1 had no `about`; it is read as before."""
FileT = TypeVar("FileT", bound=Settings)


class FileEntry(Settings):
    """One file of an artefact."""

    sha256: str
    """In hexadecimal."""
    bytes: int = Field(ge=0)


class Manifest(Settings):
    """What `manifest.json` holds."""

    manifest_version: int
    kind: str
    """What the folder is, for example bundle."""
    digest: str
    """sha256 over the sorted names and digests of the files, and over `about` where there is one."""
    files: dict[str, FileEntry]
    """Every file of the folder but the manifest; names are relative, with / between their parts."""
    about: dict[str, Any] = Field(default_factory=dict)
    """What the artefact says about itself."""


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, kind: str, about: Mapping[str, Any] | None = None) -> str:
    """Describe every file of a finished folder.

    Args:
        folder: the artefact; its files may lie in sub-folders.
        kind: what the folder is, for example bundle.
        about: what the artefact says about itself, as JSON has it.

    Returns:
        The digest of the whole.
    """
    files = {
        path.relative_to(folder).as_posix(): FileEntry(sha256=file_digest(path), bytes=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST_NAME
    }
    about = dict(about or {})
    digest = _whole_digest(files, about)
    manifest = Manifest(manifest_version=MANIFEST_VERSION, kind=kind, digest=digest, files=files, about=about)
    text = json.dumps(manifest.model_dump(), indent=2, ensure_ascii=False)
    (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")
    return digest


def check_replaceable(folder: Path, kind: str) -> None:
    """Refuse to replace what is not an earlier artefact of the same kind; call it before the work.

    Raises:
        ConfigError: the folder holds something else, is a file, or cannot be replaced as a whole.
    """
    kinds = {
        "a symbolic link": folder.is_symlink(),
        "a mount": folder.is_mount(),
        "a path without a name": not folder.name,
    }
    if unlike := [name for name, is_one in kinds.items() if is_one]:
        raise ConfigError(
            f"output {str(folder)!r}: expected a folder that can be replaced as a whole, found {unlike[-1]}. "
            "It is left alone: name a folder inside of it."
        )
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        found = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError):
        found = None
    if found != kind:
        raise ConfigError(
            f"output {str(folder)!r}: expected an empty folder or an earlier {kind}, found something else. "
            "It is left alone: name another folder, or move that one away."
        )


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine from making an artefact in the same folder at the same time.

    `<folder>.lock` beside it is locked meanwhile, and deleted in the end. The lock ends with its process.

    Raises:
        ConfigError: another process makes one there.
    """
    path = folder.with_name(folder.name + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        if not _is_locked(file, path):
            raise ConfigError(
                f"output {str(folder)!r}: another process writes it now, by its lock {str(path)!r}. Wait until that "
                "one has ended, or name another folder."
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def unfinished_folder(folder: Path) -> Iterator[Path]:
    """An empty folder `<folder>.unfinished` to make an artefact in, deleted in the end; see only_writer."""
    with only_writer(folder):
        unfinished = folder.with_name(folder.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _is_locked(file: BinaryIO, path: Path) -> bool:
    """Whether this process has the lock now; a file system without locks gives it to all."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:  # the one before has just ended
        return False


def replace_folder(finished: Path, folder: Path, kind: str) -> None:
    """Put a finished folder in the place of an earlier one; a reader finds the old one, the new one, or none.

    Raises:
        ConfigError: see check_replaceable.
    """
    check_replaceable(folder, kind)
    shutil.rmtree(folder, ignore_errors=True)
    finished.rename(folder)


def parse_manifest(text: str, where: str, kind: str) -> Manifest:
    """A manifest from its text.

    Args:
        where: of the artefact, for messages.

    Raises:
        BundleError: not a manifest, or one of another kind or version.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: {MANIFEST_NAME} is not JSON ({error}). Make the {kind} again.") from error
    if not isinstance(values, dict) or not isinstance(values.get("files"), dict):
        raise BundleError(f"{where}: {MANIFEST_NAME} has no list of files. Make the {kind} again.")
    if values.get("kind") != kind:
        raise BundleError(f"{where}: is a {values.get('kind')!r}, expected a {kind!r}.")
    if values.get("manifest_version") not in (1, MANIFEST_VERSION):
        raise BundleError(
            f"{where}: has manifest version {values.get('manifest_version')!r}, this CSRM reads {MANIFEST_VERSION}. "
            f"Make the {kind} again, or use the CSRM that made it."
        )
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        raise BundleError(f"{where}: {MANIFEST_NAME} was edited: {error}. Copy or make it again.") from error
    if outside := [name for name in manifest.files if name.startswith("/") or ".." in name.split("/")]:
        raise BundleError(f"{where}: {MANIFEST_NAME} names files outside of the folder: {outside}.")
    if manifest.digest != _whole_digest(manifest.files, manifest.about):
        raise BundleError(
            f"{where}: {MANIFEST_NAME} was edited: its digest is not that of its files. Copy or make it again."
        )
    return manifest


def read_manifest(folder: str | Path, kind: str) -> Manifest:
    """The manifest of a folder, whose other files are not looked at.

    Raises:
        BundleError: no folder or manifest, or another kind or version.
    """
    folder = Path(folder)
    where = f"{kind} {str(folder)!r}"
    try:
        text = (folder / MANIFEST_NAME).read_text(encoding="utf-8")
    except OSError as error:
        raise BundleError(f"{where}: {MANIFEST_NAME} cannot be read ({error.strerror}). Is the path right?") from error
    except UnicodeDecodeError as error:
        raise BundleError(f"{where}: {MANIFEST_NAME} is not JSON ({error}). Make the {kind} again.") from error
    return parse_manifest(text, where, kind)


def load_manifest(folder: str | Path, kind: str, digest: str | None = None) -> Manifest:
    """Check every file of a folder against its manifest.

    Args:
        folder: the artefact.
        kind: what it must be, for example bundle.
        digest: what its digest must be, or begin with; None: any.

    Raises:
        BundleError: no folder or manifest, another kind, version or digest, or files that are missing, changed or not
            listed.
    """
    folder = Path(folder)
    where = f"{kind} {str(folder)!r}"
    manifest = read_manifest(folder, kind)
    if problems := _changed_files(folder, manifest.files):
        raise BundleError(f"{where}: is not as it was made: {'; '.join(problems)}. Copy or make it again.")
    if digest and not manifest.digest.startswith(digest):
        raise BundleError(
            f"{where}: expected digest {digest}, got {manifest.digest}. "
            f"Put the {kind} there that the configuration names, or name this one."
        )
    return manifest


def require_same(folder: Path, kind: str, digest: str) -> None:
    """Refuse a folder that was replaced while its files were read: some may be of the one before.

    Args:
        digest: that its manifest had when it was opened.

    Raises:
        BundleError: its manifest is another one now, or gone.
    """
    if (found := read_manifest(folder, kind).digest) != digest:
        raise BundleError(
            f"{kind} {str(folder)!r}: was replaced while it was loaded: expected digest {digest}, got {found}. Load it "
            f"again, and put each {kind} into a folder of its own."
        )


def verify_manifest(folder: str | Path, kind: str) -> str:
    """The digest of a folder whose files are as they were made; raises as load_manifest does."""
    return load_manifest(folder, kind).digest


def write_golden(path: Path, source: str, name: str, records: Iterable[Mapping[Any, Any]]) -> None:
    """Write a `golden.json`, one line a record.

    Args:
        path: the file.
        source: what computed the records' results.
        name: of the list of records.
        records: as JSON has them.
    """
    lines = ",\n    ".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text(f'{{\n  "source": {json.dumps(source)},\n  "{name}": [\n    {lines}\n  ]\n}}\n', "utf-8")


def read_golden(path: Path, file_class: type[FileT], kind: str, what: str) -> FileT:
    """Read a `golden.json`.

    Args:
        path: the file.
        file_class: what it must hold.
        kind: of the artefact, for messages.
        what: it holds, for messages.

    Raises:
        BundleError: the file does not hold that.
    """
    try:
        return file_class.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise BundleError(
            f"{kind} {str(path.parent)!r}: {path.name} does not hold {what}: {error}. Export the model again."
        ) from error


def _changed_files(folder: Path, files: Mapping[str, FileEntry]) -> list[str]:
    if links := sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink()):
        return [
            f"{name} is a symbolic link, whose target may change or stay behind; put the file there" for name in links
        ]
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST_NAME}
    problems = [f"{name} is missing" for name in sorted(files.keys() - present)]
    problems += [f"{name} is not in the manifest" for name in sorted(present - files.keys())]
    for name in sorted(files.keys() & present):
        size = (folder / name).stat().st_size
        if size != files[name].bytes:
            problems.append(f"{name} has {size} bytes, expected {files[name].bytes}")
        elif file_digest(folder / name) != files[name].sha256:
            problems.append(f"{name} has another content (sha256)")
    return problems


def _whole_digest(files: Mapping[str, FileEntry], about: Mapping[str, Any]) -> str:
    parts: dict[str, Any] = {name: entry.sha256 for name, entry in files.items()}
    if about:
        parts[MANIFEST_NAME] = about
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
