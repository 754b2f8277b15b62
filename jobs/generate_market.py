"""Makes the input tables of invented markets as Parquet files, among them parallel text where languages differ."""

import sys

from csrm.cli import run_job
from csrm.commands.generate_market import main

if __name__ == "__main__":
    sys.exit(run_job(main))
