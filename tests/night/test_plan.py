"""From candidates to the rows that are scored."""

import itertools
import logging
import string

import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from csrm.night.plan import (
    num_scoring_partitions,
    pair_key,
    plan_pairs,
    query_fields,
    with_rejections,
    with_retrieved_titles,
    with_scoring_layout,
    with_texts,
)
from csrm.night.settings import NUM_BUCKETS
from csrm.scoring.prompts import MOST_CHARACTERS

pytestmark = pytest.mark.spark

QUERY_SCHEMA = "market string, query_id string, query string, language string"
FIELD_SCHEMA = (
    "market string, language string, query string, retrieved_titles array<string>, title string, brand string, "
    "category string, attributes map<string,string>"
)


@pytest.fixture(scope="module")
def queries_df(spark: SparkSession) -> DataFrame:
    rows = [
        ("kr", "q1", "텐트", None),
        ("kr", "q2", "\u3000 ", None),
        ("tw", "q1", "tent", "en"),
        ("tw", "q3", None, None),
    ]
    return spark.createDataFrame(rows, QUERY_SCHEMA)


@pytest.fixture(scope="module")
def retrieval_df(spark: SparkSession) -> DataFrame:
    rows = [("kr", "q1", rank, title) for rank, title in ((10, "열"), (2, "둘"), (1, "하나"))]
    return spark.createDataFrame(rows, "market string, query_id string, rank int, title string")


def test_titles_are_ordered_by_rank_and_empty_where_nothing_was_retrieved(
    queries_df: DataFrame, retrieval_df: DataFrame
) -> None:
    rows = with_retrieved_titles(queries_df, retrieval_df, broadcast_limit_mb=1).orderBy("market", "query_id").collect()

    assert [row["retrieved_titles"] for row in rows] == [["하나", "둘", "열"], [], [], []]


