from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from csrm.cli import run_job
from csrm.commands.generate_market import MarketConfig, main
from csrm.config import load_config
from csrm.schemas import BEHAVIOUR, CATALOG, JUDGMENTS, QUERIES

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

CONF = Path(__file__).parents[2] / "conf" / "generate_market.yaml"
FILES = {f"{name}.parquet" for name in ("catalog", "queries", "behaviour", "candidates", "judgments", "parallel_text")}


def generate(folder: Path, *settings: str) -> int:
    small = ("products_per_market=60", "queries_per_market=6", f"output={folder}", *settings)
    return run_job(main, ["--config", str(CONF), *(part for setting in small for part in ("--set", setting))])


def test_the_default_settings_make_the_demos_markets() -> None:
    config = load_config(CONF, MarketConfig)
    assert config.markets == {"kr": "ko", "tw": "zh-TW", "us": "en"}
    assert config.label_noise == 0


def test_the_files_have_the_declared_types(tmp_path: Path) -> None:
    assert generate(tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == FILES
    catalog = pq.read_schema(tmp_path / "catalog.parquet")
    assert catalog.names == CATALOG.column_names
    assert catalog.field("attributes").type == pa.map_(pa.string(), pa.string())
    assert catalog.field("title").type == pa.string()
    assert catalog.field("title").nullable
    assert not catalog.field("product_id").nullable
    assert pq.read_schema(tmp_path / "queries.parquet").field("frequency").type == pa.int64()
    assert pq.read_schema(tmp_path / "behaviour.parquet").field("count").type == pa.int64()
    assert pq.read_schema(tmp_path / "judgments.parquet").names == JUDGMENTS.column_names


def test_the_true_grade_stands_beside_a_wrong_one(tmp_path: Path) -> None:
    generate(tmp_path / "noisy", "label_noise=1")
    generate(tmp_path / "right")
    noisy, right = (pd.read_parquet(tmp_path / name / "judgments.parquet") for name in ("noisy", "right"))
    assert (noisy["grade"] != noisy["true_grade"]).all()
    pd.testing.assert_series_equal(noisy["true_grade"], right["grade"], check_names=False)


def test_attributes_are_read_back_as_written(tmp_path: Path) -> None:
    generate(tmp_path)
    catalog = pd.read_parquet(tmp_path / "catalog.parquet")
    assert catalog["attributes"].isna().sum() == 3 * 2  # 3 % of 60 products, rounded up, in three markets
    found = {name for attributes in catalog["attributes"].dropna() for name, _ in attributes}
    assert {"Size", "사이즈", "尺寸"} & found


def test_the_same_settings_give_the_same_bytes_and_replace_the_files(tmp_path: Path) -> None:
    generate(tmp_path / "one")
    generate(tmp_path / "two", "seed=8")
    before = (tmp_path / "two" / "catalog.parquet").read_bytes()
    generate(tmp_path / "two")
    assert {path.name for path in (tmp_path / "two").iterdir()} == FILES
    assert (tmp_path / "two" / "catalog.parquet").read_bytes() != before
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_counts_and_an_example_of_each_market_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(tmp_path)
    printed = capsys.readouterr().out
    for market in ("kr", "tw", "us"):
        assert f"{market}: 60 products, 6 queries" in printed
    assert printed.count("  product: ") == printed.count("  query:   ") == 3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("label_noise=2", "label_noise: Input should be less than or equal to 1"),
        ("markets={no: en}", "markets"),
        ("taxonomy=nowhere", "taxonomy 'nowhere': 4 problems"),
        ("markets={fr: fr}", "got 'fr'"),
    ],
)
def test_unusable_settings_end_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    assert generate(tmp_path, setting) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_a_file_ends_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert generate(tmp_path / "file") == 2
    assert "expected a folder that can be written" in capsys.readouterr().err


@pytest.mark.spark
def test_spark_reads_the_declared_types(spark: "SparkSession", tmp_path: Path) -> None:
    generate(tmp_path)
    for table in (CATALOG, QUERIES, BEHAVIOUR, JUDGMENTS):
        df = spark.read.parquet(str(tmp_path / f"{table.name}.parquet"))
        assert df.dtypes == [(column.name, column.type) for column in table.columns]
