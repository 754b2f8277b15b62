"""Input tables: mapping, conversion, and every problem in one message."""

import datetime
import json
import logging
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession
from pyspark.sql.datasource import DataSource, DataSourceReader

from csrm.config import InputSpec
from csrm.errors import InputError
from csrm.schemas import BEHAVIOUR, CANDIDATES, CATALOG, JUDGMENTS, PARALLEL_TEXT, QUERIES
from csrm.spark.inputs import read_input, require_unchanged
from csrm.spark.storage import file_states

pytestmark = pytest.mark.spark


def write_text(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def csv_spec(path: str, **columns: str) -> InputSpec:
    return InputSpec(path=path, format="csv", options={"header": "true"}, columns=columns)


def test_columns_are_mapped_and_absent_optional_ones_become_null(spark: SparkSession, tmp_path: Path) -> None:
    spark.sql("SELECT 'kr' AS shop, 7L AS sku, '텐트' AS name, 1 AS unused").write.parquet(str(tmp_path / "catalog"))
    spec = InputSpec(
        path=str(tmp_path / "catalog"),
        format="parquet",
        columns={"market": "shop", "product_id": "sku", "title": "name"},
    )

    read = read_input(spark, CATALOG, spec)

    assert read.version is None
    assert read.df.collect() == [("kr", "7", "텐트", None, None, None, None)]
    assert read.df.schema["attributes"].dataType.simpleString() == "map<string,string>"


def test_a_table_without_a_market_is_of_the_one_that_the_settings_name(spark: SparkSession, tmp_path: Path) -> None:
    folder = str(tmp_path / "catalog")
    spark.sql("SELECT '1' AS product_id, 'tent' AS title").write.parquet(folder)
    spec = InputSpec(path=folder, format="parquet", market="o'us")
    assert read_input(spark, CATALOG, spec, ["o'us", "kr"]).df.select("market", "title").collect() == [("o'us", "tent")]
    assert read_input(spark, CATALOG, spec, ["kr"]).df.isEmpty()


def test_a_market_of_all_rows_and_one_of_each_row_are_refused(spark: SparkSession, tmp_path: Path) -> None:
    path = write_text(tmp_path / "queries.csv", "market,query_id,query\nkr,1,tent\n")
    spec = csv_spec(path).model_copy(update={"market": "us"})
    with pytest.raises(InputError, match="all rows are of 'us', and column 'market' says it of each row"):
        read_input(spark, QUERIES, spec)
    path = write_text(tmp_path / "texts.csv", "source_language,target_language\nko,en\n")
    spec = csv_spec(path).model_copy(update={"market": "us"})
    with pytest.raises(InputError, match="'market' is 'us', but parallel_text has no column market"):
        read_input(spark, PARALLEL_TEXT, spec)


def test_a_delta_input_is_pinned_to_its_version(spark: SparkSession, tmp_path: Path) -> None:
    path = str(tmp_path / "queries")
    spark.sql("SELECT 'kr' AS market, 'q1' AS query_id, 'a' AS query").write.format("delta").save(path)
    read = read_input(spark, QUERIES, InputSpec(path=path))
    spark.sql("SELECT 'kr' AS market, 'q2' AS query_id, 'b' AS query").write.format("delta").mode("append").save(path)

    assert read.version == 0
    assert [row["query_id"] for row in read.df.collect()] == ["q1"]


def test_text_becomes_numbers_and_values_that_are_none_are_counted(spark: SparkSession, tmp_path: Path) -> None:
    good = write_text(tmp_path / "good.csv", "market,query,product_id,count\nkr,a,1,12\n")
    bad = write_text(tmp_path / "bad.csv", "market,query,product_id,count\nkr,a,1,twelve\nkr,a,2,1.5\nkr,a,3,3\n")

    assert read_input(spark, BEHAVIOUR, csv_spec(good)).df.collect() == [("kr", "a", "1", 12)]
    with pytest.raises(InputError) as caught:
        read_input(spark, BEHAVIOUR, csv_spec(bad))

    assert str(caught.value) == (
        f"input behaviour at {bad!r} (csv): 1 problem:\n  - column 'count' for count: 2 of 3 values are no bigint, for "
        "example '1.5'. Whole numbers are expected, or text that is one."
    )


def test_attributes_are_read_from_objects_and_from_json_text(spark: SparkSession, tmp_path: Path) -> None:
    lines = '{"market":"kr","product_id":"1","attributes":{"color":"red"}}\n{"market":"kr","product_id":"2"}\n'
    objects = InputSpec(path=write_text(tmp_path / "catalog.json", lines), format="json")
    text = write_text(tmp_path / "catalog.tsv", 'market\tproduct_id\tattributes\nkr\t1\t{"color":"red"}\nkr\t2\t\n')
    texts = InputSpec(path=text, format="csv", options={"header": "true", "sep": "\t", "quote": ""})

    for spec in (objects, texts):
        rows = read_input(spark, CATALOG, spec).df.orderBy("product_id").collect()
        assert [row["attributes"] for row in rows] == [{"color": "red"}, None]


def test_bytes_that_are_no_utf8_are_replaced(spark: SparkSession, tmp_path: Path) -> None:
    rng = random.Random(0)
    pieces = [
        b"tent",
        "텐트 👩\u200d👧".encode(),
        b"\xff",
        b"\xed\xa0\x80",
        b"\xe2\x82",
        b"\xf0\x9f\x8f",
        b"\xc0\xaf",
        b"\x80",
    ]
    titles = [b"".join(rng.choices(pieces, k=5)) for _ in range(200)] + [bytes(rng.choices(range(256), k=20))]
    columns = {
        "market": pa.array([b"kr"] * len(titles)),
        "product_id": pa.array([b"%d \xff" % number for number in range(len(titles))]),
        "title": pa.array(titles),
        "attributes": pa.array(
            [[(b"color", b"\xff"), (b"\xff", b"red")]] * len(titles), pa.map_(pa.binary(), pa.binary())
        ),
    }
    path = tmp_path / "catalog.parquet"
    pq.write_table(pa.table(columns), path)
    # Bytes are written as such and read as text, as by systems that do not check what they write.
    source_df = spark.read.schema("market string, product_id string, title string, attributes map<string,string>")
    source_df.parquet(str(path)).write.parquet(str(tmp_path / "catalog"))

    read = read_input(spark, CATALOG, InputSpec(path=str(tmp_path / "catalog"), format="parquet")).df.toPandas()

    by_id = dict(zip(read["product_id"], read["title"], strict=True))
    expected = {f"{number} \ufffd": title.decode(errors="replace") for number, title in enumerate(titles)}
    assert by_id == expected
    assert read["attributes"].tolist() == [{"color": "\ufffd"}] * len(titles)


def test_all_problems_of_the_columns_come_in_one_message(spark: SparkSession, tmp_path: Path) -> None:
    path = str(tmp_path / "catalog")
    spark.sql("SELECT 'kr' AS market, array(1) AS title, 'x' AS brand").write.parquet(path)
    spec = InputSpec(path=path, format="parquet", columns={"category": "kind", "colour": "brand"})

    with pytest.raises(InputError) as caught:
        read_input(spark, CATALOG, spec)

    assert str(caught.value).splitlines() == [
        f"input catalog at {path!r} (parquet): 4 problems:",
        "  - 'columns' maps 'colour', which is no column of catalog; it has ['market', 'product_id', 'title', 'brand', "
        "'category', 'attributes', 'language']",
        "  - missing column 'product_id' for product_id; it has ['market', 'title', 'brand']. "
        "Name the right one under columns: {product_id: ...}",
        "  - column 'title' for title: expected string, got array<int>. Cast it to text where it is written, or leave "
        "the column out: columns: {title: null}.",
        "  - missing column 'kind' for category; it has ['market', 'title', 'brand']. "
        "Name the right one under columns: {category: ...}",
    ]


def test_all_problems_of_the_values_come_in_one_message(spark: SparkSession, tmp_path: Path) -> None:
    rows = "kr,a,1,5\nkr,a,1,5\nkr,a,1,6\nkr,b,2,\nkr,b,2,1\n,b,3,1\nkr,,3,1\n,,3,1\n"
    path = write_text(tmp_path / "behaviour.csv", "market,query,product_id,count\n" + rows)

    with pytest.raises(InputError) as caught:
        read_input(spark, BEHAVIOUR, csv_spec(path))

    assert str(caught.value).splitlines() == [
        f"input behaviour at {path!r} (csv): 4 problems:",
        "  - key column market is null in 2 of 8 rows",
        "  - key column query is null in 2 of 8 rows",
        "  - required column count is null in 1 of 8 rows",
        "  - 2 keys (market, query, product_id) are not unique, for example market='kr', query='a', product_id='1' "
        "(3 rows); market='kr', query='b', product_id='2' (2 rows)",
    ]


def test_labels_of_several_judges_are_refused_with_the_way_out(spark: SparkSession, tmp_path: Path) -> None:
    rows = "market,query_id,product_id,grade,judge\nkr,1,1,E,person\nkr,1,1,I,model\n"
    with pytest.raises(
        InputError, match=r"\(2 rows\)\. Labels of several judges are for training: name a table with one"
    ):
        read_input(spark, JUDGMENTS, csv_spec(write_text(tmp_path / "judgments.csv", rows)))


def test_only_the_markets_asked_for_are_read_and_checked(spark: SparkSession, tmp_path: Path) -> None:
    path = write_text(tmp_path / "candidates.csv", "market,query_id,product_id\nkr,1,1\ntw,1,1\ntw,1,1\n")

    assert read_input(spark, CANDIDATES, csv_spec(path), ["kr"]).df.count() == 1
    with pytest.raises(InputError, match="1 keys"):
        read_input(spark, CANDIDATES, csv_spec(path), ["kr", "tw"])


def test_rows_without_a_market_are_found_whatever_markets_are_asked_for(spark: SparkSession, tmp_path: Path) -> None:
    path = write_text(tmp_path / "candidates.csv", "market,query_id,product_id\nkr,1,1\n,1,1\n")

    with pytest.raises(InputError, match="key column market is null in 1 of 2 rows"):
        read_input(spark, CANDIDATES, csv_spec(path), ["kr"])


@pytest.mark.parametrize("format_", ["delta", "parquet", "csv"])
def test_a_path_that_does_not_exist_is_an_input_error(spark: SparkSession, tmp_path: Path, format_: str) -> None:
    with pytest.raises(InputError, match=r"nothing.*(found none|PATH_NOT_FOUND)"):
        read_input(spark, CATALOG, InputSpec(path=str(tmp_path / "nothing"), format=format_))


@pytest.mark.parametrize("format_", ["delta", "parquet", "csv", "json", "orc"])
def test_a_path_that_exists_as_it_is_written_is_no_pattern(spark: SparkSession, tmp_path: Path, format_: str) -> None:
    folder = tmp_path / "new [x] {a,b} st*r? 100%, 2" / "queries"
    row_df = spark.sql(r"SELECT 'kr' AS market, 'q1' AS query_id, 'tea\npot' AS query")
    row_df.write.format(format_).option("header", "true").save(str(folder))
    if format_ == "parquet":  # files of two layouts are read one by one
        spark.sql("SELECT 'kr' AS market, 2L AS query_id, 'pot' AS query").write.mode("append").parquet(str(folder))
    options = {"header": "true"} if format_ == "csv" else {}
    read = read_input(spark, QUERIES, InputSpec(path=str(folder), format=format_, options=options))
    assert ("kr", "q1", "tea\npot") in [tuple(row)[:3] for row in read.df.collect()]
    assert None not in file_states(spark, list(read.files)).values()


def test_a_path_that_does_not_exist_may_be_a_pattern(spark: SparkSession, tmp_path: Path) -> None:
    for day in ("monday", "tuesday", "other"):
        row_df = spark.sql(f"SELECT 'kr' AS market, '{day}' AS query_id, 'tea' AS query")
        row_df.write.parquet(str(tmp_path / day))
    read = read_input(spark, QUERIES, InputSpec(path=str(tmp_path / "{mon,tues}da[xy]"), format="parquet"))
    assert sorted(row["query_id"] for row in read.df.collect()) == ["monday", "tuesday"]


def test_an_unknown_format_and_a_broken_file_are_input_errors(spark: SparkSession, tmp_path: Path) -> None:
    path = write_text(tmp_path / "catalog.parquet", "this is no parquet file")

    with pytest.raises(InputError, match="Are the path and the format right"):
        read_input(spark, CATALOG, InputSpec(path=path, format="parkett"))
    with pytest.raises(InputError, match="cannot be read"):
        read_input(spark, CATALOG, InputSpec(path=path, format="parquet"))


def test_an_empty_table_passes(spark: SparkSession, tmp_path: Path) -> None:
    path = write_text(tmp_path / "candidates.csv", "market,query_id,product_id\n")

    assert read_input(spark, CANDIDATES, csv_spec(path)).df.count() == 0


def test_a_table_without_a_key_may_have_a_row_twice(spark: SparkSession, tmp_path: Path) -> None:
    text = '{"source_language": "ko", "target_language": "en", "source_text": "램프", "target_text": "lamp"}\n'
    spec = InputSpec(path=write_text(tmp_path / "parallel_text.json", text * 2), format="json")
    assert read_input(spark, PARALLEL_TEXT, spec).df.count() == 2
    spec = InputSpec(path=write_text(tmp_path / "nulls.json", '{"source_language": "ko"}\n'), format="json")
    with pytest.raises(InputError, match=r"column.* target_language"):
        read_input(spark, PARALLEL_TEXT, spec)


def parquet(folder: Path, **columns: Any) -> InputSpec:
    """A Parquet folder with one more file."""
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{len(list(folder.iterdir()))}.parquet")
    return InputSpec(path=str(folder), format="parquet")


def catalog_rows(spark: SparkSession, spec: InputSpec) -> list[tuple[Any, ...]]:
    """product_id, title, brand and attributes."""
    read_df = read_input(spark, CATALOG, spec).df
    return [
        tuple(row)
        for row in read_df.select("product_id", "title", "brand", "attributes").orderBy("product_id").collect()
    ]


def test_csv_may_have_line_breaks_and_doubled_quotes_in_quotes(spark: SparkSession, tmp_path: Path) -> None:
    text = (
        "\ufeffmarket,product_id,title,brand\r\n"
        'us,1,"Red tea\nloose leaf, 100 g",Acme\r\n'
        'us,2,"TV 55"" 4K, black",Acme\r\n'
        "\r\n"
        'us,3,TV 55" wide,\r\n'
    )
    spec = csv_spec(write_text(tmp_path / "catalog.csv", text))

    assert catalog_rows(spark, spec) == [
        ("1", "Red tea\nloose leaf, 100 g", "Acme", None),
        ("2", 'TV 55" 4K, black', "Acme", None),
        ("3", 'TV 55" wide', None, None),
    ]


def test_csv_rows_with_another_number_of_fields_are_a_problem_whatever_their_market(
    spark: SparkSession, tmp_path: Path
) -> None:
    text = 'market,product_id,title,brand\nus,1,"a\nb",Acme\nus,2,tea, Earl Grey,Acme\nxx,3\n'
    path = write_text(tmp_path / "catalog.csv", text)

    with pytest.raises(InputError) as caught:
        read_input(spark, CATALOG, csv_spec(path), ["us"])

    assert str(caught.value).splitlines()[1:] == [
        f"  - 2 rows have another number of fields than the header, which has 4, for example file://{path}, line 4: "
        "'us,2,tea, Earl Grey,Acme'. Put fields that hold a separator, a quote or a line break in quotes, and double "
        "the quotes inside."
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'us,1,tea,"Acme"\nus,2,"tea" green,Acme\nus,3,x,y\n',
            r"Unexpected character 'g' following .*\(line 3\)\. Put fields",
        ),
        (
            'us,1,"tea,Acme\nus,2,"cup",Acme\nus,3,x,y\n',
            r"Unescaped quote character .*\(line 3\)\. Put fields",
        ),
        (
            'us,1,tea,Acme\nus,2,TV,"55 inch\nus,3,x,y\n',
            r"the last quote of .*\.csv is never closed, so that one field holds",
        ),
        (
            'us,1,tea,Acme\nus,2,TV,"55 inch\nus,3,x,y',
            r"the last quote of .*\.csv is never closed, so that one field holds",
        ),
    ],
    ids=[
        "text behind a quoted field",
        "a quote in a later row",
        "a quote that is never closed",
        "no line break at the end",
    ],
)
def test_csv_with_a_stray_quote_is_a_problem_with_its_line(
    spark: SparkSession, tmp_path: Path, text: str, message: str
) -> None:
    path = write_text(tmp_path / "catalog.csv", "market,product_id,title,brand\n" + text)

    with pytest.raises(InputError, match=message):
        read_input(spark, CATALOG, csv_spec(path))


