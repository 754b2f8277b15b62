"""The doctor's checks through Spark, on a local session; those on a cluster are in tests/faults."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pyspark.sql import SparkSession

from csrm.commands.doctor import main
from csrm.doctor.cluster import _cause
from csrm.errors import ConfigError, ScoringError

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.spark


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "score_catalog.yaml"
    values = {"tables": str(tmp_path / "tables"), "bundle": str(ROOT / "conf" / "demo_bundle")}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def verdicts(output: str) -> dict[str, str]:
    """Check to verdict."""
    return {line[34:].split()[0]: line.split()[0] for line in output.splitlines()[:-1]}


def test_each_executor_is_looked_at_once(spark: SparkSession, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(config), "--executors"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "a night could run"
    places = [line[9:33].strip() for line in lines[:-1]]
    assert [place for place in places if place == "driver"] == places[:7] + places[-1:]
    assert len(set(places[7:-1])) == 1  # a local session is one executor, whatever its cores
    assert [line[34:].split()[0] for line in lines[:-1]] == [
        *("python", "csrm", "packages", "bundle", "spark", "settings", "executors"),
        *("python", "csrm", "packages", "onnxruntime", "spill", "bundle", "scores"),
        "tables",
    ]
    assert list((config.parent / "tables").iterdir()) == []


def test_another_bundle_than_the_pinned_one_is_no_night(
    spark: SparkSession, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(config), "--executors", "--set", "bundle_digest=abc"]) == 2

    found = verdicts(capsys.readouterr().out)
    assert [name for name, verdict in found.items() if verdict == "FAILED"] == ["bundle", "executors"]


def test_a_device_that_no_executor_has_is_no_night(
    spark: SparkSession, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(config), "--executors", "--set", "device=cuda:9"]) == 4

    found = verdicts(capsys.readouterr().out)
    assert (found["settings"], found["onnxruntime"], found["scores"]) == ("ok", "FAILED", "FAILED")
    assert found["tables"] == "ok"


def test_tables_that_cannot_be_written_are_no_night(
    spark: SparkSession, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.parent / "file").write_text("")

    code = main(["--config", str(config), "--executors", "--set", f"tables={config.parent / 'file' / 'tables'}"])

    assert code in (1, 2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert [line[34:].split()[0] for line in lines] == ["tables"]


def test_gpus_that_spark_does_not_lend_are_named(
    spark: SparkSession, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(config), "--executors", "--set", "one_task_per_gpu=true"]) == 2
    assert "expected executors with GPU resources, found none" in capsys.readouterr().out


def test_executors_without_the_code_are_told_how_to_get_it() -> None:
    def failed(cause: str) -> ScoringError:
        error = ScoringError("Spark gave up: Job aborted\nmore")
        error.__cause__ = RuntimeError(cause)
        return error

    with pytest.raises(ConfigError, match=r"expected the module csrm in their Python.*docs/deployment\.md"):
        raise _cause(failed("Traceback\nModuleNotFoundError: No module named 'csrm'\n"))
    with pytest.raises(ScoringError, match=r"^Spark gave up: Job aborted$"):
        raise _cause(failed("something else"))


@pytest.mark.slow
def test_as_a_module_it_starts_a_session_of_its_own(config: Path) -> None:
    command = [sys.executable, "-m", "csrm.doctor", "--config", str(config)]

    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert [line.split()[1] for line in finished.stdout.splitlines()[-3:-1]] == ["scores", "tables"]
