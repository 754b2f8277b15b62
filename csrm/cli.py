"""What all jobs share on the command line: arguments, error messages, exit codes."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence

from csrm.errors import CsrmError


def job_parser(description: str, default_config: str) -> argparse.ArgumentParser:
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
    return parser


def setting_arguments(**values: object) -> list[str]:
    """Command-line words that replace settings of a job; for a job that runs other jobs."""
    return [word for name, value in values.items() for word in ("--set", f"{name}={json.dumps(value, default=str)}")]


def run_job(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Run a job's main function; a CsrmError becomes one message on stderr and its exit code.

    Exit codes: 0 done, 2 bad configuration or input, 3 audit rejected the run, 4 device missing, 1 anything else
    (with the traceback).
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return main(argv)
    except CsrmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
