"""Publish a run that its audit had rejected, after a person reviewed it, or throw its scores away."""

import sys

from csrm.cli import run_job
from csrm.commands.publish import main

if __name__ == "__main__":
    sys.exit(run_job(main))
