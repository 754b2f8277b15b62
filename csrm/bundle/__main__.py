"""python -m csrm.bundle: the same as `csrm bundle`."""

import sys

from csrm.cli import run_job
from csrm.commands.bundle import main

sys.exit(run_job(main))
