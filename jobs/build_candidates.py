"""Build the candidates, the pairs to score: every product of the catalog is in one or is listed as uncovered."""

import sys

from csrm.cli import run_job
from csrm.commands.build_candidates import main

if __name__ == "__main__":
    sys.exit(run_job(main))
