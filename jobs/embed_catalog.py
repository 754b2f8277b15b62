"""Embed the titles of the catalog and the queries; only texts that have no vector of this encoder yet."""

import sys

from csrm.cli import run_job
from csrm.commands.embed_catalog import main

if __name__ == "__main__":
    sys.exit(run_job(main))
