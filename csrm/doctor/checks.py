"""A check of the doctor: what was looked at, and what came of it."""

from collections.abc import Callable
from typing import NamedTuple

from csrm.errors import CsrmError, ScoringError

_LONGEST_TEXT = 1_000


class CheckWarning(Exception):
    """What a night can run with, but somebody should look at."""


class Check(NamedTuple):
    """What was looked at, and what came of it."""

    name: str
    verdict: str
    """ok, warning or FAILED."""
    text: str
    exit_code: int = 0
    """Not 0 where it failed."""


def checked(name: str, look: Callable[..., str], *arguments: object) -> Check:
    """Look at one thing.

    Args:
        look: returns what it found, or raises a CheckWarning, or the error that a night would end with.
    """
    try:
        return Check(name, "ok", _one_line(look(*arguments)))
    except CheckWarning as doubt:
        return Check(name, "warning", _one_line(str(doubt)))
    except CsrmError as error:
        return failed(name, error)
    except Exception as error:  # whatever it is, the other checks go on
        return Check(name, "FAILED", _one_line(f"{type(error).__name__}: {error}"), ScoringError.exit_code)


def failed(name: str, error: CsrmError) -> Check:
    """The check of something that a night could not run with."""
    return Check(name, "FAILED", _one_line(str(error)), error.exit_code)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_TEXT else f"{line[:_LONGEST_TEXT]}..."
