"""What runs leave behind: their plan, their staged scores, and their row of scoring_runs."""

import json
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

from pyspark.sql import Column, DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from csrm.errors import ConfigError, InputError
from csrm.night.audit import CANARY
from csrm.schemas import PAIR_KEY, RELEVANCE_SCORES, RUN_PAIRS, SCORES_STAGING, SCORING_RUNS, Table
from csrm.spark.commits import delete_matching, delete_rows, retry_conflicts
from csrm.spark.tables import (
    create_table,
    read_table,
    replace_rows,
    spark_schema,
    sql_literal,
    table_exists,
    table_path,
)

PUBLISHED = ("published", "already_published")
"""Verdicts of a run whose scores are in relevance_scores, or were before it."""
INTERVENED = ("rolled_back", "retired")
"""Verdicts of a rollback and of a retirement that came to their end."""


def create_output_tables(spark: SparkSession, tables_dir: str) -> None:
    """The tables that a run writes chunk by chunk, or reads before it writes them.

    Raises:
        InputError: something else is at the place of one.
    """
    for table in (RELEVANCE_SCORES, SCORES_STAGING, RUN_PAIRS, SCORING_RUNS):
        create_table(spark, table, table_path(tables_dir, table))


def write_run_rows(df: DataFrame, table: Table, tables_dir: str, run_id: str) -> str:
    """Write a run's rows of a table in one commit, in place of those that an earlier attempt left.

    Returns:
        What the commit carries; see replace_rows.
    """
    return replace_rows(df, table, table_path(tables_dir, table), where=f"run_id = {sql_literal(run_id)}")


def read_run_rows(
    spark: SparkSession, table: Table, tables_dir: str, run_id: str, *, version: int | None = None
) -> DataFrame:
    """A run's rows of a table, at a version; without one, as they are whenever the frame is computed."""
    return read_table(spark, table, table_path(tables_dir, table), version).where(F.col("run_id") == run_id)


def read_newest(spark: SparkSession, table: Table, tables_dir: str) -> DataFrame:
    """A table that CSRM wrote, as it is whenever the frame is computed."""
    return read_table(spark, table, table_path(tables_dir, table))


def read_nights(spark: SparkSession, tables_dir: str) -> DataFrame:
    """Rows of scoring_runs that are of runs of the scoring job: neither rollbacks nor retirements."""
    return read_newest(spark, SCORING_RUNS, tables_dir).where("intervention IS NULL")


def record_run(spark: SparkSession, tables_dir: str, run: Mapping[str, Any], *, keep_published: bool = False) -> None:
    """Write a run's row of scoring_runs; runs of other markets may write theirs at the same time.

    Args:
        run: its columns, with audit as a list of results; what is not there is null.
        keep_published: leave a row of the same id that says that it was published.
    """
    audit = run.get("audit")
    values = {**run, "audit": None if audit is None else json.dumps(audit)}
    row = tuple(values.get(name) for name in SCORING_RUNS.column_names)
    row_df = spark.createDataFrame([row], spark_schema(SCORING_RUNS))

    def write() -> None:
        recorded = find_run(spark, tables_dir, run["run_id"]) if keep_published else None
        if recorded is None or recorded["verdict"] not in PUBLISHED:
            write_run_rows(row_df, SCORING_RUNS, tables_dir, run["run_id"])

    retry_conflicts(write)


def record_end(
    spark: SparkSession, tables_dir: str, run: Mapping[str, Any], verdict: str, published_version: int | None = None
) -> None:
    """Write the row of a run that ends now.

    Where a successor of the same id, which took over the run's lease, has recorded that it published, that row stays.

    Args:
        run: as for record_run.
        verdict: of the run.
        published_version: version of relevance_scores after it.
    """
    end = {"verdict": verdict, "published_version": published_version, "finished_at": datetime.now(UTC)}
    record_run(spark, tables_dir, {**run, **end}, keep_published=verdict not in PUBLISHED)


def record_lost(spark: SparkSession, tables_dir: str, run: Mapping[str, Any]) -> None:
    """Write the end of a run that lost a lease, where its row is still the one that it wrote when it began.

    Args:
        spark: the session.
        tables_dir: folder of CSRM's tables.
        run: the row as it was when the run began.
    """
    own_df = read_run_rows(spark, SCORING_RUNS, tables_dir, run["run_id"]).where(
        (F.col("verdict") == "running") & (F.col("started_at") == F.lit(run["started_at"]))
    )
    if not own_df.isEmpty():  # else a successor of the same id has written its own
        record_end(spark, tables_dir, run, "superseded")


def find_run(spark: SparkSession, tables_dir: str, run_id: str) -> Row | None:
    """The row of a run, or None."""
    if not table_exists(spark, table_path(tables_dir, SCORING_RUNS)):
        return None
    return read_run_rows(spark, SCORING_RUNS, tables_dir, run_id).head()


def require_run(spark: SparkSession, tables_dir: str, run_id: str) -> dict[str, Any]:
    """The row of a run, with times in UTC and audit as a list of results.

    Raises:
        InputError: no such run; the message names the newest.
    """
    row = find_run(spark, tables_dir, run_id)
    if row is None:
        path = table_path(tables_dir, SCORING_RUNS)
        newest: list[str] = []
        if table_exists(spark, path):
            runs_df = read_nights(spark, tables_dir).orderBy(F.desc("started_at")).limit(5)
            newest = [run["run_id"] for run in runs_df.collect()]
        raise InputError(f"run {run_id!r}: no run of this name in {path!r}; the newest are {newest}.")
    audit = row["audit"]
    return {**in_utc(row.asDict()), "audit": None if audit is None else json.loads(audit)}


