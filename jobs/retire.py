"""Take a market that is scored no more out of relevance_scores."""

import sys

from csrm.cli import run_job
from csrm.commands.retire import main

if __name__ == "__main__":
    sys.exit(run_job(main))
