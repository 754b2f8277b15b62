"""Export a text encoder for ONNX Runtime, after proof that it gives the model's vectors."""

import sys

from csrm.cli import run_job
from csrm.commands.export_encoder import main

if __name__ == "__main__":
    sys.exit(run_job(main))
