"""The reader of training: the same tables, types and conversions as Spark's, and nothing inferred from a sample."""

import datetime
import json
import tempfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import deltalake
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from csrm.config import InputSpec
from csrm.errors import InputError
from csrm.schemas import BEHAVIOUR, CATALOG, JUDGMENTS, QUERIES, Table
from csrm.training.data.database import add_table, language_of_query, open_database

MARKETS = {"us": "en"}


def rows(table: Table, spec: InputSpec, columns: str, markets: dict[str, str] = MARKETS) -> list[tuple[Any, ...]]:
    with tempfile.TemporaryDirectory() as folder, open_database(folder) as database:
        add_table(database, table, spec, markets)
        return database.execute(f"SELECT {columns} FROM {table.name} ORDER BY ALL").fetchall()


def catalog_rows(spec: InputSpec, markets: dict[str, str] = MARKETS) -> list[tuple[Any, ...]]:
    return rows(CATALOG, spec, "product_id, title, brand, attributes", markets)


def parquet(folder: Path, **columns: Any) -> InputSpec:
    """A Parquet folder with one more file."""
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{len(list(folder.iterdir()))}.parquet")
    return InputSpec(path=str(folder), format="parquet")


def json_lines(path: Path, *records: Any) -> InputSpec:
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return InputSpec(path=str(path), format="json")


def test_json_has_the_fields_of_all_its_lines(tmp_path: Path) -> None:
    """However late the first line is that has them."""
    early = [{"market": "us", "product_id": f"{n:06}", "title": "x" * 200} for n in range(8_000)]
    late = {"market": "us", "product_id": "late", "title": "tea", "brand": "Acme", "attributes": {"color": "red"}}
    spec = json_lines(tmp_path / "catalog.json", *early, late)

    assert catalog_rows(spec)[-1] == ("late", "tea", "Acme", {"color": "red"})
    assert len(catalog_rows(spec)) == 8_001


def test_json_keeps_the_text_and_the_names_that_it_has(tmp_path: Path) -> None:
    spec = json_lines(
        tmp_path / "catalog.json",
        {"market": "us", "product_id": "2024-01-05", "title": "2025-02-05T10:00:00Z"},
        "",
        {"market": "us", "product_id": "a", "attributes": {"Color": "red", "Assembly Required": "no"}},
        '{"market": "us", "product_id": 7.0, "attributes": {"color": "blue"}, "brand": "Acme", "unused": {"x": 1}}',
        '{"market": "us", "product_id": 8, "attributes": "{\\"n\\": 1.50}", "title": null}',
        {"market": "kr", "product_id": "b"},
    )

    assert catalog_rows(spec) == [
        ("2024-01-05", "2025-02-05T10:00:00Z", None, None),
        ("7", None, "Acme", {"color": "blue"}),
        ("8", None, None, {"n": "1.5"}),
        ("a", None, None, {"Color": "red", "Assembly Required": "no"}),
    ]


def test_lines_that_are_no_json_are_a_problem_with_an_example(tmp_path: Path) -> None:
    good = {"market": "us", "product_id": "1"}
    spec = json_lines(
        tmp_path / "catalog.json", good, "", '{"market": "us", "product_id": ', '{"market": "a", "market": "b"}', "[1]"
    )

    with pytest.raises(InputError, match=r"3 lines are no JSON objects, for example .*/catalog\.json, line \d: '"):
        catalog_rows(spec)


def test_json_below_folders_that_name_a_column(tmp_path: Path) -> None:
    for market in ("01", "kr"):
        (tmp_path / f"market={market}").mkdir()
        json_lines(tmp_path / f"market={market}" / "x.json", {"product_id": "1", "title": market})
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "market=kr" / "empty.json").touch()

    spec = InputSpec(path=str(tmp_path), format="json")
    assert catalog_rows(spec, {"01": "en"}) == [("1", "01", None, None)]
    assert len(catalog_rows(spec, {"01": "en", "kr": "ko"})) == 2


def test_parquet_files_with_other_columns_and_types_are_read_together(tmp_path: Path) -> None:
    parquet(tmp_path / "catalog", market=["us"], product_id=["a1"], title=["tea"])
    parquet(tmp_path / "catalog", product_id=[2], market=["us"], brand=["Acme"], title=["tea"])
    spec = parquet(tmp_path / "catalog", market=["us"], product_id=[3.0], title=pa.nulls(1), brand=["Acme"])

    assert catalog_rows(spec) == [("2", "tea", "Acme", None), ("3", None, "Acme", None), ("a1", "tea", None, None)]


