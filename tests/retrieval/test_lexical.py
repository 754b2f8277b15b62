import math
from itertools import product

import bm25s
import numpy as np
import pytest
from pyspark.sql import DataFrame, SparkSession

from csrm.retrieval.lexical import bm25_scores, product_terms, query_terms
from csrm.text import search_terms

pytestmark = pytest.mark.spark

CATALOG_SCHEMA = (
    "market string, product_id string, title string, brand string, category string, attributes map<string,string>"
)
TITLES = [
    "Red running shoe, red sole",
    "Blue running shoe",
    "無線藍牙耳機 降噪",
    "藍牙音箱 防水 無線",
    "무선 블루투스 이어폰 LG전자",
    "블루투스 스피커 방수",
    "ワイヤレス イヤホン ノイズ",
    "Red",
]
QUERIES = ["red shoe", "red red shoe", "藍牙耳機", "블루투스 이어폰", "イヤホン", "running 無線", "nothing here"]


def catalog(spark: SparkSession, rows: list[tuple[object, ...]]) -> DataFrame:
    return spark.createDataFrame([(row + (None,) * 6)[:6] for row in rows], CATALOG_SCHEMA)


def queries(spark: SparkSession, rows: list[tuple[str, str, str | None]]) -> DataFrame:
    return spark.createDataFrame(rows, "market string, query_id string, query string")


def scores(
    spark: SparkSession, products: list[tuple[object, ...]], texts: list[tuple[str, str, str | None]], **options: float
) -> dict[tuple[str, str, str], float]:
    scores_df = bm25_scores(product_terms(catalog(spark, products)), query_terms(queries(spark, texts)), **options)
    rows = scores_df.collect()
    result = {(row.market, row.query_id, row.product_id): row.bm25 for row in rows}
    assert len(result) == len(rows)
    return result


@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (0.6, 0.3)])
def test_bm25_equals_that_of_bm25s(spark: SparkSession, k1: float, b: float) -> None:
    library = bm25s.BM25(method="lucene", k1=k1, b=b)
    library.index([search_terms(title) for title in TITLES], show_progress=False)
    found = scores(
        spark,
        [("tw", f"p{i}", title) for i, title in enumerate(TITLES)],
        [("tw", f"q{i}", query) for i, query in enumerate(QUERIES)],
        k1=k1,
        b=b,
    )
    for query_index, query in enumerate(QUERIES):
        known = [term for term in search_terms(query) if term in library.vocab_dict]
        expected = library.get_scores(known) if known else np.zeros(len(TITLES))
        for title_index in range(len(TITLES)):
            pair = ("tw", f"q{query_index}", f"p{title_index}")
            assert found.get(pair, 0.0) == pytest.approx(expected[title_index], abs=1e-5)
            assert (pair in found) == (expected[title_index] > 0)


def test_each_market_has_its_own_statistics_and_products(spark: SparkSession) -> None:
    found = scores(
        spark,
        [("us", "p1", "red shoe"), ("us", "p2", "red"), ("kr", "p1", "red"), ("kr", "p3", "!!!")],
        [("us", "q1", "red"), ("kr", "q1", "red"), ("tw", "q1", "red")],
    )
    # us: N = 2, n = 2, mean length 1.5. kr: N = 1, because p3 has no terms; length = mean length.
    assert found == {
        ("us", "q1", "p1"): pytest.approx(math.log(1 + 0.5 / 2.5) / (1 + 1.2 * (0.25 + 0.75 * 2 / 1.5)), abs=1e-8),
        ("us", "q1", "p2"): pytest.approx(math.log(1 + 0.5 / 2.5) / (1 + 1.2 * (0.25 + 0.75 * 1 / 1.5)), abs=1e-8),
        ("kr", "q1", "p1"): pytest.approx(math.log(1 + 0.5 / 1.5) / (1 + 1.2), abs=1e-8),
    }


def test_products_are_found_by_title_brand_category_and_attribute_values(spark: SparkSession) -> None:
    attributes = {"color": "red", "size": None}
    terms_df = product_terms(
        catalog(
            spark,
            [
                ("us", "p1", "Shoe", "Acme", "Sport > Shoes", attributes),
                ("us", "p2", "Shoe"),
                ("us", "p3", None, "Acme"),
                ("us", "p4", " \u3000", "Acme"),
            ],
        )
    )
    assert {row.product_id: row.terms for row in terms_df.collect()} == {
        "p1": ["shoe", "acme", "sport", "shoes", "red"],
        "p2": ["shoe"],
    }


def test_frequent_terms_are_ignored_but_a_querys_rarest(spark: SparkSession) -> None:
    titles = ["phone case red", "phone case", "phone", "cable"]
    products = [("us", f"p{i}", title) for i, title in enumerate(titles, start=1)]
    texts = [("us", "q1", "phone red"), ("us", "q2", "phone case"), ("us", "q3", "phone"), ("us", "q4", None)]
    # A quarter of the products has "red", a half "case", three quarters "phone".
    found = scores(spark, products, texts, max_term_share=0.25)
    assert sorted(pair[1:] for pair in found) == [
        ("q1", "p1"),
        ("q2", "p1"),
        ("q2", "p2"),
        ("q3", "p1"),
        ("q3", "p2"),
        ("q3", "p3"),
    ]
    alone = scores(spark, products, [("us", "q1", "red")])
    assert found["us", "q1", "p1"] == alone["us", "q1", "p1"]


def test_scores_do_not_depend_on_how_rows_are_distributed(spark: SparkSession) -> None:
    titles = [f"{a} {b} c{i % 3}" for i, (a, b) in enumerate(product("xyz", "uvw"))]
    products_df = catalog(spark, [("us", f"p{i}", title) for i, title in enumerate(titles)])
    queries_df = queries(spark, [("us", "q1", "x u c0 y v c1"), ("us", "q2", "z w c2 u")])
    one = bm25_scores(product_terms(products_df).coalesce(1), query_terms(queries_df).coalesce(1)).collect()
    other = bm25_scores(product_terms(products_df).repartition(5), query_terms(queries_df).repartition(2)).collect()
    assert len(one) > 0
    assert sorted(one) == sorted(other)
