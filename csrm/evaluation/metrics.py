"""How well scores rank products: metrics against human grades, with intervals and baselines.

Only judged pairs are ranked: products without a grade are dropped from a query's list and the rest moves up
("condensed lists", Sakai 2007). A pair that any compared ranking has no score for is left out of all of them, so every
column of the table is about the same pairs; how many were left out is part of the result.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from csrm.errors import InputError
from csrm.extras import import_eval
from csrm.schemas import PAIR_KEY

DEPTH = 10
QUERY_METRICS = (f"nDCG@{DEPTH}", f"MRR@{DEPTH}", f"defect rate@{DEPTH}")
PAIR_METRICS = ("ROC-AUC", "average precision")
METRICS = QUERY_METRICS + PAIR_METRICS
QUERY_COLUMNS = (f"ndcg_at_{DEPTH}", f"mrr_at_{DEPTH}", f"defect_rate_at_{DEPTH}")
"""QUERY_METRICS as columns of a table."""
OVERALL = "all markets"
RANDOM = "random"
_KEY = list(PAIR_KEY)
_MAX_INTEGER_GAIN = 1_000_000


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate_scores`.

    >>> judged = pd.DataFrame(
    ...     [("us", "q1", "p1", "E", 0.9), ("us", "q1", "p2", "I", 0.2)],
    ...     columns=["market", "query_id", "product_id", "grade", "score"],
    ... )
    >>> evaluation = evaluate_scores(
    ...     judged, ["score"], gains={"E": 1.0, "I": 0.0}, relevant_grades=["E"], irrelevant_grades=["I"]
    ... )
    >>> evaluation.counts[["market", "num_judged", "num_pairs"]]
      market  num_judged  num_pairs
    0     us           2          2
    >>> evaluation.notes
    ('us: one query gives no interval.',)
    """

    metrics: pd.DataFrame
    """One row for each market, ranking and metric: market, ranking, metric, value, low, high (95% interval) and
    num_queries, the queries that the value is about. Where there are several markets, "all markets" is the last."""
    differences: pd.DataFrame
    """One row for each market, metric and ranking but the first and the random order: market, ranking, metric,
    difference (the first ranking's value less this one's), low and high (95% interval of the difference)."""
    queries: pd.DataFrame
    """One row for each query and ranking: market, query_id, ranking, num_pairs, num_relevant and QUERY_COLUMNS."""
    counts: pd.DataFrame
    """One row a market: market, num_judged and num_pairs (judged pairs, those of them with scores), num_judged_queries
    and num_queries (the same for queries)."""
    notes: tuple[str, ...]
    """What was left out or is undefined, one sentence each."""


