"""What becomes of a value whose type is not the declared one: one table of conversions for every reader.

`refusal` says which types convert at all, `converted` what becomes of one value. Spark's reader, training's reader and
the UDF follow both: csrm/spark/conversions.py writes the same rules as Spark expressions,
csrm/training/data/conversions.py as SQL of DuckDB. tests/test_conversions.py holds the cases that all three pass.

| wanted | from |
| --- | --- |
| string | text; whole numbers; decimals and floating point whose value is whole (floating point: and exact) |
| int, bigint | the same, and text that is such a number; in range |
| float, double | any number, and text that is one |
| map<string,string> | maps and structs of text, numbers, true, false, or lists of these; JSON text of such an object |
| array<string> | lists of what becomes a string |

Everything else says how to cast it. Values of JSON have the type that JSON gives them.
"""

import datetime
import json
import math
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal, localcontext
from difflib import get_close_matches
from enum import StrEnum
from numbers import Integral
from typing import Any

import numpy as np
import pyarrow as pa

from csrm.config import InputSpec
from csrm.schemas import Table

EXACT_DOUBLE, EXACT_FLOAT = 2**53, 2**24
"""Up to these, floating point of 64 and of 32 bits holds every whole number."""
NUM_DECIMALS = 18
"""Decimals of a number that becomes the text of an attribute."""
LARGEST_ATTRIBUTE = 10**20
"""Numbers of attributes are smaller than this; larger ones are no text."""
WHOLE_TEXT = r"^[ \t\r\n]*[+-]?[0-9]{1,38}(\.0*)?[ \t\r\n]*$"
"""Text that is a whole number."""
NUMBER_TEXT = r"^[ \t\r\n]*[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,4})?[ \t\r\n]*$"
"""Text that is a number."""
BLANK_TEXT = r"^[ \t\r\n]*(null)?[ \t\r\n]*$"
"""Text of attributes that means that there are none."""
REPLACEMENT = "\ufffd"
"""Stands where bytes are no UTF-8."""
RANGES = {"int": (-(2**31), 2**31 - 1), "bigint": (-(2**63), 2**63 - 1)}


class Kind(StrEnum):
    """What a type is for the table of conversions, whatever its engine calls it."""

    TEXT = "text"
    WHOLE = "whole"
    DECIMAL = "decimal"
    FLOAT = "float"
    DOUBLE = "double"
    BOOLEAN = "boolean"
    TIME = "time"
    BINARY = "binary"
    UUID = "uuid"
    LIST = "list"
    MAP = "map"
    OBJECT = "object"
    JSON = "json"
    NOTHING = "nothing"
    OTHER = "other"


@dataclass(frozen=True)
class Found:
    """The type of a column as it was found."""

    kind: Kind
    name: str
    """Name of the type in its engine, for messages."""
    parts: tuple[tuple[str, "Found"], ...] = ()
    """Types inside: the fields of an object, "key" and "value" of a map, "item" of a list."""

    def __getitem__(self, part: str) -> "Found":
        return dict(self.parts)[part]


TEXT = Found(Kind.TEXT, "string")
JSON = Found(Kind.JSON, "JSON")
"""Values of JSON, or of Python, each of which says its own type."""
NUMBERS = (Kind.WHOLE, Kind.DECIMAL, Kind.FLOAT, Kind.DOUBLE)
_SCALARS = (Kind.TEXT, *NUMBERS)
_ALLOWED = {
    "string": _SCALARS,
    "int": _SCALARS,
    "bigint": _SCALARS,
    "float": _SCALARS,
    "double": _SCALARS,
    "map<string,string>": (Kind.TEXT, Kind.MAP, Kind.OBJECT),
    "array<string>": (Kind.LIST,),
}
_WAYS_OUT = {
    Kind.BOOLEAN: "Write it as text, for example yes and no",
    Kind.BINARY: (
        "Cast it to text where it is written. Where it is text that Parquet does not mark as such, set options: "
        "{binaryAsString: 'true'}"
    ),
}
_WAYS_OUT_OF_VALUES = {
    "string": (
        "Numbers become text where they are whole, floating point up to 2^53; cast others to text where they are "
        "written"
    ),
    "int": "Whole numbers are expected, or text that is one",
    "bigint": "Whole numbers are expected, or text that is one",
    "float": "Numbers are expected, or text that is one",
    "double": "Numbers are expected, or text that is one",
    "map<string,string>": (
        "JSON objects are expected, with names and strings in double quotes, each name once, whose values are text, "
        "numbers, true, false, or lists of these"
    ),
    "array<string>": "Lists of text are expected",
}


