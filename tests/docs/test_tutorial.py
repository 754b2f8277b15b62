"""The tutorials, as a reader runs them: every command and every program, in the order of the page."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, read_page

REAL_FILES = {"esci_us": "--esci", "smollm2.gguf": "--base-model", "multilingual-e5-small": "--encoder-model"}
"""What the tutorial with real labels calls a downloaded file or folder, and the option that says where it is."""


def without_times(line: str) -> str:
    """A line without what differs from run to run: seconds, and scores in their last places."""
    return re.sub(r"about [\d,.]+ s|(?<=\d\.\d)\d+", "", line.strip())


def without_numbers(line: str) -> str:
    """A line without all that another machine, or a longer training, does otherwise."""
    return re.sub(r"\s+", " ", re.sub(r"[\d,.:]*\d|\b[0-9a-f]{12}\b", "#", line.strip()))


def run_page(page: str, compared: Callable[[str], str]) -> list[str]:
    """Run a page's blocks in the working directory; returns their kinds.

    Args:
        page: of the repository.
        compared: what of a line must be among those that the commands before it printed.
    """
    blocks = re.findall(r"^```(console|python|text)\n(.*?)^```", read_page(page), re.DOTALL | re.MULTILINE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    printed: list[str] = []
    for kind, block in blocks:
        if kind == "console":
            printed = []
            for command in block.replace("\\\n", " ").splitlines():
                program, *words = shlex.split(command)
                assert program == "csrm"
                ended = subprocess.run(
                    [sys.executable, "-m", "csrm", *words], env=environment, capture_output=True, text=True, check=False
                )
                assert ended.returncode == 0, ended.stderr
                printed += map(compared, ended.stdout.splitlines())
        elif kind == "python":
            exec(block, {})
        else:
            missing = [line for line in map(compared, block.splitlines()) if line not in printed]
            assert not missing, f"{missing} not in {printed}"
    return [kind for kind, _ in blocks]


@pytest.mark.long
@pytest.mark.spark
@pytest.mark.timeout(1800)
def test_every_block_of_the_tutorial_does_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_page("docs/tutorial.md", without_times).count("text") == 4


@pytest.mark.long
@pytest.mark.spark
@pytest.mark.timeout(7200)
def test_every_block_of_the_tutorial_with_real_labels_does_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, option in REAL_FILES.items():
        path = pytestconfig.getoption(option)
        if path is None:
            pytest.skip(f"expected {option} PATH: {name} is no part of the repository")
        Path(name).symlink_to(Path(path).resolve())
    assert run_page("docs/real-labels.md", without_numbers).count("text") > 2
