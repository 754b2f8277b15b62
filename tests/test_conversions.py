"""One table of conversions: what becomes of a value is the same in Spark, in DuckDB and in Python."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from csrm.config import InputSpec
from csrm.conversions import (
    JSON,
    Found,
    Kind,
    NotConvertibleError,
    converted,
    found_in_arrow,
    problems_of_columns,
    refusal,
)
from csrm.schemas import CATALOG
from csrm.training.data import conversions as in_duckdb
from csrm.training.data.database import open_database

FAILS = "does not convert"

TEXT, INT8, INT64, UINT64 = pa.string(), pa.int8(), pa.int64(), pa.uint64()
FLOAT, DOUBLE, BOOLEAN = pa.float32(), pa.float64(), pa.bool_()
NAN = float("nan")
A_DAY = pa.date32()
OBJECT = (
    '{"Color": "red", "color": "blue", "n": 1.50, "e": 1e-5, "l": ["x", 1, 2.50, null, true], "t": true, "z": null}'
)
ENTRIES = {"Color": "red", "color": "blue", "n": "1.5", "e": "0.00001", "l": "x, 1, 2.5, true", "t": "true"}
JSON_TYPE = "json"
"""The values are written as JSON lines."""


CASES: list[tuple[Any, str, list[tuple[Any, Any]]]] = [
    # type that is found, type that is wanted, values with what becomes of them
    (TEXT, "string", [("2024-01-05", "2024-01-05"), ("1.0", "1.0"), (" x ", " x "), ("", ""), (None, None)]),
    (pa.large_string(), "string", [("x", "x")]),
    (pa.dictionary(pa.int32(), TEXT), "string", [("x", "x"), (None, None)]),
    (INT8, "string", [(-7, "-7"), (None, None)]),
    (INT64, "string", [(2**63 - 1, "9223372036854775807")]),
    (UINT64, "string", [(2**64 - 1, "18446744073709551615")]),
    (pa.decimal128(38, 0), "string", [(Decimal(10**37), "1" + 37 * "0"), (Decimal(-7), "-7")]),
    (pa.decimal128(10, 2), "string", [(Decimal("7.00"), "7"), (Decimal("7.50"), FAILS), (Decimal("-0.00"), "0")]),
    (DOUBLE, "string", [(7.0, "7"), (-0.0, "0"), (2.0**53, "9007199254740992"), (2.0**53 + 2, FAILS), (1.5, FAILS)]),
    (DOUBLE, "string", [(NAN, FAILS), (float("inf"), FAILS), (None, None)]),
    (FLOAT, "string", [(7.0, "7"), (2.0**24, "16777216"), (2.0**24 + 2, FAILS), (0.5, FAILS)]),
    (pa.null(), "string", [(None, None)]),
    (TEXT, "bigint", [("12", 12), (" 12 ", 12), ("+5", 5), ("-3.00", -3), ("007", 7), ("3.", 3), (None, None)]),
    (
        TEXT,
        "bigint",
        [("1.5", FAILS), ("1e3", FAILS), ("1_000", FAILS), ("", FAILS), ("x", FAILS), (str(2**63), FAILS)],
    ),
    (UINT64, "bigint", [(2**63 - 1, 2**63 - 1), (2**63, FAILS)]),
    (INT64, "int", [(2**31 - 1, 2**31 - 1), (2**31, FAILS), (-(2**31), -(2**31))]),
    (DOUBLE, "bigint", [(3.0, 3), (3.5, FAILS), (1e300, FAILS), (NAN, FAILS)]),
    (DOUBLE, "int", [(3.0, 3), (2.0**31, FAILS)]),
    (pa.decimal128(20, 2), "int", [(Decimal("3.00"), 3), (Decimal("3.01"), FAILS), (Decimal(2**31), FAILS)]),
    (TEXT, "double", [("0.5", 0.5), (" 1e3 ", 1000.0), (".5", 0.5), ("1d", FAILS), ("NaN", FAILS), ("1e400", FAILS)]),
    (INT64, "double", [(3, 3.0)]),
    (FLOAT, "double", [(0.5, 0.5)]),
    (pa.decimal128(10, 2), "double", [(Decimal("0.25"), 0.25)]),
    (DOUBLE, "float", [(0.1, 0.10000000149011612), (1e39, FAILS)]),
    (TEXT, "float", [("0.5", 0.5), ("1e39", FAILS)]),
    (
        pa.map_(TEXT, TEXT),
        "map<string,string>",
        [([("Color", "a"), ("color", "b"), ("z", None)], {"Color": "a", "color": "b", "z": None}), (None, None)],
    ),
    (pa.map_(TEXT, INT64), "map<string,string>", [([("n", 7), ("z", None)], {"n": "7"})]),
    (
        pa.map_(TEXT, DOUBLE),
        "map<string,string>",
        [
            (
                [("a", 1.5), ("b", 1e-5), ("c", 12345678.5), ("d", 1e22), ("e", NAN), ("f", -0.0), ("g", 7.0)],
                {"a": "1.5", "b": "0.00001", "c": "12345678.5", "f": "0", "g": "7"},
            )
        ],
    ),
    (pa.map_(TEXT, FLOAT), "map<string,string>", [([("a", 0.1), ("b", 2.0)], {"a": "0.1", "b": "2"})]),
    (
        pa.map_(TEXT, pa.decimal128(10, 2)),
        "map<string,string>",
        [([("a", Decimal("1.50")), ("b", Decimal("20.00"))], {"a": "1.5", "b": "20"})],
    ),
    (
        pa.map_(TEXT, pa.list_(TEXT)),
        "map<string,string>",
        [([("a", ["x", None, "y"]), ("b", []), ("c", None)], {"a": "x, y", "b": ""})],
    ),
    (
        pa.struct([("color", TEXT), ("size", DOUBLE), ("new", BOOLEAN), ("tags", pa.list_(INT64)), ("it's", TEXT)]),
        "map<string,string>",
        [
            (
                {"color": "red", "size": 42.0, "new": True, "tags": [1, 2], "it's": None},
                {"color": "red", "size": "42", "new": "true", "tags": "1, 2"},
            ),
            (None, None),
        ],
    ),
    (
        TEXT,
        "map<string,string>",
        [(OBJECT, ENTRIES), ("{}", {}), ("", None), ("  ", None), ("null", None), (None, None)],
    ),
    (
        TEXT,
        "map<string,string>",
        [
            ("red", FAILS),
            ("[1]", FAILS),
            ("7", FAILS),
            ("{'color': 'red'}", FAILS),
            ('{"a": 1, "a": 2}', FAILS),
            ('{"a": {"b": 1}}', FAILS),
            ('{"a": [[1]]}', FAILS),
        ],
    ),
    (
        JSON_TYPE,
        "string",
        [
            ('"2024-01-05"', "2024-01-05"),
            ('"1.0"', "1.0"),
            ("7", "7"),
            ("7.0", "7"),
            ("12345678901234567890123", "12345678901234567890123"),
            ("1e3", "1000"),
            ("null", None),
            ('"caf\\u00e9\\n"', "café\n"),
        ],
    ),
    (JSON_TYPE, "string", [("1.5", FAILS), ("true", FAILS), ("{}", FAILS), ('["x"]', FAILS), ("1e30", FAILS)]),
    (
        JSON_TYPE,
        "bigint",
        [
            ("7", 7),
            ("7.0", 7),
            ('"7"', 7),
            ("7.5", FAILS),
            ("true", FAILS),
            ('"x"', FAILS),
            ("null", None),
            ("9223372036854775808", FAILS),
        ],
    ),
    (JSON_TYPE, "int", [("2147483648", FAILS), ("-1", -1)]),
    (JSON_TYPE, "double", [("7", 7.0), ("0.5", 0.5), ('"0.5"', 0.5), ("1e-3", 0.001), ("true", FAILS), ('"x"', FAILS)]),
    (
        JSON_TYPE,
        "map<string,string>",
        [(OBJECT, ENTRIES), ("{}", {}), ("null", None), (json.dumps(OBJECT), ENTRIES), ('""', None)],
    ),
    (
        JSON_TYPE,
        "map<string,string>",
        [("[1]", FAILS), ("7", FAILS), ('"red"', FAILS), ('{"a": {"b": 1}}', FAILS), ('{"a": [{"b": 1}]}', FAILS)],
    ),
]


REFUSED: list[tuple[pa.DataType, str, str]] = [
    (BOOLEAN, "string", r"expected string, got bool\w*\. Write it as text, for example yes and no"),
    (pa.binary(), "string", r"expected string, got binary\. Cast it to text .*binaryAsString: 'true'"),
    (A_DAY, "string", r"expected string, got date\S*\. Cast it to text where it is written"),
    (pa.timestamp("us"), "string", r"expected string, got timestamp\S*\. Cast it to text"),
    (pa.list_(pa.int32()), "string", r"expected string, got (array|list)<.*>\. Cast it to text"),
    (BOOLEAN, "bigint", r"expected bigint, got bool"),
    (A_DAY, "double", r"expected double, got date"),
    (
        INT64,
        "map<string,string>",
        r"expected map<string,string>, got (bigint|int64)\. Write a map of text, or JSON text",
    ),
    (pa.list_(TEXT), "map<string,string>", r"Write a map of text, or JSON text"),
    (pa.map_(INT64, TEXT), "map<string,string>", r"its names: expected string, got (bigint|int64)"),
    (pa.map_(TEXT, A_DAY), "map<string,string>", r"its values: expected text, numbers, .* got date"),
    (pa.struct([("day", A_DAY)]), "map<string,string>", r"its field 'day': expected text, numbers, .* got date"),
    (pa.struct([("a", pa.struct([("b", TEXT)]))]), "map<string,string>", r"its field 'a': expected text"),
    (
        pa.struct([("Color", TEXT), ("color", TEXT)]),
        "map<string,string>",
        r"fields \['Color', 'color'\] differ in case",
    ),
]


FLAT = [(found, wanted, value, expected) for found, wanted, values in CASES for value, expected in values]
IDS = [f"{found} {value!s:.30} to {wanted}" for found, wanted, value, _ in FLAT]


def as_found(type_: Any) -> Found:
    return JSON if type_ == JSON_TYPE else found_in_arrow(type_)


@pytest.mark.parametrize(("type_", "wanted", "value", "expected"), FLAT, ids=IDS)
def test_in_python(type_: Any, wanted: str, value: Any, expected: Any) -> None:
    if type_ == JSON_TYPE:
        value = json.loads(value, parse_float=lambda text: float(text) if "e" in text else Decimal(text))
    else:
        value = pa.array([value], type_)[0].as_py()
    if expected == FAILS:
        with pytest.raises(NotConvertibleError):
            converted(value, as_found(type_), wanted)
    else:
        assert converted(value, as_found(type_), wanted) == expected


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with open_database(str(tmp_path_factory.mktemp("conversions"))) as database:
        yield database


@pytest.mark.parametrize(("type_", "wanted", "value", "expected"), FLAT, ids=IDS)
def test_in_duckdb(database: duckdb.DuckDBPyConnection, type_: Any, wanted: str, value: Any, expected: Any) -> None:
    if type_ == JSON_TYPE:
        rows, source = pa.table({"value": [value]}), "CASE WHEN json_type(value) <> 'NULL' THEN value::JSON END"
    else:
        column = pa.array([value], type_)
        rows, source = pa.table({"value": column.cast(in_duckdb.as_bytes(type_))}), "value"
    database.register("rows", rows)
    result = in_duckdb.converted("source", as_found(type_), wanted)
    ((found,),) = database.execute(f"SELECT {result} FROM (SELECT {source} AS source FROM rows)").fetchall()
    assert found == (None if expected == FAILS else expected)


@pytest.mark.spark
def test_in_spark(spark: Any, tmp_path: Path) -> None:
    from pyspark.sql import functions as F

    from csrm.spark import conversions as in_spark

    wrong = []
    for number, (type_, wanted, values) in enumerate(CASES):
        if type_ == JSON_TYPE:
            texts_df = spark.createDataFrame([(n, value) for n, (value, _) in enumerate(values)], "n int, value string")
            parsed_df = texts_df.withColumn("value", F.parse_json("value"))
            source_df = parsed_df.withColumn("value", F.when(~in_spark.is_json_null(F.col("value")), F.col("value")))
            found = JSON
        else:
            column = pa.array([value for value, _ in values], type_)
            pq.write_table(pa.table({"n": range(len(values)), "value": column}), tmp_path / f"{number}.parquet")
            source_df = spark.read.parquet(str(tmp_path / f"{number}.parquet"))
            found = in_spark.found_in_spark(source_df.schema["value"].dataType)
            if type_ == pa.null():
                found = Found(Kind.NOTHING, "void")
        result = in_spark.converted(F.col("value"), found, wanted).alias("result")
        results = [row["result"] for row in source_df.orderBy("n").select(result).collect()]
        for (value, expected), result in zip(values, results, strict=True):
            if result != (None if expected == FAILS else expected):
                wrong.append((str(type_), wanted, value, expected, result))
    assert wrong == []


@pytest.mark.parametrize(("type_", "wanted", "why"), REFUSED, ids=[f"{case[0]} to {case[1]}" for case in REFUSED])
def test_types_that_never_convert_are_refused_with_a_way_out(type_: pa.DataType, wanted: str, why: str) -> None:
    import re

    from pyspark.sql.pandas.types import from_arrow_type

    from csrm.spark.conversions import found_in_spark

    for found in (found_in_arrow(type_), found_in_spark(from_arrow_type(type_))):
        assert re.search(why, refusal(found, wanted) or "")


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        (
            {"asin": "product_id"},
            "'columns' maps 'asin' to 'product_id', which is the wrong way round. Write CSRM's name first: columns: "
            "{product_id: asin}",
        ),
        ({"attribute": "specs"}, "'columns' maps 'attribute', which is no column of catalog. Is it attributes?"),
    ],
)
def test_a_map_of_columns_that_is_wrong_says_how_it_is_right(columns: dict[str, str], problem: str) -> None:
    spec = InputSpec(path="x", columns=columns)
    present = ["market", "product_id", "title", "asin"]
    assert problems_of_columns(CATALOG, spec, present, [{}])[0] == problem
