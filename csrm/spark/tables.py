"""Tables on storage: created from their declaration, read at a version, written in one commit each."""

import json
import time
from collections.abc import Iterable, Sequence
from functools import cache

from delta.tables import DeltaTable
from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark.errors import AnalysisException, PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import DataType, StructField, StructType

from csrm.errors import InputError
from csrm.schemas import Table
from csrm.spark.commits import find_version, new_commit_id, retry_conflicts
from csrm.spark.storage import absolute_path, require_one_place

SCHEMA_VERSION_PROPERTY = "csrm.schemaVersion"
_CHANGE_FEED = "delta.enableChangeDataFeed"
_FOR_EVERY_READER = {
    "delta.enableDeletionVectors": ("false", "deletionVectors"),
    "delta.columnMapping.mode": ("none", "columnMapping"),
}
"""Property to its value, and to the feature that it switches off. A cluster may have other defaults for new tables,
with which not every Delta reader can read them."""


def table_path(tables_dir: str, table: Table) -> str:
    """Folder of one of CSRM's tables; a relative tables_dir starts at the working directory."""
    return f"{absolute_path(tables_dir)}/{table.name}"


def spark_schema(table: Table) -> StructType:
    """The declaration as a Spark schema: comments kept, nullable where a column is not required."""
    return StructType(list(_fields(table)))


@cache
def _fields(table: Table) -> tuple[StructField, ...]:
    """Kept, because Spark's JVM reads each type."""
    return tuple(
        StructField(column.name, DataType.fromDDL(column.type), not column.required, {"comment": column.comment})
        for column in table.columns
    )


def create_table(spark: SparkSession, table: Table, path: str) -> None:
    """Create the table where there is none: columns, comments, constraints, partitions, change feed.

    Raises:
        ConfigError: see require_one_place.
        InputError: something else is at the path or has the table's name in the catalog, or a person took the change
            feed or a constraint from the table; it is left alone.
    """
    require_one_place(spark, path)
    if table_exists(spark, path):
        _check_columns(spark, table, path)
        require_as_made(spark, table, path)
        _register(spark, table, path)
        return
    properties = {f"delta.constraints.{name}": condition for name, condition in table.checks}
    properties[SCHEMA_VERSION_PROPERTY] = str(table.schema_version)
    properties |= {name: value for name, (value, _) in _FOR_EVERY_READER.items()}
    if table.change_feed:
        properties[_CHANGE_FEED] = "true"
    builder = DeltaTable.createIfNotExists(spark).location(absolute_path(path)).comment(table.comment)
    for field in spark_schema(table).fields:
        builder = builder.addColumn(field.name, field.dataType, field.nullable, comment=field.metadata["comment"])
    for key, value in properties.items():
        builder = builder.property(key, value)
    builder = builder.partitionedBy(*table.partition_by)
    try:
        retry_conflicts(builder.execute)  # with another job that creates it at the same moment
    except AnalysisException as error:
        if _appears(spark, path):
            create_table(spark, table, path)
            return
        raise InputError(
            f"table {table.name} at {path!r}: cannot be created: {_first_line(error)}. "
            "Is the folder used by something else? Name another one under 'tables'."
        ) from error
    _check_columns(spark, table, path)
    _register(spark, table, path)


def name_tables(spark: SparkSession, tables_dir: str, schema: str) -> None:
    """Let create_table give tables of a folder their names in a schema of Spark's catalog, for the rest of the session.

    Args:
        spark: the session.
        tables_dir: the folder.
        schema: name of the schema, which is there, such as main.csrm.
    """
    spark.conf.set(_schema_setting(tables_dir), schema)


def _schema_setting(tables_dir: str) -> str:
    return f"csrm.schema of {absolute_path(tables_dir)}"


def catalog_name(spark: SparkSession, table: Table, path: str) -> str | None:
    """Name of a table in the catalog, such as main.csrm.relevance_scores; None where its folder is no schema's."""
    schema = spark.conf.get(_schema_setting(path.rpartition("/")[0]), None)
    return None if schema is None else f"{schema}.{table.name}"


def _register(spark: SparkSession, table: Table, path: str) -> None:
    """Give a table its name in the catalog, where it has none yet.

    The entry is external: DROP TABLE leaves the files, and the next job registers them again.

    Raises:
        InputError: the catalog refuses, or has something else of this name.
    """
    name, location = catalog_name(spark, table, path), absolute_path(path)
    if name is None or _location_of_name(spark, name) == location:
        return
    why = "it is another table, or a view"
    try:
        create = f"CREATE TABLE IF NOT EXISTS IDENTIFIER({sql_literal(name)}) USING DELTA"
        spark.sql(f"{create} LOCATION {sql_literal(location)}")
    except (PySparkException, Py4JJavaError) as error:  # another job may have registered it at the same moment
        why = _first_line(error)
    if _id_of_name(spark, name) != table_id(spark, path):
        raise InputError(
            f"table {name}: expected the table at {path!r} under this name in Spark's catalog: {why}. Nothing was "
            "written to it. May you create tables in this schema? Drop what has the name, or name another schema "
            "under 'tables'."
        )


