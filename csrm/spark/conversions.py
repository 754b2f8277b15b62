"""The table of conversions of csrm/conversions.py as Spark expressions."""

from collections.abc import Callable

from pyspark.sql import Column
from pyspark.sql import functions as F
from pyspark.sql.types import (
    ArrayType,
    BinaryType,
    BooleanType,
    ByteType,
    DataType,
    DateType,
    DecimalType,
    DoubleType,
    FloatType,
    IntegerType,
    LongType,
    MapType,
    NullType,
    ShortType,
    StringType,
    StructType,
    TimestampNTZType,
    TimestampType,
    TimeType,
    VariantType,
)

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
    is_kept,
)

_KINDS: tuple[tuple[type[DataType] | tuple[type[DataType], ...], Kind], ...] = (
    (StringType, Kind.TEXT),
    ((ByteType, ShortType, IntegerType, LongType), Kind.WHOLE),
    (FloatType, Kind.FLOAT),
    (DoubleType, Kind.DOUBLE),
    (BooleanType, Kind.BOOLEAN),
    ((DateType, TimestampType, TimestampNTZType, TimeType), Kind.TIME),
    (BinaryType, Kind.BINARY),
    (VariantType, Kind.JSON),
    (NullType, Kind.NOTHING),
)


def found_in_spark(type_: DataType) -> Found:
    """The type of a column of Spark."""
    name = type_.simpleString()
    if isinstance(type_, MapType):
        parts = (("key", found_in_spark(type_.keyType)), ("value", found_in_spark(type_.valueType)))
        return Found(Kind.MAP, name, parts)
    if isinstance(type_, StructType):
        return Found(Kind.OBJECT, name, tuple((field.name, found_in_spark(field.dataType)) for field in type_))
    if isinstance(type_, ArrayType):
        return Found(Kind.LIST, name, (("item", found_in_spark(type_.elementType)),))
    if isinstance(type_, DecimalType):
        return Found(Kind.DECIMAL if type_.scale > 0 else Kind.WHOLE, name)
    for types, kind in _KINDS:
        if isinstance(type_, types):
            return Found(kind, name)
    return Found(Kind.OTHER, name)


def converted(value: Column, found: Found, wanted: str) -> Column:
    """What becomes of a column's values; null where one does not convert.

    Args:
        value: the column, of a type that csrm.conversions.refusal lets pass; of JSON, a variant, null for JSON's null.
        found: its type.
        wanted: the declared type.
    """
    if is_kept(found, wanted):
        return value
    if found.kind == Kind.NOTHING:
        return F.lit(None).cast(wanted)
    if wanted == "string":
        return _text(value, found.kind)
    if wanted in RANGES:
        return _whole(value, found.kind).try_cast(wanted)
    if wanted in ("float", "double"):
        return _floating(value, found.kind, wanted)
    return _attributes(value, found)


def _text(value: Column, kind: Kind) -> Column:
    if kind == Kind.JSON:
        return F.when(_json_type(value) == "STRING", _json_text(value)).otherwise(_json_whole(value))
    return _whole(value, kind).cast("string")


def _whole(value: Column, kind: Kind) -> Column:
    """A whole number, as bigint or decimal, or as the digits of one."""
    if kind == Kind.JSON:
        is_text = _json_type(value) == "STRING"
        return F.when(is_text, _whole(_json_text(value), Kind.TEXT)).otherwise(_json_whole(value))
    if kind == Kind.TEXT:
        return F.when(value.rlike(WHOLE_TEXT), F.regexp_extract(value, "([+-]?[0-9]+)", 1))
    if kind == Kind.DECIMAL:
        return F.when(value == F.floor(value), value.try_cast("decimal(38,0)"))
    if kind in (Kind.FLOAT, Kind.DOUBLE):
        exact = EXACT_FLOAT if kind == Kind.FLOAT else EXACT_DOUBLE
        return F.when((F.abs(value) <= exact) & (value == F.rint(value)), value.try_cast("bigint"))
    return value


def _floating(value: Column, kind: Kind, wanted: str) -> Column:
    if kind == Kind.JSON:
        type_ = _json_type(value)
        text = _floating(_json_text(value), Kind.TEXT, wanted)
        is_number = (type_ == "DOUBLE") | (type_ == "BIGINT") | type_.startswith("DECIMAL")
        return F.when(type_ == "STRING", text).otherwise(
            _in_range(F.when(is_number, F.try_variant_get(value, "$", "double")), wanted)
        )
    if kind == Kind.TEXT:
        return _in_range(
            F.when(value.rlike(NUMBER_TEXT), F.trim(F.translate(value, "\t\r\n", "   "))).try_cast("double"), wanted
        )
    if kind in (Kind.FLOAT, Kind.DOUBLE):
        number = value.cast(wanted)
        return F.when(F.isnan(value) | (F.abs(value) == float("inf")) | ~_is_infinite(number), number)
    return _in_range(value.cast("double"), wanted)


