"""Commits to Delta tables: appended, merged, tried again after a conflict."""

import json
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import NamedTuple, TypeVar

from delta.exceptions import (
    ConcurrentAppendException,
    ConcurrentDeleteDeleteException,
    ConcurrentDeleteReadException,
    ConcurrentTransactionException,
    ConcurrentWriteException,
    MetadataChangedException,
    ProtocolChangedException,
)
from delta.tables import DeltaTable
from pyspark.sql import Column, DataFrame, DataFrameWriter, SparkSession
from pyspark.sql import functions as F

from csrm.schemas import Table

USER_METADATA = "spark.databricks.delta.commitInfo.userMetadata"
_MERGE_BY_PARTITION = "spark.databricks.delta.merge.repartitionBeforeWrite.enabled"
"""Delta's default gathers all rows of a partition, here a market, in one task before it writes them."""
_TXN_APP = "spark.databricks.delta.write.txnAppId"
_TXN_VERSION = "spark.databricks.delta.write.txnVersion"
_RECENT_COMMITS = 100
"""More than others can make between a commit and the look at the history."""
_CONFLICTS = (
    ConcurrentAppendException,
    ConcurrentDeleteDeleteException,
    ConcurrentDeleteReadException,
    ConcurrentWriteException,
    MetadataChangedException,
    ProtocolChangedException,
)
"""What Delta raises where a commit of others, made at the same time, touched what this one had read."""
_LONGEST_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0)
"""Before each further try."""
Result = TypeVar("Result")


class Transaction(NamedTuple):
    """Makes a commit happen at most once: Delta skips one whose version is not above the last of its application."""

    app: str
    version: int


def retry_conflicts(commit: Callable[[], Result]) -> Result:
    """Make a commit; where commits of others conflict with it, again after a pause, a few times.

    Args:
        commit: has no effect where it raises, and may be called again.

    Returns:
        What the commit returned.
    """
    for longest_pause_s in _LONGEST_PAUSES_S:
        try:
            return commit()
        except _CONFLICTS:
            time.sleep(random.uniform(0, longest_pause_s))  # at random, so that two do not meet again
    return commit()


def append_rows(df: DataFrame, table: Table, path: str, transaction: Transaction) -> None:
    """Append the declared columns of df to an existing table, in one commit; see Transaction."""
    writer = _appending(df.select(*table.column_names), transaction)
    retry_conflicts(lambda: writer.save(path))


def append_nothing(spark: SparkSession, path: str, transaction: Transaction) -> None:
    """A commit without rows, after which Delta skips what comes with an older version of the transaction."""
    no_rows_df = spark.read.format("delta").load(path).limit(0)
    writer = _appending(no_rows_df, transaction).option("userMetadata", json.dumps({"fence": transaction.app}))
    retry_conflicts(lambda: writer.save(path))


def _appending(df: DataFrame, transaction: Transaction) -> DataFrameWriter:
    writer = df.write.format("delta").mode("append")
    return writer.option("txnAppId", transaction.app).option("txnVersion", transaction.version)


def delete_matching(keys_df: DataFrame, path: str, key: Sequence[str]) -> int:
    """Delete the rows whose key is among others, in one commit, and return how many there were.

    Args:
        keys_df: columns `key`, each key once.
        path: the table's folder.
        key: names of columns, the same in both.
    """
    delta_table = DeltaTable.forPath(keys_df.sparkSession, path)
    num_rows = delta_table.toDF().join(keys_df, on=list(key), how="left_semi").count()
    if num_rows:
        matched = " AND ".join(f"old.`{name}` = gone.`{name}`" for name in key)
        merge = delta_table.alias("old").merge(keys_df.alias("gone"), matched).whenMatchedDelete()
        retry_conflicts(merge.execute)
    return num_rows


def new_commit_id() -> str:
    """What a commit carries so that find_version finds it: Delta says neither version nor that it skipped one."""
    return uuid.uuid4().hex


def find_version(spark: SparkSession, path: str, carried: str) -> int | None:
    """Version of a recent commit that carries a text as its metadata; None where there is none."""
    is_it = F.col("userMetadata") == carried
    row = DeltaTable.forPath(spark, path).history(_RECENT_COMMITS).where(is_it).select("version").head()
    return None if row is None else int(row["version"])


