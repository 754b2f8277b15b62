"""Make markets of a product taxonomy, in which queries are broad categories and products are of narrow ones."""

import sys

from csrm.cli import run_job
from csrm.commands.import_taxonomy import main

if __name__ == "__main__":
    sys.exit(run_job(main))
