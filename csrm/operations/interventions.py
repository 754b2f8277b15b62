"""What people do to a published market, a rollback or a retirement: one commit, and one row of scoring_runs."""

from collections.abc import Mapping
from datetime import UTC, datetime

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

import csrm
from csrm.errors import LeaseError
from csrm.night.leases import Lease
from csrm.night.publish import Publication, count_changes, publish_changes
from csrm.night.published import require_unique_pairs
from csrm.night.runs import INTERVENED, read_newest, record_end, record_lost, record_run
from csrm.schemas import PAIR_KEY, RELEVANCE_SCORES, SCORING_RUNS
from csrm.spark.commits import Commit
from csrm.spark.session import persisted
from csrm.spark.tables import require_as_made, table_id, table_path, table_version


def publish_intervention(
    spark: SparkSession,
    tables_dir: str,
    wanted_df: DataFrame | None,
    *,
    market: str,
    lease: Lease,
    verdict: str,
    metadata: Mapping[str, str],
    inputs: Mapping[str, str],
) -> Publication:
    """Bring a market to the wanted rows, in the order of a night: a row that runs, the commit, the row's end.

    Where it is killed before its commit, the row has no end, and nothing happened. Where nothing is to be changed,
    there is neither a commit nor a row.

    Args:
        spark: the session.
        tables_dir: folder of CSRM's tables.
        wanted_df: columns of relevance_scores, one row a pair of this market; None for no row at all.
        market: the market.
        lease: of the market.
        verdict: rolled_back or retired.
        metadata: what the commit and the row carry, beside the market and the user.
        inputs: tables that were read, as in scoring_runs.

    Raises:
        InputError: a pair is published twice, or a person took the change feed or a constraint from the table; nothing
            was written.
        LeaseError: another run took over the market.
    """
    path = table_path(tables_dir, RELEVANCE_SCORES)
    require_as_made(spark, RELEVANCE_SCORES, path)
    published_df = read_newest(spark, RELEVANCE_SCORES, tables_dir).where(F.col("market") == market)
    require_unique_pairs(spark, published_df, path)
    wanted_df = published_df.limit(0) if wanted_df is None else wanted_df
    with persisted(exact_changes(wanted_df, published_df)) as changes_df:
        num_changes = count_changes(changes_df)
        if not num_changes:
            return Publication(table_version(spark, path), num_changes)
        started_at = datetime.now(UTC)
        row = {
            "run_id": f"{verdict}-{market}-{started_at:%Y%m%dT%H%M%S.%fZ}",
            "markets": [market],
            "started_at": started_at,
            "verdict": "running",
            "inputs": inputs,
            "versions": {"csrm": csrm.__version__},
            "seconds": {},
            "base_version": table_version(spark, path),
            "table_id": table_id(spark, path),
            "intervention": {**metadata, "user": spark.sparkContext.sparkUser()},
        }
        lease.require()
        record_run(spark, tables_dir, row)
        try:
            publication = publish_changes(spark, tables_dir, changes_df, num_changes, {market: lease}, metadata)
        except LeaseError:
            record_lost(spark, tables_dir, row)
            raise
    record_end(spark, tables_dir, {**row, "changes": publication.totals}, verdict, publication.version)
    return publication


def exact_changes(wanted_df: DataFrame, published_df: DataFrame) -> DataFrame:
    """What turns the published rows into the wanted ones, to the last bit of every column.

    Args:
        wanted_df: columns of relevance_scores, one row a pair.
        published_df: the same.

    Returns:
        The columns of relevance_scores and `operation`: insert, update, or delete (then only the key is set).
    """
    key = list(PAIR_KEY)
    values = [column for column in RELEVANCE_SCORES.columns if column.name not in key]
    maps = [column.name for column in values if column.type.startswith("map")]  # Spark compares their entries only
    comparable = [F.map_entries(c.name).alias(c.name) if c.name in maps else F.col(c.name) for c in values]
    new_df = wanted_df.select(*key, F.struct(*comparable).alias("new"))
    old_df = published_df.select(*key, F.struct(*comparable).alias("old"))
    operation = F.when(F.col("old").isNull(), "insert").when(F.col("new").isNull(), "delete").otherwise("update")
    return (
        new_df.join(old_df, on=key, how="full")
        .where(~F.col("new").eqNullSafe(F.col("old")))
        .select(*key, "new.*", operation.alias("operation"))
        .withColumns({name: F.map_from_entries(name) for name in maps})
    )


def recorded_interventions(spark: SparkSession, tables_dir: str, after_version: int) -> list[Commit]:
    """Commits of rollbacks and retirements after a version of relevance_scores, as scoring_runs knows them.

    Args:
        spark: the session.
        tables_dir: folder of CSRM's tables.
        after_version: of relevance_scores.

    Returns:
        The commits, oldest first. They stay where Delta has removed its history.
    """
    own_table = F.col("table_id") == table_id(spark, table_path(tables_dir, RELEVANCE_SCORES))
    is_later = F.col("published_version") > after_version
    runs_df = read_newest(spark, SCORING_RUNS, tables_dir).where(F.col("verdict").isin(*INTERVENED))
    rows = runs_df.where(own_table & is_later).orderBy("published_version").collect()
    return [
        Commit(
            row["published_version"],
            "MERGE",
            {"market": row["markets"][0], **row["intervention"]},
            row["finished_at"].astimezone(UTC),
        )
        for row in rows
    ]
