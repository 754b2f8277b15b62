"""Judged pairs with their texts, streamed from the tables: what the relevance stage learns from."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pa_dataset
import pyarrow.fs as pa_fs

from csrm.config import InputSpec, Settings
from csrm.errors import InputError, MissingDependencyError
from csrm.schemas import CATALOG, JUDGMENTS, QUERIES, RETRIEVAL_TABLE, Column, Table

MEMORY_LIMIT = "2GB"
"""Of the joins; what does not fit goes to a temporary folder."""
_ROWS_AT_ONCE = 8_192


class JudgedInputs(Settings):
    """Tables that hold judged pairs and their texts."""

    catalog: InputSpec
    queries: InputSpec
    judgments: InputSpec
    retrieval_table: InputSpec | None = None
    """Titles that augment the queries; without it, queries are not augmented."""


class UnlabelledInputs(Settings):
    """Tables that hold pairs that nobody judged."""

    catalog: InputSpec
    queries: InputSpec
    candidates: InputSpec
    retrieval_table: InputSpec | None = None


class Fold(NamedTuple):
    """One of several parts of the queries; equal texts are in one part, whatever their market and case."""

    number: int
    """From 0."""
    num_folds: int
    seed: int = 0

    def sql(self) -> str:
        """Condition that a row of `pairs` is in this part."""
        return f"md5_number_lower(concat_ws(' ', {self.seed}, lower(trim(query)))) % {self.num_folds} = {self.number}"


def open_database(folder: str) -> duckdb.DuckDBPyConnection:
    """A database in memory; what does not fit into MEMORY_LIMIT goes to the folder."""
    database = duckdb.connect()
    database.execute(f"SET memory_limit = '{MEMORY_LIMIT}'; SET temp_directory = {_literal(folder)}")
    return database


class JudgedPairs:
    """Judged pairs of some markets, joined with their texts when they are read. Use it as a context manager.

    Tables are read without Spark, by DuckDB, which spills to disk above MEMORY_LIMIT.
    """

    def __init__(self, inputs: JudgedInputs, markets: Mapping[str, str]) -> None:
        """Args:
            inputs: where the tables are.
            markets: market to language.

        Raises:
            InputError: inputs cannot be read or have problems (all problems of an input in one message), a market has
                no judgment, or judged queries or products are missing.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="csrm-join-")
        self._database = open_database(self._folder.name)
        try:
            for table, spec in (
                (JUDGMENTS, inputs.judgments),
                (QUERIES, inputs.queries),
                (CATALOG, inputs.catalog),
                (RETRIEVAL_TABLE, inputs.retrieval_table),
            ):
                if spec is not None:
                    add_table(self._database, table, spec, markets)
            self._check(inputs.judgments.path, markets)
            self._create_view(markets, inputs.retrieval_table is not None)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "JudgedPairs":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._database.close()
        self._folder.cleanup()

    def add_unlabelled(
        self, inputs: UnlabelledInputs, markets: Mapping[str, str], pairs_per_query: int, seed: int
    ) -> int:
        """Stand-in."""
        import dataclasses
        from csrm.schemas import CANDIDATES

        for table, spec in ((CANDIDATES, inputs.candidates), (QUERIES, inputs.queries), (CATALOG, inputs.catalog)):
            add_table(self._database, dataclasses.replace(table, name="unlabelled_" + table.name), spec, markets)
        language = " ".join(f"WHEN {_literal(m)} THEN {_literal(l)}" for m, l in markets.items())
        titles = "NULL::VARCHAR AS market, NULL::VARCHAR AS query_id, NULL::VARCHAR[] AS titles LIMIT 0"
        if inputs.retrieval_table is not None:
            spec = inputs.retrieval_table
            add_table(self._database, dataclasses.replace(RETRIEVAL_TABLE, name="unlabelled_titles"), spec, markets)
            titles = "market, query_id, list(title ORDER BY rank) AS titles FROM unlabelled_titles GROUP BY ALL"
        self._database.execute(f"""CREATE TABLE unlabelled_pairs AS SELECT market, query_id, product_id, NULL::VARCHAR AS grade,
            'unlabelled' AS split, coalesce(q.language, CASE market {language} END) AS language, query,
            coalesce(titles, []) AS retrieved_titles, title, brand, category, attributes
            FROM unlabelled_candidates JOIN unlabelled_queries AS q USING (market, query_id)
            JOIN unlabelled_catalog USING (market, product_id)
            LEFT JOIN (SELECT {titles}) USING (market, query_id)
            WHERE title IS NOT NULL
            QUALIFY row_number() OVER (PARTITION BY market, query_id ORDER BY md5(concat_ws(' ', {seed}, product_id)))
                <= {pairs_per_query}""")
        self._database.execute("ALTER VIEW pairs RENAME TO judged_pairs")
        self._database.execute("CREATE VIEW pairs AS FROM judged_pairs UNION ALL BY NAME FROM unlabelled_pairs")
        return self._database.execute("SELECT count(*) FROM unlabelled_pairs").fetchall()[0][0]

    def splits(self) -> dict[str, int]:
        """Split to its number of pairs; pairs without a split are in train."""
        rows = self._database.execute("SELECT split, count(*) FROM pairs GROUP BY split ORDER BY split").fetchall()
        return dict(rows)

    def check_apart(self, split: str, other: str) -> None:
        """No query text, case ignored, may be in two splits: a model would be measured by what it was trained on.

        Raises:
            InputError: some are.
        """
        shared = self._database.execute(
            """SELECT count(*) OVER (), text FROM (
                SELECT lower(trim(query)) AS text FROM pairs WHERE split IN ($split, $other)
                GROUP BY text HAVING count(DISTINCT split) = 2
            ) ORDER BY text LIMIT 1""",
            {"split": split, "other": other},
        ).fetchall()
        for num_texts, example in shared:
            raise InputError(
                f"judgments: {num_texts} query texts are in split {split} and in split {other}, for example "
                f"{example!r}. Give all judgments of a text one split."
            )

    def read(self, split: str | None = None, num_pairs: int | None = None) -> pd.DataFrame:
        """Pairs with their texts, sorted by key, in memory.

        Args:
            split: only those of this split.
            num_pairs: a random sample of so many, always the same; None: all.

        Returns:
            market, query_id, product_id, grade, split, and csrm.scoring.PAIR_COLUMNS.
        """
        chosen = "SELECT * FROM pairs" + (" WHERE split = $split" if split is not None else "")
        if num_pairs is not None:
            chosen += f" ORDER BY md5(concat_ws(' ', market, query_id, product_id)) LIMIT {num_pairs}"
        query = f"SELECT * FROM ({chosen}) ORDER BY market, query_id, product_id"
        result = self._database.sql(query, params={"split": split} if split is not None else None)
        return _as_frame(result.to_arrow_table())

    def with_texts(self, keyed: pd.DataFrame) -> pd.DataFrame:
        """Rows that name a pair (market, query_id, product_id), in their order, with its query and title."""
        self._database.register("keyed", keyed.assign(place=range(len(keyed))))
        rows = self._database.sql(
            """SELECT keyed.*, pairs.query, pairs.title FROM keyed
            JOIN pairs USING (market, query_id, product_id) ORDER BY place"""
        ).to_arrow_table()
        self._database.unregister("keyed")
        frame: pd.DataFrame = rows.drop_columns("place").to_pandas()
        return frame

    def with_true_grades(self, keyed: pd.DataFrame) -> pd.DataFrame:
        """Rows that name a pair (market, query_id, product_id), in their order, with its true_grade, null: unknown."""
        self._database.register("keyed", keyed.assign(place=range(len(keyed))))
        rows = self._database.sql(
            """SELECT keyed.*, judgments.true_grade FROM keyed
            LEFT JOIN judgments USING (market, query_id, product_id) ORDER BY place"""
        ).to_arrow_table()
        self._database.unregister("keyed")
        frame: pd.DataFrame = rows.drop_columns("place").to_pandas()
        return frame

    def digest(self) -> str:
        """Of every pair and its texts, in no order."""
        sql = "SELECT md5(sum(md5_number_lower(pairs::VARCHAR))::VARCHAR) FROM pairs"
        ((digest,),) = self._database.execute(sql).fetchall()
        return str(digest)

    def batches(self, split: str, fold: "Fold | None" = None) -> Iterator[pd.DataFrame]:
        """Pairs of a split with their texts, by query; of one fold, where that is given. Columns as of `read`."""
        inside = "true" if fold is None else fold.sql()
        rows = self._database.sql(
            f"SELECT * FROM pairs WHERE split = $split AND {inside} ORDER BY market, query_id, product_id",
            params={"split": split},
        )
        for batch in rows.to_arrow_reader(_ROWS_AT_ONCE):
            yield _as_frame(pa.Table.from_batches([batch]))

    def groups(
        self,
        split: str,
        pairs_per_group: int,
        seed: int,
        random_negatives: float = 0.0,
        without: "Fold | None" = None,
        soft_labels: Path | None = None,
    ) -> Iterator[pd.DataFrame]:
        """Pairs of a split with their texts, in groups of one query in random order.

        Args:
            split: which pairs.
            pairs_per_group: pairs of a group at most; which pairs of a query share a group is random.
            seed: of both, and of the negatives.
            random_negatives: for this share of the pairs, in [0, 1], the query is also paired with a product that was
                judged for another query of its market; such a pair has no grade.
            without: leave out the queries of this fold.
            soft_labels: Parquet file with market, query_id, product_id and soft_label, a list of numbers.

        Yields:
            Batches of the columns of `read`, soft_label (null where there is none) and group_number; rows of a group
            stand side by side.
        """
        outside = "true" if without is None else f"NOT {without.sql()}"
        labelled = (
            f"""LEFT JOIN (
                SELECT market, query_id, product_id, soft_label, weight FROM read_parquet({_literal(soft_labels)})
            ) USING (market, query_id, product_id)"""
            if soft_labels
            else ", (SELECT NULL::FLOAT[] AS soft_label, NULL::FLOAT AS weight)"
        )
        shown = "FROM judged UNION ALL FROM negatives" if random_negatives else "FROM judged"
        query = f"""
            WITH judged AS (SELECT * FROM pairs WHERE (split = $split OR split = 'unlabelled' AND {soft_labels is not None}) AND {outside}),
            numbered AS (
                SELECT *, count(*) OVER (PARTITION BY market) AS num_pairs, row_number() OVER (
                    PARTITION BY market ORDER BY md5(concat_ws(' ', {seed}, query_id, product_id))
                ) AS number
                FROM judged
            ),
            negatives AS (
                SELECT a.market, a.query_id, b.product_id, NULL AS grade, a.split, a.language, a.query,
                    a.retrieved_titles, b.title, b.brand, b.category, b.attributes
                FROM numbered AS a JOIN numbered AS b ON b.market = a.market AND b.number = a.number % a.num_pairs + 1
                WHERE a.number <= {random_negatives} * a.num_pairs AND NOT EXISTS (
                    FROM judged AS j
                    WHERE (j.market, j.query_id, j.product_id) = (a.market, a.query_id, b.product_id)
                )
            ),
            placed AS (
                SELECT *, (row_number() OVER (
                    PARTITION BY market, query_id ORDER BY md5(concat_ws(' ', {seed}, product_id))
                ) - 1) // {pairs_per_group} AS part
                FROM ({shown})
            )
            SELECT *, dense_rank() OVER (ORDER BY md5(concat_ws(' ', {seed}, market, query_id, part))) AS group_number
            FROM placed {labelled} ORDER BY group_number, product_id
        """
        result = self._database.sql(query, params={"split": split})
        for batch in result.to_arrow_reader(_ROWS_AT_ONCE):
            frame = _as_frame(pa.Table.from_batches([batch])).drop(columns="part")
            yield frame.assign(weight=frame["weight"].fillna(1.0))

    def _check(self, path: str, markets: Mapping[str, str]) -> None:
        found = {row[0] for row in self._database.execute("SELECT DISTINCT market FROM judgments").fetchall()}
        if empty := sorted(set(markets) - found):
            raise InputError(f"judgments {path!r}: no rows for markets {empty}.")
        problems = []
        for side, table in (("query", "queries"), ("product", "catalog")):
            orphans = self._database.execute(
                f"""SELECT count(*) OVER (), market, {side}_id FROM (
                    SELECT DISTINCT market, {side}_id FROM judgments ANTI JOIN {table} USING (market, {side}_id)
                ) ORDER BY market, {side}_id LIMIT 1"""
            ).fetchall()
            for num_ids, market, id_ in orphans:
                problems.append(
                    f"{num_ids} judged ids have no {side}, for example {market} {id_}: add them to {table} or drop them"
                )
        if problems:
            raise InputError(_listed(f"judgments {path!r}", problems))

    def _create_view(self, markets: Mapping[str, str], has_titles: bool) -> None:
        language = " ".join(
            f"WHEN {_literal(market)} THEN {_literal(language)}" for market, language in markets.items()
        )
        titles = (
            "(SELECT market, query_id, list(title ORDER BY rank) AS titles FROM retrieval_table GROUP BY ALL)"
            if has_titles
            else "(SELECT NULL::VARCHAR AS market, NULL::VARCHAR AS query_id, NULL::VARCHAR[] AS titles LIMIT 0)"
        )
        self._database.execute(
            f"""CREATE VIEW pairs AS SELECT
                market, query_id, product_id, grade, coalesce(split, 'train') AS split,
                coalesce(queries.language, CASE market {language} END) AS language,
                query, coalesce(titles, []) AS retrieved_titles, title, brand, category, attributes
            FROM judgments
            JOIN queries USING (market, query_id)
            JOIN catalog USING (market, product_id)
            LEFT JOIN {titles} AS retrieved USING (market, query_id)"""
        )