class NotConvertibleError(ValueError):
    """A value does not convert."""


def refusal(found: Found, wanted: str) -> str | None:
    """Why no value of a type converts, with the way out; None where values do.

    Args:
        found: the type.
        wanted: a declared type, see csrm.schemas.Column.

    >>> refusal(Found(Kind.WHOLE, "bigint"), "string") is None
    True
    >>> refusal(Found(Kind.BOOLEAN, "boolean"), "string")
    'expected string, got boolean. Write it as text, for example yes and no'
    """
    if found.kind in (Kind.NOTHING, Kind.JSON):
        return None
    if found.kind not in _ALLOWED[wanted]:
        way_out = _WAYS_OUT.get(found.kind) or (
            "Write a map of text, or JSON text"
            if wanted == "map<string,string>"
            else "Write an array of text"
            if wanted == "array<string>"
            else "Cast it to text where it is written"
        )
        return f"expected {wanted}, got {found.name}. {way_out}"
    if found.kind == Kind.LIST:
        inner = refusal(found["item"], "string")
        return None if inner is None else f"its items: {inner}"
    if found.kind == Kind.MAP and found["key"].kind != Kind.TEXT:
        return f"its names: expected string, got {found['key'].name}. Cast them to text where they are written"
    if found.kind in (Kind.MAP, Kind.OBJECT):
        if len({name.casefold() for name, _ in found.parts}) < len(found.parts):
            names = [name for name, _ in found.parts]
            return f"its fields {names} differ in case alone. Write a map of text, or JSON text"
        for name, part in found.parts:
            if name != "key" and not _is_attribute(part):
                where = "its values" if found.kind == Kind.MAP else f"its field {name!r}"
                return (
                    f"{where}: expected text, numbers, true and false, or lists of these; got {part.name}. "
                    "Cast it to text where it is written"
                )
    return None


def _is_attribute(found: Found) -> bool:
    if found.kind == Kind.LIST:
        return found["item"].kind in (*_SCALARS, Kind.BOOLEAN, Kind.NOTHING)
    return found.kind in (*_SCALARS, Kind.BOOLEAN, Kind.NOTHING)


def is_kept(found: Found, wanted: str) -> bool:
    """Whether values stay as they are, so that nothing needs to be computed."""
    if found.kind == Kind.MAP:
        return wanted == "map<string,string>" and found["key"].kind == found["value"].kind == Kind.TEXT
    if found.kind == Kind.LIST:
        return wanted == "array<string>" and found["item"].kind == Kind.TEXT
    return found.kind == Kind.TEXT and wanted == "string"


def problems_of_columns(
    table: Table, spec: InputSpec, present: Sequence[str], sources: Sequence[Mapping[str, Found]]
) -> list[str]:
    """What is wrong with the columns of an input table, before a value is read.

    Args:
        table: what is expected.
        spec: how its columns are called there.
        present: names of all columns that are there.
        sources: types of those that are needed, in each part of it.
    """
    known = table.column_names
    problems = [
        _problem_of_map(table, name, there, present) for name, there in spec.columns.items() if name not in known
    ]
    is_missing = False
    if spec.market is not None:
        problems += _problems_of_market(table, spec, present)
    for column in table.columns:
        name = spec.name_there(column.name)
        if name is None:
            if column.required and not (column.name == "market" and spec.market is not None):
                problems.append(f"'columns' leaves {column.name} out, which is required")
            continue
        leave_out = "" if column.required else f", or leave the column out: columns: {{{column.name}: null}}"
        others = sorted(other for other in present if other != name and other.casefold() == name.casefold())
        if others and name in present:
            problems.append(
                f"columns {[name, *others]} differ in case alone. Rename or drop all but one where they are written"
                f"{leave_out}."
            )
        elif others:
            problems.append(
                f"missing column {name!r} for {column.name}, but there is {others[0]!r}. Map it: columns: "
                f"{{{column.name}: {others[0]}}}{leave_out}."
            )
        elif name not in present and (column.required or column.name in spec.columns):
            is_missing = True
            problems.append(
                f"missing column {name!r} for {column.name}; it has {list(present)}. "
                f"Name the right one under columns: {{{column.name}: ...}}"
            )
        refusals = [refusal(columns[name], column.type) for columns in sources if name in columns]
        problems += [
            f"column {name!r} for {column.name}: {why}{leave_out}."
            for why in dict.fromkeys(refusals)
            if why is not None
        ]
    if is_missing and (hint := _hint(present, spec.format)):
        problems.append(hint)
    return problems


