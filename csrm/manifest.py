"""`manifest.json`: what is in an artefact's folder, so that whoever opens it knows that it is whole and unchanged."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from csrm.errors import BundleError, ConfigError

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, kind: str) -> str:
    """Describe every file of a finished folder.

    Args:
        folder: the artefact; its files may lie in sub-folders.
        kind: what the folder is, for example bundle.

    Returns:
        The digest of the whole: sha256 over the sorted names and digests of its files.
    """
    files = {
        path.relative_to(folder).as_posix(): {"sha256": file_digest(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }
    digest = _whole_digest(files)
    manifest = {"manifest_version": MANIFEST_VERSION, "kind": kind, "digest": digest, "files": files}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return digest


def check_replaceable(folder: Path, kind: str) -> None:
    """Refuse to replace what is not an earlier artefact of the same kind; call it before the work.

    Raises:
        ConfigError: the folder holds something else, or is a file.
    """
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


def replace_folder(finished: Path, folder: Path, kind: str) -> None:
    """Put a finished folder in the place of an earlier one; a reader finds the old one, the new one, or none.

    Raises:
        ConfigError: see check_replaceable.
    """
    check_replaceable(folder, kind)
    shutil.rmtree(folder, ignore_errors=True)
    finished.rename(folder)


def verify_manifest(folder: str | Path, kind: str) -> str:
    """Check every file of a folder against its manifest.

    Returns:
        The digest of the whole.

    Raises:
        BundleError: no folder or manifest, another kind or version, or files that are missing, changed or not listed.
    """
    folder = Path(folder)
    where = f"{kind} {str(folder)!r}"
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{where}: {MANIFEST_NAME} cannot be read ({error.strerror}). Is the path right?") from error
    except ValueError as error:
        raise BundleError(f"{where}: {MANIFEST_NAME} is not JSON ({error}). Make the {kind} again.") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise BundleError(f"{where}: {MANIFEST_NAME} has no list of files. Make the {kind} again.")
    if manifest.get("kind") != kind:
        raise BundleError(f"{where}: is a {manifest.get('kind')!r}, expected a {kind!r}.")
    if manifest.get("manifest_version") != MANIFEST_VERSION:
        raise BundleError(
            f"{where}: has manifest version {manifest.get('manifest_version')!r}, this CSRM reads {MANIFEST_VERSION}. "
            f"Make the {kind} again, or use the CSRM that made it."
        )
    problems = _changed_files(folder, manifest["files"])
    if not problems and manifest.get("digest") != _whole_digest(manifest["files"]):
        problems = [f"{MANIFEST_NAME} was edited: its digest is not that of its files"]
    if problems:
        raise BundleError(f"{where}: is not as it was made: {'; '.join(problems)}. Copy or make it again.")
    return str(manifest["digest"])


def _changed_files(folder: Path, files: dict[str, Any]) -> list[str]:
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST_NAME}
    problems = [f"{name} is missing" for name in sorted(files.keys() - present)]
    problems += [f"{name} is not in the manifest" for name in sorted(present - files.keys())]
    for name in sorted(files.keys() & present):
        size = (folder / name).stat().st_size
        if size != files[name]["bytes"]:
            problems.append(f"{name} has {size} bytes, expected {files[name]['bytes']}")
        elif file_digest(folder / name) != files[name]["sha256"]:
            problems.append(f"{name} has another content (sha256)")
    return problems


def _whole_digest(files: dict[str, Any]) -> str:
    canonical = json.dumps({name: files[name]["sha256"] for name in sorted(files)}, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
