"""How the columns that CSRM reads are called in a table: proposed from their names, and from their types."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

import pyarrow as pa

from csrm.schemas import Column, Table
from csrm.start.tables import FoundTable

ALIASES = {
    "market": "locale country storefront marketplace site region product_locale market_id country_code",
    "catalog.product_id": "id",
    "product_id": "sku asin item_id product_code article_id listing_id item product",
    "queries.query_id": "id",
    "query_id": "qid search_id keyword_id",
    "catalog.title": "product_title name product_name item_name product_name_local",
    "catalog.brand": "product_brand brand_name manufacturer vendor marke marca marque",
    "catalog.category": "product_category category_name category_path product_type categories",
    "catalog.attributes": "product_attributes specs specifications properties features",
    "language": "lang product_language text_language locale",
    "query": "keyword search_term query_text search_query term text",
    "queries.frequency": "count searches num_searches search_count volume search_volume impressions",
    "behaviour.count": "clicks num_clicks purchases orders num_orders click_count n",
    "judgments.grade": "label esci_label judgment judgement relevance rating relevance_label annotation",
    "judgments.split": "fold set subset partition",
    "parallel_text.source_language": "src_lang source_lang lang1 language_from",
    "parallel_text.target_language": "tgt_lang trg_lang target_lang lang2 language_to",
    "parallel_text.source_text": "source src text1 source_sentence",
    "parallel_text.target_text": "target tgt trg translation text2 target_sentence",
}
"""Names that stand for a column, the most usual first; of one table where the key has its name in front."""
LEFT_OUT = "null"
"""What a person says in place of a column's name where none stands for it, as in the `columns` of an input."""
NEEDED = {"catalog": ("title",), "queries": ("query",), "parallel_text": ("source_text", "target_text")}
"""Columns without which a table says nothing, though their values may be null."""


@dataclass(frozen=True)
class ColumnProposal:
    """The names of a table's columns, and what is wrong."""

    there: Mapping[str, str]
    """CSRM's name to the name there, of every column that was found."""
    columns: Mapping[str, str | None]
    """What an input's `columns` must say: the names that differ, and null for what must be left out."""
    problems: tuple[str, ...]
    """Needed columns that nothing stands for."""


def propose_columns(table: Table, found: FoundTable, chosen: Mapping[str, str]) -> ColumnProposal:
    """Propose which column of a table is which of CSRM's.

    A column of the same name is taken, then one that differs in case or marks (`productId`), then one of a usual other
    name (`sku`), then, for what is needed, one of a similar name. Types must fit.

    Args:
        table: what CSRM reads.
        found: the table.
        chosen: CSRM's name to the name there, as a person said; "null" leaves a column out.
    """
    types = found.types
    if found.market is not None:
        chosen = {name: column for name, column in chosen.items() if name != "market"}  # null, since none stands for it
    left_out = {name for name in table.column_names if chosen.get(name) == LEFT_OUT and LEFT_OUT not in types}
    there = {name: chosen[name] for name in table.column_names if chosen.get(name) in types}
    problems = [
        f"{table.name} at {found.path!r}: --column {table.name}.{name}={column}: there is no column {column!r}; it has "
        f"{sorted(types)}"
        if name in table.column_names
        else f"--column {table.name}.{name}: expected one of {table.column_names} before the equals sign"
        for name, column in chosen.items()
        if name not in there and name not in left_out
    ]
    for column in table.columns:
        if column.name in types and column.name not in there and column.name not in left_out:
            if is_needed(table, column) or _fits(column, found, column.name):
                there[column.name] = column.name
            else:
                left_out.add(column.name)
    for step in (_of_same_letters, _of_usual_name, _of_similar_name):
        for column in table.columns:
            if column.name in there or column.name in left_out:
                continue
            free = {name for name in types if name not in there.values()}
            fitting = [name for name in step(table, column, sorted(free)) if _fits(column, found, name)]
            if fitting:
                there[column.name] = fitting[0]
    for column in table.columns:
        if is_needed(table, column) and column.name not in there:
            of_all = ", or of which market all rows are, with its language: --language MARKET=CODE, once"
            problems.append(
                f"{table.name} at {found.path!r}: no column stands for {column.name} ({column.comment}); it has "
                f"{sorted(types)}. Say which one: --column {table.name}.{column.name}=NAME"
                f"{of_all if column.name == 'market' else ''}"
            )
    renamed: dict[str, str | None] = {name: column for name, column in there.items() if name != column}
    return ColumnProposal(there, renamed | dict.fromkeys(sorted(left_out)), tuple(problems))


def is_needed(table: Table, column: Column) -> bool:
    """Whether a table without this column cannot be used."""
    return column.required or column.name in NEEDED.get(table.name, ())


def _of_same_letters(table: Table, column: Column, names: list[str]) -> list[str]:
    return [name for name in names if _letters(name) == _letters(column.name)]


def _of_usual_name(table: Table, column: Column, names: list[str]) -> list[str]:
    usual = [*ALIASES.get(f"{table.name}.{column.name}", "").split(), *ALIASES.get(column.name, "").split()]
    return [name for alias in usual for name in names if _letters(name) == _letters(alias)]


def _of_similar_name(table: Table, column: Column, names: list[str]) -> list[str]:
    """Names that may be misspelt. An optional column is better left out than guessed wrong."""
    if not is_needed(table, column):
        return []
    by_letters = {_letters(name): name for name in names}
    return [by_letters[near] for near in get_close_matches(_letters(column.name), by_letters, n=1, cutoff=0.8)]


def _letters(name: str) -> str:
    return re.sub(r"[^\w]|_", "", name).lower()


def _fits(column: Column, found: FoundTable, name: str) -> bool:
    """Whether values of a column there can be what CSRM's column holds."""
    type_ = found.types[name]
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    is_text = any(is_kind(type_) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))
    is_number = pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_)
    if column.type.startswith("map"):
        is_map = pa.types.is_map(type_) or pa.types.is_struct(type_)
        return is_map or (is_text and found.is_json_objects(name))
    return is_number if column.type == "bigint" else is_text or is_number
