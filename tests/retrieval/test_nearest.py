from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyspark.sql import Column, SparkSession
from pyspark.sql import functions as F

from csrm.errors import InputError
from csrm.retrieval import nearest
from csrm.retrieval.blocks import NumpyBlocks, TorchBlocks, blocks_on
from csrm.retrieval.candidates import best_pairs
from csrm.retrieval.nearest import NearestPairs, Vectors, near_pairs, search_batches, unit_vectors


def test_similarities_are_those_worked_by_hand() -> None:
    queries, _ = unit_vectors(np.array([[1.0, 0.0], [0.0, 2.0]]))
    found = NearestPairs(queries, products_per_query=2, queries_per_product=0)
    found.add(np.array([[3.0, 4.0], [0.0, 0.0], [-1.0, 0.0]]))  # the second has no direction
    found.add(np.array([[5.0, 0.0], [4.0, -3.0], [np.nan, 1.0]]))
    pairs = {(int(query), int(product)): similarity for query, product, similarity in zip(*found.pairs(), strict=True)}
    assert pairs == {
        (0, 3): pytest.approx(1.0, abs=1e-6),
        (0, 4): pytest.approx(0.8, abs=1e-6),
        (1, 0): pytest.approx(0.8, abs=1e-6),
        (1, 2): pytest.approx(0.0, abs=1e-6),  # as near as product 3, whose place is later
    }


def brute_force(queries: np.ndarray, products: np.ndarray, count: int) -> list[list[int]]:
    """Best products of each query; equal similarities go to the first product."""
    a, b = unit_vectors(queries)[0].astype(np.float64), unit_vectors(products)[0].astype(np.float64)
    similarities = np.array([[float((x * y).sum()) for y in b] for x in a]).round(12)
    return [sorted(range(len(b)), key=lambda place: (-row[place], place))[:count] for row in similarities]


@pytest.mark.parametrize("has_torch", [False, True], ids=["numpy", "torch"])
@pytest.mark.parametrize("block", [7, 64, 100_000])
def test_the_best_are_those_of_brute_force_whatever_the_blocks(
    block: int, has_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "_SIMILARITIES_PER_BLOCK", 40 * block)
    monkeypatch.setattr(nearest, "_PRODUCTS_AT_ONCE", 50)
    monkeypatch.setattr(nearest, "_PAIRS_AT_ONCE", 160)
    rng = np.random.default_rng(0)
    queries, distinct = rng.normal(size=(40, 16)), rng.normal(size=(150, 16))
    products = distinct[rng.integers(len(distinct), size=400)] * rng.uniform(0.5, 2, size=(400, 1))  # many are alike
    units, _ = unit_vectors(queries)
    blocks = TorchBlocks(units, "cpu") if has_torch else NumpyBlocks(units)
    found = NearestPairs(units, products_per_query=9, queries_per_product=2, blocks=blocks)
    for start in range(0, 400, 90):
        found.add(products[start : start + 90])
    query, product, similarity = found.pairs()
    assert len(set(zip(query, product, strict=True))) == len(query)
    order = np.lexsort((product, -similarity.round(12), query))
    best = [[int(product[row]) for row in order if query[row] == number][:9] for number in range(40)]
    # vectors that differ in length alone may differ in the last digit of their unit vectors
    expected = brute_force(queries, products, 9)
    similarities = {(int(q), int(p)): s for q, p, s in zip(query, product, similarity, strict=True)}
    for number in range(40):
        got = sorted((similarities[number, place] for place in best[number]), reverse=True)
        a, b = unit_vectors(queries)[0][number].astype(float), unit_vectors(products)[0][expected[number]].astype(float)
        np.testing.assert_allclose(got, np.sort(b @ a)[::-1], atol=1e-12)
    order = np.lexsort((query, -similarity, product))
    of_products = [[int(query[row]) for row in order if product[row] == number][:2] for number in range(400)]
    assert of_products == brute_force(products, queries, 2)


def test_torch_finds_the_very_pairs_that_numpy_finds_also_where_titles_are_alike() -> None:
    rng = np.random.default_rng(3)
    queries, _ = unit_vectors(rng.normal(size=(70, 24)))
    products = rng.normal(size=(300, 24))[rng.integers(300, size=2_000)]  # each of these some seven times
    found = []
    for blocks in (NumpyBlocks(queries), TorchBlocks(queries, "cpu")):
        nearest_pairs = NearestPairs(queries, 5, 3, 0.1, blocks=blocks)
        for start in range(0, 2_000, 450):
            nearest_pairs.add(products[start : start + 450])
        found.append(nearest_pairs.pairs())
    for of_numpy, of_torch in zip(*found, strict=True):
        np.testing.assert_array_equal(of_numpy, of_torch)
    assert len(found[0][0]) > 70 * 5


