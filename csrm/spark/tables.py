"""Tables on storage: created from their declaration, read at a version, written in one commit each.

The only file that names Delta.
"""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from delta.tables import DeltaTable
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import DataType, StructField, StructType

from csrm.errors import InputError
from csrm.schemas import Table

_USER_METADATA = "spark.databricks.delta.commitInfo.userMetadata"


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


def merge_changes(changes_df: DataFrame, table: Table, path: str, slice_: dict[str, str], user_metadata: str) -> int:
    """Apply row changes to one slice of a table in one commit.

    Args:
        changes_df: the table's columns and `operation`: insert, update or delete. At most one row a key; a delete
            needs only the key.
        table: the declaration.
        path: the table's folder.
        slice_: column to value of the slice, such as {"market": "tw"}: put into the condition as literals, so that
            files of other slices are neither read nor rewritten.
        user_metadata: text that the commit carries in the table's history.

    Returns:
        The table's version after the commit.
    """
    spark = changes_df.sparkSession
    condition = [F.col(f"old.{name}") == F.lit(value) for name, value in slice_.items()]
    condition += [F.col(f"old.{name}") == F.col(f"new.{name}") for name in table.key]
    matched = condition[0]
    for part in condition[1:]:
        matched = matched & part
    values = {name: F.col(f"new.{name}") for name in table.column_names}
    operation = F.col("new.operation")
    merge = (
        DeltaTable.forPath(spark, path)
        .alias("old")
        .merge(changes_df.alias("new"), matched)
        .whenMatchedDelete(operation == "delete")
        .whenMatchedUpdate(operation != "delete", set=values)
        .whenNotMatchedInsert(operation != "delete", values=values)
    )
    before = spark.conf.get(_USER_METADATA, None)
    spark.conf.set(_USER_METADATA, user_metadata)
    try:
        merge.execute()
    finally:
        if before is None:
            spark.conf.unset(_USER_METADATA)
        else:
            spark.conf.set(_USER_METADATA, before)
    return table_version(spark, path)


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
    if found != expected:
        raise InputError(
            f"table {table.name} at {path!r}: expected the columns {_listed(expected)}; it has {_listed(found)}. "
            "It is not overwritten: name another folder under 'tables', or move that table away."
        )


def _listed(columns: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {type_}" for name, type_ in columns)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
