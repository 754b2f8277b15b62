"""Tables of invented markets as Parquet files."""

import os
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from csrm.errors import ConfigError
from csrm.schemas import Table

_ARROW_TYPES = {
    "string": pa.string(),
    "bigint": pa.int64(),
    "map<string,string>": pa.map_(pa.string(), pa.string()),
}


def write_tables(frames: Mapping[Table, pd.DataFrame], folder: Path) -> None:
    """Write tables as `<table>.parquet`; all are written beside the old files before any of these is replaced.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for table, frame in frames.items():
            pq.write_table(arrow_table(frame, table), folder / f".{table.name}.parquet.tmp")
        for table in frames:
            os.replace(folder / f".{table.name}.parquet.tmp", folder / f"{table.name}.parquet")
    except OSError as error:
        raise ConfigError(
            f"output {str(folder)!r}: expected a folder that can be written, got {error}. Set another output."
        ) from error


def arrow_table(frame: pd.DataFrame, table: Table) -> pa.Table:
    """The frame with the table's columns and types; required columns are not nullable."""
    schema = pa.schema(
        [pa.field(column.name, _ARROW_TYPES[column.type], nullable=not column.required) for column in table.columns]
    )
    return pa.Table.from_pandas(frame, schema=schema, preserve_index=False)
