"""A night with inputs of unusual size: a query with very many products, many markets, titles of a megabyte.

    python tests/benchmarks/unusual_sizes.py --products 20000          # one query has them all
    python tests/benchmarks/unusual_sizes.py --products 3 --markets 50  # so many products in each market
    python tests/benchmarks/unusual_sizes.py --products 300 --title-characters 1000000

The real job on tables made from a seed. The memory of the job, its JVM and its workers is added up once a second.
The job is ended where it passes --most-gb, so that the machine does not run out. The last column is the processor time
of the busiest Python worker, of that of all: the share of one core where work is shared.
"""

import argparse
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import deltalake
import numpy as np
import pandas as pd
import psutil
import yaml
from speed_report import markdown

REPOSITORY = Path(__file__).parents[2]
WORDS = [
    "wireless",
    "silent",
    "mouse",
    "pad",
    "black",
    "steel",
    "bottle",
    "yoga",
    "mat",
    "running",
    "shoes",
    "cotton",
    "large",
    "small",
    "kids",
    "winter",
]


def write_inputs(folder: Path, args: argparse.Namespace) -> list[str]:
    """Each market has one query, whose candidates are all its products; the names of the markets."""
    rng = np.random.default_rng(0)
    markets = [f"m{number:04}" for number in range(args.markets)]
    titles = [" ".join(rng.choice(WORDS, 6)) + f" {number}" for number in range(args.products)]
    if args.title_characters:
        titles = [(title + " ") * (args.title_characters // (len(title) + 1)) for title in titles]
    product_ids = [f"p{number:07}" for number in range(args.products)]
    catalog = pd.concat(
        [pd.DataFrame({"market": market, "product_id": product_ids, "title": titles}) for market in markets]
    )
    queries = pd.DataFrame({"market": markets, "query_id": "q", "query": "wireless mouse"})
    tables = {
        "catalog": catalog,
        "queries": queries,
        "candidates": catalog[["market", "product_id"]].assign(query_id="q"),
        "retrieval_table": catalog.groupby("market")
        .head(1)
        .assign(query_id="q", rank=np.int32(1), similarity=1.0, source="random"),
    }
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet", row_group_size=args.row_group, index=False)
    return markets


def used(process: psutil.Process, seconds_of: dict[int, float]) -> float:
    """GB of a process and all below it; adds processor seconds of Python workers to seconds_of."""
    num_bytes = 0
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.Error):
            num_bytes += one.memory_info().rss
            if one.pid != process.pid and one.name().startswith("python"):
                seconds_of[one.pid] = sum(one.cpu_times()[:2])
    return num_bytes / 2**30


def night(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    names = ("catalog", "queries", "candidates", "retrieval_table")
    values = {
        "markets": dict.fromkeys(write_inputs(folder, args), "en"),
        "inputs": {name: {"path": str(folder / f"{name}.parquet"), "format": "parquet"} for name in names},
        "tables": str(folder / "tables"),
        "bundle": str(Path(args.bundle).resolve()),
    }
    config = folder / "night.yaml"
    config.write_text(yaml.safe_dump(values))
    start, peak, seconds_of = time.monotonic(), 0.0, dict[int, float]()
    command = [sys.executable, str(REPOSITORY / "jobs" / "score_catalog.py"), "--config", str(config), "--run-id", "1"]
    process = psutil.Popen(command, stdout=sys.stderr, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    while process.poll() is None:
        peak = max(peak, used(process, seconds_of))
        if peak > args.most_gb or time.monotonic() - start > args.most_seconds:
            for one in [*process.children(recursive=True), process]:
                with suppress(psutil.Error):
                    one.kill()
        time.sleep(1)
    row: dict[str, Any] = {
        "markets": args.markets,
        "products each": f"{args.products:,}",
        "characters of a title": args.title_characters or "usual",
        "exit status": process.returncode,
        "seconds": f"{time.monotonic() - start:.1f}",
        "peak GB": f"{peak:.1f}",
    }
    if process.returncode == 0:
        run = deltalake.DeltaTable(str(folder / "tables" / "scoring_runs")).to_pandas().iloc[-1]
        took = dict(run["seconds"])
        row["pairs/s of scoring"] = f"{run['num_scored'] / took['scoring']:.0f}"
        row |= {stage: f"{seconds:.1f}" for stage, seconds in took.items()}
    row["busiest worker"] = f"{max(seconds_of.values(), default=0) / max(sum(seconds_of.values()), 1e-9):.0%}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default=str(REPOSITORY / "conf" / "demo_bundle"))
    parser.add_argument("--products", type=int, default=20_000, help="of each market, all of its one query")
    parser.add_argument("--markets", type=int, default=1)
    parser.add_argument("--title-characters", type=int, default=0, help="0: titles of usual length")
    parser.add_argument("--row-group", type=int, default=100_000, help="rows of a row group of the Parquet files")
    parser.add_argument("--most-gb", type=float, default=12.0, help="the night is ended where it takes more")
    parser.add_argument("--most-seconds", type=float, default=480.0, help="the same of its time")
    with tempfile.TemporaryDirectory(prefix="csrm-sizes-") as folder:
        print(markdown([night(Path(folder), parser.parse_args())]))


if __name__ == "__main__":
    main()
