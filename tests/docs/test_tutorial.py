"""The tutorial, as a reader runs it: every command and every program, in the order of the page."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, read_page

BLOCKS = re.findall(r"^```(console|python|text)\n(.*?)^```", read_page("docs/tutorial.md"), re.DOTALL | re.MULTILINE)


def without_times(line: str) -> str:
    """A line without what differs from run to run: seconds, and scores in their last places."""
    return re.sub(r"about [\d,.]+ s|(?<=\d\.\d)\d+", "", line.strip())


@pytest.mark.long
@pytest.mark.spark
@pytest.mark.timeout(1800)
def test_every_block_of_the_tutorial_does_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    printed: list[str] = []
    for kind, block in BLOCKS:
        if kind == "console":
            printed = []
            for command in block.splitlines():
                program, *words = shlex.split(command)
                assert program == "csrm"
                ended = subprocess.run(
                    [sys.executable, "-m", "csrm", *words], env=environment, capture_output=True, text=True, check=False
                )
                assert ended.returncode == 0, ended.stderr
                printed += map(without_times, ended.stdout.splitlines())
        elif kind == "python":
            exec(block, {})
        else:
            missing = [line for line in map(without_times, block.splitlines()) if line not in printed]
            assert not missing, f"{missing} not in {printed}"
    assert [kind for kind, _ in BLOCKS].count("text") == 4
