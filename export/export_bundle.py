"""Export a trained model to a bundle for ONNX Runtime, after proof that it scores as the model does."""

import sys

from csrm.cli import run_job
from csrm.commands.export_bundle import main

if __name__ == "__main__":
    sys.exit(run_job(main))
