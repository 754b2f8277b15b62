"""Build the retrieval table: the product titles that augment each query, from behaviour and else from its words."""

import sys

from csrm.cli import run_job
from csrm.commands.build_retrieval_table import main

if __name__ == "__main__":
    sys.exit(run_job(main))
