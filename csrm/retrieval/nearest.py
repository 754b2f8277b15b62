"""Exact search by vectors: every product is compared with every query of its market, in blocks.

A task takes some products and meets all queries of a chunk, which are broadcast. Each block is one matrix product in
float32; what may be among the best of a few blocks by it is computed again in float64, one pair at a time. So a pair's
similarity, and with it the order of pairs, does not depend on the block that it was in.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from csrm.embedding.contents import QUERIES_PER_CHUNK
from csrm.errors import InputError
from csrm.retrieval.blocks import Blocks, NumpyBlocks, blocks_on
from csrm.spark.workers import task_device

_SIMILARITIES_PER_BLOCK = 16_000_000
_PRODUCTS_AT_ONCE = 16_384
_PAIRS_AT_ONCE = 100_000
_PAIRS_IN_CACHE = 512
_SCHEMA = "market string, query_id string, product_id string, similarity double"
_Near = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Products, queries and similarities of pairs."""


def near_pairs(
    products_df: DataFrame,
    queries_df: DataFrame,
    *,
    products_per_query: int,
    queries_per_product: int = 0,
    min_similarity: float = -1.0,
    num_partitions: int | None = None,
    queries_per_chunk: int = QUERIES_PER_CHUNK,
    device: str = "cpu",
) -> DataFrame:
    """Cosines of the nearest pairs: all that are among a query's best products or a product's best queries.

    Pairs that are neither may be there too: `candidates.best_pairs` chooses. Equal similarities go to the smaller id.
    Queries without a vector, or with one of length 0, find nothing, and such products are not found.

    Args:
        products_df: market, product_id, vector (array of float); each product once.
        queries_df: market, query_id, vector; each query once. They are collected to the driver, a chunk at a time.
        products_per_query: best products of a query in its market, >= 0.
        queries_per_product: best queries of a product in its market, >= 0.
        min_similarity: smallest cosine of a pair, in [-1, 1].
        num_partitions: tasks over the products; None: Spark's default parallelism. Each gives the best of its own, so
            that many tasks make many rows.
        queries_per_chunk: queries that are broadcast at once.
        device: cpu; or cuda, where tasks compare on a GPU if their machine has torch and one, else on the CPU.

    Returns:
        market, query_id, product_id, similarity (double, in [min_similarity, 1]); each pair once. The same whatever
        the partitions and chunks are, once best_pairs has chosen.

    Raises:
        InputError: the vectors do not all have the same number of dimensions.
    """
    spark = products_df.sparkSession
    size = F.size("vector")
    sizes = [
        sorted(row[0] for row in df.where("vector IS NOT NULL").select(size).distinct().collect())
        for df in (queries_df, products_df)
    ]
    if len({*sizes[0], *sizes[1]}) > 1:
        raise InputError(
            f"vectors: expected one number of dimensions, got {sizes[0]} of queries and {sizes[1]} of products. "
            "Were all made by the same encoder?"
        )
    count = num_partitions or spark.sparkContext.defaultParallelism
    products_df = (
        products_df.where("vector IS NOT NULL")
        .select("market", "product_id", "vector")
        .repartition(count)
        .sortWithinPartitions("market", "product_id")
    )
    num_chunks = max(1, -(-queries_df.count() // queries_per_chunk))
    chunk = F.pmod(F.xxhash64("market", "query_id"), F.lit(num_chunks))
    parts = []
    for number in range(num_chunks):
        chunk_df = queries_df.where("vector IS NOT NULL").where(chunk == number)
        queries = _by_market(chunk_df.select("market", "query_id", "vector").toArrow())
        if queries:
            shared = spark.sparkContext.broadcast(queries)

            def search(batches: Iterator[pa.RecordBatch], shared: object = shared) -> Iterator[pa.RecordBatch]:
                known: dict[str, Vectors] = shared.value  # type: ignore[attr-defined]
                ways = (products_per_query, queries_per_product, min_similarity)
                yield from search_batches(batches, known, *ways, device=task_device(device))

            parts.append(products_df.mapInArrow(search, _SCHEMA))
    return reduce(DataFrame.unionByName, parts) if parts else spark.createDataFrame([], _SCHEMA)


@dataclass(frozen=True)
class Vectors:
    """Unit vectors with their ids, in the order of ids."""

    ids: list[str]
    matrix: np.ndarray
    """Shape (len(ids), dimensions), float32."""


def unit_vectors(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of length 1 in float32, and which rows have a finite length above 0; the others are left out.

    Args:
        vectors: shape (rows, dimensions).
    """
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    has_length = np.isfinite(lengths) & (lengths > 0)
    return (vectors[has_length] / lengths[has_length, None]).astype(np.float32), has_length


def search_batches(
    batches: Iterator[pa.RecordBatch],
    queries: dict[str, Vectors],
    products_per_query: int,
    queries_per_product: int,
    min_similarity: float,
    *,
    device: str = "cpu",
) -> Iterator[pa.RecordBatch]:
    """Nearest pairs of one task's products; tested without Spark.

    Args:
        batches: market, product_id, vector, in the order of market and product_id.
        queries: market to its queries.
        products_per_query: best products of a query among these.
        queries_per_product: best queries of a product among these.
        min_similarity: smallest cosine.
        device: see blocks.blocks_on.
    """
    market, nearest, ids = "", None, list[str]()
    for batch in batches:
        names = batch.column(0).to_pylist()
        vectors = batch.column(2)
        starts = [0, *(row for row in range(1, len(names)) if names[row] != names[row - 1]), len(names)]
        for start, end in pairwise(starts):
            if start == end or names[start] not in queries:
                continue
            if nearest is None or names[start] != market:
                if nearest is not None:
                    yield from _rows(market, queries[market].ids, ids, nearest)
                market, ids = names[start], []
                matrix = queries[market].matrix
                ways = (products_per_query, queries_per_product, min_similarity)
                nearest = NearestPairs(matrix, *ways, blocks=blocks_on(device, matrix))
            ids += batch.column(1).slice(start, end - start).to_pylist()
            nearest.add(vectors_matrix(vectors.slice(start, end - start)))
    if nearest is not None:
        yield from _rows(market, queries[market].ids, ids, nearest)


class NearestPairs:
    """The nearest pairs of products, which come in blocks in the order of their ids, and queries, which are known."""

    def __init__(
        self,
        queries: np.ndarray,
        products_per_query: int,
        queries_per_product: int,
        min_similarity: float = -1.0,
        *,
        blocks: Blocks | None = None,
    ) -> None:
        """Start without products.

        Args:
            queries: unit vectors in the order of their ids, shape (queries, dimensions), float32.
            products_per_query: best products of a query, >= 0.
            queries_per_product: best queries of a product, >= 0.
            min_similarity: smallest cosine.
            blocks: what compares products with these queries; None: numpy.
        """
        self._queries, self._blocks = queries, blocks or NumpyBlocks(queries)
        self._products_per_query, self._queries_per_product = products_per_query, queries_per_product
        # float32 sums of d products of numbers whose squares add up to 1 err by at most about d / 2^24
        self._slack = 2.0 * queries.shape[1] * 2.0**-24 + 1e-6
        self._min_similarity = min_similarity
        self._bounds = np.full(len(queries), min_similarity - self._slack, np.float32)
        """Similarity in float32 that a product must have to be among a query's best so far."""
        self._num_products = 0
        self._pools: list[np.ndarray] = []
        """Rows of query, product, similarity, which are numbers of rows and float64."""
        self._of_products: list[np.ndarray] = []
        """The same for the best queries of products, which are final."""

    def add(self, vectors: np.ndarray) -> None:
        """Compare more products.

        Args:
            vectors: of any length, shape (products, dimensions).
        """
        for start in range(0, len(vectors), _PRODUCTS_AT_ONCE):
            units, has_length = unit_vectors(vectors[start : start + _PRODUCTS_AT_ONCE])
            self._add_units(units, self._num_products + start + np.flatnonzero(has_length))
        self._num_products += len(vectors)

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Places of queries, places of products in the order that they came in, and similarities; each pair once."""
        self._keep_best()
        rows = np.concatenate([*self._pools, *self._of_products, np.empty((0, 3))])
        queries, products = rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64)
        _, first = np.unique(queries * self._num_products + products, return_index=True)
        return queries[first], products[first], rows[first, 2]

    def _add_units(self, units: np.ndarray, places: np.ndarray) -> None:
        """Add what is near by float32, in blocks; then, of what is still near after all of them, by float64."""
        block = max(1, _SIMILARITIES_PER_BLOCK // max(1, len(self._queries)))
        most = max(_PAIRS_AT_ONCE, len(self._queries) * self._products_per_query)
        near: _Near = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
        for start in range(0, len(units), block):
            part = units[start : start + block]
            similarities = self._blocks.compare(part)
            if count := self._products_per_query:
                if not self._pools and not len(near[0]) and len(part) >= count:  # else all of the first block are near
                    first = self._blocks.largest_of_queries(similarities, count) - np.float32(self._slack)
                    self._bounds = np.maximum(self._bounds, first)
                products, queries, values = self._blocks.near(similarities, self._bounds)
                near = (
                    np.concatenate([near[0], products + start]),
                    np.concatenate([near[1], queries]),
                    np.concatenate([near[2], values]),
                )
                if len(near[0]) > most:
                    near = self._still_near(*near)
            if count := min(self._queries_per_product, len(self._queries)):
                worst = self._blocks.largest_of_products(similarities, count) - np.float32(self._slack)
                products, queries, _ = self._blocks.near(similarities, worst[:, None])
                rows = self._exact(units, places, products + start, queries)
                self._of_products.append(_first_of_each(rows, by=1, then=0, count=count))
        if len(near[0]):
            self._pools.append(self._exact(units, places, *self._still_near(*near)[:2]))
        if sum(map(len, self._pools)) > 2 * most:
            self._keep_best()

    def _still_near(self, products: np.ndarray, queries: np.ndarray, similarities: np.ndarray) -> _Near:
        """Those that are near beside each other too. Each bound rises to that of the query's best so far."""
        all_queries = np.concatenate([*(rows[:, 0].astype(np.int64) for rows in self._pools), queries])
        values = np.concatenate([*(rows[:, 2] for rows in self._pools), similarities])
        keys = np.sort(4.0 * all_queries + (1.5 - values))  # of each query the best first, as 1.5 - values is in (0, 3)
        counts = np.bincount(all_queries, minlength=len(self._queries))
        full = np.flatnonzero(counts >= self._products_per_query)
        last = (np.cumsum(counts) - counts)[full] + self._products_per_query - 1
        bounds = (4.0 * full + 1.5 - keys[last] - self._slack).astype(np.float32)
        self._bounds[full] = np.maximum(self._bounds[full], bounds)
        is_near = similarities >= self._bounds[queries]
        return products[is_near], queries[is_near], similarities[is_near]

    def _exact(self, units: np.ndarray, places: np.ndarray, products: np.ndarray, queries: np.ndarray) -> np.ndarray:
        """Rows of query, product, similarity in float64 for pairs of these units and queries."""
        found = np.empty(len(products))
        for start in range(0, len(products), _PAIRS_IN_CACHE):
            part = slice(start, start + _PAIRS_IN_CACHE)
            a, b = units[products[part]].astype(np.float64), self._queries[queries[part]].astype(np.float64)
            found[part] = np.einsum("ij,ij->i", a, b)
        rows = np.column_stack([queries, places[products], np.clip(found, -1.0, 1.0)])
        return rows[rows[:, 2] >= self._min_similarity]

    def _keep_best(self) -> None:
        if self._pools:
            self._pools = [_first_of_each(np.concatenate(self._pools), by=0, then=1, count=self._products_per_query)]


def _first_of_each(rows: np.ndarray, *, by: int, then: int, count: int) -> np.ndarray:
    """The rows with the highest similarities of each value of a column; equal ones go to the smaller other value."""
    ordered = rows[np.lexsort((rows[:, then], -rows[:, 2], rows[:, by]))]
    starts = np.flatnonzero(np.r_[True, ordered[1:, by] != ordered[:-1, by]]) if len(ordered) else np.empty(0, int)
    rank = np.arange(len(ordered)) - np.repeat(starts, np.diff(np.r_[starts, len(ordered)]))
    return ordered[rank < count]


def _by_market(table: pa.Table) -> dict[str, Vectors]:
    """Queries of each market, in the order of their ids."""
    table = table.sort_by([("market", "ascending"), ("query_id", "ascending")]).combine_chunks()
    found = {}
    for market in table.column("market").unique().to_pylist():
        part = table.filter(pa.compute.equal(table.column("market"), market)).combine_chunks()
        matrix, has_length = unit_vectors(vectors_matrix(part.column("vector")))
        ids = [id_ for id_, is_kept in zip(part.column("query_id").to_pylist(), has_length, strict=True) if is_kept]
        if ids:
            found[market] = Vectors(ids, matrix)
    return found


def vectors_matrix(vectors: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Lists of one length as rows, float32."""
    if isinstance(vectors, pa.ChunkedArray):
        return np.concatenate([vectors_matrix(chunk) for chunk in vectors.chunks])
    return np.asarray(vectors.flatten().to_numpy(zero_copy_only=False), np.float32).reshape(len(vectors), -1)


def _rows(market: str, query_ids: list[str], product_ids: list[str], nearest: NearestPairs) -> Iterator[pa.RecordBatch]:
    queries, products, similarities = nearest.pairs()
    for start in range(0, len(queries), _PAIRS_AT_ONCE):
        part = slice(start, start + _PAIRS_AT_ONCE)
        yield pa.record_batch(
            {
                "market": pa.array([market] * len(queries[part]), pa.string()),
                "query_id": pa.array(query_ids, pa.string()).take(pa.array(queries[part])),
                "product_id": pa.array(product_ids, pa.string()).take(pa.array(products[part])),
                "similarity": pa.array(similarities[part]),
            }
        )
