"""Judged pairs with their texts: what the relevance stage learns from."""

from collections.abc import Mapping

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pa_dataset
import pyarrow.fs as pa_fs

from csrm.config import InputSpec, Settings
from csrm.errors import InputError, MissingDependencyError
from csrm.schemas import CATALOG, JUDGMENTS, QUERIES, RETRIEVAL_TABLE, Table


class JudgedInputs(Settings):
    """Tables that hold judged pairs and their texts."""

    catalog: InputSpec
    queries: InputSpec
    judgments: InputSpec
    retrieval_table: InputSpec | None = None
    """Titles that augment the queries; without it, queries are not augmented."""


_ARROW_TYPES = {
    "string": pa.string(),
    "bigint": pa.int64(),
    "int": pa.int32(),
    "double": pa.float64(),
    "map<string,string>": pa.map_(pa.string(), pa.string()),
}


def read_frame(table: Table, spec: InputSpec, markets: Mapping[str, str]) -> pd.DataFrame:
    """Rows of some markets of a table, without Spark.

    Args:
        table: its columns are returned, in order and with its types; optional ones that are absent are null.
        spec: Delta, Parquet or JSON lines; other formats are imported with Spark first.
        markets: market to language; only these are read.

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
    present = [column for column in table.columns if there[column.name] in dataset.schema.names]
    market = pa_dataset.field(there["market"])
    rows = dataset.to_table(
        columns=[there[column.name] for column in present], filter=market.isin(list(markets)) | market.is_null()
    )
    arrays, problems = {}, []
    for column, values in zip(present, rows.columns, strict=True):
        try:
            arrays[column.name] = values.cast(_ARROW_TYPES[column.type])
        except pa.ArrowException as error:
            problems.append(f"column {there[column.name]!r}: expected {column.type}, got {values.type} ({error})")
            continue
        if column.required and values.null_count:
            problems.append(f"column {there[column.name]!r} is null in {values.null_count} of {len(values)} rows")
    frame = pa.table(arrays).to_pandas().reindex(columns=table.column_names)
    if not problems:
        repeated = frame.duplicated(list(table.key), keep=False)
        if repeated.any():
            example = ", ".join(str(value) for value in frame.loc[repeated, list(table.key)].iloc[0])
            problems.append(f"{repeated.sum()} rows share their key ({', '.join(table.key)}), for example {example}")
    if problems:
        raise InputError(f"{where}:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return frame


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


def judged_pairs(inputs: JudgedInputs, markets: Mapping[str, str]) -> pd.DataFrame:
    """Every judgment of some markets with the texts of its query and product.

    Args:
        inputs: where the tables are.
        markets: market to language.

    Returns:
        market, query_id, product_id, grade, split, and csrm.scoring.PAIR_COLUMNS; sorted by key.

    Raises:
        InputError: an input cannot be read, a market has no judgment, or judged queries or products are missing.
    """
    judgments = read_frame(JUDGMENTS, inputs.judgments, markets)
    queries = read_frame(QUERIES, inputs.queries, markets).drop(columns=["frequency"])
    catalog = read_frame(CATALOG, inputs.catalog, markets).drop(columns=["language"])
    empty = sorted(set(markets) - set(judgments["market"]))
    if empty:
        raise InputError(f"judgments {inputs.judgments.path!r}: no rows for markets {empty}.")
    queries["language"] = queries["language"].fillna(queries["market"].map(markets))
    queries["retrieved_titles"] = _retrieved_titles(queries, inputs.retrieval_table, markets)
    pairs = judgments.merge(queries, how="left", on=["market", "query_id"], indicator="_query").merge(
        catalog, how="left", on=["market", "product_id"], indicator="_product"
    )
    problems = []
    for side, table in (("query", "queries"), ("product", "catalog")):
        orphans = pairs.loc[pairs[f"_{side}"] == "left_only", ["market", f"{side}_id"]].drop_duplicates()
        if len(orphans):
            example = " ".join(orphans.iloc[0])
            problems.append(
                f"{len(orphans)} judged ids have no {side}, for example {example}: add them to {table} or drop them"
            )
    if problems:
        raise InputError(f"judgments {inputs.judgments.path!r}:\n" + "\n".join(f"  - {text}" for text in problems))
    return pairs.drop(columns=["_query", "_product"]).sort_values(
        ["market", "query_id", "product_id"], ignore_index=True
    )


def _retrieved_titles(
    queries: pd.DataFrame, spec: InputSpec | None, markets: Mapping[str, str]
) -> list[tuple[str, ...]]:
    if spec is None:
        return [()] * len(queries)
    retrieval = read_frame(RETRIEVAL_TABLE, spec, markets).sort_values("rank")
    titles = {key: tuple(rows) for key, rows in retrieval.groupby(["market", "query_id"])["title"]}
    return [titles.get(key, ()) for key in zip(queries["market"], queries["query_id"], strict=True)]
