"""Import the ESCI files (products, and examples with labels) as catalog, queries, candidates and judgments tables."""

import sys

from csrm.cli import run_job
from csrm.commands.import_esci import main

if __name__ == "__main__":
    sys.exit(run_job(main))
