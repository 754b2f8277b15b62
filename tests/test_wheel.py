"""The wheel: one top-level package, which works without a checkout."""

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's packages, unpacked."""
    folder = tmp_path_factory.mktemp("site")
    with ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_csrm(installed: Path, cwd: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "csrm", *words]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_wheel_holds_one_package_and_its_command(installed: Path) -> None:
    (info,) = installed.glob("*.dist-info")
    assert {path.name for path in installed.iterdir()} == {"csrm", info.name}
    assert (info / "entry_points.txt").read_text().split() == ["[console_scripts]", "csrm", "=", "csrm.__main__:main"]


def test_the_wheel_holds_every_file_of_the_package_and_the_configuration(installed: Path) -> None:
    def files(folder: Path) -> set[Path]:
        found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        return {path for path in found if "__pycache__" not in path.parts}

    assert files(installed / "csrm" / "conf") == files(ROOT / "conf")
    assert files(installed / "csrm") == files(ROOT / "csrm") | {Path("conf") / path for path in files(ROOT / "conf")}


def test_without_a_checkout_commands_work_on_what_init_wrote(installed: Path, tmp_path: Path) -> None:
    place = "import csrm; print(csrm.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    found = subprocess.run(
        [sys.executable, "-c", place], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()) == installed / "csrm" / "__init__.py"

    run_csrm(installed, tmp_path, "init", "conf")
    assert "--products-per-query" in run_csrm(installed, tmp_path, "capacity", "--help")
    assert "verified" in run_csrm(installed, tmp_path, "bundle", "verify", "conf/demo_bundle")
    run_csrm(installed, tmp_path, "generate-market", "--set", "products_per_market=50", "--set", "queries_per_market=5")
    assert (tmp_path / "build" / "demo" / "inputs" / "catalog.parquet").exists()
