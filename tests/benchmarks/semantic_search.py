"""How fast exact search by vectors is, as a share of the bare matrix product's rate.

    python tests/benchmarks/semantic_search.py                          # one core, without Spark
    python tests/benchmarks/semantic_search.py --spark --products 1000000

Random vectors in 100 groups, so that some products are much nearer than others. `matmul` is numpy's product of the same
blocks and nothing else. Both are in seconds of processor time, which a busy machine does not make longer: of this
process, or with --spark of the Python workers. The first 100,000 products count for all in the bare product. Products
come in blocks of 10,000. Peak memory is that of the process, with --spark that of the largest Python worker.
"""

import argparse
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
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
    (queries,) = random_vectors(args.queries, args.dimensions, seed=0, at_once=args.queries)
    ways = (args.products_per_query, args.queries_per_product)
    blocks = random_vectors(args.products, args.dimensions, seed=1)
    workers = PythonWorkers()
    seconds, num_pairs = in_spark(blocks, queries, *ways) if args.spark else in_numpy(blocks, queries, *ways)
    wall_s = time.perf_counter() - workers.started
    print(f"{args.products:,} products, {args.queries:,} queries, {args.dimensions} dimensions: {num_pairs:,} pairs")
    seconds = workers.cpu_seconds() if args.spark else seconds
    num_bare = min(args.products, BARE_PRODUCTS)
    (products,) = random_vectors(num_bare, args.dimensions, seed=1, at_once=num_bare)
    bare = matmul_seconds(products, queries) * args.products / num_bare
    compared = args.products * args.queries
    print(f"search {seconds:.1f} s, {compared / seconds / 1e6:,.0f} M comparisons/s; matmul alone {bare:.1f} s")
    print(f"share of the matmul's rate {bare / seconds:.2f}; {wall_s:.0f} s passed in all")
    if args.spark:
        print(f"peak memory of a Python worker {workers.peak / 1e6:,.0f} MB")
    else:
        print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB")


def random_vectors(size: int, dimensions: int, *, seed: int, at_once: int = 10_000) -> Iterator[np.ndarray]:
    """Vectors in 100 groups, so many at once; the groups are the same for every seed."""
    centres = np.random.default_rng(2).normal(size=(100, dimensions)).astype(np.float32)
    rng = np.random.default_rng(seed)
    for first in range(0, size, at_once):
        count = min(at_once, size - first)
        yield centres[rng.integers(100, size=count)] + rng.normal(size=(count, dimensions)).astype(np.float32)


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


def in_numpy(blocks: Iterator[np.ndarray], queries: np.ndarray, of_query: int, of_product: int) -> tuple[float, int]:
    """Seconds and pairs of one task's part of the search."""
    found, seconds = NearestPairs(unit_vectors(queries)[0], of_query, of_product), 0.0
    for products in blocks:
        start = time.process_time()
        found.add(products)
        seconds += time.process_time() - start
    start = time.process_time()
    num_pairs = len(found.pairs()[0])
    return seconds + time.process_time() - start, num_pairs


def in_spark(blocks: Iterator[np.ndarray], queries: np.ndarray, of_query: int, of_product: int) -> tuple[float, int]:
    """Seconds and pairs of the whole search, from Parquet files."""
    import tempfile

    import pyarrow as pa
    import pyarrow.parquet as pq

    from csrm.spark.session import build_session

    schema = {
        name: pa.schema({"market": pa.string(), name: pa.string(), "vector": pa.list_(pa.float32())})
        for name in ("product_id", "query_id")
    }
    spark = build_session("csrm-semantic-search")
    with tempfile.TemporaryDirectory(prefix="csrm-vectors-") as folder:
        for name, parts in (("product_id", blocks), ("query_id", iter([queries]))):
            with pq.ParquetWriter(f"{folder}/{name}.parquet", schema[name]) as writer:
                first = 0
                for vectors in parts:
                    offsets = pa.array(np.arange(len(vectors) + 1) * vectors.shape[1], pa.int32())
                    lists = pa.ListArray.from_arrays(offsets, pa.array(vectors.ravel()))
                    ids = pa.array([f"{number:08d}" for number in range(first, first + len(vectors))])
                    writer.write_table(pa.table([pa.array([MARKET] * len(ids)), ids, lists], schema[name]))
                    first += len(vectors)
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
