"""Bring tables of an older version to the declared columns."""

from delta.tables import DeltaTable
from pyspark.sql import SparkSession

from csrm.errors import InputError
from csrm.schemas import Table
from csrm.spark.storage import require_one_place
from csrm.spark.tables import SCHEMA_VERSION_PROPERTY, schema_version, spark_schema, sql_literal, sql_path


def migrate_table(spark: SparkSession, table: Table, path: str) -> list[str]:
    """Bring a table of an older version to the declared columns, in place.

    Columns that it lacks are added, and are null in its rows; their order becomes the declared one; columns that may be
    null now lose their constraint; its checks become the declared ones.

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
    is_alike = [*found.items()] == [(name, field.dataType) for name, field in declared.items()]
    if is_alike and written in (None, table.schema_version):
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
    _migrate_checks(spark, table, path)
    spark.sql(
        f"ALTER TABLE {sql_path(path)} SET TBLPROPERTIES ('{SCHEMA_VERSION_PROPERTY}' = '{table.schema_version}')"
    )
    return added


def _migrate_checks(spark: SparkSession, table: Table, path: str) -> None:
    """Add the checks that are new or say something else. Those of other names are someone else's, and stay."""
    detail = DeltaTable.forPath(spark, path).detail().select("properties").head()
    assert detail is not None
    prefix = "delta.constraints."
    found = {name.removeprefix(prefix): sql for name, sql in detail["properties"].items() if name.startswith(prefix)}
    for name, check in sorted((name.lower(), check) for name, check in table.checks):
        if found.get(name) == check:
            continue
        if name in found:
            spark.sql(f"ALTER TABLE {sql_path(path)} DROP CONSTRAINT `{name}`")
        spark.sql(f"ALTER TABLE {sql_path(path)} ADD CONSTRAINT `{name}` CHECK ({check})")
