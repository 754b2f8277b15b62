import pytest
from pyspark.sql import DataFrame, SparkSession

from csrm.retrieval.candidates import (
    best_pairs,
    coverage_by_language,
    uncovered_products,
    with_given_pairs,
    with_pairs_of,
)
from csrm.retrieval.lexical import query_terms

pytestmark = pytest.mark.spark

PAIR = "market string, query_id string, product_id string"


def rows(df: DataFrame) -> list[tuple[object, ...]]:
    return sorted(tuple(row) for row in df.collect())


def test_best_products_of_queries_and_best_queries_of_products_are_united(spark: SparkSession) -> None:
    scores_df = spark.createDataFrame(
        [
            ("us", "q1", "p1", 3.0),
            ("us", "q1", "p2", 2.0),
            ("us", "q1", "p3", 2.0),
            ("us", "q1", "p4", 1.0),
            ("us", "q2", "p1", 5.0),
            ("us", "q2", "p4", 0.9),
            ("kr", "q1", "p4", 0.5),
        ],
        f"{PAIR}, strength double",
    )
    assert rows(best_pairs(scores_df, products_per_query=2, queries_per_product=1)) == [
        ("kr", "q1", "p4", "query"),
        ("us", "q1", "p1", "query"),
        ("us", "q1", "p2", "query"),
        ("us", "q1", "p3", "product"),
        ("us", "q1", "p4", "product"),
        ("us", "q2", "p1", "query"),
        ("us", "q2", "p4", "query"),
    ]
    assert rows(best_pairs(scores_df, products_per_query=1, queries_per_product=0)) == [
        ("kr", "q1", "p4", "query"),
        ("us", "q1", "p1", "query"),
        ("us", "q2", "p1", "query"),
    ]


def test_a_product_whose_queries_score_alike_gets_the_smaller_query_id(spark: SparkSession) -> None:
    scores_df = spark.createDataFrame([("us", q, "p1", 1.0) for q in ("q3", "q1", "q2")], f"{PAIR}, strength double")
    assert rows(best_pairs(scores_df, products_per_query=0, queries_per_product=2)) == [
        ("us", "q1", "p1", "product"),
        ("us", "q2", "p1", "product"),
    ]


def test_pairs_that_words_find_keep_their_source_where_translations_find_them_too(spark: SparkSession) -> None:
    schema = f"{PAIR}, source string"
    pairs_df = spark.createDataFrame([("tw", "q1", "p1", "query"), ("tw", "q1", "p2", "product")], schema)
    translated_df = spark.createDataFrame(
        [("tw", "q1", "p2", "query"), ("tw", "q1", "p3", "query"), ("tw", "q2", "p4", "product")], schema
    )
    assert rows(with_pairs_of(pairs_df, translated_df, "translated")) == [
        ("tw", "q1", "p1", "query"),
        ("tw", "q1", "p2", "product"),
        ("tw", "q1", "p3", "translated"),
        ("tw", "q2", "p4", "translated"),
    ]


def test_given_pairs_win_and_stay_even_if_nothing_is_known_of_them(spark: SparkSession) -> None:
    schema = f"{PAIR}, source string"
    pairs_df = spark.createDataFrame([("us", "q1", "p1", "query"), ("us", "q1", "p2", "product")], schema)
    given_df = spark.createDataFrame([("us", "q1", "p2", None), ("us", "q8", "p9", "x")], schema)
    assert rows(with_given_pairs(pairs_df, given_df)) == [
        ("us", "q1", "p1", "query"),
        ("us", "q1", "p2", "given"),
        ("us", "q8", "p9", "given"),
    ]