def test_columns_that_are_not_needed_are_not_read(tmp_path: Path) -> None:
    spec = parquet(
        tmp_path / "catalog",
        market=["us"],
        product_id=["1"],
        title=["tea"],
        updated_at=pa.array([1], pa.timestamp("ns")),
        row_id=pa.array([b"a" * 16], pa.uuid()),
        score=pa.array([1], pa.float16()),
        price=pa.array([Decimal(1)], pa.decimal256(50, 2)),
        Size=["x"],
        size=["x"],
    )

    assert catalog_rows(spec) == [("1", "tea", None, None)]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (pa.array([b"a" * 16], pa.uuid()), r"'product_id' for product_id: expected string, got .*uuid.*\. Cast it"),
        (pa.array([b"a"]), r"expected string, got binary\. Cast it to text .*options: \{binaryAsString: 'true'\}\.$"),
        (pa.array([1], pa.timestamp("ns")), r"expected string, got timestamp\[ns\]\. Cast it to text"),
        (pa.array([datetime.date(2024, 1, 5)]), r"expected string, got date32.*\. Cast it to text"),
        (pa.array([True]), r"expected string, got bool\. Write it as text"),
        (
            pa.array([1.5]),
            r"1 of 1 values are no string, for example '1\.5'\. Numbers become text where they are whole",
        ),
    ],
    ids=["uuid", "binary", "time", "date", "boolean", "fraction"],
)
def test_ids_that_are_no_text_are_refused_by_column_with_a_way_out(tmp_path: Path, ids: pa.Array, message: str) -> None:
    with pytest.raises(InputError, match=message):
        catalog_rows(parquet(tmp_path / "catalog", market=["us"], product_id=ids))


def test_text_that_parquet_does_not_mark_is_read_as_text_where_the_options_say_so(tmp_path: Path) -> None:
    attributes = pa.array([[(b"color", b"red")]], pa.map_(pa.binary(), pa.binary()))
    columns = {"market": [b"us"], "product_id": [b"1"], "title": [b"tea"], "attributes": attributes}
    spec = parquet(tmp_path / "catalog", **columns).model_copy(update={"options": {"binaryAsString": "true"}})

    assert catalog_rows(spec) == [("1", "tea", None, {"color": "red"})]


def test_ids_counts_and_grades_of_other_number_types_convert(tmp_path: Path) -> None:
    ids = pa.array([Decimal(1234567)], pa.decimal128(38, 0))
    behaviour = parquet(tmp_path / "behaviour", market=["us"], query=["tea"], product_id=ids, count=[3.0])
    query_ids = pa.array([2**64 - 1], pa.uint64())
    judgments = parquet(tmp_path / "judgments", market=["us"], query_id=query_ids, product_id=[1234567.0], grade=[1.0])

    assert rows(BEHAVIOUR, behaviour, "*") == [("us", "tea", "1234567", 3)]
    assert rows(JUDGMENTS, judgments, "query_id, product_id, grade") == [("18446744073709551615", "1234567", "1")]
    with pytest.raises(InputError, match=r"column 'grade' for grade: expected string, got bool\. Write it as text"):
        rows(JUDGMENTS, parquet(tmp_path / "other", market=["us"], query_id=["1"], product_id=["1"], grade=[True]), "*")


def test_json_text_is_read_as_attributes(tmp_path: Path) -> None:
    columns = {"market": ["us"] * 3, "product_id": ["1", "2", "3"]}
    spec = parquet(tmp_path / "catalog", **columns, attributes=['{"color": "red"}', "", None])
    assert [row[3] for row in catalog_rows(spec)] == [{"color": "red"}, None, None]

    spec = parquet(tmp_path / "other", **columns, attributes=["{'color': 'red'}", "", None])
    with pytest.raises(
        InputError, match=r"1 of 3 values are no map<string,string>, for example \"\{'color': 'red'\}\""
    ):
        catalog_rows(spec)


def test_bytes_that_are_no_utf8_are_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    titles = pa.array([b"caf\xe9", b"tea"])
    as_text = pa.Array.from_buffers(pa.string(), 2, titles.buffers())
    spec = parquet(tmp_path / "catalog", market=["us"] * 2, product_id=["1", "2"], title=as_text)

    assert [row[1] for row in catalog_rows(spec)] == ["caf\ufffd", "tea"]
    assert "were replaced by U+FFFD (column: values) in title: 1." in caplog.text


