"""What one scoring run found and changed, read back from its tables as the small frames that its report shows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pandas as pd
from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark import StorageLevel
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, Row, SparkSession, Window
from pyspark.sql import functions as F

from csrm.config import InputSpec
from csrm.errors import InputError
from csrm.night.publish import newest_scores
from csrm.night.published import commits_since
from csrm.night.runs import PUBLISHED, in_utc, read_nights
from csrm.operations.findings import (
    NUM_PLOT_BINS,
    SMALLEST_MOVE,
    Comparison,
    Key,
    RunFindings,
)
from csrm.operations.interventions import recorded_interventions
from csrm.operations.texts import TextSource, read_texts
from csrm.schemas import CATALOG, PAIR_KEY, QUERIES, RELEVANCE_SCORES, RUN_PAIRS, SCORES_STAGING, SCORING_RUNS
from csrm.spark.commits import Commit
from csrm.spark.tables import read_table, spark_schema, table_exists, table_id, table_path

_KEY = list(PAIR_KEY)
_VALUES = ["relevance_score", "predicted_grade"]
_NUM_NAMED_RUNS = 5


@dataclass(frozen=True)
class Limits:
    """How much of a run a report shows."""

    num_runs: int
    """Runs in the history."""
    num_moved: int
    """Queries, and products, whose scores moved most."""
    num_samples: int
    """Rejected pairs of each reason."""


def read_findings(
    spark: SparkSession,
    tables_dir: str,
    run_id: str | None,
    catalog: InputSpec,
    queries: InputSpec,
    languages: Mapping[str, str],
    limits: Limits,
) -> RunFindings:
    """Everything that the report of a run shows. Counted and cut in Spark: what comes to the driver is small.

    Args:
        spark: the session.
        tables_dir: the folder of CSRM's tables.
        run_id: the run; None: the one that started last.
        catalog: where the titles of products are.
        queries: where the texts of queries are.
        languages: market to language.
        limits: how much of it.

    Raises:
        InputError: no such run, or no table of runs.
    """
    runs, num_newer = read_runs(spark, tables_dir, run_id, limits.num_runs)
    run, notes = runs[0], []
    rejected, samples = None, pd.DataFrame(columns=_KEY)
    pairs_df = _run_pairs(spark, tables_dir, run["run_id"])
    if pairs_df is None:
        notes.append("run_pairs has no pairs of this run: it did not come so far, or they were cleaned up.")
    else:
        rejected, samples = rejected_pairs(pairs_df, limits.num_samples)
    comparison = None
    try:
        states = _states(spark, tables_dir, run, pairs_df)
        if states is not None:
            comparison = compare(*states, limits.num_moved)
    except InputError as error:
        notes.append(f"The scores cannot be compared: {error}")
    except (PySparkException, Py4JJavaError) as error:
        if "FILE_NOT_EXIST" not in str(error):
            raise
        notes.append(
            f"The scores cannot be compared: files of relevance_scores, version {run['base_version']} or "
            f"{run['published_version']}, are gone, as VACUUM leaves it."
        )
    moved: list[tuple[pd.DataFrame, str | None, str | None]] = []
    if comparison is not None:
        moved = [(comparison.queries, "id", "other_id"), (comparison.products, "other_id", "id")]
        moved += [(comparison.lost_queries, "id", None), (comparison.lost_products, None, "id")]
    named = [*moved, (samples, "query_id", "product_id")]
    before = _published_before(runs)
    query_source = TextSource(QUERIES, queries, "query_id", "query")
    product_source = TextSource(CATALOG, catalog, "product_id", "title")
    query_keys = {key for frame, query, _ in named if query is not None for key in _keys(frame, query)}
    product_keys = {key for frame, _, product in named if product is not None for key in _keys(frame, product)}
    query_texts, query_notes = read_texts(spark, query_source, query_keys, run, before)
    product_texts, product_notes = read_texts(spark, product_source, product_keys, run, before)
    return RunFindings(
        runs=runs,
        num_newer=num_newer,
        comparison=comparison,
        rejected=rejected,
        samples=samples,
        queries=query_texts,
        products=product_texts,
        languages=languages,
        notes=[*notes, *query_notes, *product_notes],
        taken_back=taken_back(spark, tables_dir, runs),
        interventions=interventions(spark, tables_dir, runs),
    )


def taken_back(spark: SparkSession, tables_dir: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """What was done to the published scores of runs by commits that are no run's.

    Rollbacks and retirements are rows of scoring_runs. What others did, and what is older than these rows, is known as
    far as the table's history goes.

    Args:
        spark: the session.
        tables_dir: the folder of CSRM's tables.
        runs: rows of scoring_runs.

    Returns:
        Run id to sentences, oldest first; runs whose scores only later runs have changed are left out, and so is what
        a later rollback to the run took back itself.
    """
    published, commits = _commits_of_no_run(spark, tables_dir, runs)
    targets = {commit.carried["rollback_to"] for commit in commits if "rollback_to" in commit.carried}
    rows: list[Row] = []
    if targets:
        runs_df = read_table(spark, SCORING_RUNS, table_path(tables_dir, SCORING_RUNS))
        rows = runs_df.where(F.col("run_id").isin(*targets)).collect()
    versions = {row["run_id"]: row["published_version"] for row in rows}
    found: dict[str, list[str]] = {}
    for run in published:
        done: list[tuple[str | None, str]] = []
        for commit in commits:
            market = commit.carried.get("market")
            if commit.version <= run["published_version"] or market not in (None, *run["markets"]):
                continue
            target = versions.get(commit.carried.get("rollback_to", ""), -1)
            if target == run["published_version"]:  # the market is as this run left it again
                done = [(place, sentence) for place, sentence in done if place != market]
            elif target < run["published_version"]:
                done.append((market, _what_was_done(commit)))
        if done:
            found[run["run_id"]] = [sentence for _, sentence in done]
    return found


def interventions(
    spark: SparkSession, tables_dir: str, runs: Sequence[Mapping[str, Any]]
) -> list[tuple[datetime, str]]:
    """Rollbacks, retirements and changes by others since the oldest of some runs, each with its time, newest first.

    Args:
        spark: the session.
        tables_dir: the folder of CSRM's tables.
        runs: rows of scoring_runs.
    """
    _, commits = _commits_of_no_run(spark, tables_dir, runs)
    return [(commit.at, _what_was_done(commit)) for commit in reversed(commits)]


def _commits_of_no_run(
    spark: SparkSession, tables_dir: str, runs: Sequence[Mapping[str, Any]]
) -> tuple[list[Mapping[str, Any]], list[Commit]]:
    """The runs that published to the table as it is; the commits after the oldest of them that are no run's.

    Each commit is there once: a row of scoring_runs counts, and the table's history where there is no such row.
    """
    path = table_path(tables_dir, RELEVANCE_SCORES)
    if not table_exists(spark, path):
        return [], []
    own_tables = (None, table_id(spark, path))  # versions of another table are none of this one's
    published = [
        run
        for run in runs
        if run["verdict"] in PUBLISHED and run["published_version"] is not None and run["table_id"] in own_tables
    ]
    if not published:
        return [], []
    markets = {market for run in published for market in run["markets"]}
    oldest = min(run["published_version"] for run in published)
    commits = {
        commit.version: commit
        for commit in commits_since(spark, path, oldest, markets=markets)
        if "run_id" not in commit.carried
    }
    recorded = recorded_interventions(spark, tables_dir, oldest)
    commits |= {commit.version: commit for commit in recorded if commit.carried["market"] in markets}
    return published, [commits[version] for version in sorted(commits)]


def _what_was_done(commit: Commit) -> str:
    where = f"in version {commit.version} of relevance_scores, {commit.at:%Y-%m-%d %H:%M} UTC"
    market = commit.carried.get("market")
    if "rollback_to" in commit.carried:
        return f"Market {market} was rolled back to run {commit.carried['rollback_to']} {where}."
    if "retired" in commit.carried:
        return f"Market {market} was retired {where}: {commit.carried.get('reason', '')}"
    return f"Something else than CSRM changed the table {where}: {commit.operation}."


def read_runs(
    spark: SparkSession, tables_dir: str, run_id: str | None, num_runs: int
) -> tuple[list[dict[str, Any]], int]:
    """A run's row and those of the runs that started before it, newest first; and how many started later.

    Rollbacks and retirements are left out: no report is about one.

    Args:
        spark: the session.
        tables_dir: the folder of CSRM's tables.
        run_id: the run; None: the one that started last.
        num_runs: most rows to return.

    Returns:
        The rows, with times in UTC; the number.

    Raises:
        InputError: no such run, or no table of runs.
    """
    path = table_path(tables_dir, SCORING_RUNS)
    runs_df = read_nights(spark, tables_dir).withColumn("place", F.struct(F.unix_micros("started_at"), "run_id"))
    newest_first_df = runs_df.orderBy(F.col("place").desc())
    run = (newest_first_df if run_id is None else newest_first_df.where(F.col("run_id") == run_id)).head()
    if run is None:
        newest = [row["run_id"] for row in newest_first_df.limit(_NUM_NAMED_RUNS).collect()]
        wanted = "a run" if run_id is None else f"run {run_id!r}"
        raise InputError(
            f"table scoring_runs at {path!r}: expected {wanted}, found none; "
            + (f"the newest runs are {newest}. Name one with --run-id." if newest else "it has no rows.")
        )
    place = F.struct(*map(F.lit, run["place"]))
    rows = newest_first_df.where(F.col("place") <= place).drop("place").limit(num_runs).collect()
    return [in_utc(row.asDict(recursive=True)) for row in rows], runs_df.where(F.col("place") > place).count()


def rejected_pairs(pairs_df: DataFrame, num_samples: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rejected pairs of a run: counted, and some of each reason.

    Args:
        pairs_df: rows of run_pairs.
        num_samples: pairs of each reason; always the same ones.

    Returns:
        Two frames, see RunFindings.rejected and RunFindings.samples.
    """
    rejected_df = pairs_df.where("state = 'rejected'").select(*_KEY, "reason")
    by_reason_df = rejected_df.groupBy("market", "reason").agg(F.count("*").alias("num_pairs"))
    place = F.row_number().over(Window.partitionBy("reason").orderBy(F.xxhash64(*_KEY), *_KEY))
    samples_df = rejected_df.withColumn("place", place).where(F.col("place") <= num_samples)
    return (
        _frame(by_reason_df.orderBy("reason", "market")),
        _frame(samples_df.orderBy("reason", "place").select(*_KEY, "reason")),
    )