def test_products_in_no_pair_are_listed_with_the_reason(spark: SparkSession) -> None:
    catalog_df = spark.createDataFrame(
        [
            ("us", "p1", "red shoe", None, None, None),
            ("us", "p2", None, "shoe", None, None),
            ("us", "p3", " ", None, None, None),
            ("us", "p4", "lamp", None, None, {"form": "globe"}),
            ("us", "p5", "RED hat", None, None, None),
            ("us", "p6", "!!!", None, None, None),
            ("us", "p7", "cup", None, None, None),
            ("kr", "p1", "red shoe", None, None, None),
        ],
        "market string, product_id string, title string, brand string, category string, attributes map<string,string>",
    )
    queries_df = spark.createDataFrame(
        [("us", "q1", "red shoe"), ("kr", "q1", "lamp"), ("us", "q2", None), ("us", "q3", "!")],
        "market string, query_id string, query string",
    )
    candidates_df = spark.createDataFrame(
        [
            ("us", "q1", "p1", "query"),
            ("us", "q2", "p5", "given"),  # its query is blank
            ("us", "q9", "p4", "given"),  # its query does not exist
            ("kr", "q3", "p1", "given"),  # nor does this one, in its market
            ("us", "q3", "p7", "given"),  # no term, but a text to score
        ],
        f"{PAIR}, source string",
    )
    assert rows(uncovered_products(catalog_df, queries_df, query_terms(queries_df), candidates_df)) == [
        ("kr", "p1", "no_shared_term"),
        ("us", "p2", "no_title"),
        ("us", "p3", "no_title"),
        ("us", "p4", "no_shared_term"),
        ("us", "p5", "not_among_best"),
        ("us", "p6", "no_shared_term"),
    ]
    translated_df = spark.createDataFrame([("us", "p4"), ("us", "p1")], "market string, product_id string")
    uncovered_df = uncovered_products(catalog_df, queries_df, query_terms(queries_df), candidates_df, translated_df)
    assert ("us", "p4", "not_among_best") in rows(uncovered_df)
    uncovered_df = uncovered_products(catalog_df, queries_df, query_terms(queries_df), candidates_df, is_semantic=True)
    assert ("us", "p4", "too_dissimilar") in rows(uncovered_df)
    assert ("us", "p5", "not_among_best") in rows(uncovered_df)


def test_coverage_names_what_found_the_products_of_each_language(spark: SparkSession) -> None:
    catalog_df = spark.createDataFrame(
        [
            *(("tw", f"p{n}", "zh-TW") for n in range(4)),
            ("tw", "p4", None),
            *(("tw", f"k{n}", "ko") for n in range(4)),
            ("us", "p0", "en"),
        ],
        "market string, product_id string, language string",
    )
    queries_df = spark.createDataFrame(
        [("tw", "q1", "燈"), ("tw", "q2", None), ("us", "q1", "lamp")],
        "market string, query_id string, query string",
    )
    candidates_df = spark.createDataFrame(
        [
            ("tw", "q1", "p0", "query"),
            ("tw", "q1", "p1", "given"),
            ("tw", "q2", "p2", "given"),  # its query is blank
            ("tw", "q9", "p3", "given"),  # its query does not exist
            ("tw", "q1", "p4", "product"),
            ("tw", "q1", "k0", "translated"),
            ("tw", "q1", "k1", "product"),
            ("tw", "q3", "k1", "translated"),
            ("tw", "q1", "k3", "semantic"),
            ("tw", "q1", "k0", "semantic"),
            ("us", "q1", "k2", "query"),  # of another market
        ],
        f"{PAIR}, source string",
    )
    coverage_df = coverage_by_language(catalog_df, queries_df, candidates_df, {"tw": "zh-TW", "us": "en"})
    assert coverage_df.columns == [
        *("market", "language", "products", "words", "translated", "semantic", "given", "uncovered")
    ]
    assert rows(coverage_df) == [
        ("tw", "ko", 4, 1, 1, 1, 0, 1),
        ("tw", "zh-tw", 5, 2, 0, 0, 1, 2),
        ("us", "en", 1, 0, 0, 0, 0, 1),
    ]
