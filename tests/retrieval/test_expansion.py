import itertools

import numpy as np
import pytest
from pyspark.sql import DataFrame, SparkSession

from csrm.retrieval import expansion
from csrm.retrieval.expansion import compared_vectors, market_centres

pytestmark = pytest.mark.spark

Rows = list[tuple[str, str, list[float]]]


def frames(
    spark: SparkSession, products: Rows, queries: Rows, words: list[tuple[str, str, str, float]]
) -> list[DataFrame]:
    return [
        spark.createDataFrame(products, "market string, product_id string, vector array<float>"),
        spark.createDataFrame(queries, "market string, query_id string, vector array<float>"),
        spark.createDataFrame(words, "market string, query_id string, product_id string, strength double"),
    ]


def vectors(df: DataFrame) -> dict[tuple[str, str], list[float]]:
    return {(row[0], row[1]): row["vector"] for row in df.collect()}


def test_vectors_are_those_worked_by_hand(spark: SparkSession) -> None:
    products = [("us", "p1", [2.0, 0.0]), ("us", "p2", [0.0, 1.0]), ("us", "p3", [0.0, 0.0]), ("kr", "p1", [0.0, 4.0])]
    queries = [
        ("us", "found", [1.0, 0.0]),
        ("us", "alone", [1.0, 0.0]),
        ("us", "none", [0.0, 0.0]),
        ("kr", "found", [3.0, 0.0]),
        ("jp", "found", [0.0, 2.0]),
    ]
    words = [("us", "found", "p2", 1.0), ("us", "found", "p3", 9.0), ("kr", "found", "p1", 0.1)]
    df = frames(spark, products, queries, words)
    # us: p1 and p2 have the directions (1, 0) and (0, 1), p3 none; with the origin their mean is (1, 1) / 3
    assert market_centres(df[0])["us"] == pytest.approx([1 / 3, 1 / 3])
    found, moved = map(vectors, compared_vectors(*df))
    root = np.sqrt(5)
    assert found.keys() == {("us", "p1"), ("us", "p2"), ("kr", "p1")}
    assert found["us", "p1"] == pytest.approx([2 / root, -1 / root])
    assert found["us", "p2"] == pytest.approx([-1 / root, 2 / root])
    assert found["kr", "p1"] == pytest.approx([0.0, 1.0])  # a market's only product keeps its direction
    assert moved.keys() == {("us", "found"), ("us", "alone"), ("kr", "found"), ("jp", "found")}
    assert moved["us", "alone"] == pytest.approx([2 / root, -1 / root])  # words find it nothing
    assert moved["us", "found"] == pytest.approx([1 / root, 1 / root])  # with p2; p3, which is first, has no vector
    # kr: the centre is (0, 1/2); the query (1, -1/2) of length 1, and p1 beside it
    assert moved["kr", "found"] == pytest.approx([2 / root, 1 - 1 / root])
    assert moved["jp", "found"] == pytest.approx([0.0, 1.0])  # a market without products


def test_a_query_moves_to_the_first_two_titles_that_its_words_find(spark: SparkSession) -> None:
    units = np.eye(4).tolist()
    products = [("us", f"p{place}", units[place]) for place in range(4)]
    words = [("us", "q1", "p3", 2.0), ("us", "q1", "p2", 1.0), ("us", "q1", "p1", 1.0), ("us", "q1", "p0", 0.5)]
    found, moved = map(vectors, compared_vectors(*frames(spark, products, [("us", "q1", units[0])], words)))
    expected = np.add(found["us", "p0"], np.add(found["us", "p3"], found["us", "p1"]) / 2)  # of equals the smaller id
    assert moved["us", "q1"] == pytest.approx(expected)


def test_vectors_are_the_same_to_the_last_digit_for_any_partitioning(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expansion, "CENTRE_PRODUCTS", 7)
    rng = np.random.default_rng(0)
    products = [(("us", "kr")[n % 2], f"p{n}", rng.normal(size=5).tolist()) for n in range(40)]
    queries = [(("us", "kr")[n % 2], f"q{n}", rng.normal(size=5).tolist()) for n in range(12)]
    pairs = itertools.product(queries, products)
    words = [(market, query, product, 1.0) for (market, query, _), (other, product, _) in pairs if market == other]
    results = []
    for count in (1, 3, 8):
        shuffled = [[rows[place] for place in rng.permutation(len(rows))] for rows in (products, queries, words)]
        df = [frame.repartition(count) for frame in frames(spark, *shuffled)]
        results.append([vectors(frame) for frame in compared_vectors(*df)])
    assert results[0] == results[1] == results[2]
    assert len(results[0][0]) == 40
    of_all = np.mean([np.array(v) / np.linalg.norm(v) for market, _, v in products if market == "us"], axis=0)
    assert not np.allclose(market_centres(frames(spark, products, queries, words)[0])["us"], of_all)  # of seven
