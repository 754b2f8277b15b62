"""Train a multilingual language model to judge relevance: translation, judgments of source markets, repaired labels."""

import sys

from csrm.cli import run_job
from csrm.commands.train import main

if __name__ == "__main__":
    sys.exit(run_job(main))