def test_the_last_field_of_csv_may_hold_line_breaks(spark: SparkSession, tmp_path: Path) -> None:
    text = 'market,product_id,title\nus,1,"tea\n"\nus,2,"""q""\n\n"\n\n'
    path = write_text(tmp_path / "catalog.csv", text)

    assert [row[1] for row in catalog_rows(spark, csv_spec(path))] == ["tea\n", '"q"\n\n']


def test_csv_files_with_other_headers_are_an_error(spark: SparkSession, tmp_path: Path) -> None:
    write_text(tmp_path / "1.csv", "market,product_id,title\nus,1,tea\n")
    write_text(tmp_path / "2.csv", "product_id,market,title\n2,us,tea\n")

    with pytest.raises(InputError, match="CSV header does not conform to the schema"):
        read_input(spark, CATALOG, csv_spec(str(tmp_path)))


@pytest.mark.parametrize(
    ("text", "options", "hint"),
    [
        ("market,product_id\nus,1\n", {}, r"no names were read.*\{header: 'true'\}"),
        ("market;product_id\nus;1\n", {"header": "true"}, r"only column is full of separators.*sep: \";\""),
        ("market\tproduct_id\nus\t1\n", {"header": "true"}, r"full of separators.*sep: \"\\t\""),
    ],
)
def test_csv_that_was_read_wrong_says_which_option_is_missing(
    spark: SparkSession, tmp_path: Path, text: str, options: dict[str, str], hint: str
) -> None:
    spec = InputSpec(path=write_text(tmp_path / "catalog.csv", text), format="csv", options=options)

    with pytest.raises(InputError, match=hint):
        read_input(spark, CATALOG, spec)


