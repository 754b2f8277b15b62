"""Two tables of scores on the same pairs, query by query: two bundles or two nights, before one replaces the other.

Nothing need be judged: it says how much would change, not whether that is better. The evaluation says that.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Annotated

import pandas as pd
from pydantic import Field
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from csrm.config import InputSpec, LocalPath, Markets, Settings
from csrm.errors import InputError
from csrm.operations.findings import Key, Text
from csrm.operations.texts import collect_texts
from csrm.schemas import CATALOG, COMPARED_SCORES, PAIR_KEY, QUERIES
from csrm.spark.inputs import read_inputs
from csrm.spark.session import persisted

TOP = 10
"""Products that a first page shows."""
OVERALL = "all markets"
_KEY = list(PAIR_KEY)
_QUERY = ["market", "query_id"]


class ComparisonInputs(Settings):
    """Where the texts are that the page names."""

    catalog: InputSpec
    queries: InputSpec


class ComparisonConfig(Settings):
    """Settings of the comparison."""

    markets: Markets
    """Market to the language of its texts; other markets' scores are not looked at."""
    inputs: ComparisonInputs
    before: InputSpec
    """Scores that are in use: market, query_id, product_id and score; grade where there is one."""
    after: InputSpec
    """Scores that would replace them; the same columns."""
    output: LocalPath
    """Local folder for comparison.html and queries.parquet."""
    num_examples: Annotated[int, Field(ge=1)] = 10
    """Queries or pairs of each market in each list of the page."""


@dataclass(frozen=True)
class ScoreComparison:
    """Two tables of scores beside each other."""

    summary: pd.DataFrame
    """One row a market, and one of all markets where there are several: market, num_queries (with scores in both),
    num_queries_before and num_queries_after (in one alone), num_pairs (in both), num_pairs_before and num_pairs_after
    (in one alone), rank_correlation and rank_correlation_p10 (mean and tenth percentile over queries), changed_top,
    changed_first (shares of queries), kept (mean share of the first ten that stay) and regraded (share of pairs; NaN
    without grades)."""
    queries: pd.DataFrame
    """One row a query: market, query_id, query, num_before, num_after, num_shared (pairs), rank_correlation
    (Spearman's, of the shared pairs; NaN where it is undefined), num_top_before, num_top_after, num_kept (products of
    the first ten), is_first_same, num_graded and num_regraded (shared pairs with two grades, those whose grades
    differ)."""
    grades: pd.DataFrame
    """market, before_grade, after_grade, num_pairs of the shared pairs."""
    most_changed: pd.DataFrame
    """Queries whose first ten changed most: rows of `queries`, most first in each market."""
    changes: pd.DataFrame
    """The products that leave or enter the first ten of these: market, query_id, product_id and the two ranks, from 1;
    NaN where there is none."""
    regraded: pd.DataFrame
    """Pairs with another grade, those whose score moved most first: market, query_id, product_id, the two scores,
    grades and ranks."""
    query_texts: Mapping[Key, Text]
    product_texts: Mapping[Key, Text]
    places: Mapping[str, str]
    """before and after to the path, with @v and the version of a Delta table."""


