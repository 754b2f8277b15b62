"""What a run would make of each market, counted for its audit."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from csrm.evaluation.metrics import evaluate_scores
from csrm.night.audit import NUM_SCORE_BINS, Canary, MarketOutcome
from csrm.schemas import PAIR_KEY
from csrm.spark.text import is_blank


def measure_outcomes(
    planned_df: DataFrame,
    published_df: DataFrame,
    changes_df: DataFrame,
    queries_df: DataFrame,
    catalog_df: DataFrame,
    bundle_digest: str,
    canaries: Mapping[tuple[str, str], Canary],
    ndcgs: Mapping[str, tuple[float, float]],
) -> dict[str, MarketOutcome]:
    """Market to what a run would make of it.

    Args:
        planned_df: columns of run_pairs, of one run.
        published_df: columns of relevance_scores before the run, in its markets.
        changes_df: as of run_changes; read several times.
        queries_df: market, query_id, query.
        catalog_df: market, product_id, title.
        bundle_digest: of the run's bundle.
        canaries: as of measure_canaries, where a market has pairs of a state.
        ndcgs: market to the nDCG@10 of published and of new scores, where they were measured.
    """
    planned = _rows(_planned_counts(planned_df))
    published = (
        published_df.groupBy("market", _bin("relevance_score").alias("bin"), "predicted_grade")
        .agg(
            F.count("*").alias("num_rows"), F.count_if(F.col("bundle_digest") == bundle_digest).alias("num_same_bundle")
        )
        .toPandas()
    )
    changes = _change_counts(changes_df).toPandas()
    repeated = _rows(
        changes_df.groupBy("market").agg(
            (F.count("*") - F.count_distinct("query_id", "product_id")).alias("num_repeated")
        )
    )
    queries = _rows(queries_df.where(~is_blank(F.col("query"))).groupBy("market").count())
    products = _rows(catalog_df.where(~is_blank(F.col("title"))).groupBy("market").count())
    is_new = published.groupby("market")["num_same_bundle"].sum() == 0
    agreement = _rank_agreement(changes_df) if is_new.any() else {}
    return {
        market: MarketOutcome(
            market=market,
            num_candidates=counts["num_candidates"],
            num_rejected=counts["num_rejected"],
            num_unchanged=counts["num_unchanged"],
            num_covered_queries=counts["num_covered_queries"],
            num_covered_products=counts["num_covered_products"],
            num_queries=queries.get(market, {}).get("count", 0),
            num_products=products.get(market, {}).get("count", 0),
            num_repeated=repeated.get(market, {}).get("num_repeated", 0),
            is_new_bundle=bool(is_new.get(market, False)),
            rank_agreement=agreement.get(market) if is_new.get(market, False) else None,
            ndcg=ndcgs.get(market),
            canary=canaries.get((market, "unchanged")),
            reused_canary=canaries.get((market, "staged")),
            **_distributions(published[published["market"] == market], changes[changes["market"] == market]),
        )
        for market, counts in sorted(planned.items())
    }


def measure_canaries(scored: pd.DataFrame, tolerance: float) -> dict[tuple[str, str], Canary]:
    """Market and state (unchanged or staged) to the canary of its pairs.

    Args:
        scored: market, state, earlier_score, relevance_score, one row a sampled pair.
        tolerance: that the bundle declares.
    """
    differences = (scored["relevance_score"].astype(float) - scored["earlier_score"].astype(float)).abs()
    return {
        (str(market), str(state)): Canary(len(values), float(values.max(skipna=False)), tolerance)
        for (market, state), values in differences.groupby([scored["market"], scored["state"]])
    }


def measure_ndcgs(
    judgments_df: DataFrame, changes_df: DataFrame, gains: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    """Market to nDCG@10 of the published and of the new scores, over judged pairs that have both and differ.

    A market none of whose judged products has a gain has no nDCG, and is left out.

    Args:
        judgments_df: market, query_id, product_id, grade.
        changes_df: as of run_changes; what is missing or no score is for other checks of the audit.
        gains: grade to gain in [0, 1], of which six decimals count; pairs of other grades are left out.
    """
    gains = {grade: round(gain, 6) for grade, gain in gains.items()}
    updated_df = changes_df.where("operation = 'update' AND relevance_score BETWEEN 0 AND 1")
    judged = (
        judgments_df.where(F.col("grade").isin(*gains))
        .join(updated_df, on=list(PAIR_KEY), how="inner")
        .select(*PAIR_KEY, "grade", "old_score", F.col("relevance_score").alias("new_score"))
        .toPandas()
    )
    if judged.empty:
        return {}
    best, worst = max(gains, key=gains.__getitem__), min(gains, key=gains.__getitem__)
    metrics = evaluate_scores(
        judged,
        ["old_score", "new_score"],
        gains=gains,
        relevant_grades=[best],
        irrelevant_grades=[worst],
        num_resamples=100,
    ).metrics
    ndcg = metrics[metrics["metric"] == "nDCG@10"].set_index(["market", "ranking"])["value"]
    both = {
        market: (float(ndcg[market, "old_score"]), float(ndcg[market, "new_score"]))
        for market in judged["market"].unique()
    }
    return {market: values for market, values in both.items() if np.isfinite(values).all()}


def _planned_counts(planned_df: DataFrame) -> DataFrame:
    is_scored = F.col("state") != "rejected"
    return planned_df.groupBy("market").agg(
        F.count("*").alias("num_candidates"),
        F.count_if(~is_scored).alias("num_rejected"),
        F.count_if(F.col("state") == "unchanged").alias("num_unchanged"),
        F.count_distinct(F.when(is_scored, F.col("query_id"))).alias("num_covered_queries"),
        F.count_distinct(F.when(is_scored, F.col("product_id"))).alias("num_covered_products"),
    )


def _change_counts(changes_df: DataFrame) -> DataFrame:
    """Changes by operation, and by score and grade before and after; bins are -1 where there is no such score."""
    score = F.col("relevance_score")
    return changes_df.groupBy(
        "market",
        "operation",
        _bin("old_score").alias("old_bin"),
        _bin("relevance_score").alias("new_bin"),
        "old_grade",
        "predicted_grade",
    ).agg(
        F.count("*").alias("num_rows"),
        F.count_if((F.col("operation") != "delete") & score.isNull()).alias("num_missing"),
        F.count_if(F.isnan(score) | score.isin(float("inf"), float("-inf"))).alias("num_not_finite"),
        F.count_if((score < 0.0) | ((score > 1.0) & ~F.isnan(score))).alias("num_out_of_range"),
    )


def _bin(score: str) -> Column:
    number = F.floor(F.col(score) * NUM_SCORE_BINS)
    is_score = F.col(score).between(0.0, 1.0)
    return F.when(is_score, F.least(number, F.lit(NUM_SCORE_BINS - 1))).otherwise(-1).cast("int")


def _distributions(published: pd.DataFrame, changes: pd.DataFrame) -> dict[str, Any]:
    by_operation = changes.groupby("operation")["num_rows"].sum()
    updates, inserts = (changes[changes["operation"] == name] for name in ("update", "insert"))
    before = published.groupby("predicted_grade")["num_rows"].sum()
    gone = changes.groupby("old_grade")["num_rows"].sum()
    come = changes.groupby("predicted_grade")["num_rows"].sum()
    after = before.sub(gone, fill_value=0).add(come, fill_value=0)
    return {
        "num_published": int(published["num_rows"].sum()),
        "num_new": int(by_operation.get("insert", 0)),
        "num_changed": int(by_operation.get("update", 0)),
        "num_deleted": int(by_operation.get("delete", 0)),
        "num_missing": int(changes["num_missing"].sum()),
        "num_not_finite": int(changes["num_not_finite"].sum()),
        "num_out_of_range": int(changes["num_out_of_range"].sum()),
        "published_scores": _histogram(published["bin"], published["num_rows"]),
        "scores_before": _histogram(updates["old_bin"], updates["num_rows"]),
        "scores_after": _histogram(updates["new_bin"], updates["num_rows"]),
        "new_scores": _histogram(inserts["new_bin"], inserts["num_rows"]),
        "grades_before": {str(name): int(count) for name, count in before.items()},
        "grades_after": {str(name): int(count) for name, count in after.items()},
    }


def _histogram(bins: pd.Series, counts: pd.Series) -> np.ndarray:
    is_score = bins >= 0
    return np.bincount(bins[is_score], weights=counts[is_score], minlength=NUM_SCORE_BINS)


def _rank_agreement(changes_df: DataFrame) -> dict[str, float]:
    """Market to the mean over queries of Spearman's correlation between published and new scores.

    New scores that are all the same where the published ones were not agree with no order: 0. Else a model that gives
    every pair one score would not be judged. Queries whose published scores are all the same are left out.
    """
    query = ["market", "query_id"]
    ranks = {}
    for name, score in (("old_rank", "old_score"), ("new_rank", "relevance_score")):
        num_ties = F.count("*").over(Window.partitionBy(*query, score))
        first = F.rank().over(Window.partitionBy(*query).orderBy(score))
        ranks[name] = first + (num_ties - 1) / 2  # ties share their mean rank
    ranked_df = (
        changes_df.where("operation = 'update'").select(*query, "old_score", "relevance_score").withColumns(ranks)
    )
    deviations = F.stddev_pop("old_rank") * F.stddev_pop("new_rank")
    correlation = F.try_divide(F.covar_pop("old_rank", "new_rank"), deviations)
    by_query_df = ranked_df.groupBy("market", "query_id").agg(
        F.when(F.stddev_pop("old_rank") > 0, F.coalesce(correlation, F.lit(0.0))).alias("agreement")
    )
    rows = by_query_df.groupBy("market").agg(F.mean("agreement").alias("agreement")).collect()
    return {row["market"]: row["agreement"] for row in rows if row["agreement"] is not None}


def _rows(df: DataFrame) -> dict[str, dict[str, Any]]:
    return {row["market"]: row.asDict() for row in df.collect()}
