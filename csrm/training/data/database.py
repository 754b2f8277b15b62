"""A DuckDB database of input tables: any size, any format, no Spark."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb

from csrm.config import InputSpec
from csrm.conversions import (
    BLANK_TEXT,
    REPLACEMENT,
    Found,
    Kind,
    is_kept,
    problem_of_values,
    problems_of_columns,
    warning_of_blank_languages,
    warning_of_replaced,
)
from csrm.errors import InputError
from csrm.schemas import Column, Table
from csrm.text import NOTHING_CLASS, text_key
from csrm.training.data.conversions import MACROS, converted, sql_type, text_with_replacements
from csrm.training.data.sources import Source, open_sources

logger = logging.getLogger(__name__)
MEMORY_LIMIT = "256MB"
"""Of the joins and sorts; what does not fit goes to a temporary folder."""
_NUM_THREADS = 4
"""At most; each takes its part of MEMORY_LIMIT, and preparing text for the model takes longer than joining it."""


def open_database(folder: str) -> duckdb.DuckDBPyConnection:
    """A database in a folder. Joins run as they are written, with the smaller table on the right. SQL has `text_key`.

    DuckDB does not know the size of tables outside: left to choose, it joins all queries with all products of a market.
    """
    database = duckdb.connect(str(Path(folder, "csrm.duckdb")))
    database.execute(
        f"""SET memory_limit = '{MEMORY_LIMIT}'; SET temp_directory = {literal(folder)};
        SET threads = {min(_NUM_THREADS, os.cpu_count() or 1)}; SET preserve_insertion_order = false;
        SET disabled_optimizers = 'join_order,build_side_probe_side'"""
    )
    database.create_function("text_with_replacements", text_with_replacements, ["BLOB"], "VARCHAR")
    database.create_function("text_key", text_key, ["VARCHAR"], "VARCHAR")
    database.execute(MACROS)
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
        table: its columns are there, with their types, as the table of csrm.conversions has it; optional ones that are
            absent are null.
        spec: Delta, Parquet or JSON lines; other formats are imported with Spark first.
        markets: only rows of these are there and checked; those of others are in `<name>_of_all_markets`.

    Raises:
        InputError: the table cannot be read, or lacks columns, or has wrong types, values that do not convert, null or
            repeated keys; all problems of the table are in one message.
    """
    where = f"{table.name} {spec.path!r}"
    names = {column.name: spec.name_there(column.name) for column in table.columns}
    market = names.get("market")
    sources = open_sources(database, spec, [name for name in names.values() if name is not None], market, where)
    problems = [problem for source in sources for problem in source.problems]
    present = list(dict.fromkeys(name for source in sources for name in source.names))
    problems += problems_of_columns(table, spec, present, [source.columns for source in sources])
    if problems:
        raise InputError(problem_list(where, problems))
    rows = " UNION ALL ".join(_converted_rows(table, names, source, spec.market) for source in sources)
    columns = ", ".join(table.column_names)
    listed = ", ".join(map(literal, markets or {}))
    kept = f"market IS NULL OR market IN ({listed})" if markets and "market" in table.column_names else "true"
    try:
        database.execute(
            f"""CREATE TEMP VIEW {table.name}_converted AS {rows};
            CREATE TEMP VIEW {table.name}_of_all_markets AS SELECT {columns} FROM {table.name}_converted;
            CREATE TEMP VIEW {table.name} AS SELECT {columns} FROM {table.name}_converted WHERE {kept}"""
        )
        problems = _problems_of_values(database, table, names, f"{table.name}_converted WHERE {kept}", where)
    except duckdb.Error as error:
        raise InputError(f"{where}: cannot be read: {error}. Are its files complete?") from error
    if problems:
        raise InputError(problem_list(where, problems))


def _converted_rows(table: Table, names: Mapping[str, str | None], source: Source, market_of_all: str | None) -> str:
    """SQL of the columns, and of `_failed_<name>` with the source's text where a value did not convert.

    Args:
        market_of_all: market of all rows; None: a column says it.
    """
    values, failures = [], []
    for column in table.columns:
        name, failed = names[column.name], "NULL::VARCHAR"
        found = None if name is None else source.columns.get(name)
        if column.name == "market" and market_of_all is not None:
            values.append(f"{literal(market_of_all)} AS market")
        elif name is None or found is None:
            values.append(f"NULL::{sql_type(column.type)} AS {column.name}")
        elif column.name == "market" and found.kind == Kind.TEXT:
            values.append(f"{source.sql[name]} AS market")  # as it is, so that files are found by it
        else:
            values.append(f"{converted(source.sql[name], found, column.type)} AS {column.name}")
            if not is_kept(found, column.type):
                there = f"_source_{column.name}"
                values.append(f"{source.sql[name]} AS {there}")
                is_failed = f"{column.name} IS NULL AND {there} IS NOT NULL AND NOT {_is_nothing(there, found, column)}"
                shown = f"text_of_bytes({there})" if found.kind == Kind.TEXT else f"{there}::VARCHAR"
                failed = f"CASE WHEN {is_failed} THEN {shown} END"
        failures.append(f"{failed} AS _failed_{column.name}")
    columns = ", ".join([*table.column_names, *failures])
    return f"SELECT {columns} FROM (SELECT {', '.join(values)} FROM {source.relation})"


