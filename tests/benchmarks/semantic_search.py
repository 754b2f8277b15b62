"""How fast exact search by vectors is, as a share of the bare matrix product's rate.

    python tests/benchmarks/semantic_search.py                          # one core, without Spark
    python tests/benchmarks/semantic_search.py --spark --products 1000000

Random vectors in 100 groups, so that some products are much nearer than others. `matmul` is numpy's product of the same
blocks and nothing else. Both are in seconds of processor time, which a busy machine does not make longer: of this
process, or with --spark of the Python workers. Peak memory is that of the process, which holds the products; with
--spark, that of the largest Python worker, which streams them.
"""

import argparse
import resource
import threading
import time
from contextlib import suppress

import numpy as np
import pandas as pd
import psutil

from csrm.retrieval import nearest
from csrm.retrieval.nearest import NearestPairs, near_pairs, unit_vectors

MARKET = "us"
BARE_PRODUCTS = 100_000
"""Products that the bare matrix product is measured with, and multiplied."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--products-per-query", type=int, default=50)
    parser.add_argument("--queries-per-product", type=int, default=2)
    parser.add_argument("--spark", action="store_true", help="in Spark, as jobs do")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(100, args.dimensions)).astype(np.float32)
    products, queries = (
        centres[rng.integers(100, size=size)] + rng.normal(size=(size, args.dimensions)).astype(np.float32)
        for size in (args.products, args.queries)
    )
    ways = (args.products_per_query, args.queries_per_product)
    workers = PythonWorkers()
    seconds, num_pairs = in_spark(products, queries, *ways) if args.spark else in_numpy(products, queries, *ways)
    wall_s = time.perf_counter() - workers.started
    compared = args.products * args.queries
    print(f"{args.products:,} products, {args.queries:,} queries, {args.dimensions} dimensions: {num_pairs:,} pairs")
    seconds = workers.cpu_seconds() if args.spark else seconds
    bare = matmul_seconds(products[:BARE_PRODUCTS], queries) * len(products) / len(products[:BARE_PRODUCTS])
    print(f"search {seconds:.1f} s, {compared / seconds / 1e6:,.0f} M comparisons/s; matmul alone {bare:.1f} s")
    print(f"share of the matmul's rate {bare / seconds:.2f}; {wall_s:.0f} s passed in all")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory {peak:,.0f} MB, of which the vectors {(products.nbytes + queries.nbytes) / 1e6:,.0f} MB")
    if args.spark:
        print(f"peak memory of a Python worker {workers.peak / 1e6:,.0f} MB")


class PythonWorkers(threading.Thread):
    """Looks twice a second at the Python workers that this process has started."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        """Resident bytes of the largest one, ever."""
        self._seconds: dict[int, float] = {}
        """Process to its seconds of processor time."""
        self.started = time.perf_counter()
        self.start()

    def cpu_seconds(self) -> float:
        """Of all workers."""
        return sum(self._seconds.values())

    def run(self) -> None:
        while True:
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if "pyspark.daemon" in " ".join(process.cmdline()):
                        self.peak = max(self.peak, process.memory_info().rss)
                        self._seconds[process.pid] = sum(process.cpu_times()[:2])
            time.sleep(0.5)


def in_numpy(products: np.ndarray, queries: np.ndarray, of_query: int, of_product: int) -> tuple[float, int]:
    """Seconds and pairs of one task's part of the search."""
    start = time.process_time()
    found = NearestPairs(unit_vectors(queries)[0], of_query, of_product)
    for first in range(0, len(products), 10_000):
        found.add(products[first : first + 10_000])
    num_pairs = len(found.pairs()[0])
    return time.process_time() - start, num_pairs


def in_spark(products: np.ndarray, queries: np.ndarray, of_query: int, of_product: int) -> tuple[float, int]:
    """Seconds and pairs of the whole search, from Parquet files."""
    import tempfile

    import pyarrow as pa
    import pyarrow.parquet as pq

    from csrm.spark.session import build_session

    spark = build_session("csrm-semantic-search")
    with tempfile.TemporaryDirectory(prefix="csrm-vectors-") as folder:
        for name, vectors in (("product_id", products), ("query_id", queries)):
            flat = pa.array(vectors.ravel())
            lists = pa.ListArray.from_arrays(pa.array(np.arange(len(vectors) + 1) * vectors.shape[1], pa.int32()), flat)
            ids = pd.Series(np.arange(len(vectors))).map("{:08d}".format)
            table = pa.table({"market": pa.array([MARKET] * len(ids)), name: pa.array(ids), "vector": lists})
            pq.write_table(table, f"{folder}/{name}.parquet", row_group_size=10_000)
        start = time.perf_counter()
        pairs_df = near_pairs(
            spark.read.parquet(f"{folder}/product_id.parquet"),
            spark.read.parquet(f"{folder}/query_id.parquet"),
            products_per_query=of_query,
            queries_per_product=of_product,
        )
        num_pairs = pairs_df.count()
        return time.perf_counter() - start, num_pairs


def matmul_seconds(products: np.ndarray, queries: np.ndarray) -> float:
    """Seconds of the matrix products alone."""
    block = max(1, nearest._SIMILARITIES_PER_BLOCK // len(queries))
    start = time.process_time()
    for first in range(0, len(products), block):
        products[first : first + block] @ queries.T
    return time.process_time() - start


if __name__ == "__main__":
    main()