def evaluate_scores(
    judged: pd.DataFrame,
    score_columns: Sequence[str],
    *,
    gains: Mapping[str, float],
    relevant_grades: Collection[str],
    irrelevant_grades: Collection[str],
    num_resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Metrics of several rankings of the same judged pairs, each market and overall, beside a random order.

    nDCG@10 has linear gains and a log2 discount. MRR@10 is 0 for a query whose relevant products are all below ten.
    Defect rate@10 is the share of irrelevant products among the first ten, or among all where fewer were judged. These
    are means over queries; ROC-AUC and average precision are over the pairs of all queries together, relevant ones
    against the rest. Intervals are 95% percentile bootstrap intervals over queries: a resample draws whole queries with
    replacement, the same ones for every ranking. Differences are therefore paired: each is taken within a resample.
    Equal scores are ranked by a seeded hash of the pair's key, so neither file order nor the order of ids decides.

    What is undefined is NaN with a note: nDCG of a query without gain and MRR of one without a relevant product (left
    out of the mean), ROC-AUC and average precision where all or no pairs are relevant, intervals of a single query.

    Args:
        judged: one row a pair: market, query_id, product_id, grade and the score columns; a missing score is NaN.
        score_columns: columns to rank by, descending; their names are the rankings' names.
        gains: gain of each grade, at least 0.
        relevant_grades: grades that count as relevant for MRR, ROC-AUC and average precision.
        irrelevant_grades: grades that count as defects.
        num_resamples: bootstrap resamples.
        seed: of the resamples, the random order and the order of ties.

    Raises:
        InputError: grades without a gain, infinite scores, a pair twice, or no pair with scores.
        MissingDependencyError: the eval extra is not installed.

    >>> judged = pd.DataFrame(
    ...     [
    ...         ("us", "mouse", "p1", "E", 0.9),
    ...         ("us", "mouse", "p2", "I", 0.2),
    ...         ("us", "cable", "p3", "E", 0.3),
    ...         ("us", "cable", "p1", "I", 0.4),
    ...     ],
    ...     columns=["market", "query_id", "product_id", "grade", "score"],
    ... )
    >>> evaluation = evaluate_scores(
    ...     judged, ["score"], gains={"E": 1.0, "I": 0.0}, relevant_grades=["E"], irrelevant_grades=["I"]
    ... )
    >>> values = evaluation.metrics.query("ranking == 'score'").set_index("metric")["value"]
    >>> values[["MRR@10", "defect rate@10", "ROC-AUC"]].to_dict()  # the cable is only second for its query
    {'MRR@10': 0.75, 'defect rate@10': 0.5, 'ROC-AUC': 0.75}
    """
    integer_gains = _integer_gains(gains)
    _check_pairs(judged, score_columns, integer_gains, {*relevant_grades, *irrelevant_grades})
    pairs = judged.dropna(subset=list(score_columns)).sort_values(_KEY, ignore_index=True)
    if pairs.empty:
        raise InputError(
            f"judged pairs: none of {len(judged):,} has a score. Are the ids and markets those of the scores?"
        )
    scores = {name: pairs[name].to_numpy(dtype=np.float64) for name in score_columns}
    pairs["query_index"] = pairs.groupby(["market", "query_id"], sort=False).ngroup()
    pairs["tie_breaker"] = _hash_uniform(pairs, f"tie {seed}")
    pairs["gain"] = pairs["grade"].map(integer_gains)
    pairs["is_relevant"] = pairs["grade"].isin(set(relevant_grades))
    pairs["is_irrelevant"] = pairs["grade"].isin(set(irrelevant_grades))

    scores[RANDOM] = _hash_uniform(pairs, f"random {seed}")
    query_values = {name: _query_metrics(pairs, values) for name, values in scores.items()}

    rows: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    notes: list[str] = []
    pair_markets = pairs["market"].to_numpy()
    markets = pairs["market"].unique().tolist()
    for market in [*markets, OVERALL] if judged["market"].nunique() > 1 else markets:
        in_market = np.full(len(pairs), True) if market == OVERALL else pair_markets == market
        query_indices, query_of_pair = np.unique(pairs["query_index"].to_numpy()[in_market], return_inverse=True)
        weights = resample_weights(len(query_indices), num_resamples, seed)
        relevant = pairs["is_relevant"].to_numpy()[in_market]
        first: _Resampled | None = None
        for name, values in scores.items():
            of_queries = query_values[name][query_indices]
            own = _resampled(of_queries, relevant, values[in_market], query_of_pair, weights)
            first = first or own
            num_used = [int(np.isfinite(column).sum()) for column in of_queries.T] + [len(query_indices)] * 2
            place = {"market": market, "ranking": name}
            for index, (metric, used) in enumerate(zip(METRICS, num_used, strict=True)):
                low, high = _interval(own.resamples[:, index], used)
                estimate = {"value": own.values[index], "low": low, "high": high, "num_queries": used}
                rows.append({**place, "metric": metric, **estimate})
                if own is not first and name != RANDOM:
                    low, high = _interval(first.resamples[:, index] - own.resamples[:, index], used)
                    difference = {"difference": first.values[index] - own.values[index], "low": low, "high": high}
                    differences.append({**place, "metric": metric, **difference})
        notes += _notes(market, query_values[RANDOM][query_indices], relevant)
    columns = ["market", "ranking", "metric", "difference", "low", "high"]
    return Evaluation(
        metrics=pd.DataFrame(rows),
        differences=pd.DataFrame(differences, columns=columns),
        queries=_by_query(pairs, query_values),
        counts=_counts(judged, pairs),
        notes=tuple(notes),
    )


def _integer_gains(gains: Mapping[str, float]) -> dict[str, int]:
    """Gains times their smallest common denominator: trec_eval takes integers, and nDCG has no scale."""
    exact = {grade: Fraction(str(gain)) if np.isfinite(gain) else Fraction(-1) for grade, gain in gains.items()}
    scale = lcm(*(gain.denominator for gain in exact.values()))
    integers = {grade: int(gain * scale) for grade, gain in exact.items()}
    if not integers or min(integers.values()) < 0 or max(integers.values()) > _MAX_INTEGER_GAIN:
        raise InputError(
            f"gains {dict(gains)}: expected gains of at least 0, each at most {_MAX_INTEGER_GAIN:,} times one step, "
            "for example E 1.0, S 0.1, C 0.01, I 0. Round them."
        )
    return integers


def _check_pairs(
    judged: pd.DataFrame, score_columns: Sequence[str], gains: Mapping[str, int], named_grades: set[str]
) -> None:
    problems = []
    missing = [column for column in [*_KEY, "grade", *score_columns] if column not in judged]
    if missing:
        raise InputError(f"judged pairs: missing columns {missing}; there are {list(judged.columns)}.")
    if unknown := sorted(named_grades - set(gains)):
        problems.append(f"relevant or irrelevant grades without a gain: {unknown}, gains are given for {sorted(gains)}")
    if unknown := sorted(set(judged["grade"].tolist()) - set(gains), key=str):
        problems.append(
            f"grades without a gain: {unknown}, gains are given for {sorted(gains)}; add them or fix the grades"
        )
    if repeated := int(judged.duplicated(_KEY).sum()):
        example = judged.loc[judged.duplicated(_KEY), _KEY].iloc[0].tolist()
        problems.append(
            f"{repeated:,} rows repeat the key (market, query_id, product_id), first {example}; keep one of each"
        )
    for column in score_columns:
        if num_infinite := int(np.isinf(judged[column].to_numpy(dtype=np.float64)).sum()):
            problems.append(
                f"{num_infinite:,} values of {column!r} are infinite; expected finite numbers, or NaN for no score"
            )
    if problems:
        raise InputError("judged pairs:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _hash_uniform(pairs: pd.DataFrame, salt: str) -> np.ndarray:
    """A number in [0, 1) for each pair that depends on its key and the salt only."""
    keys = zip(pairs["market"], pairs["query_id"], pairs["product_id"], strict=True)
    digests = b"".join(hashlib.blake2b(repr((salt, *key)).encode(), digest_size=8).digest() for key in keys)
    return (np.frombuffer(digests, dtype="<u8") >> 11) * 2.0**-53


def _query_metrics(pairs: pd.DataFrame, scores: np.ndarray) -> np.ndarray:
    """QUERY_METRICS of each query, shape (num_queries, 3), NaN where undefined."""
    ir_measures = import_eval("ir_measures")
    queries = pairs["query_index"].to_numpy()
    order = np.lexsort((pairs["tie_breaker"], -scores, queries))
    first_of_query = np.searchsorted(queries, np.arange(queries[-1] + 1))  # pairs are sorted by query
    rank = np.empty(len(pairs), dtype=np.int64)
    rank[order] = np.arange(len(pairs)) - first_of_query[queries]

    ids = {"query_id": queries.astype(str), "doc_id": np.arange(len(pairs)).astype(str)}
    run = pd.DataFrame({**ids, "score": -rank.astype(np.float64)})
    values = np.full((len(first_of_query), len(QUERY_METRICS)), np.nan)
    for column, measure, target in (
        (0, ir_measures.nDCG @ DEPTH, pairs["gain"].to_numpy()),
        (1, ir_measures.RR @ DEPTH, pairs["is_relevant"].to_numpy().astype(int)),
    ):
        for result in ir_measures.iter_calc([measure], pd.DataFrame({**ids, "relevance": target}), run):
            values[int(result.query_id), column] = result.value
        values[np.bincount(queries, weights=target) == 0, column] = np.nan
    is_shown = rank < DEPTH
    num_defects = np.bincount(queries, weights=is_shown & pairs["is_irrelevant"].to_numpy())
    values[:, 2] = num_defects / np.bincount(queries, weights=is_shown)
    return values


def resample_weights(num_queries: int, num_resamples: int, seed: int) -> np.ndarray:
    """How often each resample drew each query, shape (num_resamples, num_queries)."""
    return np.random.default_rng(seed).multinomial(
        num_queries, np.full(num_queries, 1 / num_queries), size=num_resamples
    )


class _Resampled(NamedTuple):
    """METRICS of one ranking, NaN where undefined."""

    values: np.ndarray
    """Shape (5,)."""
    resamples: np.ndarray
    """Of each resample, shape (num_resamples, 5)."""


def _resampled(
    of_queries: np.ndarray, relevant: np.ndarray, scores: np.ndarray, query_of_pair: np.ndarray, weights: np.ndarray
) -> _Resampled:
    values = np.full(len(METRICS), np.nan)
    resamples = np.full((len(weights), len(METRICS)), np.nan)
    for index, column in enumerate(of_queries.T):
        defined = np.isfinite(column)
        if defined.any():
            num_drawn = weights[:, defined].sum(axis=1)
            values[index] = column[defined].mean()
            resamples[:, index] = weights[:, defined] @ column[defined] / np.where(num_drawn > 0, num_drawn, np.nan)
    if relevant.any() and not relevant.all():
        sklearn_metrics = import_eval("sklearn.metrics")
        values[-2] = sklearn_metrics.roc_auc_score(relevant, scores)
        values[-1] = sklearn_metrics.average_precision_score(relevant, scores)
        resamples[:, -2:] = resampled_pair_metrics(relevant, scores, query_of_pair, weights)
    return _Resampled(values, resamples)


def resampled_pair_metrics(
    relevant: np.ndarray, scores: np.ndarray, query_of_pair: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """ROC-AUC and average precision of each resample: scikit-learn's with sample weights, sorted only once.

    Args:
        relevant: whether each pair is relevant, shape (num_pairs,), bool.
        scores: shape (num_pairs,).
        query_of_pair: index of each pair's query into the columns of `weights`, shape (num_pairs,).
        weights: how often each resample has each query, shape (num_resamples, num_queries).

    Returns:
        shape (num_resamples, 2); NaN where a resample has only relevant pairs, or none.
    """
    order = np.argsort(-scores, kind="stable")
    last_of_ties = np.flatnonzero(np.diff(scores[order], append=-np.inf))
    relevant, query_of_pair = relevant[order], query_of_pair[order]
    results = np.full((len(weights), len(PAIR_METRICS)), np.nan)
    for row, query_weights in enumerate(weights):
        pair_weights = query_weights[query_of_pair]
        num_relevant = np.concatenate([[0], np.cumsum(pair_weights * relevant)[last_of_ties]])
        num_seen = np.concatenate([[0], np.cumsum(pair_weights)[last_of_ties]])
        num_rest = num_seen - num_relevant
        if num_relevant[-1] == 0 or num_rest[-1] == 0:
            continue
        results[row, 0] = np.trapezoid(num_relevant, num_rest) / (num_relevant[-1] * num_rest[-1])
        precision = num_relevant / np.maximum(num_seen, 1)
        results[row, 1] = np.diff(num_relevant) @ precision[1:] / num_relevant[-1]
    return results


def _interval(values: np.ndarray, num_queries: int) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    if num_queries < 2 or not len(values):
        return (np.nan, np.nan)
    low, high = np.percentile(values, [2.5, 97.5])
    return (float(low), float(high))


def _notes(market: str, query_values: np.ndarray, relevant: np.ndarray) -> list[str]:
    notes = []
    num_queries = len(query_values)
    for column, reason in ((0, "no product with a gain"), (1, "no relevant product")):
        if num_undefined := int(np.isnan(query_values[:, column]).sum()):
            metric = QUERY_METRICS[column]
            notes.append(
                f"{market}: {num_undefined:,} of {num_queries:,} queries have {reason} and are left out of {metric}."
            )
    if relevant.all() or not relevant.any():
        share = "All" if relevant.all() else "None"
        notes.append(f"{market}: ROC-AUC and average precision are undefined. {share} of the pairs are relevant.")
    if num_queries < 2:
        notes.append(f"{market}: one query gives no interval.")
    return notes


def _by_query(pairs: pd.DataFrame, query_values: Mapping[str, np.ndarray]) -> pd.DataFrame:
    grouped = pairs.groupby("query_index")
    queries = grouped[["market", "query_id"]].first()
    queries["num_pairs"], queries["num_relevant"] = grouped.size(), grouped["is_relevant"].sum()
    frames = []
    for name, values in query_values.items():
        own = queries.assign(**dict(zip(QUERY_COLUMNS, values.T, strict=True)))
        own.insert(2, "ranking", name)
        frames.append(own)
    return pd.concat(frames, ignore_index=True)


def _counts(judged: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    def count(frame: pd.DataFrame) -> dict[str, tuple[int, int]]:
        by_market = {str(market): (len(rows), rows["query_id"].nunique()) for market, rows in frame.groupby("market")}
        overall = (len(frame), sum(num_queries for _, num_queries in by_market.values()))
        return {**by_market, OVERALL: overall} if judged["market"].nunique() > 1 else by_market

    num_scored = count(pairs)
    return pd.DataFrame(
        [
            {
                "market": market,
                "num_judged": num_judged,
                "num_pairs": num_scored.get(market, (0, 0))[0],
                "num_judged_queries": num_judged_queries,
                "num_queries": num_scored.get(market, (0, 0))[1],
            }
            for market, (num_judged, num_judged_queries) in count(judged).items()
        ]
    )