@pytest.mark.parametrize("format_", ["csv", "parquet"])
def test_replaced_bytes_are_counted_in_a_warning(
    spark: SparkSession, tmp_path: Path, caplog: pytest.LogCaptureFixture, format_: str
) -> None:
    if format_ == "csv":
        (tmp_path / "catalog.csv").write_bytes("market,product_id,title\nus,1,caf\xe9\nus,2,tea\n".encode("latin-1"))
        spec = csv_spec(str(tmp_path / "catalog.csv"))
    else:
        spec = parquet(tmp_path / "catalog", market=["us"] * 2, product_id=["1", "2"], title=[b"caf\xe9", b"tea"])
        spec = spec.model_copy(update={"options": {"binaryAsString": "true"}})

    with caplog.at_level(logging.WARNING):
        assert catalog_rows(spark, spec) == [("1", "caf\ufffd", None, None), ("2", "tea", None, None)]

    assert "were replaced by U+FFFD (column: values) in title: 1." in caplog.text


def test_parquet_files_with_other_columns_and_types_are_read_together(spark: SparkSession, tmp_path: Path) -> None:
    parquet(tmp_path / "catalog", market=["us"], product_id=["a1"], title=["tea"])
    parquet(tmp_path / "catalog", product_id=[2], market=["us"], brand=["Acme"], title=["tea"])
    spec = parquet(tmp_path / "catalog", market=["us"], product_id=[3.0], title=pa.nulls(1), brand=["Acme"])

    assert catalog_rows(spark, spec) == [
        ("2", "tea", "Acme", None),
        ("3", None, "Acme", None),
        ("a1", "tea", None, None),
    ]


