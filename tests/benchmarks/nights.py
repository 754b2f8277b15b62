"""What a night costs after the first one, and what a killed run leaves to do: the real job on a generated market.

    python tests/benchmarks/nights.py                                         # the demo's bundle, a million pairs
    python tests/benchmarks/nights.py --bundle FOLDER --queries 1000 --products-per-query 20
    python tests/benchmarks/nights.py --keys                                  # what the keys of a million products cost

Each query is paired with random products and augmented with the titles of five others. Nights follow each other on the
same tables, each a process of its own whose seconds begin with its start: the first; one in which nothing changed; one
product in a hundred has another title; then the retrieval table says those titles too. Then the first night again in
another folder, killed when half of its pairs are staged, and started again.

With --keys no night is run: the keys of a million products are made with SHA-256 as the plan makes them, with xxhash64
alone, and not at all, three times each by turns; a row has the median of its seconds.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import deltalake
import numpy as np
import pandas as pd
import yaml
from speed_report import markdown

from csrm.market import builtin_lexicon, generate_market

REPOSITORY = Path(__file__).parents[2]
MARKET = "us"
NUM_TITLES = 5
STAGES = ("inputs", "plan", "scoring", "canary", "audit", "publish")


class Nights:
    """Input tables on disk, and the job on them."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args
        self.rng = np.random.default_rng(0)
        market = generate_market(
            7,
            {MARKET: "en"},
            num_products=args.products,
            num_queries=args.queries,
            label_noise=0.0,
            lexicons={"en": builtin_lexicon("en")},
        )
        self.catalog, queries = market.catalog.dropna(subset="title", ignore_index=True), market.queries
        query_ids, product_ids = queries["query_id"].to_numpy(), self.catalog["product_id"].to_numpy()
        products = [self.rng.choice(len(product_ids), args.products_per_query, replace=False) for _ in query_ids]
        paired = product_ids[np.concatenate(products)]
        candidates = {"query_id": query_ids.repeat(args.products_per_query), "product_id": paired}
        self.retrieved = pd.DataFrame(
            {
                "query_id": query_ids.repeat(NUM_TITLES),
                "rank": np.tile(np.arange(1, NUM_TITLES + 1, dtype=np.int32), len(query_ids)),
                "product_id": self.rng.choice(product_ids, NUM_TITLES * len(query_ids)),
                "similarity": 1.0,
                "source": "random",
            }
        )
        self.write("queries", queries)
        self.write("candidates", pd.DataFrame(candidates))
        self.write("catalog", self.catalog)
        self.retrieve()

    def write(self, name: str, table: pd.DataFrame) -> None:
        table.assign(market=MARKET).to_parquet(self.folder / f"{name}.parquet")

    def rename_products(self) -> None:
        """One product in a hundred has another title."""
        changed = self.rng.choice(len(self.catalog), len(self.catalog) // 100, replace=False)
        self.catalog.loc[changed, "title"] += " 2"
        self.write("catalog", self.catalog)

    def retrieve(self) -> None:
        """A retrieval table with the titles that the catalog has now."""
        self.write("retrieval_table", self.retrieved.merge(self.catalog[["product_id", "title"]], on="product_id"))

    def command(self, run_id: str, tables: str, **settings: Any) -> list[str]:
        names = ("catalog", "queries", "candidates", "retrieval_table")
        config = self.folder / f"{tables}.yaml"
        values = {
            "markets": {MARKET: "en"},
            "inputs": {name: {"path": str(self.folder / f"{name}.parquet"), "format": "parquet"} for name in names},
            "tables": str(self.folder / tables),
            "bundle": str(Path(self.args.bundle).resolve()),
            "chunk_minutes": self.args.chunk_minutes,
            "lease_seconds": 2,
            **settings,
        }
        config.write_text(yaml.safe_dump(values))
        job = str(REPOSITORY / "jobs" / "score_catalog.py")
        return [sys.executable, job, "--config", str(config), "--run-id", run_id]

    def table(self, tables: str, name: str) -> deltalake.DeltaTable:
        return deltalake.DeltaTable(str(self.folder / tables / name))

    def run(self, night: str, run_id: str, tables: str = "tables") -> dict[str, Any]:
        """A night; a row of the result."""
        print(f"-- {night}", file=sys.stderr, flush=True)
        start = time.monotonic()
        subprocess.run(self.command(run_id, tables), stdout=sys.stderr, check=True)
        seconds = time.monotonic() - start
        runs = self.table(tables, "scoring_runs").to_pandas()
        (row,) = runs[runs["run_id"] == run_id].to_dict("records")
        took = dict(row["seconds"])
        counts = {name: f"{int(row[f'num_{name}']):,}" for name in ("unchanged", "reused", "scored")}
        share = row["num_scored"] / row["num_candidates"]
        stages = {stage: f"{took[stage]:.1f}" for stage in STAGES}
        return {"night": night, **counts, "scored, share": f"{share:.2%}", "seconds": round(seconds, 1), **stages}

    def kill_when_half_is_staged(self, run_id: str, tables: str) -> int:
        """Start a night and kill it; how many pairs it had staged."""
        print("-- first night, killed", file=sys.stderr, flush=True)
        process = subprocess.Popen(self.command(run_id, tables), stdout=sys.stderr, start_new_session=True)
        half, num_staged = self.args.queries * self.args.products_per_query // 2, 0
        while num_staged < half:
            if process.poll() is not None:
                raise SystemExit("the run ended before half of its pairs were staged: lower --chunk-minutes.")
            time.sleep(0.5)
            if (self.folder / tables / "scores_staging" / "_delta_log").exists():
                num_staged = self.table(tables, "scores_staging").count()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(3)  # its lease ends
        return num_staged


NUM_KEYS = 1_000_000


def key_cost(catalog: Path, num_times: int = 3) -> list[dict[str, Any]]:
    """Seconds of a pass over NUM_KEYS products that makes their keys; nothing is written."""
    from pyspark.sql import functions as F

    from csrm.config import InputSpec
    from csrm.night.plan import product_key
    from csrm.schemas import CATALOG
    from csrm.spark.inputs import read_rows
    from csrm.spark.session import build_session

    spark = build_session("csrm-key-cost")
    products_df = read_rows(spark, CATALOG, InputSpec(path=str(catalog), format="parquet"))
    times = -(-NUM_KEYS // products_df.count())
    products_df = products_df.crossJoin(spark.range(times)).limit(NUM_KEYS).repartition(os.cpu_count() or 1)
    products_df = products_df.withColumn("title", F.concat_ws(" ", "title", "id")).persist()
    attributes = F.array_sort(F.map_entries("attributes"))
    keys = {
        "SHA-256 with the bundle's digest": product_key("0" * 64),
        "xxhash64": F.xxhash64("title", "brand", "category", attributes.cast("string")),
        "none": F.length("title"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in keys}
    products_df.count()
    for _ in range(num_times + 1):
        for name, key in keys.items():
            start = time.monotonic()
            products_df.select(key.alias("key")).write.format("noop").mode("overwrite").save()
            seconds[name].append(time.monotonic() - start)
    return [
        {"key": name, "products": f"{NUM_KEYS:,}", "seconds": f"{np.median(taken[1:]):.2f}"}  # the first is warm-up
        for name, taken in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default=str(REPOSITORY / "conf" / "demo_bundle"))
    parser.add_argument("--products", type=int, default=20_000, help="of the catalog")
    parser.add_argument("--queries", type=int, default=5_000)
    parser.add_argument("--products-per-query", type=int, default=200)
    parser.add_argument("--chunk-minutes", type=float, default=1.0, help="as in conf/score_catalog.yaml")
    parser.add_argument("--no-kill", action="store_true", help="leave the killed run out")
    parser.add_argument("--keys", action="store_true", help="run no night; see above")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    with tempfile.TemporaryDirectory(prefix="csrm-nights-") as folder:
        nights = Nights(Path(folder), args)
        if args.keys:
            print(markdown(key_cost(Path(folder, "catalog.parquet"))))
            return
        rows = [nights.run("first", "1"), nights.run("nothing changed", "2")]
        nights.rename_products()
        rows.append(nights.run("1 % of the products renamed", "3"))
        nights.retrieve()
        rows.append(nights.run("the retrieval table rebuilt with them", "4"))
        if not args.no_kill:
            num_staged = nights.kill_when_half_is_staged("1", "killed")
            rows.append(nights.run(f"first, killed with {num_staged:,} pairs staged, started again", "1", "killed"))
    for row in rows:
        row["of the first"] = f"{row['seconds'] / rows[0]['seconds']:.1%}"
    print(markdown(rows))


if __name__ == "__main__":
    main()
