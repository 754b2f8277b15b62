"""The doctor under spark-submit, which looks at every executor of a cluster: see csrm/doctor.py."""

import sys

from csrm.cli import run_job
from csrm.doctor import main

if __name__ == "__main__":
    sys.exit(run_job(main))
