"""What a run would make of each market, counted by Spark against counts by hand."""

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import DataFrame, SparkSession
from scipy.stats import spearmanr

from csrm.night.audit import NUM_SCORE_BINS
from csrm.night.outcome import measure_canaries, measure_ndcgs, measure_outcomes
from csrm.schemas import RUN_PAIRS
from csrm.spark.tables import spark_schema

PUBLISHED = (
    "market string, query_id string, product_id string, relevance_score float, predicted_grade string, "
    "bundle_digest string"
)
CHANGES = (
    "market string, query_id string, product_id string, operation string, relevance_score float, "
    "predicted_grade string, old_score float, old_grade string"
)
NAN = float("nan")


@pytest.fixture
def published_df(spark: SparkSession) -> DataFrame:
    rows = [("tw", "q1", f"p{n}", n / 10, "E" if n > 5 else "I", "old") for n in range(10)]
    return spark.createDataFrame(rows, PUBLISHED)


@pytest.fixture
def changes_df(spark: SparkSession) -> DataFrame:
    rows = [
        ("tw", "q1", "p0", "update", 1.0, "E", 0.0, "I"),
        ("tw", "q1", "p1", "update", NAN, "I", 0.1, "I"),
        ("tw", "q1", "p2", "update", 0.25, "I", 0.2, "I"),
        ("tw", "q1", "p3", "delete", None, None, 0.3, "I"),
        ("tw", "q2", "p0", "insert", 0.5, "E", None, None),
        ("tw", "q2", "p0", "insert", 0.5, "E", None, None),
        ("tw", "q2", "p1", "insert", None, None, None, None),
        ("tw", "q2", "p2", "insert", 1.5, "I", None, None),
        ("tw", "q2", "p3", "insert", float("inf"), "I", None, None),
    ]
    return spark.createDataFrame(rows, CHANGES)


@pytest.mark.spark
def test_a_market_is_counted(spark: SparkSession, published_df: DataFrame, changes_df: DataFrame) -> None:
    planned = [("tw", f"q{n % 3}", f"p{n % 4}", 1, "unchanged", None, 0, "r") for n in range(6)]
    planned += [
        ("tw", "q2", "p7", None, "rejected", "no_product", 0, "r"),
        ("kr", "q1", "p1", 1, "to_score", None, 0, "r"),
    ]
    queries = [("tw", "q0", "a"), ("tw", "q1", "b"), ("tw", "q2", "c"), ("tw", "q3", "d"), ("tw", "q4", " ")]
    products = [("tw", f"p{n}", "t") for n in range(5)] + [("tw", "p9", None)]

    outcomes = measure_outcomes(
        spark.createDataFrame(planned, spark_schema(RUN_PAIRS)),
        published_df,
        changes_df,
        spark.createDataFrame(queries, "market string, query_id string, query string"),
        spark.createDataFrame(products, "market string, product_id string, title string"),
        "old",
        measure_canaries(
            pd.DataFrame({"market": ["tw"], "state": ["unchanged"], "earlier_score": [0.5], "relevance_score": [0.25]}),
            1e-5,
        ),
        {"tw": (0.5, 0.6)},
    )

    tw = outcomes["tw"]
    assert (tw.num_candidates, tw.num_rejected, tw.num_unchanged) == (7, 1, 6)
    assert (tw.num_published, tw.num_new, tw.num_changed, tw.num_deleted) == (10, 5, 3, 1)
    assert (tw.num_missing, tw.num_repeated, tw.num_not_finite, tw.num_out_of_range) == (1, 1, 2, 2)
    assert (tw.num_covered_queries, tw.num_queries) == (3, 4)
    assert (tw.num_covered_products, tw.num_products) == (4, 5)
    assert tw.published_scores.sum() == 10
    assert np.flatnonzero(tw.scores_after).tolist() == [25, NUM_SCORE_BINS - 1]
    assert np.flatnonzero(tw.scores_before).tolist() == [0, 10, 20]
    assert tw.new_scores[50] == 2
    assert (tw.grades_before, tw.grades_after) == ({"E": 4, "I": 6}, {"E": 7, "I": 6})
    assert tw.num_changes == {"insert": 5, "update": 3, "delete": 1}
    assert (tw.canary.num_pairs, tw.canary.largest_difference) == (1, 0.25)
    assert (tw.is_new_bundle, tw.rank_agreement, tw.ndcg) == (False, None, (0.5, 0.6))
    kr = outcomes["kr"]
    assert (kr.num_candidates, kr.num_published, kr.num_queries, kr.is_new_bundle) == (1, 0, 0, False)


