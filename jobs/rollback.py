"""Bring one market of relevance_scores back to the state right after a run published it."""

import sys

from csrm.cli import run_job
from csrm.commands.rollback import main

if __name__ == "__main__":
    sys.exit(run_job(main))
