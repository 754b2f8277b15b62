"""Make the demo's bundle: a tiny model, trained from Korean labels alone and exported by the real jobs."""

import sys

from csrm.cli import run_job
from csrm.commands.demo_bundle import main

if __name__ == "__main__":
    sys.exit(run_job(main))
