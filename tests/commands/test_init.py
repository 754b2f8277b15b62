from pathlib import Path

import pytest

from csrm.bundle.loading import load_bundle
from csrm.cli import run_job
from csrm.commands import init
from csrm.commands.init import copy_configuration, shipped_configuration
from csrm.config import load_config
from csrm.errors import ConfigError
from csrm.night.settings import ScoringConfig

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_configuration_of_a_checkout_is_copied_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped_configuration() == ROOT / "conf"
    assert init.main(["conf"]) == 0
    assert contents(tmp_path / "conf") == contents(ROOT / "conf")
    assert (tmp_path / "conf" / "deploy" / "start.sh").stat().st_mode & 0o111
    assert "csrm demo" in capsys.readouterr().out


def test_in_a_folder_of_another_name_the_settings_name_its_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert init.main(["settings/tw"]) == 0
    settings = load_config("settings/tw/score_catalog.yaml", ScoringConfig)
    assert settings.bundle == "settings/tw/demo_bundle"
    assert load_bundle(settings.bundle) is not None
    assert "csrm score-catalog --config settings/tw/score_catalog.yaml" in capsys.readouterr().out


def test_a_folder_that_has_files_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("mine")
    assert run_job(init.main, [str(tmp_path)]) == 2
    assert "with mine.yaml. Name another folder" in capsys.readouterr().err
    assert contents(tmp_path) == {"mine.yaml": b"mine"}


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "conf").write_text("a file")
    with pytest.raises(ConfigError, match=r"conf' cannot be written: .*Not a directory.* Name another folder"):
        copy_configuration(ROOT / "conf", tmp_path / "conf")
    assert (tmp_path / "conf").read_text() == "a file"


def test_code_without_its_configuration_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csrm.__path__", [str(tmp_path / "csrm")])
    with pytest.raises(ConfigError, match=r"expected the configuration files in .*csrm/conf', found none"):
        shipped_configuration()
