"""Measure the published relevance scores against human grades, beside BM25, a random order and scores of your own."""

import sys

from csrm.cli import run_job
from csrm.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(run_job(main))
