import pytest
from pyspark.sql import DataFrame, SparkSession

from csrm.retrieval.lexical import product_terms, query_terms
from csrm.retrieval.titles import behaviour_titles, fused_titles, lexical_titles, split_judged

pytestmark = pytest.mark.spark

CATALOG_SCHEMA = (
    "market string, product_id string, title string, brand string, category string, attributes map<string,string>"
)


def catalog(spark: SparkSession, *rows: tuple[str, str, str | None]) -> DataFrame:
    return spark.createDataFrame([(*row, None, None, None) for row in rows], CATALOG_SCHEMA)


def queries(spark: SparkSession, *rows: tuple[str, str, str | None]) -> DataFrame:
    return spark.createDataFrame(list(rows), "market string, query_id string, query string")


def behaviour(spark: SparkSession, *rows: tuple[str, str, str, int]) -> DataFrame:
    return spark.createDataFrame(list(rows), "market string, query string, product_id string, count bigint")


def titles(titles_df: DataFrame) -> list[tuple[object, ...]]:
    return sorted(tuple(row) for row in titles_df.collect())


def test_the_strongest_titles_come_first_and_ties_go_to_the_smaller_id(spark: SparkSession) -> None:
    titles_df = behaviour_titles(
        behaviour(
            spark,
            ("us", "red shoe", "p1", 4),
            ("us", "red shoe", "p3", 8),
            ("us", "red shoe", "p2", 4),
            ("us", "red shoe", "p4", 3),
            ("us", "red shoe", "p5", 1),
            ("us", "blue shoe", "p5", 1),
        ),
        queries(spark, ("us", "q1", "red shoe"), ("us", "q2", "blue shoe"), ("us", "q3", None)),
        catalog(spark, *[("us", f"p{i}", f"Title {i}") for i in range(1, 6)]),
        num_titles=3,
        min_count=2,
    )
    assert titles(titles_df) == [
        ("us", "q1", 1, "p3", "Title 3", 1.0, "behaviour"),
        ("us", "q1", 2, "p1", "Title 1", 0.5, "behaviour"),
        ("us", "q1", 3, "p2", "Title 2", 0.5, "behaviour"),
    ]


def test_spellings_of_a_query_are_one_query_and_their_counts_are_summed(spark: SparkSession) -> None:
    titles_df = behaviour_titles(
        behaviour(spark, ("us", " Red  shoe", "p1", 1), ("us", "red\u3000SHOE", "p1", 1), ("us", " ", "p1", 9)),
        queries(spark, ("us", "q1", "red shoe "), ("us", "q2", "RED\tSHOE"), ("us", "q3", ""), ("kr", "q1", "red")),
        catalog(spark, ("us", "p1", "Shoe"), ("kr", "p1", "Other shoe")),
        num_titles=3,
        min_count=2,
    )
    assert titles(titles_df) == [
        ("us", "q1", 1, "p1", "Shoe", 1.0, "behaviour"),
        ("us", "q2", 1, "p1", "Shoe", 1.0, "behaviour"),
    ]


def test_the_same_text_in_another_unicode_form_is_one_query(spark: SparkSession) -> None:
    spellings = ["caf\u00e9", "cafe\u0301", "\uff43\uff41\uff46\u00e9", "\ufeffCAF\u00c9", "ca\u00adf\u00e9"]
    behaviour_df = behaviour(spark, ("fr", "cafe\u0301", "p1", 2))
    queries_df = queries(spark, *[("fr", f"q{place}", spelling) for place, spelling in enumerate(spellings)])
    titles_df = behaviour_titles(
        behaviour_df, queries_df, catalog(spark, ("fr", "p1", "Moka")), num_titles=1, min_count=1
    )
    judgments_df = spark.createDataFrame(
        [("fr", "q0", "p1", "E")], "market string, query_id string, product_id string, grade string"
    )
    unjudged_df, judged_df = split_judged(behaviour_df, queries_df, judgments_df)
    assert [row[1] for row in titles(titles_df)] == ["q0", "q1", "q2", "q3", "q4"]
    assert (unjudged_df.count(), judged_df.count()) == (0, 1)