def compare(before_df: DataFrame, after_df: DataFrame, num_moved: int) -> Comparison:
    """Two states of the published scores, beside each other.

    Args:
        before_df: market, query_id, product_id, relevance_score, predicted_grade.
        after_df: the same and is_new: whether the run wrote the row. A null score is not known yet.
        num_moved: queries, and products, to name.
    """
    scored_df = before_df.select("*", F.lit("before").alias("state")).unionByName(
        after_df.where("relevance_score IS NOT NULL").drop("is_new").withColumn("state", F.lit("after"))
    )
    changes_df = _changes(before_df, after_df).persist(StorageLevel.MEMORY_AND_DISK)
    try:
        moved_df = changes_df.where(F.abs("move") > SMALLEST_MOVE)
        return Comparison(
            bins=_frame(_bins(scored_df)),
            summary=_frame(_summary(scored_df)),
            changes=_frame(_counted_changes(changes_df)),
            queries=_frame(_moved_most(moved_df, "query_id", "product_id", num_moved)),
            products=_frame(_moved_most(moved_df, "product_id", "query_id", num_moved)),
            lost_queries=_frame(_lost_most(changes_df, after_df, "query_id", num_moved)),
            lost_products=_frame(_lost_most(changes_df, after_df, "product_id", num_moved)),
        )
    finally:
        changes_df.unpersist()


