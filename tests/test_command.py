"""The command csrm: its list, its names, its exit codes."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from csrm import __version__
from csrm.__main__ import GROUPS, help_text, main
from csrm.cli import Console, run_job, without_credentials
from csrm.errors import InputError

ROOT = Path(__file__).parent.parent
COMMANDS = [name for commands in GROUPS.values() for name in commands]


@pytest.fixture(autouse=True)
def _own_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command changes the program's name, which is the process's."""
    monkeypatch.setattr(sys, "argv", ["somewhere/csrm"])


def test_the_list_holds_every_command_of_the_room_and_the_jars() -> None:
    modules = {path.stem for path in (ROOT / "csrm" / "commands").glob("*.py")} - {"__init__"}
    assert sorted(COMMANDS) == sorted({name.replace("_", "-") for name in modules} | {"jars"})


def test_the_list_fits_a_terminal() -> None:
    assert [line for line in help_text().splitlines() if len(line) > 100] == []


def test_every_job_has_a_command_of_its_name() -> None:
    jobs = {path.stem.replace("_", "-") for path in (ROOT / "jobs").glob("*.py")}
    assert jobs <= set(COMMANDS)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from csrm.__main__ import main; main(['--help']); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *help_lines, modules = result.stdout.splitlines()
    assert "\n".join(help_lines) == help_text()
    assert {"numpy", "pandas", "pydantic", "pyspark", "torch", "yaml"}.isdisjoint(modules.split())


@pytest.mark.parametrize("argv", [["--help"], ["-h"], []])
def test_help_is_what_is_said_where_no_command_is_named(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    assert capsys.readouterr().out == f"{help_text()}\n"


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("score-catalogue", "Is it score-catalog?"),
        ("score_catalog", "Is it score-catalog?"),
        ("mantain", "Is it maintain?"),
        ("xyz", "csrm --help lists them."),
    ],
)
def test_an_unknown_command_names_the_near_miss(name: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    assert capsys.readouterr().err == f"error: csrm: there is no command {name!r}. {hint}\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_names_it(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["somewhere/csrm", name, "--help"])  # as a shell passes them
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert f"usage: csrm {name} [-h]" in capsys.readouterr().out


def test_the_help_of_a_job_still_names_the_job() -> None:
    command = [sys.executable, "jobs/generate_market.py", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: generate_market.py [-h] [--config CONFIG]")


def test_the_exit_code_of_a_command_is_that_of_csrm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bundle", "show", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_missing_configuration_file_names_the_way_to_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate-market"]) == 2
    error = capsys.readouterr().err
    assert "config 'conf/generate_market.yaml': cannot be read" in error
    assert "`csrm init conf`" in error


def test_passwords_in_uris_are_printed_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    place = "s3a://KEY:SECRET@bucket/catalog"

    def fail(_: object) -> int:
        logging.getLogger("csrm.any").warning("slow storage at %s", place)
        Console().say("plan", f"reads {place}")
        Console(as_json=True).say("plan", "", inputs={"catalog": place})
        raise InputError(f"input catalog at {place!r}: cannot be read")

    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        assert run_job(fail) == 2
    finally:
        root.handlers = handlers

    printed = capsys.readouterr()
    assert "SECRET" not in printed.out + printed.err
    assert (printed.out + printed.err).count("s3a://***@bucket/catalog") == 4
    for harmless in ("abfss://container@account.dfs.core.windows.net/tables", "schema:csrm?folder=s3://bucket/tokens"):
        assert without_credentials(harmless) == harmless
    signed = "https://bucket.s3.amazonaws.com/b?X-Amz-Credential=KEY&X-Amz-Signature=SECRET&X-Amz-Expires=60"
    assert without_credentials(signed) == (
        "https://bucket.s3.amazonaws.com/b?X-Amz-Credential=***&X-Amz-Signature=***&X-Amz-Expires=60"
    )