def _problems_of_market(table: Table, spec: InputSpec, present: Sequence[str]) -> list[str]:
    """Why a market cannot be that of all rows."""
    if "market" not in table.column_names:
        return [f"'market' is {spec.market!r}, but {table.name} has no column market. Leave it out"]
    there = spec.columns.get("market", "market")
    if "market" in spec.columns or there in present:
        return [
            f"'market' says that all rows are of {spec.market!r}, and column {there!r} says it of each row. Leave the "
            "setting out, or the column"
        ]
    return []


def _problem_of_map(table: Table, name: str, there: str | None, present: Sequence[str]) -> str:
    """Why an entry of `columns` is wrong: its key is no column of the table."""
    if there in table.column_names and name in present:
        return (
            f"'columns' maps {name!r} to {there!r}, which is the wrong way round. Write CSRM's name first: columns: "
            f"{{{there}: {name}}}"
        )
    similar = get_close_matches(name, table.column_names, n=1)
    hint = f". Is it {similar[0]}?" if similar else f"; it has {table.column_names}"
    return f"'columns' maps {name!r}, which is no column of {table.name}{hint}"


def problem_of_values(
    source: str, name: str, wanted: str, num_failed: int, num_values: int, example: str | None
) -> str:
    """What is wrong with some values of a column."""
    return (
        f"column {source!r} for {name}: {num_failed} of {num_values} values are no {wanted}, for example "
        f"{_shortened(example)!r}. {_WAYS_OUT_OF_VALUES[wanted]}."
    )


def problem_of_records(what: str, num_bad: int, example: str, place: str | None, way_out: str) -> str:
    """Lines or rows that are not what the format says.

    Args:
        what: "rows have another number of fields than the header", for example.
        num_bad: how many.
        example: one of them.
        place: file and line of the example; None where it was not found.
        way_out: what to do.
    """
    where = "" if place is None else f"{place}: "
    return f"{num_bad} {what}, for example {where}{_shortened(example)!r}. {way_out}"


def warning_of_replaced(num_values: Mapping[str, int]) -> str | None:
    """What to say of values that have U+FFFD in place of bytes that were no UTF-8; None where there are none.

    Args:
        num_values: column to such values.
    """
    listed = ", ".join(f"{name}: {number:,}" for name, number in num_values.items() if number)
    if not listed:
        return None
    return (
        f"bytes that are no UTF-8 were replaced by U+FFFD (column: values) in {listed}. Write the file as UTF-8; of "
        "CSV, another encoding may be named: options: {encoding: ...}."
    )


def warning_of_blank_languages(num_blank: int, num_rows: int) -> str | None:
    """What to say of rows whose language is blank, which is not that of their market; None where there are none."""
    if not num_blank:
        return None
    return (
        f"column language is blank in {num_blank} of {num_rows} rows, whose prompts name no language. Write null where "
        "a row is in the language of its market, or leave the column out: columns: {language: null}."
    )


def _hint(present: Sequence[str], format_: str) -> str:
    """What the names of a table's columns say about how it was read; empty where nothing."""
    if format_ != "csv" or not present:
        return ""
    if all(re.fullmatch(r"_c[0-9]+", name) for name in present):
        return "no names were read: where the first line holds them, set options: {header: 'true'}."
    separators = [separator for separator in "\t;|,:" if separator in present[0]]
    if len(present) == 1 and separators:
        shown = separators[0].replace("\t", "\\t")
        return f'its only column is full of separators: set options: {{sep: "{shown}"}}.'
    return ""


def _shortened(text: str | None, most: int = 80) -> str:
    text = "" if text is None else text
    return text if len(text) <= most else text[: most - 1] + "…"