def _changes(before_df: DataFrame, after_df: DataFrame) -> DataFrame:
    """The pairs whose row is another one now: key, operation, before, after, and move.

    The move is null unless both are usable scores.
    """
    old_df = before_df.select(*_KEY, F.lit(True).alias("was"), _usable("relevance_score").alias("before"))
    new_df = after_df.select(
        *_KEY, "is_new", F.col("relevance_score").isNull().alias("pending"), _usable("relevance_score").alias("after")
    )
    operation = (
        F.when(F.col("is_new").isNull(), "delete")
        .when(F.expr("is_new AND pending"), "pending")
        .when(F.col("was").isNull(), "insert")
        .when(F.col("is_new"), "update")
    )
    return (
        old_df.join(new_df, on=_KEY, how="full")
        .withColumn("operation", operation)
        .where("operation IS NOT NULL")
        .select(*_KEY, "operation", "before", "after", (F.col("after") - F.col("before")).alias("move"))
    )


def _usable(name: str) -> Column:
    """A score as a double; null where it is outside [0, 1] or no number, as only a rejected run's can be."""
    score = F.col(name).cast("double")
    return F.when(~F.isnan(score) & score.between(0, 1), score)


def _bins(scored_df: DataFrame) -> DataFrame:
    score = _usable("relevance_score")
    place = F.when(score.isNull(), -1).otherwise(F.least(F.floor(score * NUM_PLOT_BINS), F.lit(NUM_PLOT_BINS - 1)))
    return (
        scored_df.select("market", "state", F.col("predicted_grade").alias("grade"), place.alias("bin"))
        .groupBy("market", "state", "grade", "bin")
        .agg(F.count("*").alias("num_pairs"))
        .orderBy("market", "state", "grade", "bin")
    )


