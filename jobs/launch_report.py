"""Write the page about a market that is to be opened: which queries find no good product, which products no query."""

import sys

from csrm.cli import run_job
from csrm.commands.launch_report import main

if __name__ == "__main__":
    sys.exit(run_job(main))
