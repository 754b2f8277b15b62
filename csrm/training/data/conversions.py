"""The table of conversions of csrm/conversions.py as SQL of DuckDB.

Text of Arrow arrives as bytes: what is no UTF-8 in it becomes U+FFFD, as in Spark's reader, where DuckDB would fail.
"""

import pyarrow as pa

from csrm.conversions import (
    BLANK_TEXT,
    EXACT_DOUBLE,
    EXACT_FLOAT,
    LARGEST_ATTRIBUTE,
    NUM_DECIMALS,
    NUMBER_TEXT,
    RANGES,
    WHOLE_TEXT,
    Found,
    Kind,
    found_in_arrow,
)

MACROS = rf"""
    CREATE MACRO text_of_bytes(bytes) AS coalesce(try(decode(bytes)), text_with_replacements(bytes));
    CREATE MACRO is_json_scalar(json) AS coalesce(json_type(json) NOT IN ('OBJECT', 'ARRAY'), true);
    CREATE MACRO without_zeros(digits) AS
        CASE WHEN digits = '-0' THEN '0' ELSE regexp_replace(digits, '^-0$', '0') END;
    CREATE MACRO decimals(number) AS CASE WHEN abs(number) < {LARGEST_ATTRIBUTE}::DOUBLE THEN without_zeros(
        regexp_replace(try_cast(try_cast(number AS VARCHAR) AS DECIMAL(38, {NUM_DECIMALS}))::VARCHAR, '\.?0+$', '')
    ) END;
    CREATE MACRO whole(number, exact) AS
        CASE WHEN abs(number) <= exact AND number = trunc(number) THEN try_cast(number AS BIGINT) END;
    CREATE MACRO whole_digits(text) AS CASE WHEN regexp_matches(text, '^-?[0-9]+(\.0*)?$')
        THEN without_zeros(regexp_replace(text, '\.0*$', '')) END;
    CREATE MACRO whole_of_text(text) AS
        CASE WHEN regexp_matches(text, '{WHOLE_TEXT}') THEN regexp_extract(text, '[+-]?[0-9]+') END;
    CREATE MACRO double_of_text(text) AS CASE WHEN regexp_matches(text, '{NUMBER_TEXT}')
        THEN try_cast(trim(text, chr(9) || chr(10) || chr(13) || ' ') AS DOUBLE) END;
    CREATE MACRO in_range(number) AS CASE WHEN NOT isinf(number) THEN number END;
    CREATE MACRO json_is_number(json) AS
        coalesce(json_type(json) IN ('BIGINT', 'UBIGINT', 'HUGEINT', 'DOUBLE', 'DECIMAL'), false);
    CREATE MACRO json_whole(json) AS CASE WHEN json_is_number(json) AND (
        json_type(json) <> 'DOUBLE' OR length(json->>'$') <= 38 AND (
            NOT contains(json->>'$', '.') OR abs(try_cast(json->>'$' AS DOUBLE)) <= {EXACT_DOUBLE}
        )
    ) THEN whole_digits(json->>'$') END;
    CREATE MACRO json_text(json) AS
        CASE WHEN json_type(json) = 'VARCHAR' THEN json->>'$' ELSE json_whole(json) END;
    CREATE MACRO json_scalar_text(json) AS CASE
        WHEN json_type(json) IN ('VARCHAR', 'BOOLEAN') THEN json->>'$'
        WHEN json_is_number(json) THEN coalesce(json_whole(json), decimals(try_cast(json->>'$' AS DOUBLE)))
    END;
    CREATE MACRO joined(texts) AS
        CASE WHEN texts IS NOT NULL THEN array_to_string(list_filter(texts, lambda text: text IS NOT NULL), ', ') END;
    CREATE MACRO json_attribute_text(json) AS CASE WHEN json_type(json) = 'ARRAY'
        THEN joined(list_transform(json::JSON[], lambda item: json_scalar_text(item))) ELSE json_scalar_text(json) END;
    CREATE MACRO is_json_flat(json) AS CASE WHEN json_type(json) = 'ARRAY'
        THEN len(list_filter(json::JSON[], lambda item: NOT is_json_scalar(item))) = 0 ELSE is_json_scalar(json) END;
    CREATE MACRO with_text(entries) AS
        try(map_from_entries(list_filter(entries, lambda entry: entry.text IS NOT NULL)));
    CREATE MACRO json_entries(json) AS
        CASE WHEN json_type(json) = 'OBJECT' THEN map_entries(try_cast(json AS MAP(VARCHAR, JSON))) END;
    CREATE MACRO json_attributes(json) AS
        CASE WHEN len(list_filter(json_entries(json), lambda entry: NOT is_json_flat(entry.value))) = 0
        THEN with_text(list_transform(
            json_entries(json), lambda entry: {{'name': entry.key, 'text': json_attribute_text(entry.value)}}
        )) END;
    CREATE MACRO attributes_of_text(text) AS
        CASE WHEN NOT regexp_matches(text, '{BLANK_TEXT}') THEN json_attributes(try_cast(text AS JSON)) END;
"""
"""Functions that the conversions call. `text_with_replacements` is one of Python's, see open_database."""


