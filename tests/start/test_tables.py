import gzip
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from csrm.errors import InputError
from csrm.start.tables import open_found

ROWS = pa.table({"market": ["us", "us", "kr", None], "title": ["a", " ", "b", "c"], "n": [1.0, 2.0, 2.0, None]})


def test_a_table_is_read_in_every_format(tmp_path: Path) -> None:
    write_deltalake(str(tmp_path / "delta"), ROWS)
    pq.write_table(ROWS, tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text('{"market": "us", "title": "a"}\n{"market": "kr", "title": "b"}\n')
    with gzip.open(tmp_path / "rows.tsv.gz", "wt") as file:
        file.write("market\ttitle\nus\ta\nkr\tb\n")
    formats = {}
    for name in ("delta", "rows.parquet", "rows.jsonl", "rows.tsv.gz"):
        found = open_found(str(tmp_path / name), "catalog")
        formats[name] = found.format
        assert found.sample("market", "title") == {"us": ["a"], "kr": ["b"]}
    assert list(formats.values()) == ["delta", "parquet", "json", "csv"]
    assert open_found(str(tmp_path / "rows.tsv.gz"), "catalog").options == {"header": "true", "sep": "\t"}


def test_folders_that_name_markets_are_a_column(tmp_path: Path) -> None:
    pq.write_to_dataset(ROWS.slice(0, 3), tmp_path / "parts", partition_cols=["market"])
    (tmp_path / "parts" / "_SUCCESS").touch()
    assert open_found(str(tmp_path / "parts"), "catalog").counts("market") == {"us": 2, "kr": 1}
    (tmp_path / "parts" / "market=us").rename(tmp_path / "parts" / "market=01")
    (tmp_path / "parts" / "market=kr").rename(tmp_path / "parts" / "market=02")
    assert open_found(str(tmp_path / "parts"), "catalog").counts("market") == {"01": 2, "02": 1}


def test_numbers_count_as_the_text_that_csrm_reads(tmp_path: Path) -> None:
    grades = pa.array([Decimal("0.00"), Decimal("1.00"), Decimal("10.00"), None], pa.decimal128(10, 2))
    pq.write_table(ROWS.append_column("grade", grades), tmp_path / "rows.parquet")
    assert open_found(str(tmp_path / "rows.parquet"), "judgments").counts("n") == {"1": 1, "2": 2}
    assert open_found(str(tmp_path / "rows.parquet"), "judgments").counts("grade") == {"0": 1, "1": 1, "10": 1}


@pytest.mark.parametrize(
    ("grades", "example"),
    [([0.0, 0.5, 1.0], "0.5"), ([True, False, True], "True"), ([1.0, float("nan"), 1.0], "nan")],
)
def test_values_that_jobs_refuse_are_refused_at_once(tmp_path: Path, grades: list[object], example: str) -> None:
    """A configuration that was proposed for them would be refused by training, after hours of other jobs."""
    pq.write_table(ROWS.slice(0, 3).append_column("grade", pa.array(grades)), tmp_path / "rows.parquet")
    message = rf"rows.parquet': column 'grade' is read as text, and {example} does not become any: .* Cast the column"
    with pytest.raises(InputError, match=message):
        open_found(str(tmp_path / "rows.parquet"), "judgments").counts("grade")


def test_values_of_csv_are_the_text_that_jobs_read(tmp_path: Path) -> None:
    rows = "market,grade,split,n\n01,1.0,dev,3\n01,0.0,,\n"
    (tmp_path / "rows.csv").write_text(rows)
    found = open_found(str(tmp_path / "rows.csv"), "judgments")
    assert found.counts("market") == {"01": 2}
    assert found.counts("grade") == {"1.0": 1, "0.0": 1}
    assert found.counts("split") == {"dev": 1}
    assert found.types["n"] == pa.int64()

    (tmp_path / "parts" / "market=01").mkdir(parents=True)
    (tmp_path / "parts" / "market=01" / "rows.csv").write_text("grade,flag\n1,true\n")
    found = open_found(str(tmp_path / "parts"), "judgments")
    assert found.sample("market", "flag") == {"01": ["true"]}
    assert found.types["flag"] == pa.string()


def test_a_letter_far_down_in_numbers_of_csv_is_no_fault(tmp_path: Path) -> None:
    """pyarrow tells a column's type by the first megabyte."""
    (tmp_path / "rows.csv").write_text("sku\n" + "".join(f"{number}\n" for number in range(300_000)) + "A1\n")
    assert open_found(str(tmp_path / "rows.csv"), "catalog").counts("sku")["A1"] == 1


def test_a_sample_ends_when_every_market_has_its_values(tmp_path: Path) -> None:
    rows = pa.table({"market": ["us"] * 5 + ["kr"], "title": list("abcdef")})
    pq.write_table(rows, tmp_path / "rows.parquet")
    sample = open_found(str(tmp_path / "rows.parquet"), "catalog").sample("market", "title", 2)
    assert sample == {"us": ["a", "b"], "kr": ["f"]}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "the folder has no files"),
        ({"a.txt": "x"}, r"got files that end in \['.txt'\]"),
        ({"a.csv": "m\nus", "b.json": "{}"}, r"got files that end in \['.csv', '.json'\]"),
        ({"a.parquet": "x"}, "cannot be read: .*Is the path right"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f"queries '.*': .*{message}"):
        open_found(str(tmp_path), "queries")


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"catalog '.*nowhere': cannot be read: there is no such file or folder"):
        open_found(str(tmp_path / "nowhere"), "catalog")


def test_a_delta_table_of_other_features_or_a_damaged_one_is_named(tmp_path: Path) -> None:
    write_deltalake(str(tmp_path / "delta"), ROWS)
    features = '"readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"]'
    log = tmp_path / "delta" / "_delta_log"
    (log / "00000000000000000001.json").write_text(
        f'{{"protocol": {{"minReaderVersion": 3, "minWriterVersion": 7, {features}}}}}\n'
    )
    with pytest.raises(
        InputError, match=r"catalog '.*': cannot be read as Delta without Spark: .* write the table as Parquet"
    ):
        open_found(str(tmp_path / "delta"), "catalog")
    (log / "00000000000000000000.json").write_text("x")
    with pytest.raises(InputError, match=r"catalog '.*': cannot be read as Delta without Spark: "):
        open_found(str(tmp_path / "delta"), "catalog")
