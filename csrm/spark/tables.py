"""Tables on storage: created from their declaration, read at a version, written in one commit each.

The only file that names Delta.
"""

import json
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

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
from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import DataType, StructField, StructType

from csrm.errors import ConfigError, InputError
from csrm.schemas import Table

USER_METADATA = "spark.databricks.delta.commitInfo.userMetadata"
_MERGE_BY_PARTITION = "spark.databricks.delta.merge.repartitionBeforeWrite.enabled"
"""Delta's default gathers all rows of a partition, here a market, in one task before it writes them."""
_TXN_APP = "spark.databricks.delta.write.txnAppId"
_TXN_VERSION = "spark.databricks.delta.write.txnVersion"
_SCHEMA_VERSION = "csrm.schemaVersion"
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


class Transaction(NamedTuple):
    """Makes a commit happen at most once: Delta skips one whose version is not above the last of its application."""

    app: str
    version: int


def table_path(tables_dir: str, table: Table) -> str:
    """Folder of one of CSRM's tables; a relative tables_dir starts at the working directory."""
    return f"{_absolute(tables_dir)}/{table.name}"


def attempts_path(tables_dir: str, run_id: str) -> str:
    """Folder beside the tables for what attempts of a run are at; see csrm.attempts."""
    return f"{_absolute(tables_dir)}/_attempts/{run_id}"


def require_one_place(spark: SparkSession, path: str) -> None:
    """Refuse a path that Spark finds on one storage, and leases and notes of attempts on the driver's disk.

    Raises:
        ConfigError: the path has no scheme, and Hadoop's default file system is not this machine's.
    """
    jvm = spark.sparkContext._jvm
    assert jvm is not None
    default = str(jvm.org.apache.hadoop.fs.FileSystem.getDefaultUri(spark.sparkContext._jsc.hadoopConfiguration()))
    if not urlsplit(path).scheme and urlsplit(default).scheme != "file":
        there, here = default.rstrip("/") + _absolute(path), f"file://{_absolute(path)}"
        raise ConfigError(
            f"tables at {path!r}: expected a URI, as fs.defaultFS is {default}; got a path without a scheme, which is "
            f"another place for Spark than for leases. Name the scheme: {there}, or {here}."
        )


def spark_schema(table: Table) -> StructType:
    """The declaration as a Spark schema: comments kept, nullable where a column is not required."""
    return StructType(
        [
            StructField(column.name, DataType.fromDDL(column.type), not column.required, {"comment": column.comment})
            for column in table.columns
        ]
    )


def create_table(spark: SparkSession, table: Table, path: str) -> None:
    """Create the table where there is none: columns, comments, constraints, partitions, change feed.

    Raises:
        ConfigError: see require_one_place.
        InputError: something else is at the path; it is left alone.
    """
    require_one_place(spark, path)
    if table_exists(spark, path):
        _check_columns(spark, table, path)
        return
    properties = {f"delta.constraints.{name}": condition for name, condition in table.checks}
    properties[_SCHEMA_VERSION] = str(table.schema_version)
    if table.change_feed:
        properties["delta.enableChangeDataFeed"] = "true"
    builder = DeltaTable.createIfNotExists(spark).location(_absolute(path)).comment(table.comment)
    for field in spark_schema(table).fields:
        builder = builder.addColumn(field.name, field.dataType, field.nullable, comment=field.metadata["comment"])
    for key, value in properties.items():
        builder = builder.property(key, value)
    try:
        builder.partitionedBy(*table.partition_by).execute()
    except AnalysisException as error:
        raise InputError(
            f"table {table.name} at {path!r}: cannot be created: {_first_line(error)}. "
            "Is the folder used by something else? Name another one under 'tables'."
        ) from error
    _check_columns(spark, table, path)


def table_exists(spark: SparkSession, path: str) -> bool:
    """Whether a Delta table is at the path."""
    return bool(DeltaTable.isDeltaTable(spark, path))


def table_version(spark: SparkSession, path: str) -> int:
    """Newest version of the table at the path."""
    row = DeltaTable.forPath(spark, path).history(1).select("version").head()
    assert row is not None
    return int(row["version"])


def open_table(spark: SparkSession, path: str, version: int | None = None) -> tuple[DataFrame, int]:
    """All columns of a Delta table at one version (the newest where none is named), and that version.

    Raises:
        InputError: no Delta table there, or not that version.
    """
    _require_table(spark, path)
    pinned = table_version(spark, path) if version is None else version
    try:
        return spark.read.format("delta").option("versionAsOf", pinned).load(path), pinned
    except AnalysisException as error:
        raise InputError(
            f"table {path!r}: version {pinned} cannot be read: {_first_line(error)}. "
            f"The newest version is {table_version(spark, path)}."
        ) from error


