"""Judged pairs with their texts: what the relevance stage learns from."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pyarrow.dataset as pa_dataset

from csrm.config import InputSpec
from csrm.errors import InputError, MissingDependencyError
from csrm.schemas import CATALOG, JUDGMENTS, QUERIES, RETRIEVAL_TABLE, Table


def read_frame(table: Table, spec: InputSpec, markets: Mapping[str, str]) -> pd.DataFrame:
    """Rows of some markets of a table, without Spark.

    Args:
        table: its columns are returned, in order; optional ones that are absent are null.
        spec: Delta, Parquet, CSV or JSON lines.
        markets: market to language; only these are read.

    Raises:
        InputError: the table cannot be read, or required columns are missing.
    """
    where = f"{table.name} {spec.path!r}"
    dataset = _open(spec, where)
    there = {column.name: spec.columns.get(column.name, column.name) for column in table.columns}
    missing = [
        there[column.name]
        for column in table.columns
        if column.required and there[column.name] not in dataset.schema.names
    ]
    if missing:
        raise InputError(
            f"{where}: missing columns {missing}; it has {dataset.schema.names}. Map them in the config under columns."
        )
    present = {ours: theirs for ours, theirs in there.items() if theirs in dataset.schema.names}
    is_wanted = pa_dataset.field(there["market"]).isin(list(markets))
    rows = dataset.to_table(columns=list(present.values()), filter=is_wanted).rename_columns(list(present))
    return rows.to_pandas().reindex(columns=table.column_names)


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
    if not Path(spec.path).exists():
        raise InputError(f"{where}: is not there. Is the path right?")
    return pa_dataset.dataset(spec.path, format=spec.format)


def judged_pairs(inputs: Mapping[str, InputSpec], markets: Mapping[str, str]) -> pd.DataFrame:
    """Every judgment of some markets with the texts of its query and product.

    Args:
        inputs: catalog, queries, judgments, and optionally retrieval_table.
        markets: market to language.

    Returns:
        market, query_id, product_id, grade, split, and csrm.scoring.PAIR_COLUMNS; sorted by key.

    Raises:
        InputError: an input cannot be read, a market has no judgment, or a judged query or product is missing.
    """
    judgments = read_frame(JUDGMENTS, inputs["judgments"], markets)
    queries = read_frame(QUERIES, inputs["queries"], markets).drop(columns=["frequency"])
    catalog = read_frame(CATALOG, inputs["catalog"], markets).drop(columns=["language"])
    empty = sorted(set(markets) - set(judgments["market"]))
    if empty:
        raise InputError(f"judgments {inputs['judgments'].path!r}: no rows for markets {empty}.")
    queries["language"] = queries["language"].fillna(queries["market"].map(markets))
    queries["retrieved_titles"] = _retrieved_titles(queries, inputs, markets)
    pairs = judgments.merge(
        queries, how="left", on=["market", "query_id"], validate="many_to_one", indicator="_query"
    ).merge(catalog, how="left", on=["market", "product_id"], validate="many_to_one", indicator="_product")
    for side in ("query", "product"):
        orphans = pairs.loc[pairs[f"_{side}"] == "left_only", ["market", f"{side}_id"]].drop_duplicates()
        if len(orphans):
            example = " ".join(orphans.iloc[0])
            raise InputError(
                f"judgments {inputs['judgments'].path!r}: {len(orphans)} judged ids have no {side}, for example "
                f"{example}. "
                f"Add them to the {'queries' if side == 'query' else 'catalog'} input or drop their judgments."
            )
    return pairs.drop(columns=["_query", "_product"]).sort_values(
        ["market", "query_id", "product_id"], ignore_index=True
    )


def _retrieved_titles(
    queries: pd.DataFrame, inputs: Mapping[str, InputSpec], markets: Mapping[str, str]
) -> list[tuple[str, ...]]:
    if "retrieval_table" not in inputs:
        return [()] * len(queries)
    retrieval = read_frame(RETRIEVAL_TABLE, inputs["retrieval_table"], markets).sort_values("rank")
    titles = {key: tuple(rows) for key, rows in retrieval.groupby(["market", "query_id"])["title"]}
    return [titles.get(key, ()) for key in zip(queries["market"], queries["query_id"], strict=True)]
