"""Nights in a row on a cluster, with a fault in each: is the table right, and does anything grow?

    python tests/benchmarks/soak.py                       # thirty nights, about forty minutes
    python tests/benchmarks/soak.py --nights 6 --seed 3

A standalone Spark cluster of two workers on this machine (tests/faults/cluster.py) scores two markets with the demo's
bundle. Before each night one product in a hundred gets another title. Something happens at a random moment of it: a
Python worker, an executor or a whole machine is killed, the driver is killed or told to end, a second driver starts, or
one product's text breaks the graph. A night that did not end well is started again under its run id. Then every
published score is compared with what the core computes from the night's inputs without Spark, and at the end with a
night from scratch. jobs/maintain.py's work is done after each fifth night, with a retention of zero hours.

Prints a row a night and writes a plot: peak memory of each kind of process, files and bytes of all tables.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from csrm.operations.maintenance import MaintenanceConfig, maintain
from csrm.spark.session import build_session
from tests.faults.bundles import ERROR_MARK, faulty_bundle
from tests.faults.cluster import Cluster, Submitted, kill, run_cluster, wait_for
from tests.faults.night import KEY, LEASE_SECONDS, Night

REPOSITORY = Path(__file__).parents[2]
NUM_QUERIES, NUM_PRODUCTS, PRODUCTS_PER_QUERY = 40, 500, 50
"""Of each market."""
MAINTAINED_EVERY = 5
KILLED, TERMINATED, HELD = -9, 143, 5


class Soak(Night):
    """Tables that change from night to night."""

    def __init__(self, folder: Path, bundle: Path, seed: int) -> None:
        super().__init__(folder, bundle)
        self.random = random.Random(seed)
        markets = self.queries["market"].unique()
        titles, texts = self.catalog["title"].to_numpy(), self.queries["query"].to_numpy()
        self.catalog = pd.DataFrame(
            [(market, f"p{n:04}", f"{titles[n % len(titles)]} {n}") for market in markets for n in range(NUM_PRODUCTS)],
            columns=["market", "product_id", "title"],
        )
        self.queries = pd.DataFrame(
            [(market, f"q{n:03}", f"{texts[n % len(texts)]} {n}") for market in markets for n in range(NUM_QUERIES)],
            columns=["market", "query_id", "query"],
        )
        every = self.queries[["market", "query_id"]].merge(self.catalog[["market", "product_id"]])
        self.candidates = (
            every.groupby(["market", "query_id"]).sample(PRODUCTS_PER_QUERY, random_state=seed).reset_index(drop=True)
        )

    def rename_products(self) -> None:
        """One product in a hundred has another title; none is poisoned any more."""
        titles = self.catalog["title"].str.replace(ERROR_MARK, "")
        for row in self.random.sample(range(len(titles)), len(titles) // 100):
            titles.iloc[row] += f" {self.random.randrange(100)}"
        self.catalog["title"] = titles
        self.write_catalog()

    def poison(self) -> None:
        """A product's text breaks the graph."""
        self.catalog.loc[self.random.randrange(len(self.catalog)), "title"] += ERROR_MARK
        self.write_catalog()

    def write_catalog(self) -> None:
        self.catalog.to_parquet(self.folder / "catalog.parquet")

    def check(self, run_id: str) -> None:
        """Every candidate is in one table, once, with the score that its texts of tonight have."""
        poisoned = self.catalog.loc[self.catalog["title"].str.contains(ERROR_MARK), ["market", "product_id"]]
        pairs = self.candidates.merge(poisoned, how="left", indicator=True)
        is_sound = pairs.pop("_merge") == "left_only"
        rejected = pairs[~is_sound].sort_values(KEY, ignore_index=True)
        found = rejected.iloc[:0]
        if self.version("rejected_pairs") >= 0:
            found = self.table("rejected_pairs").query("run_id == @run_id").sort_values(KEY, ignore_index=True)
        assert found[KEY].equals(rejected[KEY]), (found, rejected)
        every, self.candidates = self.candidates, pairs[is_sound]
        try:
            self.check_scores()
        finally:
            self.candidates = every


def kill_one(submitted: Submitted, find: Callable[[], list[psutil.Process]]) -> None:
    """Kill one of some processes, once there is one; none where the job has ended before."""
    with suppress(psutil.NoSuchProcess):
        victims = wait_for(lambda: not submitted.is_running or find(), "processes")
        if victims is not True:
            kill(victims[0])


@contextmanager
def peaks(cluster: Cluster, submitted: Submitted) -> Iterator[dict[str, float]]:
    """Largest resident memory of each kind of process while the block runs, MiB."""
    found: dict[str, float] = {}
    groups: dict[str, Callable[[], list[psutil.Process]]] = {
        "driver JVM": lambda: [submitted.jvm],
        "driver": lambda: [submitted.driver()],
        "executor": cluster.executors,
        "Python worker": cluster.python_workers,
    }
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(0.3):
            for name, find in groups.items():
                with suppress(psutil.Error, StopIteration):
                    for process in find():
                        found[name] = max(found.get(name, 0.0), process.memory_info().rss / 2**20)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield found
    finally:
        is_over.set()
        watcher.join()