def compare_scores(spark: SparkSession, config: ComparisonConfig) -> ScoreComparison:
    """Compare the scores of two tables, query by query.

    Raises:
        InputError: an input has problems, or the tables have no pair in common.
    """
    tables = {name: replace(COMPARED_SCORES, name=name) for name in ("before", "after")}
    specs = {CATALOG: config.inputs.catalog, QUERIES: config.inputs.queries}
    specs |= {tables["before"]: config.before, tables["after"]: config.after}
    inputs = read_inputs(spark, specs, config.markets)
    pairs_df = paired(inputs["before"].df, inputs["after"].df)
    with persisted(pairs_df), persisted(by_query(pairs_df)) as queries_df:
        texts_df = inputs[QUERIES.name].df.select(*_QUERY, "query")
        queries = _numbers(queries_df.join(texts_df, _QUERY, "left").orderBy(*_QUERY).toPandas())
        if not queries["num_shared"].sum():
            raise InputError(
                f"before at {config.before.path!r} and after at {config.after.path!r}: expected pairs that both have, "
                f"found none in the markets {sorted(config.markets)}. Are their ids those of the same tables?"
            )
        most_changed = most_changed_queries(queries, config.num_examples)
        changes = _changes_of_top(pairs_df, most_changed)
        regraded = _regraded(pairs_df, config.num_examples)
        grades_df = pairs_df.where("before_grade IS NOT NULL AND after_grade IS NOT NULL")
        grades_df = grades_df.groupBy("market", "before_grade", "after_grade").agg(F.count("*").alias("num_pairs"))
        grades = grades_df.orderBy("market", "before_grade", "after_grade").toPandas()
    named = pd.concat([frame[[*_QUERY, "product_id"]] for frame in (changes, regraded)])
    named_queries = {*_keys(named, "query_id"), *_keys(most_changed, "query_id")}
    product_keys = set(_keys(named, "product_id"))
    return ScoreComparison(
        summary=summarize(queries, config.markets),
        queries=queries,
        grades=grades,
        most_changed=most_changed,
        changes=changes,
        regraded=regraded,
        query_texts=collect_texts(inputs[QUERIES.name].df, "query_id", "query", named_queries),
        product_texts=collect_texts(inputs[CATALOG.name].df, "product_id", "title", product_keys),
        places={name: _place(inputs[name].path, inputs[name].version) for name in ("before", "after")},
    )


def paired(before_df: DataFrame, after_df: DataFrame) -> DataFrame:
    """The pairs of two tables side by side; those without a score are in neither.

    Args:
        before_df: rows of COMPARED_SCORES.
        after_df: the same.

    Returns:
        market, query_id, product_id; before_score, before_grade, before_rank (place in its own table, from 1, equal
        scores by product_id), before_place (place among the pairs that both have, equal scores share the mean of their
        places); the same of after. Null where a table lacks the pair.
    """
    pairs_df = _ranked(before_df, "before").join(_ranked(after_df, "after"), _KEY, "full")
    is_shared = F.col("before_rank").isNotNull() & F.col("after_rank").isNotNull()
    of_query = Window.partitionBy(*_QUERY, is_shared)
    for side in ("before", "after"):
        score = F.col(f"{side}_score")
        num_equal = F.count("*").over(Window.partitionBy(*_QUERY, is_shared, score))
        place = F.rank().over(of_query.orderBy(score.desc())) + (num_equal - 1) / 2
        pairs_df = pairs_df.withColumn(f"{side}_place", F.when(is_shared, place))
    return pairs_df


def _ranked(scores_df: DataFrame, side: str) -> DataFrame:
    best_first = Window.partitionBy(*_QUERY).orderBy(F.desc("score"), "product_id")
    return scores_df.where("score IS NOT NULL AND NOT isnan(score)").select(
        *_KEY,
        F.col("score").alias(f"{side}_score"),
        F.col("grade").alias(f"{side}_grade"),
        F.row_number().over(best_first).alias(f"{side}_rank"),
    )


def by_query(pairs_df: DataFrame) -> DataFrame:
    """What changes for each query; see ScoreComparison.queries, without the text.

    Args:
        pairs_df: see paired.
    """
    in_before, in_after = F.col("before_rank") <= TOP, F.col("after_rank") <= TOP
    is_graded = F.col("before_grade").isNotNull() & F.col("after_grade").isNotNull()
    spread = F.sqrt(F.var_pop("before_place") * F.var_pop("after_place"))
    correlation = F.try_divide(F.covar_pop("before_place", "after_place"), spread)  # corr divides by 0 where all tie
    return pairs_df.groupBy(*_QUERY).agg(
        F.count("before_rank").alias("num_before"),
        F.count("after_rank").alias("num_after"),
        F.count("before_place").alias("num_shared"),
        correlation.alias("rank_correlation"),
        F.count_if(in_before).alias("num_top_before"),
        F.count_if(in_after).alias("num_top_after"),
        F.count_if(in_before & in_after).alias("num_kept"),
        F.coalesce(F.bool_or(F.expr("before_rank = 1 AND after_rank = 1")), F.lit(False)).alias("is_first_same"),
        F.count_if(is_graded).alias("num_graded"),
        F.count_if(is_graded & (F.col("before_grade") != F.col("after_grade"))).alias("num_regraded"),
    )


