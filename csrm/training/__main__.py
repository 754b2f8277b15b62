"""python -m csrm.training: the same as `csrm train`; what a launcher of several processes starts."""

import sys

from csrm.cli import run_job
from csrm.commands.train import main

if __name__ == "__main__":
    sys.exit(run_job(main))