def forget_table(spark: SparkSession, table: Table, path: str) -> None:
    """Take a table's name out of the catalog, where it has one; its files stay."""
    if (name := catalog_name(spark, table, path)) is not None:
        spark.sql(f"DROP TABLE IF EXISTS IDENTIFIER({sql_literal(name)})")


def _location_of_name(spark: SparkSession, name: str) -> str | None:
    """Where a table of the catalog is; None where it has none of this name, or says nothing of it."""
    try:
        if not spark.catalog.tableExists(name):  # pyspark logs errors of SQL, even those that are caught
            return None
        described_df = spark.sql(f"DESCRIBE TABLE EXTENDED IDENTIFIER({sql_literal(name)})")
        row = described_df.where("col_name = 'Location'").head()
    except (PySparkException, Py4JJavaError):
        return None
    return None if row is None else str(row["data_type"])


def _id_of_name(spark: SparkSession, name: str) -> str | None:
    """As table_id, of a table in the catalog; None where it has no Delta table of this name."""
    try:
        detail = DeltaTable.forName(spark, name).detail().select("id").head()
    except (PySparkException, Py4JJavaError):
        return None
    return None if detail is None else str(detail["id"])


def _appears(spark: SparkSession, path: str) -> bool:
    """Whether a table is at the path soon: another job may have made its folder, and not yet its first commit."""
    for _ in range(10):
        if table_exists(spark, path):
            return True
        time.sleep(0.2)
    return False


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
        version: the frame holds this one; None: what is newest whenever it is computed. Columns that a migration added
            since are null in it.

    Raises:
        InputError: no such table or version, or it lacks columns.
    """
    if version is not None:
        table_df, _ = open_table(spark, path, version)
    else:
        _require_table(spark, path)
        table_df = spark.read.format("delta").load(path)
    missing = [name for name in table.column_names if name not in table_df.columns]
    if version is not None and missing:
        added = {field.name: F.lit(None).cast(field.dataType) for field in spark_schema(table) if field.nullable}
        table_df = table_df.withColumns({name: added[name] for name in missing if name in added})
        missing = [name for name in missing if name not in added]
    if missing:
        if version is None:
            _check_columns(spark, table, path)  # says so where it is of another version
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
    """As replace_rows, again after a conflict with another job; returns the version that the commit made."""
    carried = retry_conflicts(lambda: replace_rows(df, table, path, where))
    return committed_version(df.sparkSession, path, carried)


def overwrite_markets(df: DataFrame, table: Table, path: str, markets: Iterable[str]) -> int:
    """Replace the rows of some markets in one commit; returns the table's version after it.

    Args:
        df: rows of these markets only; see replace_rows.
        table: the declaration; it has a column market.
        path: the table's folder.
        markets: the markets.
    """
    return overwrite_table(df, table, path, where=f"market IN ({', '.join(map(sql_literal, markets))})")


def replace_rows(df: DataFrame, table: Table, path: str, where: str | None = None) -> str:
    """Replace the table's rows in one commit, creating the table first.

    Args:
        df: has the declared columns with the declared types; others are dropped.
        table: the declaration.
        path: the table's folder.
        where: SQL condition on its columns: only the rows that meet it are replaced, and every row of df must meet it.

    Returns:
        What the commit carries, by which committed_version finds it.
    """
    create_table(df.sparkSession, table, path)
    carried = json.dumps({"commit": new_commit_id()})
    writer = df.select(*table.column_names).write.format("delta").mode("overwrite").option("userMetadata", carried)
    # A session may be told to leave partitions alone that df has no rows of.
    writer = writer.option("partitionOverwriteMode", "static")
    if where is not None:
        writer = writer.option("replaceWhere", where)
    writer.save(path)
    return carried


def committed_version(spark: SparkSession, path: str, carried: str) -> int:
    """Version that a recent commit of replace_rows made; the newest where no rows came in place of none: no commit."""
    version = find_version(spark, path, carried)
    return table_version(spark, path) if version is None else version


def table_id(spark: SparkSession, path: str) -> str:
    """Delta's id of the table at a path, which its versions belong to: a table that is made anew has another."""
    detail = DeltaTable.forPath(spark, path).detail().select("id").head()
    assert detail is not None
    return str(detail["id"])


