"""Export of a trained model at every CPU precision: table of size, speed and quality, seconds and memory of the whole.

    python tests/benchmarks/esci_real_input.py --data FOLDER/esci_us --gguf FOLDER/MODEL.gguf --until train
    python tests/benchmarks/export_precisions.py

Exports the model of esci_real_input.py at precision auto, with the gate on its dev pairs, then verifies the bundle in a
process of its own. Give both scripts the same --work, one for each model.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "esci_real_input", help="of the training")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    work = args.work.resolve()
    tables = ", ".join(f"{name}: {{path: {work}/inputs/{name}}}" for name in ("catalog", "queries", "judgments"))
    settings = {
        "markets": '{"us": "en"}',
        "inputs": f"{{{tables}, retrieval_table: {{path: {work}/tables/retrieval_table}}}}",
        "model_dir": work / "model",
        "bundle_dir": work / "bundle_auto",
    }
    overrides = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    start = time.monotonic()
    command = [sys.executable, "export/export_bundle.py", "--precision", "auto", "--device", "cpu", *overrides]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    seconds = time.monotonic() - start
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"{seconds:.0f} s with all gates, at most {memory:.1f} GB of memory", flush=True)
    verify = [sys.executable, "-m", "csrm.bundle", "verify", str(work / "bundle_auto")]
    lines = subprocess.run(verify, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.splitlines()
    print(lines[-1])


if __name__ == "__main__":
    main()
