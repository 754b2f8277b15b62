"""Tables on storage: created from their declaration, read at a version, written in one commit each.

The only file that names Delta.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from delta.exceptions import ConcurrentTransactionException
from delta.tables import DeltaTable
from pyspark.errors import AnalysisException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import DataType, StructField, StructType

from csrm.errors import InputError
from csrm.schemas import Table

_USER_METADATA = "spark.databricks.delta.commitInfo.userMetadata"
_TXN_APP = "spark.databricks.delta.write.txnAppId"
_TXN_VERSION = "spark.databricks.delta.write.txnVersion"
_SCHEMA_VERSION = "csrm.schemaVersion"


class Transaction(NamedTuple):
    """Makes a commit happen at most once: Delta skips one whose version is not above the last of its application."""

    app: str
    version: int


def table_path(tables_dir: str, table: Table) -> str:
    """Folder of one of CSRM's tables; a relative tables_dir starts at the working directory."""
    return f"{_absolute(tables_dir)}/{table.name}"


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
        InputError: something else is at the path; it is left alone.
    """
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
    if not table_exists(spark, path):
        raise InputError(
            f"table {path!r}: expected a Delta table, found none. Is the path right? Has the job that writes it run?"
        )
    pinned = table_version(spark, path) if version is None else version
    try:
        return spark.read.format("delta").option("versionAsOf", pinned).load(path), pinned
    except AnalysisException as error:
        raise InputError(
            f"table {path!r}: version {pinned} cannot be read: {_first_line(error)}. "
            f"The newest version is {table_version(spark, path)}."
        ) from error


def read_table(spark: SparkSession, table: Table, path: str, version: int | None = None) -> DataFrame:
    """A table that CSRM wrote, at one version: the declared columns in their order.

    Raises:
        InputError: no such table or version, or it lacks columns.
    """
    table_df, _ = open_table(spark, path, version)
    missing = [name for name in table.column_names if name not in table_df.columns]
    if missing:
        raise InputError(
            f"table {table.name} at {path!r}: missing columns {missing}; it has {table_df.columns}. "
            "Was it written by CSRM?"
        )
    return table_df.select(*table.column_names)


def overwrite_table(
    df: DataFrame, table: Table, path: str, where: str | None = None, user_metadata: str | None = None
) -> int:
    """Replace the table's rows in one commit, creating the table first.

    Args:
        df: has the declared columns with the declared types; others are dropped.
        table: the declaration.
        path: the table's folder.
        where: SQL condition on its columns: only the rows that meet it are replaced, and every row of df must meet it.
        user_metadata: text that the commit carries in the table's history.

    Returns:
        The table's version after the commit.
    """
    spark = df.sparkSession
    create_table(spark, table, path)
    writer = df.select(*table.column_names).write.format("delta").mode("overwrite")
    if where is not None:
        writer = writer.option("replaceWhere", where)
    if user_metadata is not None:
        writer = writer.option("userMetadata", user_metadata)
    writer.save(path)
    return table_version(spark, path)


def append_rows(df: DataFrame, table: Table, path: str, transaction: Transaction) -> bool:
    """Append the declared columns of df to an existing table, in one commit.

    Returns:
        Whether it was committed; False where the transaction, or a later one of its application, was before.
    """
    before = table_version(df.sparkSession, path)
    (
        df.select(*table.column_names)
        .write.format("delta")
        .mode("append")
        .option("txnAppId", transaction.app)
        .option("txnVersion", transaction.version)
        .save(path)
    )
    return table_version(df.sparkSession, path) > before


def delete_rows(spark: SparkSession, path: str, condition: Column) -> int:
    """Delete the rows that meet a condition, in one commit, and return how many there were."""
    delta_table = DeltaTable.forPath(spark, path)
    num_rows = delta_table.toDF().where(condition).count()
    if num_rows:
        delta_table.delete(condition)
    return num_rows


def append_nothing(spark: SparkSession, table: Table, path: str, transaction: Transaction) -> bool:
    """A commit without rows, after which Delta skips what comes with an older version of the transaction.

    Returns:
        See append_rows.
    """
    return append_rows(spark.createDataFrame([], spark_schema(table)), table, path, transaction)


def merge_changes(
    changes_df: DataFrame,
    table: Table,
    path: str,
    slice_: dict[str, str],
    user_metadata: str,
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
        user_metadata: text that the commit carries in the table's history; it tells this commit from others.
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
    before = table_version(spark, path)
    settings = {_USER_METADATA: user_metadata}
    if transaction is not None:  # MERGE takes it from the session alone
        settings |= {_TXN_APP: transaction.app, _TXN_VERSION: str(transaction.version)}
    with _session_settings(spark, settings):
        try:
            merge.execute()
        except ConcurrentTransactionException:
            return None
    after = table_version(spark, path)
    for row in delta_table.history(max(after - before, 1)).collect():
        if row["version"] > before and row["userMetadata"] == user_metadata:
            return int(row["version"])
    return None


@contextmanager
def _session_settings(spark: SparkSession, settings: Mapping[str, str]) -> Iterator[None]:
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

    Columns that it lacks are added, and are null in its rows; their order becomes the declared one.

    Returns:
        The columns that were added.

    Raises:
        InputError: not a table of an older version of this declaration.
    """
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
