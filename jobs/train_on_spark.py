"""Run jobs/train.py on the executors of a Spark cluster, one process for each, as one training."""

import sys

from csrm.cli import run_job
from csrm.commands.train_on_spark import main

if __name__ == "__main__":
    sys.exit(run_job(main))
