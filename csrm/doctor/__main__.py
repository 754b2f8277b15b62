"""python -m csrm.doctor: the same as `csrm doctor`."""

import sys

from csrm.cli import run_job
from csrm.commands.doctor import main

sys.exit(run_job(main))
