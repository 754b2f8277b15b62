"""Errors that a user can act on, each with the exit code that a job returns for it.

A message says where, what was expected, what was found, and the way out.
"""


class CsrmError(Exception):
    """Base of every error that CSRM raises on purpose.

    >>> from csrm import CsrmError, load_bundle
    >>> try:
    ...     load_bundle("nowhere")
    ... except CsrmError as error:
    ...     print(type(error).__name__, error.exit_code)
    BundleError 2
    """

    exit_code = 1


class ConfigError(CsrmError):
    """A configuration file, an argument or an environment is unusable."""

    exit_code = 2


class InputError(CsrmError):
    """An input table or file does not have the columns, types, keys or values that it must have."""

    exit_code = 2


class BundleError(CsrmError):
    """A bundle is incomplete, was changed after its export, or does not fit this version."""

    exit_code = 2


class ParityError(CsrmError):
    """Two forms of one model give different scores."""


class AuditError(CsrmError):
    """A finished run did not pass its audit; nothing was published and its staged scores are kept."""

    exit_code = 3


class DeviceError(CsrmError):
    """The device that was asked for cannot run the model."""

    exit_code = 4


class ScoringError(CsrmError):
    """Spark gave up, for example after a task failed on every attempt; what was staged is kept."""


class LeaseError(CsrmError):
    """Another run works on the market, or has taken it over."""

    exit_code = 5


class StoppedError(CsrmError):
    """A signal stopped the work, and what was done is kept. Its exit code is 128 and the signal's number."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class MissingDependencyError(CsrmError):
    """A package of an optional extra is not installed."""

    exit_code = 2
