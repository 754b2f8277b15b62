import math

import pytest
from pyspark.sql import DataFrame, SparkSession

from csrm.errors import InputError
from csrm.retrieval.titles import translated_titles
from csrm.retrieval.translations import (
    MAX_TERMS,
    TranslatedProducts,
    phrases,
    term_translations,
    translated_products,
    translated_scores,
)

pytestmark = pytest.mark.spark

CATALOG = (
    "market string, product_id string, title string, brand string, category string, attributes map<string,string>, "
    "language string"
)
MARKETS = {"tw": "zh-TW", "us": "en"}


def catalog(spark: SparkSession, *rows: tuple[str, str, str | None, str | None]) -> DataFrame:
    return spark.createDataFrame([(*row[:3], None, None, None, row[3]) for row in rows], CATALOG)


def queries(spark: SparkSession, *rows: tuple[str, str, str | None, str | None]) -> DataFrame:
    return spark.createDataFrame(list(rows), "market string, query_id string, query string, language string")


def texts(spark: SparkSession, *rows: tuple[str | None, ...]) -> DataFrame:
    names = ("source_language", "target_language", "source_text", "target_text", "split")
    whole = [(*row, None)[:5] for row in rows]
    return spark.createDataFrame(whole, ", ".join(f"{name} string" for name in names))


def found(translated: TranslatedProducts | None, **options: float) -> dict[tuple[str, str, str], float]:
    assert translated is not None
    rows = translated_scores(translated, **options).collect()
    assert len({row[:3] for row in rows}) == len(rows)
    return {tuple(row[:3]): row.bm25 for row in rows}


def test_phrases_serve_both_directions_and_only_short_ones_of_split_train_are_used(spark: SparkSession) -> None:
    sentence = " ".join(f"w{n}" for n in range(MAX_TERMS + 1))
    phrases_df = phrases(
        texts(
            spark,
            ("ko", "en", "램프", "desk lamp Lamp"),
            ("EN", "ko", "lamp desk", "램프"),  # the same phrase
            ("ko", "en", "의자", "chair", "dev"),
            ("ko", "en", "의자", "chair", "test"),
            ("ko", "en", "모자", "hat", "train"),
            ("ko", "en", None, "null"),
            ("ko", "en", "문장", sentence),
            ("ko", "es", "램프", "lámpara"),
        ),
        [("en", "ko"), ("ko", "en")],
    )
    assert sorted(tuple(row) for row in phrases_df.collect()) == [
        ("en", "ko", ["desk", "lamp"], ["램프"]),
        ("en", "ko", ["hat"], ["모자"]),
        ("ko", "en", ["램프"], ["desk", "lamp"]),
        ("ko", "en", ["모자"], ["hat"]),
    ]


def test_terms_translate_each_other_as_exclusively_as_they_stand_together(spark: SparkSession) -> None:
    phrases_df = phrases(
        texts(
            spark,
            ("en", "es", "desk lamp", "lampara mesa"),
            ("en", "es", "floor lamp", "lampara pie"),
            ("en", "es", "lamp", "lampara"),
            ("en", "es", "desk", "escritorio"),
            *(("en", "es", f"other{n} desk", "mesa") for n in range(30)),
        ),
        [("en", "es")],
    )
    vocabulary_df = spark.createDataFrame(
        [("en", "lamp"), ("en", "floor"), ("es", "mesa")], "language string, term string"
    )
    rows = term_translations(phrases_df, vocabulary_df).collect()
    # lamp: 3 texts. lampara: 3 texts, all of them with lamp. pie: 1 text, with lamp. mesa: 31 texts, 1 of them with
    # lamp, 2 * 1 / (3 + 31) is below MIN_ASSOCIATION.
    assert {tuple(row[1:4]): row.weight for row in rows} == {
        ("es", "lamp", "lampara"): 1.0,
        ("es", "lamp", "pie"): pytest.approx(2 * 1 / (3 + 1)),
        ("es", "floor", "lampara"): pytest.approx(2 * 1 / (1 + 3)),
        ("es", "floor", "pie"): 1.0,
    }


PARALLEL = [("en", "es", "lamp", "lampara"), ("en", "es", "lamp", "luz"), ("en", "es", "red", "rojo")]


def test_translations_of_one_term_count_as_one_term(spark: SparkSession) -> None:
    catalog_df = catalog(
        spark,
        ("us", "p1", "lampara rojo", "es"),
        ("us", "p2", "luz azul", "es"),
        ("us", "p3", "luz lampara", "es"),
        ("us", "p4", "mesa azul", "es"),
        ("us", "p5", "red lamp", "en"),
        ("us", "p6", None, "es"),
        ("tw", "p1", "lampara rojo", None),
    )
    queries_df = queries(spark, ("us", "q1", "Red Lamp", None), ("us", "q2", "chair", None), ("us", "q3", None, None))
    with translated_products(catalog_df, queries_df, texts(spark, *PARALLEL), MARKETS) as translated:
        scores = found(translated)
    # Four products of two terms each, so that length does not count. lamp stands in 2 texts, either translation in 1:
    # each has the weight 2 / (2 + 1). Three products have any of them, one product has both.
    lamp, red = math.log(1 + 1.5 / 3.5), math.log(1 + 3.5 / 1.5)
    assert scores == {
        ("us", "q1", "p1"): pytest.approx(lamp * (2 / 3) / (2 / 3 + 1.2) + red / (1 + 1.2), abs=1e-8),
        ("us", "q1", "p2"): pytest.approx(lamp * (2 / 3) / (2 / 3 + 1.2), abs=1e-8),
        ("us", "q1", "p3"): pytest.approx(lamp * (4 / 3) / (4 / 3 + 1.2), abs=1e-8),
    }


