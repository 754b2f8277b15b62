"""Pairs a second of CSRM against what a user would otherwise run: CrossEncoder, and an ONNX model in predict_batch_udf.

    make bench                                                        # a seeded model, text of the generated market
    make bench BENCH_ARGS="--gemma FOLDER_OF_A_TRAINED_MODEL --data FOLDER_OF_REAL_TEXT"
    python tests/benchmarks/speed.py --list                           # what is done; --report writes the tables again

The same weights, pairs and cores for all. A cell is a model with a workload: in it each contender is a process that
stays alive and scores the workload in turn with the others, once to warm up and be checked, then `--repeats` times. A
ratio is the median over the turns, with the smallest and the largest. A finished cell is kept in the work folder: an
interrupted benchmark goes on where it stopped. It is measured again when the settings or the code under test change.

Workloads: five retrieved titles in each prefix; 12 products a query in English, Korean and Chinese of Taiwan; 100
products a query; one product a query, where there is nothing to share; and with --spark 12 products in Spark. A seeded
model has a trained vocabulary's size, of which it uses only the rows of its tokenizer.

Scores are checked in every turn. Those of float32 must be within the fp32 bundle's tolerance of the first contender's,
each of them. A bundle of 8 or 4 bits is proven by its own golden pairs, within its own tolerance, when it is loaded;
the mean difference of its scores must be within that tolerance too, and they must correlate with the first contender's.
Otherwise the cell is void, and so is the run. What 8 and 4 bits do to the ranking is for the export's quality gate to
say (export_precisions.py): a seeded model has no quality to lose.

The physical limit is the rate of the fastest float32 matrix product on the same threads, measured in turn with the
contenders. A contender's share is that of the products with the layers' weights, for each token that it had to compute:
padding and attention are not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from speed_contenders import LOADERS, MATMUL
from speed_inputs import PAIRS, REPOSITORY, SEEDED_MODELS, WORKLOADS, code_digest
from speed_report import write_report

from csrm.artefacts.manifest import MANIFEST_NAME, file_digest
from csrm.scoring.runtime import cpu_features

HERE = Path(__file__).parent
SPARK_CONTENDERS = ("ours-fp32", "spark-udf", "spark-ours")
PACKAGES = ("torch", "onnxruntime", "transformers", "sentence-transformers", "optimum-onnx", "tokenizers", "pyspark")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
"""Of the processor, on which the speed of some precision depends."""
CODE = ("csrm/**/*.py", "tests/benchmarks/speed.py", "tests/benchmarks/speed_[ci]*.py")
MIN_SPREAD = 10
"""Least standard deviation of the scores, in tolerances: where all scores are alike, agreement says nothing."""

MIN_CORRELATION = 0.5
"""Of the scores of 8 and 4 bits with those of float32. Those of other pairs have about 0."""


class VoidError(Exception):
    """Scores that should agree do not."""


class Process:
    """A contender that was started and has loaded its model."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        self._name, self._log_path = name, folder / f"{name}.log"
        command = [sys.executable, str(HERE / "speed_contenders.py"), name, str(folder), "--threads", str(threads)]
        with self._log_path.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=REPOSITORY
            )
        self._answer()

    def ask(self, **order: str) -> dict[str, Any]:
        assert self._process.stdin
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self._log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-10:])
            raise SystemExit(f"{self._name} ended without an answer; the end of {self._log_path}:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def check_scores(scores: Mapping[str, np.ndarray], tolerances: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Differences of each contender's scores from those of the first one, which is of float32.

    Args:
        scores: of the same pairs in the same order, shape (num_pairs,).
        tolerances: of the bundles, by precision.

    Returns:
        The largest and the mean difference of each, and the correlation.

    Raises:
        VoidError: a score is missing, they differ by more than they may, or they are all alike.
    """
    first, reference = next(iter(scores.items()))
    exact, spread = tolerances["fp32"], float(np.std(reference))
    if not spread >= MIN_SPREAD * exact:
        raise VoidError(f"standard deviation of the scores is {spread:.1e}, expected {MIN_SPREAD * exact:.0e}")
    found = {}
    for name, values in scores.items():
        difference = np.abs(values - reference)
        found[name] = {
            "largest_difference": float(difference.max()),
            "mean_difference": float(difference.mean()),
            "correlation": float(np.corrcoef(values, reference)[0, 1]),
        }
        precision = name.rpartition("-")[2]
        kind, allowed = ("mean", tolerances[precision]) if is_quantised(name) else ("largest", exact)
        if not found[name][f"{kind}_difference"] <= allowed:
            raise VoidError(
                f"{name}: {kind} difference from {first} is {found[name][f'{kind}_difference']:.1e}, "
                f"allowed {allowed:.0e}"
            )
        if not found[name]["correlation"] >= MIN_CORRELATION:
            raise VoidError(
                f"{name}: correlation with {first} is {found[name]['correlation']:.2f}, expected {MIN_CORRELATION}"
            )
    return found


def is_quantised(name: str) -> bool:
    return name.endswith(("-int8", "-int4"))


def measure_cell(
    folder: Path, workload: str, processes: Mapping[str, Process], repeats: int, tolerances: Mapping[str, float]
) -> dict[str, Any]:
    """Seconds of each contender in each turn, all else that is known of them, and the rates of the machine.

    Args:
        folder: of the model.
        processes: contenders, the one that the others are compared with first; and MATMUL.

    Raises:
        VoidError: see check_scores.
    """
    names = [name for name in processes if name != MATMUL]
    contenders: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in names}
    rates: dict[str, list[float]] = {}
    for turn in range(repeats + 1):
        scores: dict[str, np.ndarray] = {}
        start = turn % len(names)
        for name in [*names[start:], *names[:start]]:
            scores_path = folder / f"scores_{name}.npy"
            answer = processes[name].ask(
                workload=str(folder / "workloads" / f"{workload}.pkl"), scores=str(scores_path)
            )
            scores[name] = np.load(scores_path)
            contenders[name]["num_tokens"] = answer["num_tokens"]
            if turn:
                contenders[name]["seconds"].append(answer["seconds"])
        for name, differences in check_scores({name: scores[name] for name in names}, tolerances).items():
            contenders[name] |= differences
        if turn:
            for precision, rate in processes[MATMUL].ask().items():
                rates.setdefault(precision, []).append(rate)
        seconds = (f"{name} {contenders[name]['seconds'][-1]:.2f} s" for name in names if turn)
        print(f"  turn {turn}: {', '.join(seconds) or 'scores agree'}", flush=True)
    return {"num_pairs": len(scores[names[0]]), "contenders": contenders, "matmul": rates}


def machine(threads: int) -> dict[str, Any]:
    """What measured, for the header."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    described = ["git", "describe", "--always", "--dirty"]
    git = subprocess.run(described, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return {
        "processor": names[0] if names else "unknown",
        "instructions": list(cpu_features(names=INSTRUCTIONS)),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load_average": os.getloadavg()[0],
        "python": sys.version.split()[0],
        "versions": versions,
        "commit": git.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def prepare(model: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What speed_inputs.py says of the model, after it made what is missing."""
    source = str(args.gemma.resolve()) if model == "gemma" else model
    command = [sys.executable, str(HERE / "speed_inputs.py"), str(folder), "--model", source]
    command += ["--pairs", str(num_pairs(model, args))]
    for name in ("data", "tokenizer"):
        if getattr(args, name):
            command += [f"--{name}", str(getattr(args, name).resolve())]
    folder.parent.mkdir(parents=True, exist_ok=True)
    log_path = folder.with_suffix(".log")
    print(f"{model}: its graphs and pairs (what is done now: {log_path})", flush=True)
    with log_path.open("w") as log:
        if subprocess.run(command, stdout=log, stderr=log, cwd=REPOSITORY, check=False).returncode:
            tail = "\n".join(log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-10:])
            raise SystemExit(f"{model} could not be prepared:\n{tail}")
    about: dict[str, Any] = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    return about


def num_pairs(model: str, args: argparse.Namespace) -> int:
    return round(PAIRS[model] * args.scale)


def cell_settings(model: str, contenders: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """What a kept cell must have been measured with."""
    return {
        "pairs": num_pairs(model, args),
        "threads": args.threads,
        "repeats": args.repeats,
        "contenders": list(contenders),
        "text": f"folder {args.data.resolve().name}" if args.data else "generated market",
        "tokenizer": file_digest(args.tokenizer) if args.tokenizer else None,
        "source": file_digest(args.gemma / MANIFEST_NAME) if model == "gemma" else "seeded",
        "code": code_digest(*CODE),
    }


def chosen_contenders(workload: str, args: argparse.Namespace) -> list[str]:
    """Contenders of a workload; the others are compared with the first."""
    in_spark = WORKLOADS[workload].in_spark
    names = SPARK_CONTENDERS if in_spark else [name for name in LOADERS if not name.startswith("spark-")]
    return [name for name in names if name in args.contenders]


def read_cell(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def cell_state(cell: dict[str, Any] | None, settings: dict[str, Any]) -> str:
    """done, or why it is to be measured."""
    if cell is None:
        return "missing"
    if cell["settings"] != settings:
        changed = [name for name, value in settings.items() if cell["settings"].get(name) != value]
        return f"measured with another {', '.join(changed)}"
    return f"void: {cell['void']}" if cell["void"] else "done"


def measure_model(model: str, workloads: Sequence[str], args: argparse.Namespace) -> None:
    """Measure and keep the cells of one model. Its processes end with it."""
    folder = args.work / model
    about = prepare(model, folder, args)
    processes: dict[str, Process] = {}
    try:
        for workload in workloads:
            names = chosen_contenders(workload, args)
            print(f"{model}/{workload}: {', '.join(names)}", flush=True)
            cell: dict[str, Any] = {
                "model": model,
                "about": about,
                "workload": workload,
                "settings": cell_settings(model, names, args),
                "machine": machine(args.threads),
                "void": None,
            }
            for name in (*names, MATMUL):
                if name not in processes:
                    processes[name] = Process(name, folder, args.threads)
            in_cell = {name: processes[name] for name in (*names, MATMUL)}
            try:
                cell |= measure_cell(folder, workload, in_cell, args.repeats, about["tolerances"])
            except VoidError as error:
                cell["void"] = str(error)
                print(f"  void: {error}", flush=True)
            path = cell_path(model, workload, args)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(cell, indent=2) + "\n", encoding="utf-8")
    finally:
        for process in processes.values():
            process.close()


def cell_path(model: str, workload: str, args: argparse.Namespace) -> Path:
    path: Path = args.work / "cells" / f"{model}_{workload}.json"
    return path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    parser.add_argument("--models", nargs="+", choices=list(SEEDED_MODELS), default=["qwen3"], help="seeded models")
    parser.add_argument("--gemma", type=Path, help="folder that jobs/train.py made of Gemma-3-270M, for a model gemma")
    parser.add_argument("--data", type=Path, help="folder of real text (speed_inputs.py); else of the generated market")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json of the seeded models; else the demo's")
    parser.add_argument("--spark", action="store_true", help="with the workload in Spark")
    parser.add_argument("--cells", nargs="+", default=["*"], help='only these, for example "qwen3/12-*"')
    parser.add_argument("--contenders", nargs="+", choices=list(LOADERS), default=list(LOADERS), help="only these")
    parser.add_argument("--threads", type=int, default=len(cores), help="cores that everything may use")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the number of pairs")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "speed", help="what is kept")
    parser.add_argument("--output", type=Path, default=HERE, help="for speed.json, speed.md and speed.png")
    parser.add_argument("--list", action="store_true", help="show the cells and end")
    parser.add_argument("--report", action="store_true", help="measure nothing; report the cells that are kept")
    args = parser.parse_args()
    if args.threads > len(cores):
        parser.error(f"--threads {args.threads}: this process may use {len(cores)} cores")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores[: args.threads])
    args.work = args.work.resolve()
    return args


def main() -> int:
    args = parse_args()
    os.environ |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    models = [*args.models, *(["gemma"] if args.gemma else [])]
    cells = [
        (model, workload)
        for model in models
        for workload in WORKLOADS
        if (args.spark or not WORKLOADS[workload].in_spark)
        and any(fnmatch(f"{model}/{workload}", pattern) for pattern in args.cells)
        and chosen_contenders(workload, args)
    ]
    if wrong := [cell for cell in cells if is_quantised(chosen_contenders(cell[1], args)[0])]:
        raise SystemExit(f"{wrong[0]}: expected a contender of float32, with which the others are compared")
    states = {
        (model, workload): cell_state(
            read_cell(cell_path(model, workload, args)),
            cell_settings(model, chosen_contenders(workload, args), args),
        )
        for model, workload in cells
    }
    if args.list:
        for (model, workload), state in states.items():
            print(f"{model}/{workload}: {state}")
        return 0
    if not args.report:
        for model in models:
            workloads = [workload for name, workload in cells if name == model and states[name, workload] != "done"]
            if workloads:
                measure_model(model, workloads, args)
    kept = [cell for model, workload in cells if (cell := read_cell(cell_path(model, workload, args)))]
    if not kept:
        raise SystemExit(f"{args.work}: no cell was measured yet")
    write_report(kept, args.output)
    voids = [f"{cell['model']}/{cell['workload']}: {cell['void']}" for cell in kept if cell["void"]]
    print("\n".join(["", *(f"void: {void}" for void in voids), f"wrote {args.output / 'speed.md'}"]))
    return 1 if voids else 0


if __name__ == "__main__":
    sys.exit(main())
