"""Whether a night could run: `python -m csrm.doctor`."""

import sys

from csrm.cli import run_job
from csrm.commands.doctor import main

if __name__ == "__main__":
    sys.exit(run_job(main))