def _in_range(value: Column, wanted: str) -> Column:
    number = value.cast(wanted)
    return F.when(~_is_infinite(number), number)


def _is_infinite(number: Column) -> Column:
    return F.abs(number) == float("inf")


def _attributes(value: Column, found: Found) -> Column:
    if found.kind == Kind.JSON:
        text = _attributes(_json_text(value), Found(Kind.TEXT, "string"))
        return F.when(_json_type(value) == "STRING", text).otherwise(_json_attributes(value))
    if found.kind == Kind.TEXT:
        return F.when(~value.rlike(BLANK_TEXT), _json_attributes(F.try_parse_json(value)))
    if found.kind == Kind.MAP:
        texts = F.transform_values(value, lambda _, part: _attribute_text(part, found["value"]))
    else:
        names = [F.lit(name) for name, _ in found.parts]
        parts = [_attribute_text(value.getField(name), part).cast("string") for name, part in found.parts]
        texts = (
            F.map_from_arrays(F.array(*names), F.array(*parts)) if names else F.create_map().cast("map<string,string>")
        )
        texts = F.when(value.isNotNull(), texts)
    return F.map_filter(texts, lambda _, text: text.isNotNull())


def _attribute_text(value: Column, found: Found) -> Column:
    """A value as text; a list is its items, joined by commas."""
    if found.kind == Kind.NOTHING:
        return F.lit(None).cast("string")
    if found.kind == Kind.LIST:
        return F.array_join(F.transform(value, lambda item: _attribute_text(item, found["item"])), ", ")
    if found.kind in (Kind.TEXT, Kind.BOOLEAN, Kind.WHOLE):
        return value.cast("string")
    return _number_text(value, found.kind)


def _number_text(value: Column, kind: Kind) -> Column:
    """Plain decimals, no zeros behind them; null for what is no number or too large."""
    double = value.cast("string").try_cast("double") if kind == Kind.FLOAT else value.cast("double")
    digits = F.regexp_replace(F.format_string(f"%.{NUM_DECIMALS}f", double), r"\.?0+$", "")
    decimals = F.when(F.abs(double) < float(LARGEST_ATTRIBUTE), F.when(digits == "-0", "0").otherwise(digits))
    return F.coalesce(_text(value, kind), decimals) if kind == Kind.DECIMAL else decimals


def is_json_null(value: Column) -> Column:
    """Whether a value of JSON is null."""
    return F.coalesce(F.is_variant_null(value), F.lit(True))


def json_example(value: Column) -> Column:
    """A value of JSON as it is shown."""
    return F.to_json(value)


def _json_type(value: Column) -> Column:
    return F.schema_of_variant(value)


def _json_text(value: Column) -> Column:
    return F.try_variant_get(value, "$", "string")


def _json_whole(value: Column) -> Column:
    """The digits of a number of JSON that is whole."""
    type_ = _json_type(value)
    is_exact = (type_ == "BIGINT") | type_.startswith("DECIMAL")
    digits = F.when(is_exact & _json_text(value).rlike("^-?[0-9]+$"), _json_text(value))
    double = F.when(type_ == "DOUBLE", F.try_variant_get(value, "$", "double"))
    return F.coalesce(digits, _text(double, Kind.DOUBLE))


def _json_attributes(value: Column) -> Column:
    """The map that an object of JSON is read as; null where it is none, or has objects inside."""
    entries = F.try_variant_get(value, "$", "map<string,variant>")
    is_flat = F.forall(F.map_values(entries), lambda part: _json_parts(part, _is_json_scalar))
    texts = F.transform_values(entries, lambda _, part: _json_attribute_text(part))
    return F.when(is_flat, F.map_filter(texts, lambda _, text: text.isNotNull()))


def _json_parts(value: Column, holds: Callable[[Column], Column]) -> Column:
    items = F.try_variant_get(value, "$", "array<variant>")
    return F.when(items.isNotNull(), F.forall(items, holds)).otherwise(holds(value))


def _is_json_scalar(value: Column) -> Column:
    type_ = _json_type(value)
    return ~(type_.startswith("OBJECT") | type_.startswith("ARRAY"))


def _json_attribute_text(value: Column) -> Column:
    items = F.try_variant_get(value, "$", "array<variant>")
    joined = F.array_join(F.transform(items, _json_scalar_text), ", ")
    return F.when(items.isNotNull(), joined).otherwise(_json_scalar_text(value))


def _json_scalar_text(value: Column) -> Column:
    type_ = _json_type(value)
    double = F.when((type_ == "DOUBLE") | type_.startswith("DECIMAL"), F.try_variant_get(value, "$", "double"))
    is_number = (type_ == "BIGINT") | type_.startswith("DECIMAL") | (type_ == "DOUBLE")
    number = F.coalesce(_json_whole(value), _number_text(double, Kind.DOUBLE))
    return F.when(is_number, number).otherwise(_json_text(value))