def delete_rows(spark: SparkSession, path: str, condition: Column) -> int:
    """Delete the rows that meet a condition, in one commit, and return how many there were."""
    delta_table = DeltaTable.forPath(spark, path)
    num_rows = delta_table.toDF().where(condition).count()
    if num_rows:
        retry_conflicts(lambda: delta_table.delete(condition))
    return num_rows


def merge_changes(
    changes_df: DataFrame,
    table: Table,
    path: str,
    slice_: Mapping[str, str],
    metadata: Mapping[str, str],
    transaction: Transaction | None = None,
) -> int | None:
    """Apply row changes to one slice of a table in one commit.

    Args:
        changes_df: the table's columns and `operation`: insert, update or delete. At most one row a key; a delete
            needs only the key.
        table: the declaration.
        path: the table's folder.
        slice_: column to value of the slice, such as {"market": "tw"}: put into the condition as literals, so that
            files of other slices are neither read nor rewritten.
        metadata: what the commit carries in the table's history as JSON, with the slice.
        transaction: see Transaction.

    Returns:
        The version that the commit made; None where Delta skipped it because of its transaction, or refused it because
        another one of the same application was committed meanwhile.
    """
    spark = changes_df.sparkSession
    condition = [F.col(f"old.{name}") == F.lit(value) for name, value in slice_.items()]
    condition += [F.col(f"old.{name}") == F.col(f"new.{name}") for name in table.key]
    matched = condition[0]
    for part in condition[1:]:
        matched = matched & part
    values = {name: F.col(f"new.{name}") for name in table.column_names}
    operation = F.col("new.operation")

    def merge() -> None:
        delta_table = DeltaTable.forPath(spark, path)
        (
            delta_table.alias("old")
            .merge(changes_df.alias("new"), matched)
            .whenMatchedDelete(operation == "delete")
            .whenMatchedUpdate(operation != "delete", set=values)
            .whenNotMatchedInsert(operation != "delete", values=values)
            .execute()
        )

    carried = json.dumps({**metadata, **slice_, "commit": new_commit_id()}, ensure_ascii=False)
    settings = {USER_METADATA: carried, _MERGE_BY_PARTITION: "false"}
    if transaction is not None:  # MERGE takes it from the session alone
        settings |= {_TXN_APP: transaction.app, _TXN_VERSION: str(transaction.version)}
    with session_settings(spark, settings):
        try:
            retry_conflicts(merge)  # with what does not know of leases, such as ALTER TABLE or OPTIMIZE of others
        except ConcurrentTransactionException:
            return None
    return find_version(spark, path, carried)


class Commit(NamedTuple):
    """A commit in a table's history."""

    version: int
    operation: str
    """Delta's name of what was done: MERGE, OPTIMIZE, WRITE, DELETE, RESTORE, ..."""
    carried: dict[str, str]
    """Metadata and slice, as merge_changes wrote them; empty for commits of others."""
    at: datetime
    """When it was made, UTC."""


def read_commits(spark: SparkSession, path: str, after_version: int) -> list[Commit]:
    """The commits after a version that are in the table's history still, oldest first."""
    carried = F.from_json("userMetadata", "map<string,string>").alias("carried")
    history_df = DeltaTable.forPath(spark, path).history().where(F.col("version") > after_version)
    rows = history_df.select("version", "operation", carried, "timestamp").orderBy("version").collect()
    return [
        Commit(row["version"], row["operation"], row["carried"] or {}, row["timestamp"].astimezone(UTC)) for row in rows
    ]


@contextmanager
def session_settings(spark: SparkSession, settings: Mapping[str, str]) -> Iterator[None]:
    """Settings of the session while the block runs; threads share them."""
    before = {key: spark.conf.get(key, None) for key in settings}
    for key, value in settings.items():
        spark.conf.set(key, value)
    try:
        yield
    finally:
        for key, earlier in before.items():
            if earlier is None:
                spark.conf.unset(key)
            else:
                spark.conf.set(key, earlier)
