"""The tutorial, as a reader runs it: every command and every program, in the order of the page."""

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from csrm.__main__ import main
from tests.docs.pages import read_page

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

BLOCKS = re.findall(r"^```(console|python|text)\n(.*?)^```", read_page("docs/tutorial.md"), re.DOTALL | re.MULTILINE)


def without_times(line: str) -> str:
    """A line without what differs from run to run: seconds, and scores in their last places."""
    return re.sub(r"about [\d,.]+ s|(?<=\d\.\d)\d+", "", line.strip())


@pytest.mark.long
@pytest.mark.spark
@pytest.mark.timeout(1800)
def test_every_block_of_the_tutorial_does_what_it_shows(
    spark: "SparkSession", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    printed: list[str] = []
    for kind, block in BLOCKS:
        if kind == "console":
            capsys.readouterr()
            for command in block.splitlines():
                program, *words = shlex.split(command)
                assert program == "csrm"
                assert main(words) == 0, command
            printed = [without_times(line) for line in capsys.readouterr().out.splitlines()]
        elif kind == "python":
            exec(block, {})
        else:
            assert [line for line in map(without_times, block.splitlines()) if line not in printed] == []
    assert [kind for kind, _ in BLOCKS].count("text") == 4
