"""A DuckDB database of input tables: any size, any format, no Spark."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as pa_dataset
import pyarrow.fs as pa_fs

from csrm.config import InputSpec
from csrm.errors import InputError, MissingDependencyError
from csrm.schemas import Column, Table

MEMORY_LIMIT = "256MB"
"""Of the joins and sorts; what does not fit goes to a temporary folder."""


_NUM_THREADS = 4
"""At most; each takes its part of MEMORY_LIMIT, and preparing text for the model takes longer than joining it."""


_NOT_SEEN = r"\s\pZ\pC"


def open_database(folder: str) -> duckdb.DuckDBPyConnection:
    """A database in a folder. Joins run as they are written, with the smaller table on the right.

    DuckDB does not know the size of tables outside: left to choose, it joins all queries with all products of a market.
    """
    database = duckdb.connect(str(Path(folder, "csrm.duckdb")))
    database.execute(
        f"""SET memory_limit = '{MEMORY_LIMIT}'; SET temp_directory = {literal(folder)};
        SET threads = {min(_NUM_THREADS, os.cpu_count() or 1)}; SET preserve_insertion_order = false;
        SET disabled_optimizers = 'join_order,build_side_probe_side'"""
    )
    return database


def check_markets(
    database: duckdb.DuckDBPyConnection, table: Table, spec: InputSpec, markets: Mapping[str, str]
) -> None:
    """A table that add_table made known must have rows of each market.

    Raises:
        InputError: it has none of one.
    """
    found = {row[0] for row in database.execute(f"SELECT DISTINCT market FROM {table.name}").fetchall()}
    if empty := sorted(set(markets) - found):
        raise InputError(f"{table.name} {spec.path!r}: no rows for markets {empty}.")


def add_table(
    database: duckdb.DuckDBPyConnection, table: Table, spec: InputSpec, markets: Mapping[str, str] | None = None
) -> None:
    """Make a table that Spark is not needed for known to a database, under its name, after its checks.

    Args:
        table: its columns are there, with their types; optional ones that are absent are null.
        spec: Delta, Parquet or JSON lines; other formats are imported with Spark first.
        markets: only rows of these are there and checked; those of others are in `<name>_of_all_markets`.

    Raises:
        InputError: the table cannot be read, or lacks columns, or has wrong types, null or repeated keys; all problems
            of the table are in one message.
    """
    where = f"{table.name} {spec.path!r}"
    dataset = _open(spec, where)
    there = {column.name: spec.columns.get(column.name, column.name) for column in table.columns}
    missing = [
        there[column.name]
        for column in table.columns
        if there[column.name] not in dataset.schema.names and (column.required or column.name in spec.columns)
    ]
    if missing:
        raise InputError(
            f"{where}: missing columns {missing}; it has {dataset.schema.names}. Map them in the config under columns."
        )
    database.register(f"{table.name}_source", dataset)
    values, tests = [], []
    for column in table.columns:
        type_ = _sql_type(column)
        if there[column.name] not in dataset.schema.names:
            values.append(f"NULL::{type_} AS {column.name}")
            continue
        source = _name(there[column.name])
        values.append(f"TRY_CAST({source} AS {type_}) AS {column.name}")
        tests.append(f"count_if({source} IS NOT NULL AND TRY_CAST({source} AS {type_}) IS NULL)")
        tests.append(f"count_if({source} IS NULL)" if column.required else "0")
    market = _name(there["market"]) if "market" in there else ""
    kept = f"{market} IS NULL OR {market} IN ({', '.join(map(literal, markets))})" if markets and market else "true"
    source = f"(SELECT * FROM {table.name}_source WHERE {kept})"
    database.execute(f"CREATE TEMP VIEW {table.name} AS SELECT {', '.join(values)} FROM {source}")
    everything = f"SELECT {', '.join(values)} FROM {table.name}_source"
    database.execute(f"CREATE TEMP VIEW {table.name}_of_all_markets AS {everything}")
    problems = []
    try:
        num_rows, *counts = database.execute(f"SELECT count(*), {', '.join(tests)} FROM {source}").fetchall()[0]
    except duckdb.Error as error:
        raise InputError(f"{where}: cannot be read: {error}. Are its files complete?") from error
    present = [column for column in table.columns if there[column.name] in dataset.schema.names]
    for column, failed, null in zip(present, counts[::2], counts[1::2], strict=True):
        found = dataset.schema.field(there[column.name]).type
        if failed:
            problems.append(f"column {there[column.name]!r}: expected {column.type}, got {found} ({failed} rows)")
        if null:
            problems.append(f"column {there[column.name]!r} is null in {null} of {num_rows} rows")
    if not problems and table.key:
        key = ", ".join(table.key)
        repeated = database.execute(
            f"""SELECT sum(copies) OVER (), {key} FROM (
                SELECT {key}, count(*) AS copies FROM {table.name} GROUP BY ALL HAVING copies > 1
            ) ORDER BY {key} LIMIT 1"""
        ).fetchall()
        for num_rows, *example in repeated:
            problems.append(f"{num_rows} rows share their key ({key}), for example {', '.join(map(str, example))}")
    if problems:
        raise InputError(problem_list(where, problems))


def _open(spec: InputSpec, where: str) -> pa_dataset.Dataset:
    """A table as Spark wrote it; columns that name folders (market=kr), as of partitionBy, are text."""
    if spec.format == "delta":
        try:
            from deltalake import DeltaTable
            from deltalake.exceptions import DeltaError
        except ImportError as error:
            raise MissingDependencyError(
                "reading Delta without Spark needs deltalake: pip install csrm[train]"
            ) from error
        try:
            return DeltaTable(spec.path).to_pyarrow_dataset()
        except DeltaError as error:
            raise InputError(f"{where}: cannot be read as Delta: {error}") from error
    if spec.format not in ("parquet", "json") or spec.options:
        raise InputError(
            f"{where}: training reads delta, parquet and json without options, got format {spec.format!r} with options "
            f"{spec.options}. Write it as one of these, for example with jobs/import_esci.py."
        )
    try:
        filesystem, path = pa_fs.FileSystem.from_uri(spec.path) if "://" in spec.path else (None, spec.path)
        dataset = pa_dataset.dataset(path, filesystem=filesystem, format=spec.format)
        folders = {folder for file in dataset.files for folder in file.removeprefix(path).split("/")[:-1]}
        names = {folder.partition("=")[0] for folder in folders if "=" in folder} - {*dataset.schema.names}
        if not names:
            return dataset
        columns = pa.schema([(name, pa.string()) for name in sorted(names)])
        hive = pa_dataset.partitioning(columns, flavor="hive")
        return pa_dataset.dataset(path, filesystem=filesystem, format=spec.format, partitioning=hive)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{where}: cannot be read: {error}. Is the path right?") from error


def language_of_query(markets: Mapping[str, str]) -> str:
    """SQL of a query's language, from columns language and market: its own, else its market's."""
    cases = " ".join(f"WHEN {literal(market)} THEN {literal(language)}" for market, language in markets.items())
    return f"coalesce(language, CASE market {cases} END)"


def same_text(column: str) -> str:
    """SQL of a text such that texts which differ in case, white space and Unicode form alone are equal."""
    return f"lower(nfc_normalize(trim(regexp_replace({column}, '[{_NOT_SEEN}]+', ' ', 'g'))))"


def has_text(column: str) -> str:
    """SQL: it has more than white space and characters that nobody sees."""
    return f"coalesce(regexp_matches({column}, '[^{_NOT_SEEN}]'), false)"


def random_number(seed: int, *values: str) -> str:
    """SQL of a random number in [0, 2^64) for these values, always the same for a seed."""
    return f"md5_number_lower(concat_ws(' ', {seed}, {', '.join(values)}))"


def _sql_type(column: Column) -> str:
    return {"string": "VARCHAR", "map<string,string>": "MAP(VARCHAR, VARCHAR)"}.get(column.type, column.type.upper())


def _name(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def literal(text: Any) -> str:
    """A text in SQL."""
    return "'" + str(text).replace("'", "''") + "'"


def problem_list(where: str, problems: list[str]) -> str:
    return f"{where}:\n" + "\n".join(f"  - {problem}" for problem in problems)
