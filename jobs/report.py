"""Write the page about one scoring run: its verdict, the audit, what changed, rejected pairs, the last runs."""

import sys

from csrm.cli import run_job
from csrm.commands.report import main

if __name__ == "__main__":
    sys.exit(run_job(main))
