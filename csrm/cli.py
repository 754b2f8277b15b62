"""What all jobs share on the command line: arguments, error messages, exit codes."""

import argparse
import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from csrm.errors import CsrmError

if TYPE_CHECKING:
    from csrm.config import SettingsT

Main = Callable[[Sequence[str] | None], int]
"""A command: from its arguments, None for those of the process, to its exit code."""


def job_parser(description: str | None, default_config: str) -> argparse.ArgumentParser:
    """Parser with the arguments that every job has: --config and --set."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--config", default=default_config, help="YAML file with the job's settings")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace one setting, dotted key; may be repeated",
    )
    parser.add_argument(
        "--show-config", action="store_true", help="print every setting with where it comes from, and do nothing"
    )
    return parser


def job_settings(
    args: argparse.Namespace, settings_class: "type[SettingsT]", overrides: Sequence[str] | None = None
) -> "SettingsT":
    """Settings of a job from its command line; with --show-config they are printed, and the process ends.

    Args:
        args: of a job_parser.
        settings_class: what the file must hold.
        overrides: see load_config; None: those of the command line.

    Raises:
        ConfigError: see load_config.
    """
    from csrm.config import load_config, resolved_settings  # the help of csrm needs neither pydantic nor yaml

    overrides = args.overrides if overrides is None else overrides
    config = load_config(args.config, settings_class, overrides)
    if args.show_config:
        for key, value, source in resolved_settings(config, args.config, overrides):
            print(without_credentials(f"{key}: {value}  # {source}"))
        raise SystemExit(0)
    return config


_SIGNATURE = re.compile(
    r"([?&](?:x-amz-|x-goog-)?(?:sig|signature|credential|security-token|token|password|secret)=)[^&\s'\"]+",
    re.IGNORECASE,
)
_USER_INFO = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^\s/@:]*:[^\s/@]*@")


def without_credentials(text: str) -> str:
    """A text without user, password and signature of any URI; whatever CSRM prints or records goes through it.

    >>> without_credentials("input catalog at 's3a://KEY:SECRET@bucket/catalog'")
    "input catalog at 's3a://***@bucket/catalog'"
    >>> without_credentials("bundle https://host/bundle.tar?sv=1&sig=SECRET&se=2")
    'bundle https://host/bundle.tar?sv=1&sig=***&se=2'
    """
    return _SIGNATURE.sub(r"\1***", _USER_INFO.sub(r"\1***@", text))


class _Log(logging.Formatter):
    """Log lines without credentials."""

    def format(self, record: logging.LogRecord) -> str:
        return without_credentials(super().format(record))


class Console:
    """What a job says on stdout: text for a person, or one JSON object a line for a machine."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json

    def say(self, event: str, text: str, **fields: object) -> None:
        """Say that something happened.

        Args:
            event: its name, for machines.
            text: for people; nothing is printed where it is empty.
            fields: for machines.
        """
        if self.as_json:
            line = json.dumps({"event": event, **fields}, default=str, ensure_ascii=False)
            print(without_credentials(line), flush=True)
        elif text:
            print(without_credentials(text), flush=True)


def add_log_format(parser: argparse.ArgumentParser) -> None:
    """The argument --log-format, for jobs that use Console."""
    parser.add_argument("--log-format", choices=("text", "json"), default="text", help="what is printed on stdout")


def setting_arguments(**values: object) -> list[str]:
    """Command-line words that replace settings of a job; for a job that runs other jobs."""
    return [word for name, value in values.items() for word in ("--set", f"{name}={json.dumps(value, default=str)}")]


def run_job(main: Main, argv: Sequence[str] | None = None) -> int:
    """Run a job's main function; a CsrmError becomes one message on stderr and its exit code.

    Exit codes: 0 done, 2 bad configuration or input, 3 audit rejected the run, 4 device missing, 5 another
    run holds the market, 128 and its number a signal that stopped it, 1 anything else (with the traceback).
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Log("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        return main(argv)
    except CsrmError as error:
        print(f"error: {without_credentials(str(error))}", file=sys.stderr)
        return error.exit_code