def add_table(
    database: duckdb.DuckDBPyConnection, table: Table, spec: InputSpec, markets: Mapping[str, str] | None = None
) -> None:
    """Make a table that Spark is not needed for known to a database, under its name, after its checks.

    Args:
        table: its columns are there, with their types; optional ones that are absent are null.
        spec: Delta, Parquet or JSON lines; other formats are imported with Spark first.
        markets: only rows of these are there.

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
    kept = f"{market} IS NULL OR {market} IN ({', '.join(map(_literal, markets))})" if markets and market else "true"
    source = f"(SELECT * FROM {table.name}_source WHERE {kept})"
    database.execute(f"CREATE VIEW {table.name} AS SELECT {', '.join(values)} FROM {source}")
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
        raise InputError(_listed(where, problems))


def _open(spec: InputSpec, where: str) -> pa_dataset.Dataset:
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
        return pa_dataset.dataset(path, filesystem=filesystem, format=spec.format)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{where}: cannot be read: {error}. Is the path right?") from error


def _as_frame(rows: pa.Table) -> pd.DataFrame:
    """Titles as tuples, attributes as lists of (name, value) or None."""
    frame: pd.DataFrame = rows.to_pandas()
    frame["retrieved_titles"] = [tuple(titles) for titles in frame["retrieved_titles"]]
    return frame


def _sql_type(column: Column) -> str:
    return {"string": "VARCHAR", "map<string,string>": "MAP(VARCHAR, VARCHAR)"}.get(column.type, column.type.upper())


def _name(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _literal(text: Any) -> str:
    return "'" + str(text).replace("'", "''") + "'"


def _listed(where: str, problems: list[str]) -> str:
    return f"{where}:\n" + "\n".join(f"  - {problem}" for problem in problems)