def converted(value: Any, found: Found, wanted: str) -> Any:
    """What becomes of one value.

    Args:
        value: as Arrow gives it to Python; of a map, pairs; of JSON, as json.loads gives it with Decimal for numbers
            that are not whole.
        found: its type.
        wanted: the declared type.

    Raises:
        NotConvertibleError: it does not convert.

    >>> converted(7.0, Found(Kind.DOUBLE, "double"), "string")
    '7'
    """
    if value is None:
        return None
    if (why := refusal(found, wanted)) is not None:
        raise NotConvertibleError(why)
    if found.kind == Kind.JSON:
        found = found_in_python(value)
        if wanted == "map<string,string>" and found.kind == Kind.OBJECT:
            return _attributes(value, found)
        if wanted == "array<string>" and found.kind == Kind.LIST:
            return [converted(item, JSON, "string") for item in value]
        return converted(value, found, wanted)
    if wanted == "string":
        return value if found.kind == Kind.TEXT else str(_whole(value, found.kind))
    if wanted in RANGES:
        whole = _whole_of_text(value) if found.kind == Kind.TEXT else _whole(value, found.kind)
        least, most = RANGES[wanted]
        if not least <= whole <= most:
            raise NotConvertibleError(f"{value!r} is out of range")
        return whole
    if wanted in ("float", "double"):
        return _floating(value, wanted)
    if wanted == "array<string>":
        return [converted(item, found["item"], "string") for item in value]
    return _attributes(value, found)


