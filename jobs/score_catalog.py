"""Score the candidate pairs whose prompt changed, and publish what changed."""

import sys

from csrm.cli import run_job
from csrm.commands.score_catalog import main

if __name__ == "__main__":
    sys.exit(run_job(main))
