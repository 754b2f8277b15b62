"""What a pair costs as a night grows, and where it goes: the real job on nights of the same queries with more products.

    python tests/benchmarks/night_cost.py                  # 100 k, 300 k and 1 M pairs with both bundles: about an hour
    python tests/benchmarks/night_cost.py --bundles none   # the same without the model: some minutes
    python tests/benchmarks/night_cost.py --report         # measures nothing; the tables of what is kept

A cell is a bundle with a size: a first night in empty tables, a process of its own whose seconds begin with its start,
and all of whose pairs are one chunk. Its inputs are those of nights.py. A finished cell is kept in the work folder, and
measured again when the settings or the code under test change.

The bundle `demo` is conf/demo_bundle. The bundle `none` is the same but for its graph, which multiplies the length of a
prompt by a constant: what its nights cost is everything but the model, measured and not a difference of two large
numbers. The share of PairScorer in it (prompts, tokens, packs, the call of the graph) is that of the same pairs without
Spark, in as many processes as there are cores.

A marginal cost is that of the pairs which one night has more than another. Memory is sampled twice a second: resident
memory of the JVM, which here is driver and executor, of the driver's Python and of the largest Python worker; and, from
the JVM's own log, how little of its heap was in use after a collection. Bytes that were shuffled are those of Spark's
event log.

The last table compares csrm.capacity with what was measured: a night of the middle size tells it what a run can tell,
and it foretells the smallest and the largest. Its constants are printed as these nights give them.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
from nights import MARKET, Nights
from nights import STAGES as NIGHT_STAGES
from speed import machine
from speed_inputs import REPOSITORY, code_digest
from speed_report import markdown

from csrm.artefacts.manifest import GOLDEN_NAME, MODEL_NAME, TOKENIZER_NAME, write_manifest
from csrm.bundle.contents import BUNDLE_KIND, Origin
from csrm.bundle.golden import GoldenPairs
from csrm.bundle.loading import Bundle, default_tokens_per_call, load_bundle
from csrm.capacity.figures import Run, bundle_figures, read_run, with_run
from csrm.capacity.formula import PHASES, TABLE_BYTES, Machines, PhaseCost, Plan
from csrm.scoring.packing import Pack
from csrm.scoring.runtime import load_pack_scorer
from csrm.scoring.scorer import PAIR_COLUMNS, PairScorer

DEMO_BUNDLE = REPOSITORY / "conf" / "demo_bundle"
BUNDLES = ("none", "demo")
BARE_PAIRS = 10_000
"""Pairs that are scored without Spark, as whole queries; fewer where there are fewer."""
PAIRS_PER_CALL = 1_024
CHUNK_MINUTES = 120.0
SAMPLE_SECONDS = 0.5
CODE = ("csrm/**/*.py", "tests/benchmarks/night*.py")
MOST_GROWTH = 1.1
"""Target: marginal cost between the second and the third size, by that between the first and the second."""
MOST_MICROSECONDS = 60
"""Target: of a core, for a pair, for everything but the model."""
SAME_SIZE = 0.2
"""Target: how far csrm.capacity may be from what was measured."""

Cell = dict[str, Any]


def write_bundle_without_model(source: Bundle, folder: Path) -> None:
    """A bundle like another one, whose graph multiplies the place of a pair's last token by a constant."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    settings = source.settings
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, list(spec.shape))
        for name, spec in settings.inputs.items()
    ]
    (output,) = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, list(spec.shape))
        for name, spec in settings.outputs.items()
    )
    factors = 0.01 * np.arange(len(settings.labels), dtype=np.float32)
    constants = [numpy_helper.from_array(factors, "factors"), numpy_helper.from_array(np.array([1]), "axis")]
    nodes = [
        helper.make_node("Gather", ["position_ids", "last_index"], ["place"]),
        helper.make_node("Cast", ["place"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["number", "axis"], ["column"]),
        helper.make_node("Mul", ["column", "factors"], [output.name]),
    ]
    graph = helper.make_graph(nodes, "none", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    folder.mkdir(parents=True)
    onnx.save(model, folder / MODEL_NAME)
    shutil.copyfile(source.folder / TOKENIZER_NAME, folder / TOKENIZER_NAME)
    pack_scorer, _ = load_pack_scorer(folder / MODEL_NAME, "cpu")
    scorer = PairScorer(
        source.prompt_tokenizer(),
        settings.labels,
        pack_scorer=pack_scorer,
        tokens_per_call=default_tokens_per_call("cpu"),
    )
    golden = source.golden_pairs()
    scores = scorer.score(golden.pairs)["relevance_score"].to_numpy(dtype=np.float64)
    GoldenPairs("the graph itself", golden.pairs, golden.prompt_ids, scores).write(folder / GOLDEN_NAME)
    about = settings.model_copy(update={"origin": Origin(base_model="none", base_model_files={})})
    write_manifest(folder, BUNDLE_KIND, about.model_dump(mode="json"))


def measure_cell(name: str, num_pairs: int, args: argparse.Namespace) -> Cell:
    """One night, and its pairs without Spark."""
    folder = args.work / "bundle_none" if name == "none" else DEMO_BUNDLE
    if name == "none":
        shutil.rmtree(folder, ignore_errors=True)
        write_bundle_without_model(load_bundle(DEMO_BUNDLE), folder)
    cell: Cell = {"bundle": name, "settings": cell_settings(args), "machine": machine(args.cores)}
    with tempfile.TemporaryDirectory(prefix="csrm-night-cost-") as place:
        about = argparse.Namespace(**vars(args), bundle=folder, chunk_minutes=CHUNK_MINUTES)
        about.products_per_query = num_pairs // args.queries
        nights = Nights(Path(place), about)
        cell |= measure_night(nights, Path(place))
        sample = bare_pairs(nights, -(-BARE_PAIRS // about.products_per_query))
        cell["bare_us"] = bare_microseconds(sample, folder, args.cores)
    return cell


def measure_night(nights: Nights, folder: Path) -> Cell:
    """A first night: seconds, and all that its process, its tables and its logs tell."""
    (folder / "events").mkdir()
    settings = {
        "spark.eventLog.enabled": "true",
        "spark.eventLog.dir": (folder / "events").as_uri(),
        "spark.eventLog.rolling.enabled": "false",
        "spark.eventLog.compress": "false",
    }
    words = " ".join(f"--conf {key}={value}" for key, value in settings.items())
    environment = os.environ | {
        "PYSPARK_SUBMIT_ARGS": f"{words} pyspark-shell",
        "JAVA_TOOL_OPTIONS": f"-Xlog:gc:file={folder}/gc-%p.log",
    }
    start = time.monotonic()
    process = psutil.Popen(nights.command("1", "tables"), stdout=sys.stderr, env=environment)
    samples, exit_code = [], None
    while exit_code is None:
        samples.append(memory_sample(process))
        try:
            exit_code = process.wait(SAMPLE_SECONDS)
        except psutil.TimeoutExpired:
            continue
    seconds = time.monotonic() - start
    if exit_code:
        raise SystemExit(f"the night ended with exit code {exit_code}")
    (row,) = nights.table("tables", "scoring_runs").to_pyarrow_table().to_pylist()
    windows = stage_windows(row)
    stages = {stage: end - begin for stage, (begin, end) in windows.items() if stage in PHASES}
    return {
        "pairs": row["num_scored"],
        "seconds": seconds,
        "stages": {"start": seconds - sum(stages.values()), **stages},
        "run": asdict(read_run(str(nights.folder / "tables"), "1")),
        "num_files": {name: len(nights.table("tables", name).file_uris()) for name in TABLE_BYTES},
        "memory": memory_summary(samples, windows["scoring"]) | {"heap": heap_in_use(folder)},
        "tasks": task_totals(folder / "events", windows),
    }


def stage_windows(row: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """When each stage of a run began and ended, in seconds since 1970, from its row of scoring_runs."""
    seconds, end = dict(row["seconds"]), row["finished_at"].timestamp()
    windows = {}
    for stage in reversed(NIGHT_STAGES):
        windows[stage] = (end - seconds[stage], end)
        end -= seconds[stage]
    return dict(reversed(windows.items()))


def memory_sample(process: psutil.Process) -> dict[str, Any]:
    """Resident bytes of a job's processes now."""
    sample: dict[str, Any] = {"time": time.time(), "jvm": 0, "driver": 0, "workers": []}
    try:
        sample["driver"] = process.memory_info().rss
        for child in process.children(recursive=True):
            name, rss = child.name(), child.memory_info().rss
            if name == "java":
                sample["jvm"] += rss
            elif name.startswith("python"):
                sample["workers"].append(rss)
    except psutil.NoSuchProcess:
        pass  # it ended while it was looked at
    return sample


def memory_summary(samples: Sequence[Mapping[str, Any]], scoring: tuple[float, float]) -> dict[str, float]:
    """Peaks in bytes; of the largest worker also the medians over the first and the last third of the scoring."""
    in_scoring = [
        max(sample["workers"]) for sample in samples if scoring[0] <= sample["time"] <= scoring[1] and sample["workers"]
    ]
    third = max(1, len(in_scoring) // 3)
    return {
        "jvm": max(sample["jvm"] for sample in samples),
        "driver": max(sample["driver"] for sample in samples),
        "workers": max(sum(sample["workers"]) for sample in samples),
        "worker": max(in_scoring, default=0),
        "worker_first": statistics.median(in_scoring[:third]) if in_scoring else 0,
        "worker_last": statistics.median(in_scoring[-third:]) if in_scoring else 0,
    }


def heap_in_use(folder: Path) -> int:
    """Least bytes of the heap that were in use after a collection in the second half of the JVM's log.

    Whatever was needed all the time is in it. Most collections leave much that is not needed any more.
    """
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    log = max(folder.glob("gc-*.log"), key=lambda path: path.stat().st_size)  # the others are of Spark's launcher
    pauses = re.findall(r"Pause (?:Young|Full).*?\d+[KMG]->(\d+)([KMG])\(", log.read_text())
    after = [int(size) * units[unit] for size, unit in pauses]
    return min(after[len(after) // 2 :], default=0)


def task_totals(folder: Path, windows: Mapping[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    """Of the tasks that ended in each stage: seconds, processor seconds in the JVM, bytes shuffled and spilled."""
    names = ("seconds", "jvm_seconds", "shuffled", "spilled")
    totals = {stage: dict.fromkeys(names, 0.0) for stage in windows}
    for line in _lines(folder.rglob("*")):
        if not line.startswith('{"Event":"SparkListenerTaskEnd"'):
            continue
        event = json.loads(line)
        metrics, end = event.get("Task Metrics"), event["Task Info"]["Finish Time"] / 1000
        stages = [stage for stage, window in windows.items() if window[0] <= end < window[1]]
        if metrics and stages:
            values = (
                metrics["Executor Run Time"] / 1e3,
                metrics["Executor CPU Time"] / 1e9,
                metrics["Shuffle Write Metrics"]["Shuffle Bytes Written"],
                metrics["Disk Bytes Spilled"],
            )
            for name, value in zip(names, values, strict=True):
                totals[stages[0]][name] += value
    return totals


def _lines(paths: Iterator[Path]) -> Iterator[str]:
    for path in paths:
        if path.is_file() and not path.name.startswith("."):
            with path.open() as file:
                yield from file


def bare_pairs(nights: Nights, num_queries: int) -> pd.DataFrame:
    """All pairs of some of the night's queries: PAIR_COLUMNS."""
    queries, candidates, titles = (
        pd.read_parquet(nights.folder / f"{name}.parquet") for name in ("queries", "candidates", "retrieval_table")
    )
    retrieved = titles.sort_values("rank").groupby("query_id")["title"].agg(list).rename("retrieved_titles")
    pairs = (
        queries.head(num_queries)[["query_id", "query"]]
        .merge(retrieved, left_on="query_id", right_index=True)
        .merge(candidates[["query_id", "product_id"]], on="query_id")
        .merge(nights.catalog[["product_id", "title", "brand", "category", "attributes"]], on="product_id")
    )
    return pairs.sort_values(["query_id", "product_id"]).assign(market=MARKET, language="en")[PAIR_COLUMNS]


def bare_microseconds(pairs: pd.DataFrame, bundle: Path, cores: int) -> dict[str, float]:
    """Of a core for a pair, in PairScorer without Spark: in the model, and beside it. All cores work, as in a night."""
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        found = pool.starmap(bare_loop, [(pairs, str(bundle))] * cores, chunksize=1)
    return {name: float(np.mean([taken[name] for taken in found])) for name in found[0]}


def bare_loop(pairs: pd.DataFrame, bundle_dir: str) -> dict[str, float]:
    bundle = load_bundle(bundle_dir)
    pack_scorer, _ = load_pack_scorer(bundle.folder / MODEL_NAME, "cpu", threads=1)
    in_model = 0.0

    def timed(pack: Pack) -> np.ndarray:
        nonlocal in_model
        start = time.perf_counter()
        logits = pack_scorer(pack)
        in_model += time.perf_counter() - start
        return logits

    scorer = PairScorer(
        bundle.prompt_tokenizer(),
        bundle.settings.labels,
        pack_scorer=timed,
        tokens_per_call=default_tokens_per_call("cpu"),
    )
    scorer.score_or_reject(pairs.head(PAIRS_PER_CALL).reset_index(drop=True))
    in_model, start = 0.0, time.perf_counter()
    for place in range(0, len(pairs), PAIRS_PER_CALL):
        scorer.score_or_reject(pairs.iloc[place : place + PAIRS_PER_CALL].reset_index(drop=True))
    beside = time.perf_counter() - start - in_model
    return {"model": 1e6 * in_model / len(pairs), "beside": 1e6 * beside / len(pairs)}


def marginal(cells: Sequence[Cell], stage: str | None = None) -> list[float]:
    """Microseconds of wall time for each pair that a night has more than the one before it, in a stage or in all."""
    seconds = [cell["seconds"] if stage is None else cell["stages"][stage] for cell in cells]
    return [
        1e6 * (later - earlier) / (larger["pairs"] - smaller["pairs"])
        for (earlier, later), (smaller, larger) in zip(pairwise(seconds), pairwise(cells), strict=True)
    ]


def measured_stages(cells: Sequence[Cell]) -> dict[str, PhaseCost]:
    """PHASES as the first and the last of some nights without a model give them."""
    first, last = cells[0], cells[-1]
    cores = first["settings"]["cores"]
    costs = {}
    for stage in PHASES:
        (slope,) = marginal([first, last], stage) if stage != "start" else (0.0,)
        fixed = first["stages"][stage] - slope * first["pairs"] / 1e6
        costs[stage] = PhaseCost(round(fixed, 1), round(max(0.0, slope) * cores, 1))
    return costs


def foretold(cells: Sequence[Cell], bundle: Bundle) -> list[dict[str, Any]]:
    """Rows of the first and the last night, as csrm.capacity foretells them from the one in the middle."""
    middle, cores = cells[len(cells) // 2], cells[0]["settings"]["cores"]
    machines = Machines(cores, cores)
    figures = with_run(bundle_figures(bundle), Run(**middle["run"]), machines)
    rows = []
    for cell in (cells[0], cells[-1]):
        run = Run(**cell["run"])
        needs = Plan(figures, machines, run.products_per_query).needs(cell["pairs"] / run.products_per_query)
        shuffled = sum(stage["shuffled"] for stage in cell["tasks"].values())
        compared = {
            "seconds": (sum(needs.seconds.values()), cell["seconds"]),
            "tokens": (needs.num_tokens, run.num_tokens),
            "bytes of the tables": (needs.stored_bytes, cell["pairs"] * sum(run.table_bytes.values())),
            "bytes shuffled": (needs.shuffled_bytes, shuffled),
        }
        for what, (expected, found) in compared.items():
            off = expected / found - 1
            verdict = "" if abs(off) <= SAME_SIZE else ", missed"
            values = {"foretold": f"{expected:,.0f}", "measured": f"{found:,.0f}"}
            rows.append({"pairs": f"{cell['pairs']:,}", "what": what, **values, "off by": f"{off:+z.0%}{verdict}"})
    return rows


def report(cells: Sequence[Cell]) -> str:
    """Everything, as Markdown."""
    by_bundle = {name: [cell for cell in cells if cell["bundle"] == name] for name in BUNDLES}
    by_bundle = {name: sorted(kept, key=lambda cell: cell["pairs"]) for name, kept in by_bundle.items() if kept}
    made_by, settings = cells[-1]["machine"], cells[-1]["settings"]
    parts = [
        f"`tests/benchmarks/night_cost.py`, {made_by['date']}, commit {made_by['commit']}: {settings['queries']:,} "
        f"queries, {settings['products']:,} products; {made_by['processor']}, {settings['cores']} cores, "
        f"{made_by['memory_gib']} GiB. Load average before each night: "
        f"{', '.join(format(cell['machine']['load_average'], '.1f') for cell in cells)}.",
        "Seconds of each night:",
        markdown([_night_row(cell) for kept in by_bundle.values() for cell in kept]),
    ]
    marginals = [row for kept in by_bundle.values() for row in _marginal_rows(kept)]
    if marginals:
        parts += ["What a pair more costs:", markdown(marginals)]
    if len(without_model := by_bundle.get("none", [])) > 1:
        title = "Everything but the model, microseconds of a core for a pair more:"
        parts += [title, markdown(_place_rows(without_model))]
    parts += [
        "Bytes for each pair:",
        markdown([_bytes_row(cell) for kept in by_bundle.values() for cell in kept]),
        "Memory at its peak, MiB:",
        markdown([_memory_row(cell) for kept in by_bundle.values() for cell in kept]),
    ]
    if len(demo := by_bundle.get("demo", [])) > 2:
        rows = foretold(demo, load_bundle(DEMO_BUNDLE))
        parts += [f"`csrm.capacity`, told of the night with {demo[len(demo) // 2]['pairs']:,} pairs:", markdown(rows)]
    if len(without_model) > 1:
        parts += ["Constants of `csrm/capacity/formula.py` from these nights:", _constants(without_model)]
    return "\n\n".join(parts)


def _night_row(cell: Cell) -> dict[str, Any]:
    per_pair = 1e6 * cell["seconds"] * cell["settings"]["cores"] / cell["pairs"]
    stages = {stage: f"{cell['stages'][stage]:.1f}" for stage in PHASES}
    whole = {"seconds": f"{cell['seconds']:.1f}", **stages, "us a pair and core": f"{per_pair:,.0f}"}
    return {"bundle": cell["bundle"], "pairs": f"{cell['pairs']:,}", **whole}


def _marginal_rows(cells: Sequence[Cell]) -> Iterator[dict[str, Any]]:
    slopes = marginal(cells)
    for (smaller, larger), slope in zip(pairwise(cells), slopes, strict=True):
        row = {"bundle": larger["bundle"], "from": f"{smaller['pairs']:,}", "to": f"{larger['pairs']:,}"}
        row["us a pair"] = f"{slope:,.1f}"
        growth = slope / slopes[0]
        verdict = ", missed" if growth > MOST_GROWTH else ""
        row[f"by the first, target {MOST_GROWTH}"] = "" if smaller is cells[0] else f"{growth:.2f}{verdict}"
        row["fixed part, s"] = f"{smaller['seconds'] - slope * smaller['pairs'] / 1e6:.1f}"
        yield row


def _place_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    last, cores = cells[-1], cells[0]["settings"]["cores"]
    total, bare = cores * marginal(cells)[-1], last["bare_us"]
    own = {stage: cores * marginal(cells, stage)[-1] for stage in PHASES}
    in_tasks = {stage: 1e6 * totals["seconds"] / last["pairs"] for stage, totals in last["tasks"].items()}
    verdict = "" if total <= MOST_MICROSECONDS else ", missed"
    rows = [(stage, f"{own[stage]:.1f}", f"{in_tasks[stage]:.1f}" if stage in in_tasks else "") for stage in PHASES]
    rows += [
        ("of scoring: PairScorer, measured without Spark", f"{bare['beside'] + bare['model']:.1f}", ""),
        (f"all, target {MOST_MICROSECONDS}", f"{total:.1f}{verdict}", ""),
    ]
    return [dict(zip(("where", "us", "in tasks, over all pairs"), row, strict=True)) for row in rows]


def _bytes_row(cell: Cell) -> dict[str, Any]:
    row: dict[str, Any] = {"bundle": cell["bundle"], "pairs": f"{cell['pairs']:,}"}
    for name, size in cell["run"]["table_bytes"].items():
        row[f"{name} (files)"] = f"{size:.1f} ({cell['num_files'][name]})"
    for stage, totals in cell["tasks"].items():
        if stage in PHASES:
            row[f"shuffled: {stage}"] = f"{totals['shuffled'] / cell['pairs']:.1f}"
    row["spilled"] = f"{sum(totals['spilled'] for totals in cell['tasks'].values()) / cell['pairs']:.1f}"
    return row


def _memory_row(cell: Cell) -> dict[str, Any]:
    names = {
        "jvm": "JVM",
        "heap": "its heap after a collection",
        "driver": "driver's Python",
        "worker": "largest worker",
        "worker_first": "first third of the scoring",
        "worker_last": "last third",
        "workers": "all workers",
    }
    sizes = {text: f"{cell['memory'][name] / 2**20:,.0f}" for name, text in names.items()}
    return {"bundle": cell["bundle"], "pairs": f"{cell['pairs']:,}", **sizes}


def _constants(cells: Sequence[Cell]) -> str:
    last, figures = cells[-1], bundle_figures(load_bundle(DEMO_BUNDLE))
    shuffled = {stage: totals["shuffled"] / last["pairs"] for stage, totals in last["tasks"].items()}
    text_bytes = figures.prefix_bytes + figures.suffix_bytes
    stages = [
        f'    "{name}": PhaseCost({cost.fixed_s}, {cost.pair_us}),' for name, cost in measured_stages(cells).items()
    ]
    table_bytes = {name: round(size, 1) for name, size in last["run"]["table_bytes"].items()}
    lines = ["PHASES = {", *stages, "}", f"TABLE_BYTES = {table_bytes}"]
    lines.append(f"SHUFFLED_KEY_BYTES = {sum(shuffled.values()) - shuffled['scoring']:.0f}")
    lines.append(f"SHUFFLED_TEXT = {shuffled['scoring'] / text_bytes:.2f}")
    return "\n".join(["```python", *lines, "```"])


def cell_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What a kept cell must have been measured with."""
    return {
        "queries": args.queries,
        "products": args.products,
        "cores": args.cores,
        "code": code_digest(*CODE),
    }


def read_cell(path: Path) -> Cell | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--bundles", nargs="+", choices=BUNDLES, default=list(BUNDLES))
    parser.add_argument("--queries", type=int, default=5_000)
    parser.add_argument("--products", type=int, default=20_000, help="of the catalog")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "night_cost", help="what is kept")
    parser.add_argument("--report", action="store_true", help="measure nothing; report the cells that are kept")
    args = parser.parse_args(argv)
    args.work = args.work.resolve()
    args.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if wrong := [pairs for pairs in args.pairs if not args.queries <= pairs <= args.queries * args.products // 2]:
        parser.error(f"--pairs {wrong}: expected at least one and at most {args.products // 2} for each of the queries")
    return args


def main() -> int:
    args = parse_args()
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    args.work.mkdir(parents=True, exist_ok=True)
    cells = []
    for name in args.bundles:
        for num_pairs in sorted(args.pairs):
            path = args.work / f"{name}_{num_pairs}.json"
            cell = read_cell(path)
            if not args.report and (cell is None or cell["settings"] != cell_settings(args)):
                print(f"-- {name}, {num_pairs:,} pairs", file=sys.stderr, flush=True)
                cell = measure_cell(name, num_pairs, args)
                path.write_text(json.dumps(cell, indent=1) + "\n", encoding="utf-8")
            if cell is not None:
                cells.append(cell)
    if not cells:
        raise SystemExit(f"{args.work}: no night was measured yet")
    print(report(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
