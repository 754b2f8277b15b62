"""python -m csrm.capacity: the same as `csrm capacity`."""

import sys

from csrm.cli import run_job
from csrm.commands.capacity import main

sys.exit(run_job(main))
