"""Vectors as the search by meaning compares them: seen from their market's centre, queries moved to what words find.

All texts of an encoder share a direction, and all texts of a language one more. Without it, titles in other languages
come nearer: Mu and Viswanath, "All-but-the-Top: Simple and Effective Postprocessing for Word Representations", 2018.
The first titles that a query finds by its words say more of what is meant than the query alone: Rocchio, "Relevance
feedback in information retrieval", 1971; Li, Mourad, Zhuang, Koopman and Zuccon, "Pseudo Relevance Feedback with Deep
Language Models and Dense Retrievers: Successes and Pitfalls", 2022.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from csrm.retrieval.nearest import unit_vectors, vectors_matrix

CENTRE_PRODUCTS = 1_000
"""Products of a market that its centre is computed from, at most; chosen by a hash of their ids."""
TITLES_OF_WORDS = 2
"""Products that a query finds first by its words, and moves to."""


def compared_vectors(products_df: DataFrame, queries_df: DataFrame, words_df: DataFrame) -> tuple[DataFrame, DataFrame]:
    """Products and queries as they are compared.

    A market's centre is the mean of its products' unit vectors, as if one more product were at the origin: so a
    market's only product keeps its direction. Products and queries are unit vectors less the centre, of length 1 again.
    A query is moved by the mean of the two products that it finds first by its words. Where it finds none, it is not.

    Args:
        products_df: market, product_id, vector (array of float, all of one length); each product once.
        queries_df: market, query_id, vector; each query once.
        words_df: market, query_id, product_id, strength (more is better; equal ones go to the smaller product), each
            pair once. Products that have no vector are not moved to.

    Returns:
        The first two frames with other vectors, those of queries of any length. The same, to the last digit, for any
        partitioning. Vectors that have no direction are left out.
    """
    centres = market_centres(products_df)
    products_df, queries_df = _from_centres(products_df, centres), _from_centres(queries_df, centres)
    of_query = Window.partitionBy("market", "query_id").orderBy(F.desc("strength"), F.asc("product_id"))
    titles_df = (
        words_df.withColumn("place", F.row_number().over(of_query))
        .where(F.col("place") <= TITLES_OF_WORDS)
        .select("market", "query_id", "product_id")
        .join(products_df, ["market", "product_id"], "inner")
        .groupBy("market", "query_id")
        .agg(F.array_sort(F.collect_list("vector")).alias("titles"))  # in one order, as rounding depends on it
    )
    moved = (
        "aggregate(titles, CAST(vector AS array<double>), "
        "(sum, title) -> zip_with(sum, title, (a, b) -> a + b / size(titles)))"
    )
    moved_df = queries_df.join(titles_df, ["market", "query_id"], "left").withColumn(
        "vector", F.expr(f"CAST(coalesce({moved}, vector) AS array<float>)")
    )
    return products_df, moved_df.select("market", "query_id", "vector")


def market_centres(products_df: DataFrame) -> dict[str, np.ndarray]:
    """Market to the centre of its products; see compared_vectors.

    Args:
        products_df: see compared_vectors.
    """
    in_market = Window.partitionBy("market").orderBy(F.xxhash64("product_id"), "product_id")
    chosen_df = (
        products_df.select("market", "product_id")
        .withColumn("place", F.row_number().over(in_market))
        .where(F.col("place") <= CENTRE_PRODUCTS)
    )
    table = products_df.join(chosen_df, ["market", "product_id"], "inner").orderBy("market", "place").toArrow()
    centres = {}
    for market in table.column("market").unique().to_pylist():
        of_market = table.filter(pa.compute.equal(table.column("market"), market))
        units, _ = unit_vectors(vectors_matrix(of_market.column("vector")))
        centres[market] = units.sum(axis=0, dtype=np.float64) / (len(units) + 1)
    return centres


def _from_centres(vectors_df: DataFrame, centres: Mapping[str, np.ndarray]) -> DataFrame:
    """Unit vectors less their market's centre, of length 1 again; a market without products has no centre."""

    def move(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if len(batch):
                yield moved_batch(batch, centres)

    return vectors_df.mapInArrow(move, vectors_df.schema)


def moved_batch(batch: pa.RecordBatch, centres: Mapping[str, np.ndarray]) -> pa.RecordBatch:
    """One batch of _from_centres, with its columns.

    Args:
        batch: market, an id, vector; at least one row.
        centres: market to its centre.
    """
    markets, place = np.unique(batch.column("market").to_numpy(zero_copy_only=False), return_inverse=True)
    vectors = vectors_matrix(batch.column("vector"))
    units, has_length = unit_vectors(vectors)
    centre = np.stack([centres.get(market, np.zeros(vectors.shape[1])) for market in markets])
    moved, is_moved = unit_vectors(units - centre[place[has_length]])
    rows = np.flatnonzero(has_length)[is_moved]
    offsets = pa.array(np.arange(len(moved) + 1, dtype=np.int32) * vectors.shape[1])
    found = pa.ListArray.from_arrays(offsets, pa.array(moved.ravel()))
    columns = [found if name == "vector" else batch.column(name).take(pa.array(rows)) for name in batch.schema.names]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