@pytest.mark.parametrize("partitions", [[], ["market"], ["product_id"]])
def test_a_delta_table(tmp_path: Path, partitions: list[str]) -> None:
    table = pa.table({"market": ["us", "kr"], "product_id": ["1", "2"], "title": ["tea", "차"], "other": [1, 2]})
    deltalake.write_deltalake(str(tmp_path / "catalog"), table, partition_by=partitions)

    spec = InputSpec(path=str(tmp_path / "catalog"))
    assert catalog_rows(spec) == [("1", "tea", None, None)]
    assert catalog_rows(spec, {"kr": "ko", "us": "en"}) == [("1", "tea", None, None), ("2", "차", None, None)]


def test_a_column_of_another_case_is_named(tmp_path: Path) -> None:
    spec = parquet(tmp_path / "catalog", market=["us"], product_id=["1"], TITLE=["tea"])

    with pytest.raises(InputError, match=r"missing column 'title' for title, but there is 'TITLE'\. Map it"):
        catalog_rows(spec)
    assert catalog_rows(spec.model_copy(update={"columns": {"title": "TITLE"}})) == [("1", "tea", None, None)]
    assert catalog_rows(spec.model_copy(update={"columns": {"title": None}})) == [("1", None, None, None)]


def test_delta_features_that_cannot_be_read_have_a_way_out(tmp_path: Path) -> None:
    log = tmp_path / "catalog" / "_delta_log"
    log.mkdir(parents=True)
    schema = json.dumps(
        {"type": "struct", "fields": [{"name": "x", "type": "string", "nullable": True, "metadata": {}}]}
    )
    actions = [
        {
            "protocol": {
                "minReaderVersion": 3,
                "minWriterVersion": 7,
                "readerFeatures": ["deletionVectors"],
                "writerFeatures": ["deletionVectors"],
            }
        },
        {
            "metaData": {
                "id": "x",
                "format": {"provider": "parquet", "options": {}},
                "schemaString": schema,
                "partitionColumns": [],
                "configuration": {},
            }
        },
    ]
    (log / f"{0:020}.json").write_text("\n".join(map(json.dumps, actions)))

    with pytest.raises(InputError, match=r"deletionVectors.*write the table as Parquet with Spark"):
        catalog_rows(InputSpec(path=str(tmp_path / "catalog")))


def test_a_blank_language_which_is_not_that_of_the_market_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As nights warn of it: such a query was trained on in a prompt without a language, and nobody was told."""
    languages = ["\u3000", None, "en"]
    spec = parquet(tmp_path / "queries", market=["us"] * 3, query_id=["1", "2", "3"], language=languages)

    found = rows(QUERIES, spec, f"query_id, {language_of_query({'us': 'en-US'})}")
    assert found == [("1", "\u3000"), ("2", "en-US"), ("3", "en")]
    assert "column language is blank in 1 of 3 rows, whose prompts name no language. Write null" in caplog.text


def test_a_blank_split_is_refused_since_no_split_would_have_its_rows(tmp_path: Path) -> None:
    key = {"market": ["us"] * 3, "query_id": ["1", "2", "3"], "product_id": ["1"] * 3, "grade": ["E"] * 3}
    spec = parquet(tmp_path / "judgments", **key, when=["", None, "dev"])

    with pytest.raises(InputError, match=r"column 'when' is blank in 1 of 3 rows.*Write null where a row is to be in"):
        rows(JUDGMENTS, spec.model_copy(update={"columns": {"split": "when"}}), "*")


def test_a_table_without_a_market_is_of_the_one_that_the_settings_name(tmp_path: Path) -> None:
    spec = parquet(tmp_path / "catalog", product_id=["1"], title=["tent"]).model_copy(update={"market": "o'us"})
    assert rows(CATALOG, spec, "market, title", {"o'us": "en"}) == [("o'us", "tent")]
    assert rows(CATALOG, spec, "market, title", {"kr": "ko"}) == []


def test_a_market_of_all_rows_and_one_of_each_row_are_refused(tmp_path: Path) -> None:
    spec = parquet(tmp_path / "catalog", market=["kr"], product_id=["1"], title=["tent"])
    spec = spec.model_copy(update={"market": "us"})
    with pytest.raises(InputError, match="all rows are of 'us', and column 'market' says it of each row"):
        catalog_rows(spec)