def test_torch_multiplies_in_float32_where_the_machine_says_tf32() -> None:
    """Some container images set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which makes this the default."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    TorchBlocks(np.eye(2, dtype=np.float32), "cpu")
    assert torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision(before)


def test_a_device_without_torch_or_gpu_is_the_cpu() -> None:
    queries = np.eye(2, dtype=np.float32)
    assert isinstance(blocks_on("cpu", queries), NumpyBlocks)
    expected = TorchBlocks if torch.cuda.is_available() else NumpyBlocks
    assert isinstance(blocks_on("cuda:0", queries), expected)


def test_equal_products_go_to_the_smaller_id_and_markets_are_apart() -> None:
    names = [("kr", "p1"), ("us", "p1"), ("us", "p2"), ("us", "p3"), ("xx", "p4")]
    vectors = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    columns = [[market for market, _ in names], [id_ for _, id_ in names], vectors]
    types = [pa.string(), pa.string(), pa.list_(pa.float32())]
    whole = pa.record_batch(
        [pa.array(*pair) for pair in zip(columns, types, strict=True)], ["market", "product_id", "vector"]
    )
    queries = {market: Vectors(["q1"], np.array([[1.0, 0.0]], np.float32)) for market in ("kr", "us")}
    expected = [("kr", "q1", "p1", 1.0), ("us", "q1", "p2", pytest.approx(0.5**0.5, abs=1e-7))]
    for cuts in ([0, 5], [0, 1, 2, 3, 4, 5], [0, 3, 5]):
        batches = (whole.slice(start, end - start) for start, end in pairwise(cuts))
        found = search_batches(batches, queries, 1, 0, min_similarity=0.1)
        assert [tuple(row.values()) for batch in found for row in batch.to_pylist()] == expected


VECTORS = "market string, {} string, vector array<float>"


@pytest.mark.spark
def test_the_result_is_the_same_for_any_partitions_and_chunks(spark: SparkSession) -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(60, 8)).round(1).astype(np.float32)
    products = [(("us", "kr")[n % 2], f"p{n:02d}", vectors[n % 40].tolist()) for n in range(60)]
    queries = [(("us", "kr")[n % 2], f"q{n:02d}", rng.normal(size=8).tolist()) for n in range(20)]
    products_df = spark.createDataFrame([*products, ("us", "p99", None)], VECTORS.format("product_id"))
    queries_df = spark.createDataFrame([*queries, ("us", "q99", None)], VECTORS.format("query_id"))

    def found(num_partitions: int, queries_per_chunk: int) -> list[tuple[object, ...]]:
        pairs_df = near_pairs(
            products_df,
            queries_df,
            products_per_query=3,
            queries_per_product=1,
            num_partitions=num_partitions,
            queries_per_chunk=queries_per_chunk,
        )
        assert pairs_df.groupBy("market", "query_id", "product_id").count().where("count > 1").isEmpty()
        chosen_df = best_pairs(pairs_df.withColumnRenamed("similarity", "strength"), 3, 1)
        return sorted(tuple(row) for row in chosen_df.collect())

    one = found(1, 50_000)
    assert found(5, 7) == one
    for market in ("us", "kr"):
        ids, rows = zip(*[(id_, row) for of, id_, row in products if of == market], strict=True)
        of_market = [(id_, row) for of, id_, row in queries if of == market]
        expected = brute_force(np.array([row for _, row in of_market]), np.array(rows), 3)
        for (query_id, _), places in zip(of_market, expected, strict=True):
            best = [row[2] for row in one if row[:2] == (market, query_id) and row[3] == "query"]
            assert sorted(best) == sorted(ids[place] for place in places)
        assert {row[2] for row in one if row[0] == market} == set(ids)  # each product has its best query


@pytest.mark.spark
@pytest.mark.parametrize("num_partitions", [1, 4])
def test_the_best_are_those_of_sparks_own_exact_join(spark: SparkSession, num_partitions: int) -> None:
    rng = np.random.default_rng(2)
    products_df, queries_df = (
        spark.createDataFrame(
            [("us", f"{n:03d}", row) for n, row in enumerate(rng.normal(size=(count, 6)).tolist())],
            VECTORS.format(name),
        )
        for count, name in ((90, "product_id"), (25, "query_id"))
    )

    def sum_of(one: str, other: str) -> Column:
        products = F.zip_with(one, other, lambda a, b: a.cast("double") * b.cast("double"))
        return F.aggregate(products, F.lit(0.0), lambda total, product: total + product)

    of_product = products_df.select("product_id", F.col("vector").alias("of_product"))
    cosine = sum_of("vector", "of_product") / F.sqrt(sum_of("vector", "vector") * sum_of("of_product", "of_product"))
    joined_df = queries_df.nearestByJoin(of_product, cosine, 7, "exact", "similarity")
    expected = joined_df.select("market", "query_id", "product_id", cosine.alias("similarity"))

    pairs_df = near_pairs(products_df, queries_df, products_per_query=7, num_partitions=num_partitions)
    chosen_df = best_pairs(pairs_df.withColumnRenamed("similarity", "strength"), 7, 0)
    found_df = pairs_df.join(chosen_df.drop("source"), ["market", "query_id", "product_id"], "left_semi")
    similarities = {tuple(row)[1:3]: row["similarity"] for row in found_df.collect()}
    assert similarities == {tuple(row)[1:3]: pytest.approx(row["similarity"], abs=1e-6) for row in expected.collect()}
    assert len(similarities) == 25 * 7


@pytest.mark.spark
def test_vectors_of_other_dimensions_are_an_error(spark: SparkSession) -> None:
    products_df = spark.createDataFrame([("us", "p1", [1.0, 0.0])], VECTORS.format("product_id"))
    queries_df = spark.createDataFrame([("us", "q1", [1.0, 0.0, 0.0])], VECTORS.format("query_id"))
    with pytest.raises(InputError, match=r"got \[3\] of queries and \[2\] of products"):
        near_pairs(products_df, queries_df, products_per_query=1)
    assert near_pairs(products_df, queries_df.limit(0), products_per_query=1).count() == 0
