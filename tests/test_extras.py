"""Delta tables that are read without Spark."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from csrm.config import InputSpec
from csrm.errors import InputError
from csrm.extras import open_delta
from csrm.schemas import CATALOG
from csrm.start.tables import open_found
from csrm.training.data.database import add_table, open_database

ROWS = pa.table({"market": ["us"], "product_id": ["1"], "title": ["tea"], "maker": ["Ahmad"]})


def renamed_under_column_mapping(path: Path) -> str:
    """A table whose column `maker` was renamed to `brand`, as Spark does it: the files keep the name that it had."""
    write_deltalake(str(path), ROWS)
    log = path / "_delta_log"
    (metadata,) = [
        action["metaData"]
        for action in map(json.loads, (log / "00000000000000000000.json").read_text().splitlines())
        if "metaData" in action
    ]
    schema = json.loads(metadata["schemaString"])
    for number, field in enumerate(schema["fields"], 1):
        field["metadata"] = {"delta.columnMapping.id": number, "delta.columnMapping.physicalName": field["name"]}
    schema["fields"][-1]["name"] = "brand"
    settings = {"delta.columnMapping.mode": "name", "delta.columnMapping.maxColumnId": str(len(schema["fields"]))}
    actions = [
        {"protocol": {"minReaderVersion": 2, "minWriterVersion": 5}},
        {"metaData": metadata | {"schemaString": json.dumps(schema), "configuration": settings}},
    ]
    (log / "00000000000000000001.json").write_text("\n".join(map(json.dumps, actions)) + "\n")
    return str(path)


def test_a_column_that_was_renamed_under_column_mapping_is_never_read_as_null(tmp_path: Path) -> None:
    path = renamed_under_column_mapping(tmp_path / "catalog")
    message = r"catalog '.*': cannot be read as Delta without Spark: it has column mapping, in mode 'name'\. Write"

    with pytest.raises(InputError, match=message):
        open_delta(path, f"catalog {path!r}")
    with pytest.raises(InputError, match=message):
        open_found(path, "catalog")
    with open_database(str(tmp_path)) as database, pytest.raises(InputError, match=message):
        add_table(database, CATALOG, InputSpec(path=path), {"us": "en"})


def test_the_newest_version_is_read(tmp_path: Path) -> None:
    write_deltalake(str(tmp_path / "catalog"), ROWS)
    write_deltalake(str(tmp_path / "catalog"), ROWS, mode="append")

    table, dataset = open_delta(str(tmp_path / "catalog"), "catalog")
    assert (table.version(), dataset.to_table().num_rows) == (1, 2)