def attributes_of_json(text: str) -> dict[str, str] | None:
    """The map that JSON text is read as; None where the text is blank or null.

    Raises:
        NotConvertibleError: it is no JSON object whose values are text, numbers, true, false or lists of these.
    """
    if re.match(BLANK_TEXT, text):
        return None
    try:
        value = json.loads(text, parse_float=_number_of_json, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise NotConvertibleError(f"{_shortened(text)!r} is no JSON: {error}") from error
    if value is None:
        return None
    if not isinstance(value, dict):
        raise NotConvertibleError(f"{_shortened(text)!r} is no JSON object")
    return _attributes(value, found_in_python(value))


def found_in_python(value: Any) -> Found:
    """The type that a value of Python has, which may come from JSON, NumPy or pandas.

    >>> found_in_python(7.0).kind, found_in_python(["x"]).kind
    (<Kind.DOUBLE: 'double'>, <Kind.LIST: 'list'>)
    """
    name = type(value).__name__
    if value is None:
        return Found(Kind.NOTHING, name)
    if isinstance(value, Mapping):
        return Found(Kind.OBJECT, name, tuple((str(key), found_in_python(part)) for key, part in value.items()))
    for types, kind in _PYTHON_KINDS:
        if isinstance(value, types):
            return Found(kind, name)
    return Found(Kind.OTHER, name)


_PYTHON_KINDS: tuple[tuple[Any, Kind], ...] = (
    (str, Kind.TEXT),
    ((bool, np.bool_), Kind.BOOLEAN),
    (Integral, Kind.WHOLE),
    (np.float32, Kind.FLOAT),
    (float, Kind.DOUBLE),
    (Decimal, Kind.DECIMAL),
    ((bytes, bytearray), Kind.BINARY),
    ((datetime.date, datetime.time, np.datetime64), Kind.TIME),
    (uuid.UUID, Kind.UUID),
    ((list, tuple, np.ndarray), Kind.LIST),
)


def _number_of_json(text: str) -> float | Decimal:
    return float(text) if "e" in text.lower() else Decimal(text)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name is there twice")
    return values


def _whole(value: Any, kind: Kind) -> int:
    if kind == Kind.WHOLE:
        return int(value)
    exact = {Kind.FLOAT: EXACT_FLOAT, Kind.DOUBLE: EXACT_DOUBLE}.get(kind, 10**38)
    if not math.isfinite(value) or value != int(value) or abs(value) > exact:
        raise NotConvertibleError(f"{value!r} is no whole number, or too large to be exact")
    return int(value)


def _whole_of_text(text: str) -> int:
    if not re.match(WHOLE_TEXT, text):
        raise NotConvertibleError(f"{text!r} is no whole number")
    return int(text.strip().partition(".")[0])


def _floating(value: Any, wanted: str) -> float:
    if isinstance(value, str):
        if not re.match(NUMBER_TEXT, value):
            raise NotConvertibleError(f"{value!r} is no number")
        value = value.strip()
    number = float(value)
    rounded = pa.scalar(number, pa.float32()).as_py() if wanted == "float" else number
    if math.isinf(rounded) and not (isinstance(value, float) and math.isinf(value)):
        raise NotConvertibleError(f"{value!r} is out of range")
    return float(rounded)


def _attributes(value: Any, found: Found) -> dict[str, str] | None:
    if found.kind == Kind.TEXT:
        return attributes_of_json(value)
    entries = value.items() if isinstance(value, Mapping) else value
    types = {name: found["value"] for name, _ in entries} if found.kind == Kind.MAP else dict(found.parts)
    texts = {name: _attribute_text(part, types[name]) for name, part in entries}
    if is_kept(found, "map<string,string>"):
        return texts  # type: ignore[return-value]  # entries without a value stay in a map that needs no conversion
    return {name: text for name, text in texts.items() if text is not None}


def _attribute_text(value: Any, found: Found) -> str | None:
    """A value as text; a list is its items, joined by commas."""
    if value is None or found.kind == Kind.NOTHING:
        return None
    if found.kind == Kind.TEXT:
        return str(value)
    if found.kind == Kind.BOOLEAN:
        return "true" if value else "false"
    if found.kind == Kind.LIST:
        is_json = "item" not in dict(found.parts)
        types = [found_in_python(item) if is_json else found["item"] for item in value]
        if Kind.LIST in {type_.kind for type_ in types}:
            raise NotConvertibleError(f"{value!r} is a list of lists inside of attributes")
        items = [_attribute_text(item, type_) for item, type_ in zip(value, types, strict=True)]
        return ", ".join(item for item in items if item is not None)
    if found.kind not in NUMBERS:
        raise NotConvertibleError(f"{value!r} is an object inside of attributes")
    return _number_text(value, found.kind)


def _number_text(value: Any, kind: Kind) -> str | None:
    """Plain decimals, no zeros behind them; None for what is no number or too large."""
    if kind == Kind.WHOLE:
        return str(value)
    shortest = pa.scalar(value, pa.float32()).cast(pa.string()).as_py() if kind == Kind.FLOAT else str(value)
    number = Decimal(shortest)
    if not number.is_finite() or abs(number) >= LARGEST_ATTRIBUTE:
        return None
    with localcontext(prec=60):
        text = format(number.quantize(Decimal(1).scaleb(-NUM_DECIMALS), ROUND_HALF_UP), "f").rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def found_in_arrow(type_: pa.DataType) -> Found:
    """The type of a column of Arrow."""
    name, types = str(type_), pa.types
    if types.is_dictionary(type_):
        return Found(found_in_arrow(type_.value_type).kind, name)
    if types.is_map(type_):
        parts = (("key", found_in_arrow(type_.key_type)), ("value", found_in_arrow(type_.item_type)))
        return Found(Kind.MAP, name, parts)
    if types.is_struct(type_):
        return Found(Kind.OBJECT, name, tuple((field.name, found_in_arrow(field.type)) for field in type_))
    if types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_):
        return Found(Kind.LIST, name, (("item", found_in_arrow(type_.value_type)),))
    if types.is_decimal(type_):
        is_readable = type_.precision <= 38
        kind = Kind.OTHER if not is_readable else Kind.DECIMAL if type_.scale > 0 else Kind.WHOLE
        return Found(kind, name)
    if isinstance(type_, pa.BaseExtensionType):
        return Found(Kind.UUID if type_.extension_name == "arrow.uuid" else Kind.OTHER, name)
    for is_kind, kind in _ARROW_KINDS:
        if is_kind(type_):
            return Found(kind, name)
    return Found(Kind.OTHER, name)


_ARROW_KINDS = (
    (pa.types.is_string, Kind.TEXT),
    (pa.types.is_large_string, Kind.TEXT),
    (pa.types.is_string_view, Kind.TEXT),
    (pa.types.is_integer, Kind.WHOLE),
    (pa.types.is_float32, Kind.FLOAT),
    (pa.types.is_float64, Kind.DOUBLE),
    (pa.types.is_boolean, Kind.BOOLEAN),
    (pa.types.is_temporal, Kind.TIME),
    (pa.types.is_binary, Kind.BINARY),
    (pa.types.is_large_binary, Kind.BINARY),
    (pa.types.is_binary_view, Kind.BINARY),
    (pa.types.is_fixed_size_binary, Kind.BINARY),
    (pa.types.is_null, Kind.NOTHING),
)