def read_table(spark: SparkSession, table: Table, path: str, version: int | None = None) -> DataFrame:
    """A table that CSRM wrote: the declared columns in their order.

    Args:
        spark: the session.
        table: the declaration.
        path: the table's folder.
        version: the frame holds this one; None: what is newest whenever it is computed.

    Raises:
        InputError: no such table or version, or it lacks columns.
    """
    if version is not None:
        table_df, _ = open_table(spark, path, version)
    else:
        _require_table(spark, path)
        table_df = spark.read.format("delta").load(path)
    missing = [name for name in table.column_names if name not in table_df.columns]
    if missing:
        raise InputError(
            f"table {table.name} at {path!r}: missing columns {missing}; it has {table_df.columns}. "
            "Was it written by CSRM?"
        )
    return table_df.select(*table.column_names)


def read_changes(spark: SparkSession, table: Table, path: str, after_version: int) -> DataFrame:
    """The change feed of a table: rows that commits after a version wrote, replaced or deleted.

    Returns:
        The declared columns, and change (insert, update_preimage, update_postimage, delete) and version.
    """
    feed_df = spark.read.format("delta").option("readChangeFeed", "true").option("startingVersion", after_version + 1)
    names = (F.col("_change_type").alias("change"), F.col("_commit_version").alias("version"))
    return feed_df.load(path).select(*table.column_names, *names)


def overwrite_table(df: DataFrame, table: Table, path: str, where: str | None = None) -> int:
    """As replace_rows; returns the table's version after the commit."""
    replace_rows(df, table, path, where)
    return table_version(df.sparkSession, path)


def replace_rows(df: DataFrame, table: Table, path: str, where: str | None = None) -> None:
    """Replace the table's rows in one commit, creating the table first.

    Args:
        df: has the declared columns with the declared types; others are dropped.
        table: the declaration.
        path: the table's folder.
        where: SQL condition on its columns: only the rows that meet it are replaced, and every row of df must meet it.
    """
    create_table(df.sparkSession, table, path)
    writer = df.select(*table.column_names).write.format("delta").mode("overwrite")
    if where is not None:
        writer = writer.option("replaceWhere", where)
    writer.save(path)


def retry_conflicts(commit: Callable[[], None]) -> None:
    """Make a commit; where commits of others conflict with it, again after a pause, a few times.

    Args:
        commit: has no effect where it raises, and may be called again.
    """
    for longest_pause_s in _LONGEST_PAUSES_S:
        try:
            return commit()
        except _CONFLICTS:
            time.sleep(random.uniform(0, longest_pause_s))  # at random, so that two do not meet again
    return commit()


def append_rows(df: DataFrame, table: Table, path: str, transaction: Transaction) -> None:
    """Append the declared columns of df to an existing table, in one commit; see Transaction."""
    writer = df.select(*table.column_names).write.format("delta").mode("append")
    writer.option("txnAppId", transaction.app).option("txnVersion", transaction.version).save(path)


def append_nothing(spark: SparkSession, table: Table, path: str, transaction: Transaction) -> None:
    """A commit without rows, after which Delta skips what comes with an older version of the transaction."""
    append_rows(spark.read.format("delta").load(path).limit(0), table, path, transaction)


def delete_rows(spark: SparkSession, path: str, condition: Column) -> int:
    """Delete the rows that meet a condition, in one commit, and return how many there were."""
    delta_table = DeltaTable.forPath(spark, path)
    num_rows = delta_table.toDF().where(condition).count()
    if num_rows:
        delta_table.delete(condition)
    return num_rows


def delete_table(spark: SparkSession, path: str) -> None:
    """Delete a table's folder and all that is in it, where there is one."""
    jvm = spark.sparkContext._jvm
    assert jvm is not None
    folder = jvm.org.apache.hadoop.fs.Path(path)
    folder.getFileSystem(spark.sparkContext._jsc.hadoopConfiguration()).delete(folder, True)


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
    delta_table = DeltaTable.forPath(spark, path)
    merge = (
        delta_table.alias("old")
        .merge(changes_df.alias("new"), matched)
        .whenMatchedDelete(operation == "delete")
        .whenMatchedUpdate(operation != "delete", set=values)
        .whenNotMatchedInsert(operation != "delete", values=values)
    )
    # Delta says neither that it skipped a commit nor which version one made: an id finds it in the history.
    carried = json.dumps({**metadata, **slice_, "commit": uuid.uuid4().hex}, ensure_ascii=False)
    settings = {USER_METADATA: carried, _MERGE_BY_PARTITION: "false"}
    if transaction is not None:  # MERGE takes it from the session alone
        settings |= {_TXN_APP: transaction.app, _TXN_VERSION: str(transaction.version)}
    with session_settings(spark, settings):
        try:
            merge.execute()
        except ConcurrentTransactionException:
            return None
    row = delta_table.history(_RECENT_COMMITS).where(F.col("userMetadata") == carried).head()
    return None if row is None else int(row["version"])