def _is_nothing(value: str, found: Found, column: Column) -> str:
    """SQL: a value stands for null, so that it need not convert."""
    if column.type != "map<string,string>" or found.kind not in (Kind.TEXT, Kind.JSON):
        return "false"
    text = f"text_of_bytes({value})" if found.kind == Kind.TEXT else f"coalesce({value}->>'$', '')"
    is_text = "true" if found.kind == Kind.TEXT else f"json_type({value}) = 'VARCHAR'"
    return f"({is_text} AND regexp_matches({text}, {literal(BLANK_TEXT)}))"


def _has_replacement(value: str, wanted: str) -> str:
    """SQL: text has characters in place of bytes that were no UTF-8."""
    if wanted == "string":
        return f"contains({value}, {literal(REPLACEMENT)})"
    if wanted == "map<string,string>":
        texts = f"list_filter(map_values({value}), lambda text: contains(text, {literal(REPLACEMENT)}))"
        return f"len({texts}) > 0"
    return "false"


def _is_blank_name(column: str) -> str:
    """SQL: a language or a split is there, but blank; null means the market's language, or split train."""
    return f"{column} IS NOT NULL AND NOT {has_text(column)}" if column in ("language", "split") else "false"


def _problems_of_values(
    database: duckdb.DuckDBPyConnection, table: Table, names: Mapping[str, str | None], rows: str, where: str
) -> list[str]:
    """Nulls, failed conversions, blank splits and duplicate keys; replaced bytes and blank languages are warned of."""
    tests = [
        f"""count(_failed_{column.name}), min(_failed_{column.name}),
        count(*) FILTER ({column.required} AND {column.name} IS NULL AND _failed_{column.name} IS NULL),
        count(*) FILTER ({_has_replacement(column.name, column.type)}),
        count(*) FILTER ({_is_blank_name(column.name)})"""
        for column in table.columns
    ]
    ((num_rows, *counts),) = database.execute(f"SELECT count(*), {', '.join(tests)} FROM {rows}").fetchall()
    problems, replaced, blank = [], {}, {}
    for place, column in enumerate(table.columns):
        failed, example, nulls, replaced[column.name], blank[column.name] = counts[5 * place : 5 * place + 5]
        name = names[column.name] or ""
        if failed:
            problems.append(problem_of_values(name, column.name, column.type, failed, num_rows, example))
        if nulls:
            problems.append(f"column {name!r} is null in {nulls} of {num_rows} rows")
    if blank.get("split"):
        problems.append(
            f"column {names['split']!r} is blank in {blank['split']} of {num_rows} rows, which are in no split. Write "
            "null where a row is to be in split train"
        )
    if not problems and table.key:
        key = ", ".join(table.key)
        repeated = database.execute(
            f"""SELECT sum(copies) OVER (), {key} FROM (
                SELECT {key}, count(*) AS copies FROM {table.name} GROUP BY ALL HAVING copies > 1
            ) ORDER BY {key} LIMIT 1"""
        ).fetchall()
        for num_copies, *example in repeated:
            problems.append(f"{num_copies} rows share their key ({key}), for example {', '.join(map(str, example))}")
    for warning in (warning_of_replaced(replaced), warning_of_blank_languages(blank.get("language", 0), num_rows)):
        if warning is not None:
            logger.warning("%s: %s", where, warning)
    return problems


def language_of_query(markets: Mapping[str, str]) -> str:
    """SQL of a query's language, from columns language and market: its own, else its market's."""
    return f"coalesce(language, {language_of_market(markets)})"


def language_of_market(markets: Mapping[str, str], column: str = "market") -> str:
    """SQL of a market's language, from the market's column."""
    cases = " ".join(f"WHEN {literal(market)} THEN {literal(language)}" for market, language in markets.items())
    return f"CASE {column} {cases} END"


def has_text(column: str) -> str:
    """SQL of csrm.text.has_text."""
    return f"coalesce(regexp_matches({column}, '[^{NOTHING_CLASS}]'), false)"


def random_number(seed: int, *values: str) -> str:
    """SQL of a random number in [0, 2^64) for these values, always the same for a seed."""
    return f"md5_number_lower(concat_ws(' ', {seed}, {', '.join(values)}))"


def literal(text: Any) -> str:
    """A text in SQL."""
    return "'" + str(text).replace("'", "''") + "'"


def problem_list(where: str, problems: list[str]) -> str:
    return f"{where}:\n" + "\n".join(f"  - {problem}" for problem in problems)
