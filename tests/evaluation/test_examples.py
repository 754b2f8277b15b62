"""Queries and pairs to look at, worked by hand."""

import numpy as np
import pandas as pd

from csrm.evaluation.examples import (
    false_friends,
    first_and_best,
    missing_products,
    moved_queries,
    ranks_among_judged,
    worst_queries,
)

QUERIES = pd.DataFrame(
    [
        ("kr", "a", "ours", 3, 0.5, 0.1),
        ("kr", "b", "ours", 3, 0.5, 0.4),
        ("kr", "c", "ours", 3, 1.0, 0.0),
        ("kr", "d", "ours", 3, np.nan, 1.0),
        ("tw", "a", "ours", 3, 0.9, 0.0),
        ("kr", "a", "theirs", 3, 0.7, 0.1),
        ("kr", "b", "theirs", 3, 0.1, 0.1),
        ("kr", "c", "theirs", 3, 0.9, 0.1),
        ("kr", "d", "theirs", 3, np.nan, 0.1),
        ("tw", "a", "theirs", 3, 0.9, 0.1),
    ],
    columns=["market", "query_id", "ranking", "num_pairs", "ndcg_at_10", "defect_rate_at_10"],
)


def judged(*rows: tuple[str, str, str, float, float]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["query_id", "product_id", "grade", "score", "rank"])
    return frame.assign(market="kr", has_query=True, has_product=True)


def test_worst_queries_are_those_of_the_lowest_ndcg_in_each_market() -> None:
    worst = worst_queries(QUERIES, "ours", 2)
    assert worst[["market", "query_id"]].to_numpy().tolist() == [["kr", "b"], ["kr", "a"], ["tw", "a"]]
    assert worst_queries(QUERIES, "ours", 1)["market"].tolist() == ["kr", "tw"]


def test_queries_that_lose_come_before_those_that_gain() -> None:
    moved = moved_queries(QUERIES, "ours", "theirs", 10)
    assert moved["query_id"].tolist() == ["a", "b", "c"]  # d is undefined, that of tw is the same
    assert moved["difference"].round(9).tolist() == [-0.2, 0.4, 0.1]
    assert moved_queries(QUERIES, "ours", "theirs", 1)["query_id"].tolist() == ["a", "b"]


def test_false_friends_are_irrelevant_and_score_high() -> None:
    pairs = judged(
        ("q", "a", "I", 0.9, 1), ("q", "b", "E", 0.8, 2), ("q", "c", "I", np.nan, np.nan), ("q", "d", "I", 0.95, 3)
    )
    assert false_friends(pairs, "score", ["I"], 10)["product_id"].tolist() == ["d", "a"]
    assert false_friends(pairs, "score", ["I"], 1)["product_id"].tolist() == ["d"]


def test_missing_products_are_relevant_and_not_among_the_first_ten() -> None:
    pairs = judged(
        ("q", "tenth", "E", 0.5, 10),
        ("q", "eleventh", "E", 0.5, 11),
        ("q", "last", "E", 0.1, 40),
        ("q", "bad", "I", 0.1, 41),
        ("q", "unscored", "E", np.nan, np.nan),
        ("q", "gone", "E", np.nan, np.nan),
    )
    pairs.loc[pairs["product_id"] == "gone", "has_product"] = False
    missing = missing_products(pairs, ["E"], 1)
    assert missing["reason"].tolist() == ["no_product", "no_score", "low_rank"]
    assert missing["product_id"].tolist() == ["gone", "unscored", "last"]
    assert missing["num_in_all"].tolist() == [1, 1, 2]


def test_first_and_best_products_are_those_of_the_published_order() -> None:
    pairs = judged(("q", "first", "I", 0.9, 1), ("q", "late", "E", 0.1, 9), ("q", "sooner", "E", 0.5, 5))
    named = first_and_best(pairs, pd.DataFrame({"market": ["kr", "kr"], "query_id": ["q", "none"]}), {"E": 1, "I": 0})
    assert named.loc[0, ["first_id", "first_grade", "best_id", "best_grade", "best_rank"]].tolist() == [
        *("first", "I", "sooner", "E"),
        5,
    ]
    assert named.loc[1, ["first_id", "best_id"]].isna().all()


def test_equal_scores_share_the_best_place() -> None:
    pairs = judged(("q", "a", "E", 0.5, 1), ("q", "b", "E", 0.5, 2), ("q", "c", "E", 0.1, 3), ("r", "c", "E", 0.1, 1))
    assert ranks_among_judged(pairs, ["score"])["score"].tolist() == [1, 1, 3, 1]