def test_equal_titles_are_used_once_and_products_without_a_title_not_at_all(spark: SparkSession) -> None:
    titles_df = behaviour_titles(
        behaviour(spark, *[("us", "shoe", f"p{i}", 20 - i) for i in range(1, 7)]),
        queries(spark, ("us", "q1", "shoe")),
        catalog(
            spark,
            ("us", "p1", None),
            ("us", "p2", "\u3000\u200b"),
            ("us", "p3", "Red Shoe"),
            ("us", "p4", "red  shoe"),
            ("us", "p5", "Blue shoe"),
        ),
        num_titles=2,
        min_count=1,
    )
    assert titles(titles_df) == [
        ("us", "q1", 1, "p3", "Red Shoe", 1.0, "behaviour"),
        ("us", "q1", 2, "p5", "Blue shoe", 15 / 17, "behaviour"),
    ]


def test_behaviour_of_judged_pairs_is_left_out(spark: SparkSession) -> None:
    judgments_df = spark.createDataFrame(
        [("us", "q1", "p1", "I"), ("us", "q9", "p2", "E"), ("kr", "q1", "p2", "E")],
        "market string, query_id string, product_id string, grade string",
    )
    unjudged_df, judged_df = split_judged(
        behaviour(spark, ("us", "Shoe ", "p1", 5), ("us", "shoe", "p2", 3), ("us", "boot", "p1", 2)),
        queries(spark, ("us", "q1", "shoe"), ("us", "q2", "boot"), ("kr", "q1", "shoe")),
        judgments_df,
    )
    assert titles(unjudged_df) == [("us", "boot", "p1", 2), ("us", "shoe", "p2", 3)]
    assert titles(judged_df) == [("us", "Shoe ", "p1", 5)]


def test_lexical_titles_come_from_the_own_market_by_bm25(spark: SparkSession) -> None:
    catalog_df = catalog(
        spark,
        ("us", "p1", "red shoe"),
        ("us", "p2", "red shoe"),
        ("us", "p3", "red hat"),
        ("us", "p4", "blue hat"),
        ("us", "p5", None),
        ("kr", "p1", "red shoe of another market"),
    )
    terms_df = query_terms(queries(spark, ("us", "q1", "Red shoes, shoe"), ("us", "q2", "lamp"), ("us", "q3", None)))
    titles_df = lexical_titles(product_terms(catalog_df), terms_df, catalog_df, num_titles=5, max_term_share=1.0)
    # Four products of two terms each, so the length does not count: scores are in the ratio of the terms' idf.
    # red: 3 of 4 products, ln(1 + 1.5/3.5); shoe: 2 of 4, ln(1 + 2.5/2.5).
    red, shoe = 0.3566749439, 0.6931471806
    assert titles(titles_df) == [
        ("us", "q1", 1, "p1", "red shoe", 1.0, "lexical"),
        ("us", "q1", 2, "p3", "red hat", pytest.approx(red / (red + shoe), abs=1e-8), "lexical"),
    ]


def test_titles_of_several_sources_are_fused_by_reciprocal_rank(spark: SparkSession) -> None:
    schema = "market string, query_id string, product_id string, strength double"
    lexical_df = spark.createDataFrame(
        [("us", "q1", "p1", 9.0), ("us", "q1", "p2", 5.0), ("us", "q1", "p3", 1.0)], schema
    )
    semantic_df = spark.createDataFrame(
        [("us", "q1", "p3", 0.9), ("us", "q1", "p4", 0.8), ("us", "q1", "p2", 0.7), ("us", "q2", "p4", 0.1)], schema
    )
    catalog_df = catalog(spark, *[("us", f"p{number}", f"title {number}") for number in range(1, 5)])
    titles_df = fused_titles({"lexical": lexical_df, "semantic": semantic_df}, catalog_df, num_titles=3)
    best = 1 / 61 + 1 / 63
    assert titles(titles_df) == [
        ("us", "q1", 1, "p3", "title 3", 1.0, "semantic"),  # first by meaning, third by words
        ("us", "q1", 2, "p2", "title 2", pytest.approx((1 / 62 + 1 / 63) / best, abs=1e-6), "lexical"),
        ("us", "q1", 3, "p1", "title 1", pytest.approx(1 / 61 / best, abs=1e-6), "lexical"),
        ("us", "q2", 1, "p4", "title 4", 1.0, "semantic"),
    ]
