import os
import shutil
import tomllib
from pathlib import Path

import pytest

from csrm.commands.doctor import main
from csrm.doctor import machine as doctor
from csrm.doctor.checks import Check, CheckWarning, checked
from csrm.doctor.machine import (
    PACKAGES,
    RUNTIME,
    SPARK_PACKAGES,
    check_disk,
    check_gpu,
    check_java,
    check_packages,
    checks_of_code,
    checks_of_scoring,
    fits,
    installed_versions,
)
from csrm.errors import AuditError, ConfigError, DeviceError
from csrm.night.settings import NightSettings

ROOT = Path(__file__).parents[2]
DEMO = NightSettings(tables="nowhere", bundle=str(ROOT / "conf" / "demo_bundle"))


def write_program(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def failures(checks: list[Check]) -> dict[str, int]:
    return {check.name: check.exit_code for check in checks if check.verdict == "FAILED"}


def test_what_must_be_installed_is_what_pyproject_says() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    assert [f"{name}{bounds}" for name, bounds in (PACKAGES | SPARK_PACKAGES).items()] == project["dependencies"]
    extras = project["optional-dependencies"]
    assert extras["cpu"] + extras["gpu"] == [f"onnxruntime{RUNTIME}", f"onnxruntime-gpu{RUNTIME}"]


@pytest.mark.parametrize(
    ("number", "bounds", "expected"),
    [
        ("4.4.0", ">=4.4,<4.5,!=4.4.1", True),
        ("4.4.1", ">=4.4,<4.5,!=4.4.1", False),
        ("4.5.0", ">=4.4,<4.5,!=4.4.1", False),
        ("4.10", ">=4.4", True),
        ("3.0.0", ">=2.2,<3", False),
        ("2.15.0+cu130", ">=2.6", True),
        ("2024.3", ">=2024.4", False),
    ],
)
def test_versions_are_compared_as_numbers(number: str, bounds: str, expected: bool) -> None:
    assert fits(number, bounds) is expected


def test_an_error_becomes_one_line_with_its_exit_code_and_the_checks_go_on() -> None:
    def fail(error: Exception) -> str:
        raise error

    assert checked("a", lambda: "two\n words") == ("a", "ok", "two words", 0)
    assert checked("b", fail, CheckWarning("look\nat it")) == ("b", "warning", "look at it", 0)
    assert checked("c", fail, AuditError("no")) == ("c", "FAILED", "no", 3)
    assert checked("d", fail, KeyError("x")) == ("d", "FAILED", "KeyError: 'x'", 1)
    assert len(checked("e", fail, DeviceError("x" * 5_000)).text) < 1_100


def test_packages_that_do_not_fit_are_all_named() -> None:
    with pytest.raises(
        ConfigError, match=r"numpy: expected >=99, found \d.*; no-such-thing: expected >=1, found none\."
    ):
        check_packages({"numpy": ">=99", "pyyaml": ">=6", "no-such-thing": ">=1"}, None)


def test_an_executor_with_other_packages_than_the_driver_is_a_doubt_with_another_csrm_a_failure() -> None:
    driver = installed_versions(PACKAGES)
    assert not failures(list(checks_of_code(PACKAGES, driver)))

    checks = {check.name: check for check in checks_of_code(PACKAGES, {**driver, "numpy": "1.0", "csrm": "0.0.9"})}

    assert checks["packages"].verdict == "warning"
    assert "the driver has 1.0" in checks["packages"].text
    assert (checks["csrm"].verdict, checks["csrm"].exit_code) == ("FAILED", 2)
    assert checks["csrm"].text.startswith("expected 0.0.9, which the driver has, found ")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["echo '    java.specification.version = 11' >&2"],
            r"expected version 17 or 21, found version 11\. Install Java",
        ),
        (
            ["echo 'Module jdk.incubator.vector not found' >&2", "exit 1"],
            r"found Module jdk\.incubator\.vector not found",
        ),
    ],
)
def test_a_java_that_cannot_run_spark_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], message: str
) -> None:
    write_program(tmp_path / "bin" / "java", *lines)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        check_java()


def test_a_java_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"bin/java: cannot be run .* name its folder by JAVA_HOME"):
        check_java()


