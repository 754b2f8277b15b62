"""Compare two tables of scores on the same pairs, query by query: two bundles or two nights, before a switch."""

import sys

from csrm.cli import run_job
from csrm.commands.compare import main

if __name__ == "__main__":
    sys.exit(run_job(main))
