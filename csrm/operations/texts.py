"""Texts of queries and products that pages name: few, and cut to what a page shows."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from csrm.config import InputSpec
from csrm.errors import InputError
from csrm.operations.findings import MOST_CHARACTERS, Key, Text, Texts
from csrm.schemas import Table
from csrm.spark.inputs import read_rows


@dataclass(frozen=True)
class TextSource:
    """Where the texts of queries or products are."""

    table: Table
    spec: InputSpec
    id_column: str
    text_column: str


def read_texts(
    spark: SparkSession,
    source: TextSource,
    keys: Collection[Key],
    run: Mapping[str, Any],
    before: Mapping[str, Any] | None,
) -> tuple[Texts, list[str]]:
    """The texts that a run read, and those that an earlier one had read, from the places that their rows name.

    A report must come also where inputs are faulty, or gone: what cannot be read is left out.

    Args:
        spark: the session.
        source: where texts are now, for a run whose place cannot be read; its format and columns hold everywhere.
        keys: the queries or products.
        run: its row of scoring_runs.
        before: that of the earlier run, or None.

    Returns:
        The texts; sentences that say what they lack.
    """
    if not keys:
        return Texts(), []
    name = source.table.name
    place = run["inputs"].get(name, source.spec.path)
    earlier_place = place if before is None else before["inputs"].get(name, place)
    present, problem = _try_texts(spark, source, keys, place)
    earlier, _ = _try_texts(spark, source, keys, earlier_place) if earlier_place != place else ({}, None)
    if problem is None:
        return Texts(present, earlier), []
    present, problem_now = _try_texts(spark, source, keys, source.spec.path)
    if problem_now is None:
        note = f"Texts of {name} are those of {source.spec.path} as it is now: what the run read, {place}, is gone."
    else:
        note = f"Texts of {name} cannot be read, neither from {place} nor from {source.spec.path}: {problem_now}"
    return Texts(present, earlier), [note]


def _try_texts(
    spark: SparkSession, source: TextSource, keys: Collection[Key], place: str
) -> tuple[dict[Key, Text], str | None]:
    """The texts at a place; why there are none, if so."""
    try:
        return _texts_at(spark, source, keys, place), None
    except (InputError, PySparkException, Py4JJavaError) as error:
        return {}, str(error).strip().splitlines()[0]


def _texts_at(spark: SparkSession, source: TextSource, keys: Collection[Key], place: str) -> dict[Key, Text]:
    """Texts from a path, or from a path with @v and the version of a Delta table."""
    names = ("market", source.id_column, source.text_column)
    columns = {name: there for name, there in source.spec.columns.items() if name in names}
    spec, version = spec_at(source.spec.model_copy(update={"columns": columns}), place)
    wanted = tuple(replace(column, required=True) for column in source.table.columns if column.name in names)
    source_df = read_rows(spark, replace(source.table, columns=wanted), spec, version)
    return collect_texts(source_df, source.id_column, source.text_column, keys)


def collect_texts(df: DataFrame, id_column: str, text_column: str, keys: Collection[Key]) -> dict[Key, Text]:
    """Texts of some queries or products; those that have none are left out.

    Args:
        df: market, id_column, text_column.
        id_column: query_id or product_id.
        text_column: query or title.
        keys: market and id of each.
    """
    keys_df = df.sparkSession.createDataFrame(sorted(keys), f"market string, {id_column} string")
    text = F.min(text_column)
    texts_df = (
        df.join(F.broadcast(keys_df), on=["market", id_column], how="inner")
        .groupBy("market", id_column)
        .agg(F.substring(text, 1, MOST_CHARACTERS).alias("beginning"), F.length(text).alias("num_characters"))
        .where("beginning IS NOT NULL")
    )
    return {(row[0], row[1]): Text(row[2], row[3]) for row in texts_df.collect()}


def spec_at(spec: InputSpec, place: str) -> tuple[InputSpec, int | None]:
    """An input as a run read it.

    Args:
        spec: where it is now, and how.
        place: what scoring_runs says of it: a path, for a Delta table with @v and its version.

    Returns:
        The same input at that path; the version, None where the place has none.
    """
    versioned = re.fullmatch(r"(.*)@v(\d+)", place, re.DOTALL)
    if versioned is None:
        return spec.model_copy(update={"path": place}), None
    return spec.model_copy(update={"path": versioned[1], "format": "delta"}), int(versioned[2])
