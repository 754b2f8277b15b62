"""Care for the tables after a night: lay published rows out by query, delete rows of old runs, remove old files."""

import sys

from csrm.cli import run_job
from csrm.commands.maintain import main

if __name__ == "__main__":
    sys.exit(run_job(main))