def test_files_below_folders_that_name_a_column_are_read_together(spark: SparkSession, tmp_path: Path) -> None:
    """Folders keep their text: 01 is no number."""
    for market, columns in (("01", {"title": ["tea"]}), ("kr", {"brand": ["Acme"], "title": ["tea"]})):
        (tmp_path / "a b" / f"market={market}").mkdir(parents=True)
        pq.write_table(pa.table({"product_id": [1], **columns}), tmp_path / "a b" / f"market={market}" / "x y.parquet")
    spec = InputSpec(path=str(tmp_path / "a b"), format="parquet")

    read = read_input(spark, CATALOG, spec, ["01", "kr"])

    rows = read.df.select("market", "product_id", "title", "brand").orderBy("market").collect()
    assert rows == [("01", "1", "tea", None), ("kr", "1", "tea", "Acme")]
    assert len(read.files) == 2
    assert None not in read.files.values()


def test_columns_that_are_not_needed_are_not_read(spark: SparkSession, tmp_path: Path) -> None:
    spec = parquet(
        tmp_path / "catalog",
        market=["us"],
        product_id=["1"],
        title=["tea"],
        updated_at=pa.array([1], pa.timestamp("ns")),
        opens_at=pa.array([1], pa.time64("ns")),
        row_id=pa.array([b"a" * 16], pa.uuid()),
        score=pa.array([1], pa.float16()),
        price=pa.array([Decimal(1)], pa.decimal256(50, 2)),
        Size=["x"],
        size=["x"],
    )

    assert catalog_rows(spark, spec) == [("1", "tea", None, None)]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (pa.array([b"a" * 16], pa.uuid()), r"column 'product_id' for product_id: expected string, got UUID\. Cast it"),
        (pa.array([b"a"]), r"expected string, got binary\. Cast it to text .*options: \{binaryAsString: 'true'\}\.$"),
        (pa.array([1], pa.timestamp("ns")), r"expected string, got TIMESTAMP\(NANOS,false\)\. Cast it to text"),
        (pa.array([datetime.date(2024, 1, 5)]), r"expected string, got date\. Cast it to text"),
        (pa.array([True]), r"expected string, got boolean\. Write it as text"),
        (
            pa.array([1.5]),
            r"1 of 1 values are no string, for example '1\.5'\. Numbers become text where they are whole",
        ),
    ],
    ids=["uuid", "binary", "time", "date", "boolean", "fraction"],
)
def test_ids_that_are_no_text_are_refused_by_column_with_a_way_out(
    spark: SparkSession, tmp_path: Path, ids: pa.Array, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_input(spark, CATALOG, parquet(tmp_path / "catalog", market=["us"], product_id=ids))


def test_text_that_parquet_does_not_mark_is_read_as_text_where_the_options_say_so(
    spark: SparkSession, tmp_path: Path
) -> None:
    attributes = pa.array([[(b"color", b"red")]], pa.map_(pa.binary(), pa.binary()))
    columns = {"market": [b"us"], "product_id": [b"1"], "title": [b"tea"], "attributes": attributes}
    spec = parquet(tmp_path / "catalog", **columns).model_copy(update={"options": {"binaryAsString": "true"}})

    assert catalog_rows(spark, spec) == [("1", "tea", None, {"color": "red"})]


def test_ids_counts_and_grades_of_other_number_types_convert(spark: SparkSession, tmp_path: Path) -> None:
    ids = pa.array([Decimal(1234567)], pa.decimal128(38, 0))
    behaviour = parquet(tmp_path / "behaviour", market=["us"], query=["tea"], product_id=ids, count=[3.0])
    judgments = parquet(
        tmp_path / "judgments",
        market=["us"],
        query_id=pa.array([2**64 - 1], pa.uint64()),
        product_id=[1234567.0],
        grade=[1.0],
    )

    assert read_input(spark, BEHAVIOUR, behaviour).df.collect() == [("us", "tea", "1234567", 3)]
    (row,) = read_input(spark, JUDGMENTS, judgments).df.collect()
    assert row[:4] == ("us", "18446744073709551615", "1234567", "1")


def test_json_keeps_the_text_and_the_names_that_it_has(spark: SparkSession, tmp_path: Path) -> None:
    lines = [
        '{"market": "us", "product_id": "2024-01-05", "title": "2025-02-05T10:00:00Z"}',
        *(json.dumps({"market": "us", "product_id": str(n), "title": "x"}) for n in range(30_000, 30_003)),
        '{"market": "us", "product_id": "a", "attributes": {"Color": "red", "Assembly Required": "no"}}',
        '{"market": "us", "product_id": 7.0, "attributes": {"color": "blue"}, "brand": "Acme", "unused": {"x": 1}}',
        '{"market": "us", "product_id": 8, "attributes": "{\\"n\\": 1.50}", "title": null}',
    ]
    spec = InputSpec(path=write_text(tmp_path / "catalog.json", "\n".join(lines)), format="json")

    rows = catalog_rows(spark, spec)

    assert rows[0] == ("2024-01-05", "2025-02-05T10:00:00Z", None, None)
    assert rows[-3:] == [
        ("7", None, "Acme", {"color": "blue"}),
        ("8", None, None, {"n": "1.5"}),
        ("a", None, None, {"Color": "red", "Assembly Required": "no"}),
    ]


@pytest.mark.parametrize(
    "line",
    [
        '{"market": "us", "product_id": ',
        '{"market": "us", "product_id": "2", "market": "kr"}',
        '{"market": "us", "product_id": "2"} {"market": "us", "product_id": "3"}',
        '{"market": "us", "product_id": "2"}, {"market": "us", "product_id": "3"}',
        '[{"market": "us", "product_id": "2"}]',
        "{'market': 'us', 'product_id': '2'}",
        '{"market": "us", "product_id": "2", "title": NaN}',
    ],
)
def test_a_line_that_is_no_json_object_is_a_problem_with_its_place(
    spark: SparkSession, tmp_path: Path, line: str
) -> None:
    path = write_text(tmp_path / "catalog.json", '{"market": "us", "product_id": "1"}\n\n' + line + "\n")

    with pytest.raises(InputError, match=r"1 records are no JSON objects, for example .*\.json, line 3: .*multiLine"):
        read_input(spark, CATALOG, InputSpec(path=path, format="json"))


def test_bytes_of_json_that_are_no_utf8_are_replaced(
    spark: SparkSession, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = (
        b'\xef\xbb\xbf{"market": "us", "product_id": "1", "title": "caf\xe9"}\r\n{"market": "us", "product_id": "2"}'
    )
    (tmp_path / "catalog.json").write_bytes(lines)

    rows = catalog_rows(spark, InputSpec(path=str(tmp_path / "catalog.json"), format="json"))

    assert rows == [("1", "caf\ufffd", None, None), ("2", None, None, None)]
    assert "were replaced by U+FFFD (column: values) in title: 1." in caplog.text


def test_json_below_folders_that_name_a_column_and_with_odd_names(spark: SparkSession, tmp_path: Path) -> None:
    for market in ("01", "kr"):
        (tmp_path / f"market={market}").mkdir()
        record = {"id": 1, "the.title's": market, 'a "brand"': "Acme"}
        write_text(tmp_path / f"market={market}" / "x.json", json.dumps(record))
    columns = {"product_id": "id", "title": "the.title's", "brand": 'a "brand"'}
    read = read_input(spark, CATALOG, InputSpec(path=str(tmp_path), format="json", columns=columns), ["01"])

    assert [tuple(row[:4]) for row in read.df.collect()] == [("01", "1", "01", "Acme")]
    assert len(read.files) == 2


def test_a_file_of_several_json_objects_is_a_problem_where_it_is_to_be_one(spark: SparkSession, tmp_path: Path) -> None:
    """Spark's reader takes the first and leaves the others."""
    path = write_text(tmp_path / "catalog.json", '{"market": "us",\n"product_id": "1"}\n{"market": "us"}\n')

    with pytest.raises(
        InputError, match=r"1 records are no JSON objects, .*A file is one object, or one array of them"
    ):
        read_input(spark, CATALOG, InputSpec(path=path, format="json", options={"multiLine": "true"}))


def test_a_json_array_is_read_where_the_options_say_so(spark: SparkSession, tmp_path: Path) -> None:
    text = '[\n {"market": "us", "product_id": "1"},\n {"market": "us",\n "product_id": "2"}\n]\n'
    spec = InputSpec(path=write_text(tmp_path / "catalog.json", text), format="json", options={"multiLine": "true"})

    assert [row[0] for row in catalog_rows(spark, spec)] == ["1", "2"]


@pytest.mark.parametrize("format_", ["parquet", "json", "csv", "delta"])
def test_a_column_of_another_case_is_named(spark: SparkSession, tmp_path: Path, format_: str) -> None:
    path = str(tmp_path / "catalog")
    rows_df = spark.sql("SELECT 'us' AS market, '1' AS product_id, 'tea' AS TITLE, 'x' AS Brand")
    rows_df.write.format(format_).option("header", "true").save(path)
    spec = InputSpec(path=path, format=format_, options={"header": "true"} if format_ == "csv" else {})

    with pytest.raises(InputError) as caught:
        read_input(spark, CATALOG, spec)

    assert str(caught.value).splitlines()[1:] == [
        "  - missing column 'title' for title, but there is 'TITLE'. Map it: columns: {title: TITLE}, or leave the "
        "column out: columns: {title: null}.",
        "  - missing column 'brand' for brand, but there is 'Brand'. Map it: columns: {brand: Brand}, or leave the "
        "column out: columns: {brand: null}.",
    ]
    mapped = spec.model_copy(update={"columns": {"title": "TITLE", "brand": None}})
    assert catalog_rows(spark, mapped) == [("1", "tea", None, None)]


def test_columns_that_differ_in_case_alone_are_refused_where_they_are_needed(
    spark: SparkSession, tmp_path: Path
) -> None:
    parquet(tmp_path / "catalog", market=["us"], product_id=["1"], title=["tea"])
    spec = parquet(tmp_path / "catalog", market=["us"], product_id=["2"], Title=["tea"])

    with pytest.raises(InputError, match=r"columns \['title', 'Title'\] differ in case alone\. Rename or drop"):
        read_input(spark, CATALOG, spec)


def test_a_required_column_cannot_be_left_out(spark: SparkSession, tmp_path: Path) -> None:
    spec = parquet(tmp_path / "catalog", market=["us"], product_id=["1"])

    with pytest.raises(InputError, match="'columns' leaves product_id out, which is required"):
        read_input(spark, CATALOG, spec.model_copy(update={"columns": {"product_id": None}}))


def test_a_delta_input_is_read_at_the_version_that_its_options_name(spark: SparkSession, tmp_path: Path) -> None:
    path = str(tmp_path / "catalog")
    for title in ("old", "new"):
        rows_df = spark.createDataFrame([("tw", "p1", title)], "market string, product_id string, title string")
        rows_df.write.format("delta").mode("overwrite").save(path)

    found = {}
    for name, options in (("newest", {}), ("first", {"versionAsOf": "0"}), ("upper", {"VERSIONASOF": "0"})):
        read = read_input(spark, CATALOG, InputSpec(path=path, format="Delta", options=options))
        found[name] = (read.version, read.df.collect()[0]["title"])
    assert found == {"newest": (1, "new"), "first": (0, "old"), "upper": (0, "old")}

    for options in ({"timestampAsOf": "2026-11-01"}, {"versionAsOf": "yesterday"}, {"header": "true"}):
        with pytest.raises(InputError, match=r"expected no option of a Delta table but versionAsOf, a whole number"):
            read_input(spark, CATALOG, InputSpec(path=path, options=options))
    with pytest.raises(InputError, match=r"version 7 cannot be read.*The newest version is 1"):
        read_input(spark, CATALOG, InputSpec(path=path, options={"versionAsOf": "7"}))


def test_an_input_with_neither_versions_nor_files_must_have_the_same_rows_at_the_end(
    spark: SparkSession, tmp_path: Path
) -> None:
    class Rows(DataSource):
        """Rows of a file that is read anew each time, as a database is asked anew."""

        @classmethod
        def name(cls) -> str:
            return "rows"

        def schema(self) -> str:
            return "market string, product_id string, title string"

        def reader(self, schema: Any) -> DataSourceReader:
            return RowsReader(self.options["path"])

    class RowsReader(DataSourceReader):
        def __init__(self, path: str) -> None:
            self.path = path

        def read(self, partition: Any) -> Any:
            with open(self.path, encoding="utf-8") as file:
                yield from (tuple(line.split()) for line in file)

    path = tmp_path / "rows.txt"
    path.write_text("tw p1 tent\ntw p2 towel\n")
    spark.dataSource.register(Rows)
    read = read_input(spark, CATALOG, InputSpec(path=str(path), format="rows"))
    assert (read.version, read.files) == (None, {})

    path.write_text("tw p2 towel\ntw p1 tent\n")  # in another order
    require_unchanged(spark, {"catalog": read})
    path.write_text("tw p1 tent\ntw p2 bathrobe\n")
    with pytest.raises(InputError, match=r"input catalog at .*its rows were changed while the run read them"):
        require_unchanged(spark, {"catalog": read})


def test_a_blank_language_which_is_not_that_of_the_market_is_warned_of(
    spark: SparkSession, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "queries.json"
    rows = [{"market": "tw", "query_id": f"q{n}", "query": "x", "language": name} for n, name in enumerate(["", None])]
    path.write_text("\n".join(map(json.dumps, [*rows, {"market": "tw", "query_id": "q2", "query": "x"}])))

    with caplog.at_level(logging.WARNING):
        read_input(spark, QUERIES, InputSpec(path=str(path), format="json"))
    assert "column language is blank in 1 of 3 rows, whose prompts name no language. Write null" in caplog.text
