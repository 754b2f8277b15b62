"""Bundles from far away: fetched once, checked, shared; nothing half-fetched is ever used."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from csrm.artefacts import cache as delivery
from csrm.artefacts.cache import fetch_folder
from csrm.artefacts.manifest import verify_manifest, write_manifest
from csrm.errors import BundleError, ConfigError
from tests.disks import small_disk

KIND = "bundle"

FETCH = (
    "import sys; from csrm.artefacts.cache import fetch_folder; "
    "print(fetch_folder(sys.argv[1], 'bundle'), flush=True); "
)
HOLD = FETCH + "sys.stdin.readline()"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CSRM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(delivery, "_used", {})
    return tmp_path / "cache"


def artefact(folder: Path, num_bytes: int = 1000, fill: str = "a") -> str:
    """URI of a folder on a filesystem of pyarrow.fs."""
    (folder / "inner").mkdir(parents=True)
    (folder / "model.onnx").write_text(fill * num_bytes)
    (folder / "inner" / "b.txt").write_text(fill)
    write_manifest(folder, KIND)
    return folder.as_uri()


def fetching_process(uri: str, code: str = FETCH) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, uri],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_path_is_used_where_it_is(cache: Path) -> None:
    assert fetch_folder("conf/demo_bundle", KIND) == Path("conf/demo_bundle")
    assert not cache.exists()


def test_a_uri_is_fetched_once_and_named_by_its_digest(cache: Path, tmp_path: Path) -> None:
    uri = artefact(tmp_path / "far")
    folder = fetch_folder(uri, KIND)
    assert folder.parent == cache
    assert verify_manifest(folder, KIND) == folder.name == verify_manifest(tmp_path / "far", KIND)
    written = (folder / "model.onnx").stat().st_mtime_ns
    assert fetch_folder(shutil.copytree(tmp_path / "far", tmp_path / "elsewhere").as_uri(), KIND) == folder
    assert (folder / "model.onnx").stat().st_mtime_ns == written


def test_processes_that_fetch_at_once_share_one_copy(cache: Path, tmp_path: Path) -> None:
    uri = artefact(tmp_path / "far", 5_000_000)
    processes = [fetching_process(uri) for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert {out for out, _ in outputs} == {f"{fetch_folder(uri, KIND)}\n"}, outputs
    assert sum(path.is_dir() for path in cache.iterdir()) == 1


def test_an_entry_that_another_process_uses_is_shared_at_once(cache: Path, tmp_path: Path) -> None:
    uri = artefact(tmp_path / "far")
    folder = fetch_folder(uri, KIND)

    output, _ = fetching_process(uri).communicate(timeout=60)

    assert output.strip() == str(folder)


def test_a_damaged_entry_in_use_is_an_error_and_not_a_hang(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = artefact(tmp_path / "far")
    holder = fetching_process(uri, HOLD)
    try:
        folder = Path(holder.stdout.readline().strip())
        (folder / "model.onnx").write_text("b" * 1000)
        monkeypatch.setattr(delivery, "_PATIENCE_S", 0.2)
        with pytest.raises(BundleError, match=r"was changed while other processes use it\. End them"):
            fetch_folder(uri, KIND)
    finally:
        holder.kill()
        holder.communicate()

    assert verify_manifest(fetch_folder(uri, KIND), KIND) == folder.name


def test_what_a_killed_download_leaves_is_not_used(cache: Path, tmp_path: Path) -> None:
    uri = artefact(tmp_path / "far")
    slow = "import csrm.artefacts.cache as d, time\ncopy = d.pa_fs.copy_files\n"
    slow += "def copy_slowly(*args):\n    copy(*args); print('one file', flush=True); time.sleep(60)\n"
    slow += "d.pa_fs.copy_files = copy_slowly\n" + FETCH
    process = fetching_process(uri, slow)
    assert process.stdout is not None
    assert process.stdout.readline() == "one file\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (left,) = [path for path in cache.iterdir() if path.is_dir()]
    assert left.suffix == ".unfinished"

    folder = fetch_folder(uri, KIND)
    assert verify_manifest(folder, KIND) == folder.name
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder]


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = artefact(tmp_path / "far", 2_000_000)
    with small_disk(tmp_path / "cache", "1m") as cache:
        monkeypatch.setenv("CSRM_CACHE_DIR", str(cache))
        with pytest.raises(BundleError, match=r"did not arrive whole: .*No space left on device"):
            fetch_folder(uri, KIND)
        assert not any(path.is_dir() for path in cache.iterdir())


def test_a_copy_that_was_damaged_in_the_cache_is_fetched_again(cache: Path, tmp_path: Path) -> None:
    uri = artefact(tmp_path / "far")
    folder = fetch_folder(uri, KIND)
    (folder / "model.onnx").write_text("damaged")
    delivery._used.clear()
    assert verify_manifest(fetch_folder(uri, KIND), KIND) == folder.name


def test_a_folder_that_is_damaged_where_it_comes_from_is_never_in_the_cache(cache: Path, tmp_path: Path) -> None:
    uri = artefact(tmp_path / "far")
    (tmp_path / "far" / "model.onnx").write_text("a" * 999 + "b")
    with pytest.raises(BundleError, match=r"did not arrive whole.*model.onnx has another content"):
        fetch_folder(uri, KIND)
    (tmp_path / "far" / "model.onnx").unlink()
    with pytest.raises(BundleError, match="did not arrive whole"):
        fetch_folder(uri, KIND)
    assert not any(path.is_dir() for path in cache.iterdir())


@pytest.mark.parametrize("uri", ["file:///nowhere/at/all", "nonsense://x/y"])
def test_a_uri_without_an_artefact_is_named(cache: Path, uri: str) -> None:
    with pytest.raises(BundleError, match=f"bundle '{uri}': manifest.json cannot be read"):
        fetch_folder(uri, KIND)


def test_the_longest_unused_entry_makes_room_and_one_in_use_never_does(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CSRM_CACHE_GB", "0.000025")
    uris = {fill: artefact(tmp_path / fill, 10_000, fill) for fill in "abc"}
    holder = fetching_process(uris["a"], HOLD)
    assert holder.stdout is not None
    in_use = Path(holder.stdout.readline().strip())
    unused = fetch_folder(uris["b"], KIND)
    delivery._used.popitem()[1].close()
    for age, folder in ((100, in_use), (50, unused)):
        os.utime(folder, (time.time() - age, time.time() - age))

    third = fetch_folder(uris["c"], KIND)
    assert (in_use.exists(), unused.exists(), third.exists()) == (True, False, True)
    with pytest.raises(BundleError, match=r"expected room for .* are in use\. Raise CSRM_CACHE_GB"):
        fetch_folder(uris["b"], KIND)
    holder.communicate("\n", timeout=60)
    assert fetch_folder(uris["b"], KIND).exists()
    assert not in_use.exists()


def test_a_bundle_is_loaded_from_a_uri(cache: Path, tiny_bundle: Path) -> None:
    from csrm.bundle.loading import load_scorer

    assert load_scorer(tiny_bundle.as_uri(), "cpu", threads=1).digest == verify_manifest(tiny_bundle, KIND)


def test_a_limit_that_is_no_number_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CSRM_CACHE_GB", "lots")
    with pytest.raises(ConfigError, match="expected a number of gigabytes, got 'lots'"):
        fetch_folder(artefact(tmp_path / "far"), KIND)
