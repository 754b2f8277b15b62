"""The queries and pairs that a person looks at first: where scores and human grades agree least."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd

from csrm.evaluation.metrics import DEPTH, QUERY_COLUMNS

_QUERY = ["market", "query_id"]
_NDCG = QUERY_COLUMNS[0]


def worst_queries(queries: pd.DataFrame, ranking: str, num: int) -> pd.DataFrame:
    """Queries of the lowest nDCG of a ranking; of equal ones those with most irrelevant products, then most pairs.

    Args:
        queries: see Evaluation.queries.
        ranking: the ranking.
        num: most queries of each market.

    Returns:
        Rows of `queries`, worst first in each market. Queries whose nDCG is undefined or 1 are left out.

    >>> columns = ["query_id", "ndcg_at_10", "defect_rate_at_10"]
    >>> queries = pd.DataFrame([("q1", 0.9, 0.1), ("q2", 0.4, 0.3), ("q3", 1.0, 0.0)], columns=columns)
    >>> queries = queries.assign(market="us", ranking="score", num_pairs=5)
    >>> worst_queries(queries, "score", 10)["query_id"].tolist()
    ['q2', 'q1']
    """
    own = queries[(queries["ranking"] == ranking) & (queries[_NDCG] < 1)]
    order = ["market", _NDCG, QUERY_COLUMNS[2], "num_pairs", "query_id"]
    own = own.sort_values(order, ascending=[True, True, False, False, True])
    return own.groupby("market", sort=False).head(num).reset_index(drop=True)


def moved_queries(queries: pd.DataFrame, ranking: str, other: str, num: int) -> pd.DataFrame:
    """Queries whose nDCG is most below or above that of another ranking.

    Args:
        queries: see Evaluation.queries.
        ranking: the ranking.
        other: the one that it is compared with.
        num: most queries of each market and direction.

    Returns:
        market, query_id, num_pairs, value, other (nDCG of the two) and difference: in each market what loses most
        first, then what gains most, from its largest gain downwards.
    """
    own, others = (queries[queries["ranking"] == name][[*_QUERY, "num_pairs", _NDCG]] for name in (ranking, other))
    frame = own.merge(others[[*_QUERY, _NDCG]].rename(columns={_NDCG: "other"}), on=_QUERY)
    frame = frame.rename(columns={_NDCG: "value"}).assign(difference=lambda both: both["value"] - both["other"])
    parts = []
    for is_loss in (True, False):
        part = frame[frame["difference"] < 0 if is_loss else frame["difference"] > 0]
        part = part.sort_values(["market", "difference", "query_id"], ascending=[True, is_loss, True])
        parts.append(part.groupby("market", sort=False).head(num))
    return pd.concat(parts).sort_values("market", kind="stable", ignore_index=True)


def false_friends(judged: pd.DataFrame, score: str, irrelevant_grades: Collection[str], num: int) -> pd.DataFrame:
    """Products that people judged irrelevant, those of the highest scores.

    Args:
        judged: market, query_id, product_id, grade and the score.
        score: column of the score.
        irrelevant_grades: grades that count as irrelevant.
        num: most pairs of each market.

    Returns:
        Rows of `judged`, highest score first in each market.
    """
    own = judged[judged["grade"].isin(set(irrelevant_grades))].dropna(subset=[score])
    own = own.sort_values(["market", score, "query_id", "product_id"], ascending=[True, False, True, True])
    return own.groupby("market", sort=False).head(num).reset_index(drop=True)


def missing_products(judged: pd.DataFrame, relevant_grades: Collection[str], num: int) -> pd.DataFrame:
    """Relevant products that are not among the first ten that are published for their query.

    Args:
        judged: market, query_id, product_id, grade, has_query, has_product (whether the id is known) and rank (among
            all products of the query that have a published score, from 1; NaN without one).
        relevant_grades: grades that count as relevant.
        num: most pairs of each market and reason.

    Returns:
        Rows of `judged` with reason (no_query, no_product, no_score or low_rank) and num_in_all (pairs of the market
        and reason); in each market by reason, the lowest rank first.
    """
    own = judged[judged["grade"].isin(set(relevant_grades)) & ~(judged["rank"] <= DEPTH)]
    conditions = [~own["has_query"].astype(bool), ~own["has_product"].astype(bool), own["rank"].isna()]
    reasons = ["no_query", "no_product", "no_score"]
    own = own.assign(reason=np.select(conditions, reasons, "low_rank"))
    own["place"] = own["reason"].map({reason: place for place, reason in enumerate([*reasons, "low_rank"])})
    by_reason = ["market", "place"]
    own["num_in_all"] = own.groupby(by_reason)["reason"].transform("size")
    own = own.sort_values([*by_reason, "rank", "query_id", "product_id"], ascending=[True, True, False, True, True])
    return own.groupby(by_reason, sort=False).head(num).drop(columns="place").reset_index(drop=True)


def first_and_best(judged: pd.DataFrame, queries: pd.DataFrame, gains: Mapping[str, float]) -> pd.DataFrame:
    """The product that a query shows first, and the one that people judged best.

    Args:
        judged: market, query_id, product_id, grade and rank; pairs without a rank are left out.
        queries: market and query_id of the queries.
        gains: gain of each grade.

    Returns:
        The rows of `queries` with first_id, first_grade, best_id, best_grade and best_rank. Of equally good products,
        the best is the one of the lowest rank.
    """
    own = judged.dropna(subset=["rank"]).merge(queries[_QUERY].drop_duplicates(), on=_QUERY)
    own = own.assign(gain=own["grade"].map(dict(gains))).sort_values([*_QUERY, "rank"])
    first = own.drop_duplicates(_QUERY)[[*_QUERY, "product_id", "grade"]]
    best = own.sort_values([*_QUERY, "gain", "rank"], ascending=[True, True, False, True]).drop_duplicates(_QUERY)
    best = best[[*_QUERY, "product_id", "grade", "rank"]]
    named = first.rename(columns={"product_id": "first_id", "grade": "first_grade"})
    named_best = best.rename(columns={"product_id": "best_id", "grade": "best_grade", "rank": "best_rank"})
    return queries.merge(named, on=_QUERY, how="left").merge(named_best, on=_QUERY, how="left")


def ranks_among_judged(judged: pd.DataFrame, score_columns: Sequence[str]) -> pd.DataFrame:
    """Place of each pair among the judged pairs of its query by each score, from 1; equal scores share the best place.

    Returns:
        One column for each score, on the index of `judged`; NaN without a score.
    """
    grouped = judged.groupby(_QUERY)[list(score_columns)]
    return grouped.rank(method="min", ascending=False)