def attempt(cluster: Cluster, night: Soak, run_id: str, fault: str, usual_s: float) -> tuple[bool, dict[str, float]]:
    """Start the night, let something happen to it; whether it has to be started again, and its memory."""
    with ExitStack() as stack:
        submitted = stack.enter_context(cluster.submit(*night.arguments(run_id)))
        memory = stack.enter_context(peaks(cluster, submitted))
        moment = night.random.uniform(0.1, 0.9) * usual_s
        if fault not in ("none", "poison"):
            with suppress(psutil.TimeoutExpired):
                submitted.jvm.wait(moment)
        allowed: tuple[int, ...] = (0,)
        if fault == "Python worker killed":
            kill_one(submitted, cluster.python_workers)
        elif fault == "executor killed":
            kill_one(submitted, cluster.executors)
        elif fault == "machine lost":
            with cluster.lost_machine():
                submitted.end()
        elif fault == "driver killed":
            submitted.kill()
            allowed = (0, KILLED)
        elif fault == "driver terminated":
            with suppress(psutil.NoSuchProcess):
                submitted.jvm.terminate()
            allowed = (0, TERMINATED)
        elif fault == "second driver":
            second = cluster.run(*night.arguments(f"{run_id}-second"))
            assert second.code in (0, HELD), second.output
            allowed = (0, HELD)
        code = submitted.end().code
        assert code in allowed, f"{run_id}, {fault}: exit {code}\n{submitted.output}"
    return code != 0, memory


FAULTS = (
    "Python worker killed",
    "executor killed",
    "machine lost",
    "driver killed",
    "driver terminated",
    "second driver",
    "poison",
)


def stored(tables: Path) -> dict[str, float]:
    """Files and MiB of all tables: data, and Delta's logs apart."""
    files = [path for path in tables.rglob("*") if path.is_file()]
    logs = [path for path in files if "_delta_log" in path.parts]
    num_bytes = {path: path.stat().st_size for path in files}
    return {
        "data files": len(files) - len(logs),
        "log files": len(logs),
        "MB": round((sum(num_bytes.values()) - sum(num_bytes[path] for path in logs)) / 2**20, 2),
        "log MB": round(sum(num_bytes[path] for path in logs) / 2**20, 2),
    }


def care(tables: Path) -> None:
    """jobs/maintain.py without its lower bounds, so that old files go at once."""
    spark = build_session("csrm-soak")
    config = MaintenanceConfig.model_construct(
        tables=str(tables), file_mb=1.0, change_feed_days=0, retention_hours=0, staging_days=0
    )
    try:
        maintain(spark, config)
    finally:
        spark.stop()


def one_night(cluster: Cluster, night: Soak, number: int, usual_s: float) -> dict[str, Any]:
    """A row of the result."""
    run_id = f"night-{number:02}"
    fault = "none" if number == 0 else FAULTS[(number - 1) % len(FAULTS)]
    if number:
        night.rename_products()
    if fault == "poison":
        night.poison()
    start = time.monotonic()
    is_open, memory = attempt(cluster, night, run_id, fault, usual_s)
    if is_open:
        time.sleep(LEASE_SECONDS)
        _, memory = attempt(cluster, night, run_id, "none", usual_s)
    seconds = time.monotonic() - start
    night.check(run_id)
    run = night.run(run_id)
    return {
        "night": number,
        "fault": fault,
        "started again": "yes" if is_open else "",
        "scored": int(run["num_scored"]),
        "seconds": round(seconds),
        **{name: round(memory.get(name, 0)) or None for name in ("driver JVM", "driver", "executor", "Python worker")},
        **stored(night.folder / "tables"),
    }


def plot(rows: list[Mapping[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    memory, files, size = figure.subplots(3, 1, sharex=True)
    table = pd.DataFrame(rows).set_index("night")
    for axes, names, label in (
        (memory, ["driver JVM", "driver", "executor", "Python worker"], "peak memory, MiB"),
        (files, ["data files", "log files"], "files"),
        (size, ["MB", "log MB"], "MiB on disk"),
    ):
        for name in names:
            axes.plot(table.index, table[name], marker=".", label=name)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    size.set_xlabel("night")
    size.set_xticks(
        table.index, [f"{night} {fault}" for night, fault in table["fault"].items()], rotation=90, fontsize=7
    )
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nights", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_name("soak.svg"))
    args = parser.parse_args()
    rows: list[Mapping[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="csrm-soak-") as name, run_cluster(Path(name)) as cluster:
        folder = Path(name) / "nights"
        folder.mkdir()
        night = Soak(folder, faulty_bundle(REPOSITORY / "conf" / "demo_bundle", Path(name) / "bundle"), args.seed)
        for number in range(args.nights + 1):
            usual_s = float(rows[-1]["seconds"]) if rows and not rows[-1]["started again"] else 30.0
            rows.append(one_night(cluster, night, number, usual_s))
            if number == 0:
                print(f"| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
            print(f"| {' | '.join(map(str, rows[-1].values()))} |", flush=True)
            if number % MAINTAINED_EVERY == MAINTAINED_EVERY - 1:
                care(folder / "tables")
        scores = night.scores().drop(columns=["run_id", "scored_at"])
        (folder / "tables").rename(folder / "tables_of_the_soak")
        finished = cluster.run(*night.arguments("scratch"))
        assert finished.code == 0, finished.output
        pd.testing.assert_frame_equal(night.scores().drop(columns=["run_id", "scored_at"]), scores, atol=1e-5, rtol=0)
        print("the table equals that of a night from scratch", file=sys.stderr)
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