def sql_path(path: str) -> str:
    """A Delta table at a path, as SQL names it."""
    return f"delta.`{path.replace('`', '``')}`"


def sql_literal(value: str) -> str:
    """A string as a SQL literal."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _require_table(spark: SparkSession, path: str) -> None:
    if not table_exists(spark, path):
        raise InputError(
            f"table {path!r}: expected a Delta table, found none. Is the path right? Has the job that writes it run?"
        )


def _check_columns(spark: SparkSession, table: Table, path: str) -> None:
    found = [(field.name, field.dataType.simpleString()) for field in spark.read.format("delta").load(path).schema]
    expected = [(field.name, field.dataType.simpleString()) for field in spark_schema(table)]
    if found == expected and not (table.checks and table.schema_version > 1):  # nothing else could be older
        return
    written = schema_version(spark, path)
    if found == expected and written in (None, table.schema_version):
        return
    where = f"table {table.name} at {path!r}"
    if written is not None and written != table.schema_version:
        is_older = written < table.schema_version
        way_out = "Migrate it: jobs/migrate.py." if is_older else "Use the newer CSRM that wrote it."
        raise InputError(
            f"{where}: expected version {table.schema_version} of its columns, it has version {written}. {way_out}"
        )
    way_out = "name another folder under 'tables', or move that table away."
    if set(expected) < set(found) and (version := _version_before_added_columns(spark, path, expected)) is not None:
        restore = f"RESTORE TABLE {sql_path(absolute_path(path))} TO VERSION AS OF {version}"
        way_out = f"columns were added to it by hand after version {version}. Take them away with Spark: {restore}."
    raise InputError(
        f"{where}: expected the columns {_listed(expected)}; it has {_listed(found)}. It is not overwritten: {way_out}"
    )


def _version_before_added_columns(spark: SparkSession, path: str, expected: list[tuple[str, str]]) -> int | None:
    """The last version before ALTER TABLE added columns to a table that had the expected ones; None: not known."""
    is_added = F.col("operation") == "ADD COLUMNS"
    row = DeltaTable.forPath(spark, path).history().where(is_added).agg(F.min("version").alias("version")).head()
    if row is None or row["version"] is None:
        return None
    try:
        before_df, version = open_table(spark, path, row["version"] - 1)
    except InputError:  # its files or its log are gone
        return None
    return version if [(field.name, field.dataType.simpleString()) for field in before_df.schema] == expected else None


def require_as_made(spark: SparkSession, table: Table, path: str) -> None:
    """Check that what readers rely on is still there: a feed that is off loses changes without a word.

    Args:
        spark: the session.
        table: the declaration.
        path: the table's folder; the table is there.

    Raises:
        InputError: its change feed is off, a constraint is gone, or it has a feature that not every reader has; the
            message says how to bring that back.
    """
    if not table.change_feed:
        return
    properties = {name.lower(): value for name, value in _properties(spark, path).items()}
    ways_out = [
        f"ADD CONSTRAINT {name} CHECK ({condition})"
        for name, condition in table.checks
        if f"delta.constraints.{name}".lower() not in properties
    ]
    if table.change_feed and properties.get(_CHANGE_FEED.lower(), "").lower() != "true":
        ways_out.append(f"SET TBLPROPERTIES ('{_CHANGE_FEED}' = 'true')")
    for name, (value, feature) in _FOR_EVERY_READER.items():
        if properties.get(name.lower(), value).lower() != value:
            ways_out += [f"SET TBLPROPERTIES ('{name}' = '{value}')", f"DROP FEATURE {feature}"]
    if ways_out:
        listed = "; ".join(f"ALTER TABLE {sql_path(absolute_path(path))} {way_out}" for way_out in ways_out)
        raise InputError(
            f"table {table.name} at {path!r}: expected the constraints, the change feed and the features with which "
            f"CSRM made it. They were changed since. Nothing was written. Put them back with Spark: {listed}. Readers "
            "of the change feed have to read the whole table once, if it was written without the feed."
        )


def _properties(spark: SparkSession, path: str) -> dict[str, str]:
    detail = DeltaTable.forPath(spark, path).detail().select("properties").head()
    assert detail is not None
    return dict(detail["properties"])


def schema_version(spark: SparkSession, path: str) -> int | None:
    """Version of the declaration that a table was made from; None for a table that CSRM did not make."""
    text = _properties(spark, path).get(SCHEMA_VERSION_PROPERTY)
    return None if text is None else int(text)


def _listed(columns: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {type_}" for name, type_ in columns)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