def text_with_replacements(text: bytes) -> str:
    """Text whose bytes are no UTF-8 in some places, which become U+FFFD."""
    return text.decode(errors="replace")


def sql_type(wanted: str) -> str:
    """A declared type in DuckDB."""
    return {"string": "VARCHAR", "map<string,string>": "MAP(VARCHAR, VARCHAR)"}.get(wanted, wanted.upper())


def as_bytes(type_: pa.DataType) -> pa.DataType:
    """A type of Arrow with bytes for all text, which DuckDB takes whatever they are."""
    types = pa.types
    if types.is_map(type_):
        return pa.map_(as_bytes(type_.key_type), as_bytes(type_.item_type))
    if types.is_struct(type_):
        return pa.struct([field.with_type(as_bytes(field.type)) for field in type_])
    if types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_):
        return pa.list_(as_bytes(type_.value_type))
    return pa.binary() if found_in_arrow(type_).kind == Kind.TEXT else type_


def converted(value: str, found: Found, wanted: str) -> str:
    """SQL of what becomes of a column's values; null where one does not convert.

    Args:
        value: SQL of the column, of a type that csrm.conversions.refusal lets pass; its text is bytes, see as_bytes.
        found: its type.
        wanted: the declared type.
    """
    if found.kind == Kind.NOTHING:
        return f"NULL::{sql_type(wanted)}"
    if wanted == "string":
        return _text(value, found.kind)
    if wanted in RANGES:
        return f"try_cast({_whole(value, found.kind)} AS {sql_type(wanted)})"
    if wanted in ("float", "double"):
        return _floating(value, found.kind, wanted)
    return _attributes(value, found)


def _text(value: str, kind: Kind) -> str:
    if kind == Kind.JSON:
        return f"json_text({value})"
    if kind == Kind.TEXT:
        return f"text_of_bytes({value})"
    return f"{_whole(value, kind)}::VARCHAR"


def _whole(value: str, kind: Kind) -> str:
    if kind == Kind.JSON:
        return (
            f"CASE WHEN json_type({value}) = 'VARCHAR' THEN whole_of_text({value}->>'$') ELSE json_whole({value}) END"
        )
    if kind == Kind.TEXT:
        return f"whole_of_text(text_of_bytes({value}))"
    if kind == Kind.DECIMAL:
        return f"whole_digits({value}::VARCHAR)"
    if kind in (Kind.FLOAT, Kind.DOUBLE):
        return f"whole({value}, {EXACT_FLOAT if kind == Kind.FLOAT else EXACT_DOUBLE})"
    return value


def _floating(value: str, kind: Kind, wanted: str) -> str:
    if kind == Kind.JSON:
        number = f"CASE WHEN json_is_number({value}) THEN try_cast({value}->>'$' AS DOUBLE) END"
        number = f"CASE WHEN json_type({value}) = 'VARCHAR' THEN double_of_text({value}->>'$') ELSE {number} END"
    elif kind == Kind.TEXT:
        number = f"double_of_text(text_of_bytes({value}))"
    else:
        number = f"{value}::DOUBLE"
    rounded = f"in_range(try_cast({number} AS {wanted.upper()}))"
    if kind in (Kind.FLOAT, Kind.DOUBLE):  # what is no finite number stays as it is
        return f"CASE WHEN isfinite({value}) THEN {rounded} ELSE {value}::{wanted.upper()} END"
    return rounded


def _attributes(value: str, found: Found) -> str:
    if found.kind == Kind.JSON:
        text = f"attributes_of_text({value}->>'$')"
        return f"CASE WHEN json_type({value}) = 'VARCHAR' THEN {text} ELSE json_attributes({value}) END"
    if found.kind == Kind.TEXT:
        return f"attributes_of_text(text_of_bytes({value}))"
    if found.kind == Kind.MAP:
        is_named = "try(decode(entry.key)) IS NOT NULL"
        entries = f"list_filter(map_entries({value}), lambda entry: {is_named})"
        text = _attribute_text("entry.value", found["value"])
        texts = f"list_transform({entries}, lambda entry: {{'name': decode(entry.key), 'text': {text}}})"
        return f"try(map_from_entries({texts}))" if found["value"].kind == Kind.TEXT else f"with_text({texts})"
    fields = [
        f"{{'name': {_literal(name)}, 'text': {_attribute_text(f'struct_extract({value}, {_literal(name)})', part)}}}"
        for name, part in found.parts
    ]
    return f"CASE WHEN {value} IS NOT NULL THEN with_text([{', '.join(fields)}]) END"


def _attribute_text(value: str, found: Found) -> str:
    """A value as text; a list is its items, joined by commas."""
    if found.kind == Kind.NOTHING:
        return "NULL::VARCHAR"
    if found.kind == Kind.LIST:
        return f"joined(list_transform({value}, lambda item: {_attribute_text('item', found['item'])}))"
    if found.kind == Kind.TEXT:
        return f"text_of_bytes({value})"
    if found.kind in (Kind.BOOLEAN, Kind.WHOLE):
        return f"{value}::VARCHAR"
    if found.kind == Kind.DECIMAL:
        return f"coalesce(whole_digits({value}::VARCHAR), decimals({value}::DOUBLE))"
    return f"decimals({value})"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