def in_utc(run: dict[str, Any]) -> dict[str, Any]:
    """A run's row with times in UTC: Spark gives them in the zone of this process, where an hour may come twice."""
    times = {name: run[name] and run[name].astimezone(UTC) for name in ("started_at", "finished_at")}
    return {**run, **times}


def check_same_run(earlier: Row, markets: Collection[str], bundle_digest: str) -> None:
    """Refuse a run id that names a run of other markets or no night, or under which another bundle's scores are.

    Args:
        earlier: the row of the run that has the id.
        markets: those of the new run.
        bundle_digest: that of the new run.

    Raises:
        ConfigError: the markets or the bundle differ, or it is a rollback or a retirement.
    """
    if earlier["intervention"] is not None:
        raise ConfigError(
            f"--run-id {earlier['run_id']!r}: names a rollback or a retirement of {earlier['markets']}. Choose another."
        )
    expected = (sorted(earlier["markets"]), earlier["bundle_digest"])
    found = (sorted(markets), bundle_digest)
    is_same = found == expected if earlier["verdict"] in PUBLISHED else found[0] == expected[0]
    if not is_same:
        raise ConfigError(
            f"--run-id {earlier['run_id']!r}: a run of this name, started {earlier['started_at']}, is "
            f"{earlier['verdict']}: it has the markets {expected[0]} with bundle {expected[1][:12]}; this one has the "
            f"markets {found[0]} with bundle {found[1][:12]}. Choose another --run-id."
        )


def read_open_staging(spark: SparkSession, tables_dir: str, markets: Collection[str], run_id: str) -> DataFrame:
    """Staged scores that may still be published: those of runs that were neither published nor discarded.

    After a failed canary a run's scores are not to be trusted: only the run itself reads them, for a person who accepts
    that. Pairs that could not be scored are those of the run itself: what failed in another run is tried again.

    Args:
        spark: the session.
        tables_dir: folder of CSRM's tables.
        markets: those of the run.
        run_id: of the run that reads.

    Returns:
        Columns of scores_staging. A pair may be there more than once, also with one pair_key.
    """
    closed = F.col("verdict").isin(*PUBLISHED, "discarded") | (_failed_canary() & (F.col("run_id") != run_id))
    closed_df = read_newest(spark, SCORING_RUNS, tables_dir).where(closed).select("run_id")
    staged_df = read_newest(spark, SCORES_STAGING, tables_dir).where(F.col("market").isin(*sorted(markets)))
    staged_df = staged_df.where(F.col("reason").isNull() | (F.col("run_id") == run_id))
    return staged_df.join(F.broadcast(closed_df), on="run_id", how="left_anti").select(*SCORES_STAGING.column_names)


def discard_staging(spark: SparkSession, tables_dir: str, run_id: str) -> int:
    """Delete what a run had staged, and what it had reused of other runs; returns the number of rows."""
    path = table_path(tables_dir, SCORES_STAGING)
    key = [*PAIR_KEY, "pair_key"]
    planned_df = read_run_rows(spark, RUN_PAIRS, tables_dir, run_id).where(
        "pair_key IS NOT NULL AND state != 'unchanged'"
    )
    num_rows = delete_matching(planned_df.select(*key).distinct(), path, key)
    return num_rows + delete_rows(spark, path, F.col("run_id") == run_id)


def discard_distrusted(spark: SparkSession, tables_dir: str, earlier: Row) -> int:
    """Delete the staged scores of an earlier attempt whose canary failed, and return how many there were.

    Where the discarding of the run died, its own are deleted: else they would come back as those of the new attempt.

    Args:
        earlier: the run's row of scoring_runs.
    """
    audit = json.loads(earlier["audit"]) if earlier["audit"] else []
    is_distrusted = any(result["name"] == CANARY and not result["passed"] for result in audit)
    if earlier["verdict"] == "discarded":
        return delete_rows(spark, table_path(tables_dir, SCORES_STAGING), F.col("run_id") == earlier["run_id"])
    if earlier["verdict"] != "rejected" or not is_distrusted:
        return 0
    return discard_staging(spark, tables_dir, earlier["run_id"])


def _failed_canary() -> Column:
    """Whether a row of scoring_runs is of a run that its canary rejected."""
    results = F.from_json("audit", "array<struct<name:string,passed:boolean>>")
    failed = F.exists(results, lambda result: (result["name"] == CANARY) & ~result["passed"])
    return (F.col("verdict") == "rejected") & F.coalesce(failed, F.lit(False))


def find_later_run(spark: SparkSession, tables_dir: str, run: Mapping[str, Any]) -> str | None:
    """Name of a run that was published in one of a run's markets and was started after it; None where there is none."""
    is_later = F.col("verdict").isin(*PUBLISHED) & (F.col("started_at") > F.lit(run["started_at"]))
    shares_market = F.arrays_overlap("markets", F.array(*map(F.lit, run["markets"])))
    row = read_newest(spark, SCORING_RUNS, tables_dir).where(is_later & shares_market).select("run_id").head()
    return None if row is None else str(row["run_id"])


def scoring_rate(spark: SparkSession, tables_dir: str, bundle_digest: str, device: str) -> float | None:
    """Pairs a second of the run that scored most pairs with a bundle on a device; None where there is none.

    The fixed cost of a run that scored few would hide the rate.
    """
    seconds = F.col("seconds")["scoring"]
    same = (F.col("bundle_digest") == bundle_digest) & (F.col("device") == device)
    row = (
        read_newest(spark, SCORING_RUNS, tables_dir)
        .where(same & (F.col("num_scored") > 0) & (seconds > 0))
        .orderBy(F.desc("num_scored"))
        .select((F.col("num_scored") / seconds).alias("rate"))
        .head()
    )
    return None if row is None else float(row["rate"])
