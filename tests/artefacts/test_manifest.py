import json
from pathlib import Path

import pytest

from csrm.artefacts.manifest import (
    check_replaceable,
    load_manifest,
    only_writer,
    require_same,
    unfinished_folder,
    verify_manifest,
    write_manifest,
)
from csrm.errors import BundleError, ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.txt").write_text("alpha")
    (tmp_path / "inner" / "b.bin").write_bytes(b"\x00\x01")
    return tmp_path


def test_a_folder_as_it_was_made_verifies(folder: Path) -> None:
    digest = write_manifest(folder, "bundle")
    assert verify_manifest(folder, "bundle") == digest
    assert len(digest) == 64


def test_the_digest_depends_on_content_and_names_alone(folder: Path) -> None:
    digest = write_manifest(folder, "bundle")
    assert write_manifest(folder, "bundle") == digest
    (folder / "a.txt").rename(folder / "c.txt")
    assert write_manifest(folder, "bundle") != digest


@pytest.mark.parametrize("name", ["a.txt", "inner/b.bin"])
def test_one_flipped_byte_is_found(folder: Path, name: str) -> None:
    write_manifest(folder, "bundle")
    data = bytearray((folder / name).read_bytes())
    data[0] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} has another content"):
        verify_manifest(folder, "bundle")


def test_missing_added_and_truncated_files_are_all_named(folder: Path) -> None:
    write_manifest(folder, "bundle")
    (folder / "a.txt").write_text("alp")
    (folder / "inner" / "b.bin").unlink()
    (folder / "new").touch()
    with pytest.raises(BundleError) as error:
        verify_manifest(folder, "bundle")
    for part in ("a.txt has 3 bytes, expected 5", "inner/b.bin is missing", "new is not in the manifest"):
        assert part in str(error.value)


def test_an_edited_manifest_is_refused(folder: Path) -> None:
    write_manifest(folder, "bundle")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["digest"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="was edited"):
        verify_manifest(folder, "bundle")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 200_000, "is not JSON"),
        ("[]", "no list of files"),
        ('{"files": {}, "kind": "model"}', "is a 'model', expected a 'bundle'"),
        ('{"files": {}, "kind": "bundle", "manifest_version": 99}', "manifest version 99"),
    ],
)
def test_another_manifest_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=message):
        verify_manifest(tmp_path, "bundle")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere.*Is the path right"):
        verify_manifest(tmp_path / "nowhere", "bundle")


def test_what_a_folder_says_about_itself_is_part_of_its_digest(folder: Path) -> None:
    digests = {write_manifest(folder, "bundle", about) for about in (None, {"gain": 1}, {"gain": 0.5}, {"other": 1})}
    assert len(digests) == 4
    manifest = load_manifest(folder, "bundle")
    assert manifest.about == {"other": 1}
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"other": 1', '"other": 2'))
    with pytest.raises(BundleError, match="was edited"):
        load_manifest(folder, "bundle")


def test_a_manifest_of_the_first_version_is_read(folder: Path) -> None:
    digest = write_manifest(folder, "model")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["about"]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "manifest_version": 1}))
    assert verify_manifest(folder, "model") == digest


@pytest.mark.parametrize("name", ["../a.txt", "/a.txt", "inner/../../a.txt"])
def test_files_outside_of_the_folder_are_refused(folder: Path, name: str) -> None:
    write_manifest(folder, "bundle")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"].pop("a.txt")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="names files outside of the folder"):
        verify_manifest(folder, "bundle")


def test_a_link_is_refused_as_a_place_before_the_work(folder: Path) -> None:
    write_manifest(folder / "inner", "model")
    (folder / "link").symlink_to(folder / "inner")
    (folder / "dangling").symlink_to(folder / "nowhere")
    for name in ("link", "dangling"):
        with pytest.raises(ConfigError, match="can be replaced as a whole, found a symbolic link"):
            check_replaceable(folder / name, "model")


def test_a_place_without_a_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # an empty folder
    with pytest.raises(ConfigError, match="replaced as a whole, found a path without a name"):
        check_replaceable(Path(), "model")


def test_a_mount_is_refused_as_a_place() -> None:
    with pytest.raises(ConfigError, match="replaced as a whole, found a mount"):
        check_replaceable(Path("/proc"), "model")


def test_two_writers_of_one_folder_are_kept_apart(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "model"
    with only_writer(folder):
        with pytest.raises(ConfigError, match="another process writes it now"), only_writer(folder):
            pass
        with only_writer(folder.with_name("other")):
            pass
    with only_writer(folder):
        pass
    assert not list(folder.parent.iterdir())


def test_what_a_second_writer_does_leaves_the_unfinished_folder_of_the_first(tmp_path: Path) -> None:
    with unfinished_folder(tmp_path / "bundle") as first:
        (first / "half").touch()
        with pytest.raises(ConfigError, match="another process"), unfinished_folder(tmp_path / "bundle"):
            pass
        assert (first / "half").exists()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_replaced_since_is_refused(folder: Path) -> None:
    digest = write_manifest(folder, "bundle")
    require_same(folder, "bundle", digest)
    write_manifest(folder, "bundle", {"name": "another"})
    with pytest.raises(BundleError, match=f"was replaced while it was loaded: expected digest {digest}"):
        require_same(folder, "bundle", digest)
