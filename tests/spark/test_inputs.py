"""Input tables: mapping, conversion, and every problem in one message."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from csrm.config import InputSpec
from csrm.errors import InputError
from csrm.schemas import BEHAVIOUR, CANDIDATES, CATALOG, QUERIES
from csrm.spark.inputs import read_input

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
        f"input behaviour at {bad!r} (csv): 1 problem:\n  - column count: 2 of 3 values are no bigint"
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
        "  - column 'title' for title: expected string, got array<int>",
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


def test_an_unknown_format_and_a_broken_file_are_input_errors(spark: SparkSession, tmp_path: Path) -> None:
    path = write_text(tmp_path / "catalog.parquet", "this is no parquet file")

    with pytest.raises(InputError, match="Are the path and the format right"):
        read_input(spark, CATALOG, InputSpec(path=path, format="parkett"))
    with pytest.raises(InputError, match="cannot be read"):
        read_input(spark, CATALOG, InputSpec(path=path, format="parquet"))


def test_an_empty_table_passes(spark: SparkSession, tmp_path: Path) -> None:
    path = write_text(tmp_path / "candidates.csv", "market,query_id,product_id\n")

    assert read_input(spark, CANDIDATES, csv_spec(path)).df.count() == 0