def _numbers(queries: pd.DataFrame) -> pd.DataFrame:
    return queries.astype({"rank_correlation": "float64"})


def summarize(queries: pd.DataFrame, markets: Collection[str]) -> pd.DataFrame:
    """Figures of each market; see ScoreComparison.summary.

    Args:
        queries: see ScoreComparison.queries.
        markets: the markets, also those that neither table has scores of.
    """
    rows = [_summary(market, queries[queries["market"] == market]) for market in sorted(markets)]
    if len(rows) > 1:
        rows.append(_summary(OVERALL, queries))
    return pd.DataFrame(rows)


def _summary(market: str, queries: pd.DataFrame) -> dict[str, object]:
    both = queries[(queries["num_before"] > 0) & (queries["num_after"] > 0)]
    largest = both[["num_top_before", "num_top_after"]].max(axis=1)
    num_pairs, num_graded = int(queries["num_shared"].sum()), int(queries["num_graded"].sum())
    return {
        "market": market,
        "num_queries": len(both),
        "num_queries_before": int((queries["num_after"] == 0).sum()),
        "num_queries_after": int((queries["num_before"] == 0).sum()),
        "num_pairs": num_pairs,
        "num_pairs_before": int(queries["num_before"].sum()) - num_pairs,
        "num_pairs_after": int(queries["num_after"].sum()) - num_pairs,
        "rank_correlation": both["rank_correlation"].mean(),
        "rank_correlation_p10": both["rank_correlation"].quantile(0.1),
        "changed_top": (both["num_kept"] < largest).mean(),
        "changed_first": (~both["is_first_same"]).mean(),
        "kept": (both["num_kept"] / largest).mean(),
        "regraded": int(queries["num_regraded"].sum()) / num_graded if num_graded else float("nan"),
    }


def most_changed_queries(queries: pd.DataFrame, num: int) -> pd.DataFrame:
    """Queries of which most products leave or enter the first ten; of equal ones those of the lowest correlation.

    Args:
        queries: see ScoreComparison.queries; those that one table lacks are left out.
        num: most queries of each market.
    """
    num_changed = queries["num_top_before"] + queries["num_top_after"] - 2 * queries["num_kept"]
    is_changed = (queries["num_before"] > 0) & (queries["num_after"] > 0) & (num_changed > 0)
    own = queries.assign(num_changed=num_changed)[is_changed]
    order = ["market", "num_changed", "rank_correlation", "query_id"]
    own = own.sort_values(order, ascending=[True, False, True, True])
    return own.groupby("market", sort=False).head(num).drop(columns="num_changed").reset_index(drop=True)


def _changes_of_top(pairs_df: DataFrame, queries: pd.DataFrame) -> pd.DataFrame:
    spark = pairs_df.sparkSession
    keys_df = spark.createDataFrame(sorted(_keys(queries, "query_id")), "market string, query_id string")
    is_moved = F.expr(f"coalesce(before_rank <= {TOP}, false) != coalesce(after_rank <= {TOP}, false)")
    columns = [*_KEY, "before_rank", "after_rank"]
    changes_df = pairs_df.join(F.broadcast(keys_df), _QUERY).where(is_moved).select(*columns)
    return pd.DataFrame(changes_df.orderBy(*_QUERY, "before_rank", "after_rank").collect(), columns=columns)


def _regraded(pairs_df: DataFrame, num: int) -> pd.DataFrame:
    columns = [*_KEY, *(f"{side}_{name}" for side in ("before", "after") for name in ("score", "grade", "rank"))]
    most_first = F.abs(F.col("after_score") - F.col("before_score")).desc()
    place = F.row_number().over(Window.partitionBy("market").orderBy(most_first, "query_id", "product_id"))
    regraded_df = pairs_df.where("before_grade != after_grade").withColumn("place", place).where(F.col("place") <= num)
    return pd.DataFrame(regraded_df.orderBy("market", "place").select(*columns).collect(), columns=columns)


def _keys(frame: pd.DataFrame, id_column: str) -> list[Key]:
    return list(zip(frame["market"], frame[id_column], strict=True))


def _place(path: str, version: int | None) -> str:
    return path if version is None else f"{path}@v{version}"