def test_a_query_finds_products_of_every_other_language_of_its_market(spark: SparkSession) -> None:
    catalog_df = catalog(
        spark,
        ("us", "p1", "lampara", "es"),
        ("us", "p2", "램프", "KO"),
        ("us", "p3", "lamp", None),
        ("tw", "p4", "lamp", "en"),
        ("tw", "p5", "lampara", "es"),  # no text translates zh-TW and es
    )
    queries_df = queries(spark, ("us", "q1", "lamp", None), ("us", "q2", "램프", "ko"), ("tw", "q3", "檯燈", None))
    parallel_df = texts(
        spark, ("en", "es", "lamp", "lampara"), ("ko", "en", "램프", "lamp"), ("zh-tw", "en", "檯燈", "lamp")
    )
    with translated_products(catalog_df, queries_df, parallel_df, MARKETS) as translated:
        assert sorted(found(translated)) == [
            ("tw", "q3", "p4"),
            ("us", "q1", "p1"),
            ("us", "q1", "p2"),
            ("us", "q2", "p3"),
        ]


def test_frequent_terms_are_ignored_but_a_querys_rarest(spark: SparkSession) -> None:
    catalog_df = catalog(spark, *[("us", f"p{n}", "lampara", "es") for n in range(3)], ("us", "p3", "rojo", "es"))
    queries_df = queries(spark, ("us", "q1", "red lamp", None), ("us", "q2", "lamp", None))
    with translated_products(catalog_df, queries_df, texts(spark, *PARALLEL), MARKETS) as translated:
        pairs = sorted(pair[1:] for pair in found(translated, max_term_share=0.5))
    assert pairs == [("q1", "p3"), ("q2", "p0"), ("q2", "p1"), ("q2", "p2")]


def test_scores_do_not_depend_on_how_rows_are_distributed(spark: SparkSession) -> None:
    words = ["lampara", "luz", "rojo", "mesa"]
    catalog_df = catalog(spark, *[("us", f"p{n}", f"{words[n % 4]} {words[n % 3]} x{n}", "es") for n in range(24)])
    queries_df = queries(spark, ("us", "q1", "red lamp", None), ("us", "q2", "lamp", None))
    parallel_df = texts(spark, *PARALLEL, ("en", "es", "red lamp", "luz rojo"))
    with translated_products(catalog_df.coalesce(1), queries_df, parallel_df.coalesce(1), MARKETS) as translated:
        one = found(translated)
    with translated_products(catalog_df.repartition(5), queries_df, parallel_df.repartition(3), MARKETS) as translated:
        assert found(translated) == one
    assert len(one) > 20


def test_nothing_is_translated_where_all_products_are_in_the_language_of_the_queries(spark: SparkSession) -> None:
    catalog_df = catalog(spark, ("us", "p1", "lamp", "EN"), ("us", "p2", " ", "ko"), ("tw", "p1", "램프", "ko"))
    queries_df = queries(spark, ("us", "q1", "lamp", None), ("tw", "q1", "", None))
    with translated_products(catalog_df, queries_df, texts(spark, *PARALLEL), MARKETS) as translated:
        assert translated is None
    with translated_products(catalog_df, queries_df, None, MARKETS) as translated:
        assert translated is None


def test_parallel_text_in_none_of_the_languages_is_an_error(spark: SparkSession) -> None:
    catalog_df = catalog(spark, ("us", "p1", "램프", "ko"))
    queries_df = queries(spark, ("us", "q1", "lamp", None))
    parallel_df = texts(spark, *PARALLEL, ("en", "ko", "lamp", "램프", "test"))
    message = r"split train in en and ko, .* texts in: en and es, en and ko\. .*'inputs\.parallel_text'"
    with (
        pytest.raises(InputError, match=message),
        translated_products(catalog_df, queries_df, parallel_df, MARKETS),
    ):
        pass


def test_titles_that_translations_find_are_written_as_such(spark: SparkSession) -> None:
    catalog_df = catalog(
        spark, ("us", "p1", "lampara azul", "es"), ("us", "p2", "lampara rojo", "es"), ("us", "p3", "silla azul", "es")
    )
    queries_df = queries(spark, ("us", "q1", "red lamp", None))
    with translated_products(catalog_df, queries_df, texts(spark, *PARALLEL), MARKETS) as translated:
        assert translated is not None
        rows = translated_titles(translated, catalog_df, num_titles=5, max_term_share=1.0).orderBy("rank").collect()
    lamp, red = math.log(1 + 1.5 / 2.5) * (2 / 3) / (2 / 3 + 1.2), math.log(1 + 2.5 / 1.5) / (1 + 1.2)
    assert [tuple(row) for row in rows] == [
        ("us", "q1", 1, "p2", "lampara rojo", 1.0, "translated"),
        ("us", "q1", 2, "p1", "lampara azul", pytest.approx(lamp / (lamp + red), abs=1e-8), "translated"),
    ]
