"""Write the page about a query: its products with their scores, and why one of them has its score."""

import sys

from csrm.cli import run_job
from csrm.commands.explain import main

if __name__ == "__main__":
    sys.exit(run_job(main))