def test_the_gpu_that_spark_gave_must_be_one_that_nvidia_smi_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(tmp_path / "nvidia-smi", "echo '0, NVIDIA H100, 580.95.05, 81559 MiB'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    assert check_gpu("cuda", None) == check_gpu("cuda:0", "0") == "0: NVIDIA H100, 580.95.05, 81559 MiB"
    with pytest.raises(DeviceError, match=r"expected GPU 7, nvidia-smi lists \['0'\]"):
        check_gpu("cuda:7", "7")
    assert check_gpu("cpu", "7") == "address 7 from Spark, without a use: the device is cpu"


def test_a_machine_without_nvidia_smi_is_a_doubt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CheckWarning, match="nvidia-smi cannot be asked"):
        check_gpu("cuda", None)


def test_a_folder_needs_room_and_must_take_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new" / "spill"
    assert check_disk(folder, "X").startswith(f"{folder}: ")
    assert list(folder.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written to .* name another folder by X\."):
        check_disk(tmp_path / "file" / "spill", "X")
    monkeypatch.setattr(doctor, "ENOUGH_FREE_GB", 1e9)
    with pytest.raises(CheckWarning, match="which a large night may fill"):
        check_disk(folder, "X")
    monkeypatch.setattr(doctor, "LEAST_FREE_GB", 1e8)
    with pytest.raises(ConfigError, match=r"GB free, expected at least 1e\+08\. Make room"):
        check_disk(folder, "X")


def test_a_bundle_proves_itself_with_all_its_golden_pairs() -> None:
    checks = {check.name: check for check in checks_of_scoring(DEMO, "cpu", threads=1)}

    assert not failures(list(checks.values()))
    assert list(checks) == ["onnxruntime", "spill", "bundle", "scores"]
    assert checks["bundle"].text.endswith("every file whole; not pinned by bundle_digest")
    assert checks["scores"].text == "32 golden pairs have their scores on cpu (CPUExecutionProvider)"


def test_a_bundle_at_a_uri_needs_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CSRM_CACHE_DIR", str(tmp_path / "cache"))
    settings = DEMO.model_copy(update={"bundle": Path(DEMO.bundle).as_uri()})

    checks = {check.name: check for check in checks_of_scoring(settings, "cpu", threads=1)}

    assert not failures(list(checks.values()))
    assert checks["cache"].text.startswith(f"{tmp_path / 'cache'}: ")


def test_a_damaged_bundle_fails_and_is_not_scored_with(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO.bundle, tmp_path / "bundle"))
    with (folder / "model.onnx").open("r+b") as file:
        file.seek(1_000)
        file.write(b"x")

    checks = list(checks_of_scoring(DEMO.model_copy(update={"bundle": str(folder)}), "cpu"))

    assert failures(checks) == {"bundle": 2}
    assert "scores" not in {check.name for check in checks}


def test_another_bundle_than_the_pinned_one_fails() -> None:
    assert failures(list(checks_of_scoring(DEMO.model_copy(update={"bundle_digest": "0000"}), "cpu"))) == {"bundle": 2}


def test_a_device_that_is_not_there_fails_with_4() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has CUDA")
    checks = list(checks_of_scoring(DEMO, "cuda"))
    assert failures(checks) == {"onnxruntime": 4, "scores": 4}
    assert "Install csrm[gpu]" in checks[0].text


def test_a_machine_on_which_a_night_could_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == [
        *("python", "csrm", "packages", "java", "jars", "onnxruntime", "spill")
    ]
    assert lines[-1] == "a night could run"


def test_a_machine_on_which_none_could_run_says_so_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setenv("SPARK_HOME", str(tmp_path))

    assert main([]) == 2

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("FAILED")] == ["java", "jars"]
    assert "Unset SPARK_HOME" in next(line for line in lines if " jars " in line)
    assert lines[-1] == "no night could run: 2 of the checks failed: java, jars"


@pytest.mark.parametrize("arguments", [["--executors"], ["--set", "device=cuda"]])
def test_what_needs_a_configuration_says_so(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "--executors, --set and --show-config need --config" in capsys.readouterr().err
