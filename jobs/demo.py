"""Two nights on a generated market: retrieval table, candidates, scores, published table, evaluation, changes."""

import sys

from csrm.cli import run_job
from csrm.commands.demo import main

if __name__ == "__main__":
    sys.exit(run_job(main))