def test_titles_over_the_limit_are_joined_by_a_shuffle_which_is_said(
    queries_df: DataFrame, retrieval_df: DataFrame, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        broadcast_df = with_retrieved_titles(queries_df, retrieval_df, broadcast_limit_mb=1)
        assert caplog.text == ""
        shuffled_df = with_retrieved_titles(queries_df, retrieval_df, broadcast_limit_mb=0)

    assert "over broadcast_limit_mb=0: joined to the queries by a shuffle" in caplog.text
    assert "strategy=broadcast" in broadcast_df._jdf.queryExecution().toString()
    assert "strategy=broadcast" not in shuffled_df._jdf.queryExecution().toString()
    assert sorted(map(str, shuffled_df.collect())) == sorted(map(str, broadcast_df.collect()))


LANGUAGES = {"kr": "ko", "tw": "zh-TW"}
CATALOG_SCHEMA = (
    "market string, product_id string, title string, brand string, category string, attributes map<string,string>"
)
KEY_SCHEMA = "market string, query_id string, product_id string, pair_key bigint"


def catalog(spark: SparkSession, **title: str) -> DataFrame:
    rows = [
        ("kr", "p1", title.get("p1", "캠핑 텐트"), None, "", {"색상": "녹색"}),
        ("kr", "p2", "\u00a0\t", None, None, None),
        ("kr", "p3", "등산화", None, None, None),
        ("tw", "p1", "帳篷", "B", "C", None),
    ]
    return spark.createDataFrame(rows, CATALOG_SCHEMA)


def plan(
    spark: SparkSession,
    queries_df: DataFrame,
    catalog_df: DataFrame,
    published: list[tuple[str, str, str, int]],
    staged: list[tuple[str, str, str, int]],
    digest: str = "d",
) -> dict[tuple[str, str, str], tuple[str, str | None, int | None]]:
    """Pair to its state, reason and key."""
    pairs = [("kr", "q1", "p1"), ("tw", "q1", "p1"), ("kr", "q1", "p2"), ("kr", "q1", "p9"), ("kr", "q1", "p3")]
    pairs += [("kr", "q2", "p1"), ("kr", "q9", "p9"), ("tw", "q3", "p1")]
    candidates_df = spark.createDataFrame(pairs, "market string, query_id string, product_id string")
    known = (spark.createDataFrame(rows, KEY_SCHEMA) for rows in (published, staged))
    rows = plan_pairs(candidates_df, queries_df, catalog_df, *known, digest).collect()
    assert len(rows) == len(pairs)
    assert all(0 <= row["bucket"] < NUM_BUCKETS for row in rows)
    assert len({row["bucket"] for row in rows if (row["market"], row["query_id"]) == ("kr", "q1")}) == 1
    return {
        (row["market"], row["query_id"], row["product_id"]): (row["state"], row["reason"], row["pair_key"])
        for row in rows
    }


def test_every_candidate_is_planned_or_rejected_with_its_reason(
    spark: SparkSession, queries_df: DataFrame, retrieval_df: DataFrame
) -> None:
    fields_df = query_fields(with_retrieved_titles(queries_df, retrieval_df, broadcast_limit_mb=1), LANGUAGES)

    planned = plan(spark, fields_df, catalog(spark), [], [])

    rejected = {pair: reason for pair, (state, reason, key) in planned.items() if state == "rejected" and key is None}
    assert rejected == {
        ("kr", "q1", "p2"): "empty_title",
        ("kr", "q1", "p9"): "no_product",
        ("kr", "q2", "p1"): "empty_query",
        ("kr", "q9", "p9"): "no_query",
        ("tw", "q3", "p1"): "empty_query",
    }
    assert {pair for pair, (state, *_) in planned.items() if state == "to_score"} == {
        ("kr", "q1", "p1"),
        ("kr", "q1", "p3"),
        ("tw", "q1", "p1"),
    }


def test_only_pairs_whose_prompt_changed_are_scored(
    spark: SparkSession, queries_df: DataFrame, retrieval_df: DataFrame
) -> None:
    fields_df = query_fields(with_retrieved_titles(queries_df, retrieval_df, broadcast_limit_mb=1), LANGUAGES)
    first = plan(spark, fields_df, catalog(spark), [], [])
    known = [(*pair, key) for pair, (_, _, key) in first.items() if key is not None]
    gone = ("kr", "q1", "p0", 7)

    def states(published: list, staged: list, fields_df: DataFrame, catalog_df: DataFrame, digest: str = "d") -> str:
        planned = plan(spark, fields_df, catalog_df, published, staged, digest)
        return " ".join(planned[pair][0] for pair in (("kr", "q1", "p1"), ("kr", "q1", "p3"), ("tw", "q1", "p1")))

    same = catalog(spark)
    assert states([*known, gone], [], fields_df, same) == "unchanged unchanged unchanged"
    assert states(known, known, fields_df, same) == "unchanged unchanged unchanged"
    assert states(known[:1], [*known, *known], fields_df, same).count("staged") == 2
    assert states(known, [], fields_df, catalog(spark, p1="텐트 2인용")) == "to_score unchanged unchanged"
    renamed_df = retrieval_df.withColumn("title", F.when(F.col("rank") == 2, "셋").otherwise(F.col("title")))
    retitled_df = query_fields(with_retrieved_titles(queries_df, renamed_df, broadcast_limit_mb=1), LANGUAGES)
    assert states(known, [], retitled_df, same) == "to_score to_score unchanged"
    assert states(known, [], fields_df, same, digest="another bundle") == "to_score to_score to_score"


def test_pairs_to_score_get_everything_that_a_prompt_is_made_of(
    spark: SparkSession, queries_df: DataFrame, retrieval_df: DataFrame
) -> None:
    fields_df = query_fields(with_retrieved_titles(queries_df, retrieval_df, broadcast_limit_mb=1), LANGUAGES)
    pairs_df = spark.createDataFrame([("kr", "q1", "p1", 5), ("tw", "q1", "p1", 6)], KEY_SCHEMA)

    kr, tw = (row.asDict() for row in with_texts(pairs_df, fields_df, catalog(spark)).orderBy("market").collect())

    assert kr == {
        "market": "kr",
        "query_id": "q1",
        "product_id": "p1",
        "pair_key": 5,
        "language": "ko",
        "query": "텐트",
        "retrieved_titles": ["하나", "둘", "열"],
        "title": "캠핑 텐트",
        "brand": None,
        "category": "",
        "attributes": {"색상": "녹색"},
    }
    assert (tw["language"], tw["retrieved_titles"], tw["title"]) == ("en", [], "帳篷")


def test_of_a_huge_text_only_its_start_goes_into_pairs(spark: SparkSession) -> None:
    """Else each of a product's pairs has its megabyte, and thousands of them are in memory at once."""
    start, rest = "é" * MOST_CHARACTERS, "x" * 1_000_000
    values = ("us", "p1", start + rest, start + rest, None, {"a": start + rest, "b": "short", "c": None})
    schema = "market string, product_id string, title string, brand string, category string"
    catalog_df = spark.createDataFrame([values], f"{schema}, attributes map<string,string>")
    fields_df = spark.createDataFrame(
        [("us", "q1", "en", start + rest, [start + rest, "short"])],
        "market string, query_id string, language string, query string, retrieved_titles array<string>",
    )
    pairs_df = spark.createDataFrame([("us", "q1", "p1", 5)], KEY_SCHEMA)

    row = with_texts(pairs_df, fields_df, catalog_df).head()

    assert row is not None
    assert (row["query"], row["title"], row["brand"], row["category"]) == (start, start, start, None)
    assert row["retrieved_titles"] == [start, "short"]
    assert row["attributes"] == {"a": start, "b": "short", "c": None}


def test_a_text_whose_start_is_blank_is_blank(spark: SparkSession) -> None:
    """The prompt would hold nothing of it."""
    late = " " * MOST_CHARACTERS + "tent"
    fields_df = spark.createDataFrame(
        [("us", "q1", "en", "tent", []), ("us", "q2", "en", late, [])],
        "market string, query_id string, language string, query string, retrieved_titles array<string>",
    )
    catalog_df = spark.createDataFrame(
        [("us", "p1", late, None, None, None), ("us", "p2", late[1:], None, None, None)],
        "market string, product_id string, title string, brand string, category string, attributes map<string,string>",
    )
    pairs = [("us", "q1", "p1", 1), ("us", "q1", "p2", 1), ("us", "q2", "p2", 1)]
    pairs_df = spark.createDataFrame(pairs, KEY_SCHEMA)

    planned_df = plan_pairs(pairs_df, fields_df, catalog_df, pairs_df.limit(0), pairs_df.limit(0), "d")

    reasons = {(row["query_id"], row["product_id"]): row["reason"] for row in planned_df.collect()}
    assert reasons == {("q1", "p1"): "empty_title", ("q1", "p2"): None, ("q2", "p2"): "empty_query"}


def test_a_pair_key_follows_everything_that_the_prompt_says(spark: SparkSession) -> None:
    base = ("kr", "ko", "q", ["a", "b"], "t", None, "c", {"x": "1", "y": "2"})
    same = [base, (*base[:7], {"y": "2", "x": "1"})]
    other = [
        ("tw", *base[1:]),
        (base[0], "en", *base[2:]),
        (*base[:2], "Q", *base[3:]),
        (*base[:3], ["b", "a"], *base[4:]),
        (*base[:3], ["a"], *base[4:]),
        (*base[:3], [], *base[4:]),
        (*base[:3], ['a","b'], *base[4:]),
        (*base[:4], "T", *base[5:]),
        (*base[:5], "", *base[6:]),
        (*base[:6], None, base[7]),
        (*base[:5], "c", None, base[7]),
        (*base[:7], None),
        (*base[:7], {}),
        (*base[:7], {"x": "2", "y": "1"}),
        (*base[:7], {"x": "1", "y": None}),
    ]
    pairs_df = spark.createDataFrame([*same, *other], FIELD_SCHEMA).coalesce(1)

    rows = pairs_df.select(pair_key("d1").alias("key"), pair_key("d2").alias("other_bundle")).collect()

    keys = [row["key"] for row in rows]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 1 + len(other)
    assert not set(keys) & {row["other_bundle"] for row in rows}


def colliding_titles() -> tuple[str, ...]:
    """Two titles whose JSON objects have one XXH64, Spark's hash: what they differ in is made up for 32 bytes later."""
    first, second, mask, letters = (
        0x9E3779B185EBCA87,
        0xC2B2AE3D27D4EB4F,
        2**64 - 1,
        string.ascii_letters + string.digits,
    )

    def lane(text: str) -> int:
        return int.from_bytes(text.encode(), "little")

    def mixed(state: int, text: str) -> int:
        state = (state + lane(text) * second) & mask
        return ((state << 31 | state >> 33) & mask) * first & mask

    head, fill, end = '{"title":"', "tent for two people  ! ", "camping equipment, green"
    start = (head + fill)[:32].ljust(32, "-")
    state = mixed(42 + first + second, start[:8])
    good, tail = "AAAAAAAA", "BBBBBBBB"
    for number in itertools.count():
        bad = "".join(letters[number // 62**place % 62] for place in range(8))
        wanted = lane(tail) + (mixed(state, good) - mixed(state, bad)) * pow(second, -1, 2**64) & mask
        made = (wanted & mask).to_bytes(8, "little")
        if all(chr(byte) in letters for byte in made):
            return tuple(start[10:] + a + end + b + end for a, b in ((good, tail), (bad, made.decode())))
    raise AssertionError


def test_a_title_that_was_made_to_have_the_hash_of_another_has_another_key(spark: SparkSession) -> None:
    good, bad = colliding_titles()
    rows = [("kr", "ko", "tent", [], title, None, None, None) for title in (good, bad)]
    pairs_df = spark.createDataFrame(rows, FIELD_SCHEMA)

    plain, keys = zip(
        *pairs_df.select(F.xxhash64(F.to_json(F.struct("title"))), pair_key("digest")).collect(), strict=True
    )

    assert good != bad
    assert plain[0] == plain[1]
    assert keys[0] != keys[1]


def test_a_query_stays_together_and_a_head_query_is_spread_over_partitions(spark: SparkSession) -> None:
    head_df = spark.range(2_000).selectExpr("'kr' AS market", "'head' AS query_id", "lpad(id, 5, '0') AS product_id")
    tail_df = spark.range(60).selectExpr(
        "'kr' AS market", "concat('q', id % 20) AS query_id", "string(id) AS product_id"
    )

    laid_out_df = with_scoring_layout(head_df.union(tail_df), num_partitions=5, products_per_chunk=100)
    rows = laid_out_df.withColumn("partition", F.spark_partition_id()).collect()

    assert laid_out_df.rdd.getNumPartitions() == 5
    assert len(rows) == 2_060
    assert max(sum(row["partition"] == n for row in rows) for n in range(5)) < 1_000
    for query_id in [f"q{n}" for n in range(20)]:
        places = [(row["partition"], place) for place, row in enumerate(rows) if row["query_id"] == query_id]
        assert [place for _, place in places] == list(range(places[0][1], places[0][1] + 3))
        assert len({partition for partition, _ in places}) == 1


def test_partitions_hold_about_4096_pairs_and_use_every_core() -> None:
    assert num_scoring_partitions(0, num_cores=2) == 2
    assert num_scoring_partitions(2_560, num_cores=2) == 10
    assert num_scoring_partitions(2_561, num_cores=2) == 11
    assert num_scoring_partitions(200_000, num_cores=2) == 64
    assert num_scoring_partitions(4_096_000, num_cores=2) == 1_000
    assert num_scoring_partitions(100, num_cores=64) == 64


def test_pairs_that_could_not_be_scored_are_rejected_unless_an_attempt_has_scored_them(spark: SparkSession) -> None:
    planned_df = spark.createDataFrame(
        [
            ("kr", "q", "scored", 1, "to_score", None),
            ("kr", "q", "failed", 2, "to_score", None),
            ("kr", "q", "failed before", 3, "staged", None),
            ("kr", "q", "failed, then scored", 4, "staged", None),
            ("kr", "q", "failed with another text", 5, "to_score", None),
            ("kr", "q", "published", 6, "unchanged", None),
            ("kr", "q", "published without probabilities", 7, "to_score", None),
            ("kr", "q", "published with another text", 8, "to_score", None),
            ("kr", "q", "gone", None, "rejected", "no_product"),
        ],
        "market string, query_id string, product_id string, pair_key bigint, state string, reason string",
    )
    staged_df = spark.createDataFrame(
        [
            ("kr", "q", "scored", 1, 0.5, None),
            ("kr", "q", "failed", 2, None, "model_error"),
            ("kr", "q", "failed before", 3, None, "not_finite"),
            ("kr", "q", "failed, then scored", 4, None, "model_error"),
            ("kr", "q", "failed, then scored", 4, 0.5, None),
            ("kr", "q", "failed with another text", 55, None, "model_error"),
            ("kr", "q", "published", 6, None, "model_error"),
            ("kr", "q", "published without probabilities", 7, None, "model_error"),
            ("kr", "q", "published with another text", 8, None, "model_error"),
        ],
        "market string, query_id string, product_id string, pair_key bigint, relevance_score float, reason string",
    )

    published_df = spark.createDataFrame(
        [
            ("kr", "q", "published", 6),
            ("kr", "q", "published without probabilities", 7),
            ("kr", "q", "published with another text", 88),
        ],
        "market string, query_id string, product_id string, pair_key bigint",
    )

    rows = with_rejections(planned_df, published_df, staged_df).collect()

    assert {row["product_id"]: (row["state"], row["reason"]) for row in rows} == {
        "scored": ("to_score", None),
        "failed": ("rejected", "model_error"),
        "failed before": ("rejected", "not_finite"),
        "failed, then scored": ("staged", None),
        "failed with another text": ("to_score", None),
        "published": ("unchanged", None),
        "published without probabilities": ("unchanged", None),
        "published with another text": ("rejected", "model_error"),
        "gone": ("rejected", "no_product"),
    }
    assert len(rows) == 9
