"""Bring the tables that an older CSRM wrote to this version's columns. New columns are null in old rows."""

import sys

from csrm.cli import run_job
from csrm.commands.migrate import main

if __name__ == "__main__":
    sys.exit(run_job(main))