@pytest.mark.spark
def test_the_order_of_a_new_bundle_is_compared_by_query(spark: SparkSession, published_df: DataFrame) -> None:
    old = {"q1": [0.1, 0.2, 0.2, 0.9, 0.5], "q2": [0.5, 0.1, 0.3, 0.2, 0.8], "q3": [0.4, 0.4]}
    new = {"q1": [0.3, 0.2, 0.4, 0.8, 0.4], "q2": [0.1, 0.2, 0.3, 0.4, 0.9], "q3": [0.1, 0.2]}
    rows = [
        ("tw", query, f"p{n}", "update", after, "E", before, "E")
        for query in old
        for n, (before, after) in enumerate(zip(old[query], new[query], strict=True))
    ]
    planned_df = spark.createDataFrame([("tw", "q1", "p1", 1, "to_score", None, 0, "r")], spark_schema(RUN_PAIRS))
    texts_df = spark.createDataFrame(
        [("tw", "1", "x", "y")], "market string, query_id string, query string, title string"
    )

    outcomes = measure_outcomes(
        planned_df, published_df, spark.createDataFrame(rows, CHANGES), texts_df, texts_df, "new", {}, {}
    )

    expected = np.mean(
        [spearmanr(old[query], new[query]).statistic for query in ("q1", "q2")]
    )  # q3 has no order before
    assert outcomes["tw"].is_new_bundle
    assert outcomes["tw"].rank_agreement == pytest.approx(expected)


@pytest.mark.spark
def test_a_new_bundle_that_gives_all_pairs_one_score_agrees_with_no_order(
    spark: SparkSession, published_df: DataFrame
) -> None:
    rows = [("tw", "q1", f"p{n}", "update", 0.5, "S", n / 10, "E") for n in range(10)]
    rows += [("tw", "q2", f"p{n}", "update", 0.5, "S", 0.7, "E") for n in range(2)]  # had no order before
    planned_df = spark.createDataFrame([("tw", "q1", "p1", 1, "to_score", None, 0, "r")], spark_schema(RUN_PAIRS))
    texts_df = spark.createDataFrame(
        [("tw", "1", "x", "y")], "market string, query_id string, query string, title string"
    )

    outcomes = measure_outcomes(
        planned_df, published_df, spark.createDataFrame(rows, CHANGES), texts_df, texts_df, "new", {}, {}
    )

    assert outcomes["tw"].rank_agreement == 0


@pytest.mark.spark
def test_ndcg_of_both_scores_is_over_the_same_judged_pairs(spark: SparkSession) -> None:
    rows = [
        ("tw", "q1", "p1", "update", 0.9, "E", 0.1, "I"),
        ("tw", "q1", "p2", "update", 0.1, "I", 0.9, "E"),
        ("tw", "q1", "p3", "insert", 0.5, "E", None, None),
    ]
    judgments = [("tw", "q1", "p1", "E"), ("tw", "q1", "p2", "I"), ("tw", "q1", "p3", "E"), ("tw", "q1", "p4", "odd")]
    judgments_df = spark.createDataFrame(judgments, "market string, query_id string, product_id string, grade string")

    found = measure_ndcgs(judgments_df, spark.createDataFrame(rows, CHANGES), {"E": 1.0, "I": 0.0})

    before, after = found["tw"]
    assert after == pytest.approx(1.0)
    assert before == pytest.approx(1 / np.log2(3))


@pytest.mark.spark
def test_ndcg_is_of_scores_and_of_markets_where_it_is_defined(spark: SparkSession) -> None:
    rows = [
        *(("tw", "q1", f"p{n}", "update", 0.2 * n, "E", 1 - 0.2 * n, "I") for n in range(3)),
        ("tw", "q1", "p3", "update", None, None, 0.5, "I"),  # not scored: another check of the audit says so
        ("tw", "q1", "p4", "update", float("inf"), None, 0.5, "I"),
        ("kr", "q1", "p1", "update", 0.5, "I", 0.1, "I"),  # nothing judged has a gain
        ("us", "q1", "p1", "update", None, None, 0.1, "I"),
    ]
    judgments = [(*row[:3], "E" if row[:3] == ("tw", "q1", "p2") else "I") for row in rows]
    judgments_df = spark.createDataFrame(judgments, "market string, query_id string, product_id string, grade string")
    changes_df = spark.createDataFrame(rows, CHANGES)

    found = measure_ndcgs(judgments_df, changes_df, {"E": 1.0, "S": 1 / 3, "I": 0.0})

    assert found == {"tw": (pytest.approx(0.5), pytest.approx(1.0))}


def test_a_canary_without_a_score_is_no_agreement() -> None:
    scored = pd.DataFrame(
        {
            "market": ["kr", "kr", "tw"],
            "state": ["staged", "staged", "unchanged"],
            "earlier_score": [0.5, 0.5, 0.5],
            "relevance_score": [0.5, None, 0.5],
        }
    )

    found = measure_canaries(scored, 1e-5)

    assert np.isnan(found["kr", "staged"].largest_difference)
    assert found["tw", "unchanged"].largest_difference == 0
