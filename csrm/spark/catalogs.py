"""CSRM's tables in a schema of Spark's catalog: their folder.

All of CSRM goes by that folder. What the catalog adds is each table's name, which create_table registers.
"""

from typing import TypeVar
from urllib.parse import unquote

from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from csrm.config import TablesSettings, schema_place
from csrm.errors import ConfigError
from csrm.spark.sources import reason
from csrm.spark.tables import name_tables

TablesSettingsT = TypeVar("TablesSettingsT", bound=TablesSettings)


def located_tables(spark: SparkSession, config: TablesSettingsT) -> TablesSettingsT:
    """The settings with the folder of their tables in place of a schema; see tables_folder."""
    return config.model_copy(update={"tables": tables_folder(spark, config.tables)})


def tables_folder(spark: SparkSession, tables: str) -> str:
    """Folder of the tables; tables that the session creates there get a name in the schema that was named.

    Args:
        spark: the session, with the catalogs that it was started with.
        tables: a folder, or a schema; see schema_place.

    Raises:
        ConfigError: the catalog has no such schema, or the schema has no location and no folder was named.
    """
    place = schema_place(tables)
    if place is None:
        return tables
    try:
        location = spark.catalog.getDatabase(place.schema).locationUri
    except (PySparkException, Py4JJavaError) as error:
        raise ConfigError(
            f"tables {tables!r}: expected a schema of Spark's catalog {spark.catalog.currentCatalog()!r}, or one with "
            f"its catalog in front, such as main.csrm: {reason(error)}. Make it once: CREATE SCHEMA {place.schema}. "
            f"Catalogs are named when Spark is started; {_session_catalog(spark)}."
        ) from error
    if not (place.folder or location):
        raise ConfigError(
            f"tables {tables!r}: the schema has no location. Name a folder for its tables: "
            f"schema:{place.schema}?folder=URI."
        )
    folder = place.folder or unquote(location)
    name_tables(spark, folder, place.schema)
    return folder


def _session_catalog(spark: SparkSession) -> str:
    if spark.conf.get("spark.sql.catalogImplementation", "in-memory") == "hive":
        return "this session's own is a Hive metastore"
    return (
        "this session's own is in memory and forgets its schemas (spark.sql.catalogImplementation=hive, "
        "spark.sql.catalog.NAME)"
    )