def _summary(scored_df: DataFrame) -> DataFrame:
    quantiles = F.percentile_approx("score", [0.1, 0.5, 0.9])
    return (
        scored_df.select("market", "state", _usable("relevance_score").alias("score"))
        .groupBy("market", "state")
        .agg(F.mean("score").alias("mean"), quantiles.alias("quantiles"))
        .select(
            "market",
            "state",
            "mean",
            *(F.col("quantiles")[i].alias(name) for i, name in enumerate(("p10", "p50", "p90"))),
        )
        .orderBy("market", "state")
    )


def _counted_changes(changes_df: DataFrame) -> DataFrame:
    return (
        changes_df.groupBy("market", "operation")
        .agg(
            F.count("*").alias("num_pairs"),
            F.count_if(F.abs("move") > SMALLEST_MOVE).alias("num_moved"),
            F.mean(F.abs("move")).alias("mean_move"),
            F.max(F.abs("move")).alias("largest_move"),
        )
        .orderBy("market", "operation")
    )


def _moved_most(moved_df: DataFrame, own: str, other: str, num_moved: int) -> DataFrame:
    distance = F.abs("move")
    largest = F.max(F.struct(distance.alias("distance"), other, "before", "after"))
    return (
        moved_df.groupBy("market", own)
        .agg(
            F.count_if(F.col("move") > 0).alias("num_up"),
            F.count_if(F.col("move") < 0).alias("num_down"),
            F.sum(distance).alias("total_move"),
            largest.alias("largest"),
        )
        .orderBy(F.col("total_move").desc(), "market", own)
        .limit(num_moved)
        .select(
            "market",
            F.col(own).alias("id"),
            *("num_up", "num_down", "total_move"),
            F.col(f"largest.{other}").alias("other_id"),
            *("largest.before", "largest.after"),
        )
    )


def _lost_most(changes_df: DataFrame, after_df: DataFrame, own: str, num_lost: int) -> DataFrame:
    """The queries, or products, that most pairs were deleted of."""
    lost_df = changes_df.where("operation = 'delete'").groupBy("market", own).agg(F.count("*").alias("num_lost"))
    most_df = lost_df.orderBy(F.col("num_lost").desc(), "market", own).limit(num_lost)
    left_df = after_df.where("relevance_score IS NOT NULL").join(F.broadcast(most_df), ["market", own], "left_semi")
    left_df = left_df.groupBy("market", own).agg(F.count("*").alias("num_left"))
    return (
        most_df.join(left_df, ["market", own], "left")
        .select("market", F.col(own).alias("id"), "num_lost", F.coalesce("num_left", F.lit(0)).alias("num_left"))
        .orderBy(F.col("num_lost").desc(), "market", "id")
    )


