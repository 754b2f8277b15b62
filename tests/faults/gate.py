"""A command that stands still where it makes a file, so that a test can kill it, or do something, at that moment.

Hadoop sets the mode of each new file with the chmod of the PATH, so that one that waits holds its writer up.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.cluster import PATIENCE_S, ROOT, Finished, clean_environment, wait_for

_CHMOD = """#!/bin/sh
case "$2" in
  {pattern}) touch "{folder}/reached"; while [ ! -e "{folder}/opened" ]; do sleep 0.05; done ;;
esac
exec {chmod} "$@"
"""


def commit_file(table: str, version: int) -> str:
    """Pattern of the file that becomes the commit of a version: what the version needs is written, and is not there."""
    return f"*/{table}/_delta_log/.{version:020}.json.*"


def checksum_file(table: str, version: int) -> str:
    """Pattern of the file that Delta writes as soon as a version was committed."""
    return f"*/{table}/_delta_log/.{version:020}.crc.*"


class Held:
    """A command that stands still as soon as it makes a file."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, folder: Path) -> None:
        self._process, self._log, self._folder = process, log, folder

    def wait(self) -> None:
        """Wait until it stands still."""

        def reached() -> bool:
            assert self._process.poll() is None, self._log.read_text(errors="replace")
            return (self._folder / "reached").exists()

        wait_for(reached, f"a file that {self._process.args!r} makes")

    def release(self) -> Finished:
        """Let it go on, and wait for its end."""
        (self._folder / "opened").touch()
        code = self._process.wait(PATIENCE_S)
        return Finished(code, self._log.read_text(errors="replace"))

    def kill(self) -> None:
        """SIGKILL for it, its JVM and what else it has started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def held(folder: Path, pattern: str, *arguments: str) -> Iterator[Held]:
    """A command of csrm that stands still where it makes a file, and is killed where it is left running.

    Args:
        folder: an existing one, for what the gate needs.
        pattern: of the file's path, as a shell's `case` takes it.
        arguments: of csrm.
    """
    place = folder / f"gate-{len(list(folder.glob('gate-*')))}"
    place.mkdir()
    chmod = place / "chmod"
    chmod.write_text(_CHMOD.format(pattern=pattern, folder=place, chmod=shutil.which("chmod")))
    chmod.chmod(0o755)
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT), "PYSPARK_PYTHON": sys.executable}
    environment["PATH"] = f"{place}{os.pathsep}{environment['PATH']}"
    command, log = [sys.executable, "-m", "csrm", *arguments], place / "output.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    held_command = Held(process, log, place)
    try:
        yield held_command
    finally:
        held_command.kill()