def read_commits(spark: SparkSession, path: str, after_version: int) -> list[dict[str, str]]:
    """What the commits of merge_changes after a version carried: their metadata and slice."""
    is_later = (F.col("version") > after_version) & (F.col("operation") == "MERGE")
    carried = F.from_json("userMetadata", "map<string,string>").alias("carried")
    rows = DeltaTable.forPath(spark, path).history().where(is_later).select(carried).collect()
    return [row["carried"] for row in rows if row["carried"]]


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


def sql_path(path: str) -> str:
    """A Delta table at a path, as SQL names it."""
    return f"delta.`{path.replace('`', '``')}`"


def sql_literal(value: str) -> str:
    """A string as a SQL literal."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _absolute(path: str) -> str:
    """Delta takes a relative location for the name of a table; URIs stay as they are."""
    return path.rstrip("/") if urlsplit(path).scheme else str(Path(path).absolute())


def _require_table(spark: SparkSession, path: str) -> None:
    if not table_exists(spark, path):
        raise InputError(
            f"table {path!r}: expected a Delta table, found none. Is the path right? Has the job that writes it run?"
        )


def _check_columns(spark: SparkSession, table: Table, path: str) -> None:
    found = [(field.name, field.dataType.simpleString()) for field in spark.read.format("delta").load(path).schema]
    expected = [(field.name, field.dataType.simpleString()) for field in spark_schema(table)]
    if found == expected:
        return
    where = f"table {table.name} at {path!r}"
    written = schema_version(spark, path)
    if written is not None and written != table.schema_version:
        is_older = written < table.schema_version
        way_out = "Migrate it: jobs/migrate.py." if is_older else "Use the newer CSRM that wrote it."
        raise InputError(
            f"{where}: expected version {table.schema_version} of its columns, it has version {written}. {way_out}"
        )
    raise InputError(
        f"{where}: expected the columns {_listed(expected)}; it has {_listed(found)}. "
        "It is not overwritten: name another folder under 'tables', or move that table away."
    )


def migrate_table(spark: SparkSession, table: Table, path: str) -> list[str]:
    """Bring a table of an older version to the declared columns, in place.

    Columns that it lacks are added, and are null in its rows; their order becomes the declared one; columns that may be
    null now lose their constraint.

    Returns:
        The columns that were added.

    Raises:
        ConfigError: see require_one_place.
        InputError: not a table of an older version of this declaration.
    """
    require_one_place(spark, path)
    where = f"table {table.name} at {path!r}"
    written = schema_version(spark, path)
    found = {field.name: field.dataType for field in spark.read.format("delta").load(path).schema}
    declared = {field.name: field for field in spark_schema(table)}
    if [*found.items()] == [(name, field.dataType) for name, field in declared.items()]:
        return []
    unknown = [name for name, type_ in found.items() if name not in declared or declared[name].dataType != type_]
    if unknown or written is None or written > table.schema_version:
        raise InputError(
            f"{where}: expected version {table.schema_version} of its columns or an older one, it has {written} "
            f"with the columns {unknown} of no such version. It is left as it is."
        )
    added = [name for name in declared if name not in found]
    for place, name in enumerate(declared):
        after = f"AFTER `{table.column_names[place - 1]}`" if place else "FIRST"
        field = declared[name]
        if name in added:
            comment = sql_literal(field.metadata["comment"])
            change = f"ADD COLUMNS (`{name}` {field.dataType.simpleString()} COMMENT {comment} {after})"
        else:
            change = f"ALTER COLUMN `{name}` {after}"
            if field.nullable:
                spark.sql(f"ALTER TABLE {sql_path(path)} ALTER COLUMN `{name}` DROP NOT NULL")
        spark.sql(f"ALTER TABLE {sql_path(path)} {change}")
    spark.sql(f"ALTER TABLE {sql_path(path)} SET TBLPROPERTIES ('{_SCHEMA_VERSION}' = '{table.schema_version}')")
    return added


def schema_version(spark: SparkSession, path: str) -> int | None:
    """Version of the declaration that a table was made from; None for a table that CSRM did not make."""
    detail = DeltaTable.forPath(spark, path).detail().select("properties").head()
    assert detail is not None
    text = detail["properties"].get(_SCHEMA_VERSION)
    return None if text is None else int(text)


def _listed(columns: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {type_}" for name, type_ in columns)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