def _states(
    spark: SparkSession, tables_dir: str, run: Mapping[str, Any], pairs_df: DataFrame | None
) -> tuple[DataFrame, DataFrame] | None:
    """The scores before a run and those after it, as `compare` takes them; None where the latter are not there.

    Raises:
        InputError: a version cannot be read any more, or the table is another one than the run's.
    """
    path = table_path(tables_dir, RELEVANCE_SCORES)
    if run["table_id"] is not None and table_exists(spark, path) and run["table_id"] != table_id(spark, path):
        raise InputError(f"relevance_scores at {path!r} was made anew since, so that its versions are other states.")

    def published(version: int | None) -> DataFrame:
        if version is None:
            return spark.createDataFrame([], spark_schema(RELEVANCE_SCORES))
        scores_df = read_table(spark, RELEVANCE_SCORES, path, version)
        return scores_df.where(F.col("market").isin(*run["markets"]))

    base, version = run["base_version"], run["published_version"]
    before_df = published(base)
    if version is not None:
        is_new = F.lit(False) if version == base else F.col("run_id") == run["run_id"]
        after_df = published(version).withColumn("is_new", is_new)
    elif pairs_df is None or run["verdict"] == "discarded":
        return None
    else:
        after_df = _would_be(pairs_df, before_df, _staged(spark, tables_dir))
    return before_df.select(*_KEY, *_VALUES), after_df.select(*_KEY, *_VALUES, "is_new")


def _would_be(pairs_df: DataFrame, before_df: DataFrame, staged_df: DataFrame) -> DataFrame:
    """What a run that was not published would have: its unchanged pairs as they are, the others as they are staged.

    Args:
        pairs_df: rows of run_pairs.
        before_df: the published scores that the run compared with.
        staged_df: key, pair_key, relevance_score, predicted_grade; one row for a pair and pair_key.
    """
    unchanged_df = (
        pairs_df.where("state = 'unchanged'")
        .select(*_KEY)
        .join(before_df.select(*_KEY, *_VALUES), on=_KEY, how="left")
        .withColumn("is_new", F.lit(False))
    )
    changed_df = (
        pairs_df.where("state IN ('staged', 'to_score')")
        .select(*_KEY, "pair_key")
        .join(staged_df, on=[*_KEY, "pair_key"], how="left")
        .select(*_KEY, *_VALUES, F.lit(True).alias("is_new"))
    )
    return unchanged_df.unionByName(changed_df)


def _staged(spark: SparkSession, tables_dir: str) -> DataFrame:
    """Staged scores, the newest of each pair and pair_key, whatever became of their run."""
    path = table_path(tables_dir, SCORES_STAGING)
    if table_exists(spark, path):
        staged_df = read_table(spark, SCORES_STAGING, path)
    else:
        staged_df = spark.createDataFrame([], spark_schema(SCORES_STAGING))
    return newest_scores(staged_df)


def _run_pairs(spark: SparkSession, tables_dir: str, run_id: str) -> DataFrame | None:
    """The run's rows of run_pairs; None where there are none."""
    path = table_path(tables_dir, RUN_PAIRS)
    if not table_exists(spark, path):
        return None
    pairs_df = read_table(spark, RUN_PAIRS, path).where(F.col("run_id") == run_id)
    return None if pairs_df.isEmpty() else pairs_df


def _published_before(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The run that had published the state that the first of `runs` compared with."""
    base = runs[0]["base_version"]
    for run in runs[1:]:
        if run["table_id"] not in (None, runs[0]["table_id"]):
            continue  # its version is one of another table
        if base is not None and run["published_version"] is not None and run["published_version"] <= base:
            return run
    return None


def _frame(small_df: DataFrame) -> pd.DataFrame:
    return pd.DataFrame(small_df.collect(), columns=small_df.columns)


def _keys(frame: pd.DataFrame, id_column: str) -> Iterable[Key]:
    return zip(frame["market"], frame[id_column], strict=True)
