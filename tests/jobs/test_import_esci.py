"""The ESCI import on small files in the public form, as Parquet, and in another form, as TSV."""

import gzip
import os
import re
from pathlib import Path

import pandas as pd
import pytest
from pyspark.sql import SparkSession

from csrm.commands.import_esci import ImportConfig, main
from csrm.config import load_config
from csrm.errors import ConfigError, InputError

pytestmark = pytest.mark.spark

CONF = Path(__file__).parents[2] / "conf"

PRODUCTS = pd.DataFrame(
    [
        ("P1", "Red umbrella", "us", "Rainy", "Red"),
        ("P2", "Blue umbrella", "us", None, None),
        ("P1", "赤い傘", "jp", "アメ", "赤"),
        ("P9", "Roter Schirm", "de", None, None),
    ],
    columns=["product_id", "product_title", "product_locale", "product_brand", "product_color"],
)
EXAMPLES = pd.DataFrame(
    [
        (0, "umbrella", 7, "P1", "us", "Exact", 1, "train"),
        (1, "umbrella", 7, "P2", "us", "S", 0, "train"),
        (2, "傘", 8, "P1", "jp", "Complement", 1, "test"),
        (3, "Schirm", 9, "P9", "de", "E", 1, "train"),
    ],
    columns=["example_id", "query", "query_id", "product_id", "product_locale", "esci_label", "small_version", "split"],
)


def write_public_files(folder: Path, products: pd.DataFrame = PRODUCTS, examples: pd.DataFrame = EXAMPLES) -> None:
    products.to_parquet(folder / "shopping_queries_dataset_products.parquet")
    examples.to_parquet(folder / "shopping_queries_dataset_examples.parquet")


def run_import(folder: Path, conf: str = "import_esci.yaml", *settings: str) -> int:
    argv = ["--config", str(CONF / conf), "--set", f"data={folder}", "--set", f"output={folder}/out"]
    for setting in settings:
        argv += ["--set", setting]
    return main(argv)


def rows(spark: SparkSession, folder: Path, table: str, *columns: str) -> set[tuple[object, ...]]:
    table_df = spark.read.format("delta").load(f"{folder}/out/{table}")
    return {tuple(row) for row in table_df.select(*columns).collect()}


def test_an_output_that_is_no_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    """Else the tables would be at the root of the file system."""
    with pytest.raises(ConfigError, match="output: String should have at least 1 character"):
        run_import(tmp_path, "import_esci.yaml", "output=''")


def test_the_public_files_become_four_tables(spark: SparkSession, tmp_path: Path) -> None:
    write_public_files(tmp_path)
    assert run_import(tmp_path) == 0
    catalog_df = spark.read.format("delta").load(f"{tmp_path}/out/catalog")
    assert {(row["market"], row["product_id"]): row.asDict() for row in catalog_df.collect()} == {
        ("us", "P1"): {
            "market": "us",
            "product_id": "P1",
            "title": "Red umbrella",
            "brand": "Rainy",
            "category": None,
            "attributes": {"color": "Red"},
            "language": "en",
        },
        ("us", "P2"): {
            "market": "us",
            "product_id": "P2",
            "title": "Blue umbrella",
            "brand": None,
            "category": None,
            "attributes": None,
            "language": "en",
        },
        ("jp", "P1"): {
            "market": "jp",
            "product_id": "P1",
            "title": "赤い傘",
            "brand": "アメ",
            "category": None,
            "attributes": {"color": "赤"},
            "language": "ja",
        },
    }
    assert rows(spark, tmp_path, "queries", "market", "query_id", "query", "language") == {
        ("us", "7", "umbrella", "en"),
        ("jp", "8", "傘", "ja"),
    }
    assert rows(spark, tmp_path, "candidates", "market", "query_id", "product_id", "source") == {
        ("us", "7", "P1", "given"),
        ("us", "7", "P2", "given"),
        ("jp", "8", "P1", "given"),
    }
    assert rows(spark, tmp_path, "judgments", "market", "query_id", "product_id", "grade", "split") == {
        ("us", "7", "P1", "E", "train"),
        ("us", "7", "P2", "S", "train"),
        ("jp", "8", "P1", "C", "test"),
    }


def test_the_small_version_and_splits_can_be_chosen(spark: SparkSession, tmp_path: Path) -> None:
    write_public_files(tmp_path)
    run_import(tmp_path, "import_esci.yaml", "small_version_only=true", "splits=[train]")
    assert rows(spark, tmp_path, "judgments", "market", "query_id", "product_id") == {("us", "7", "P1")}
    assert rows(spark, tmp_path, "queries", "query_id") == {("7",)}
    assert len(rows(spark, tmp_path, "catalog", "market", "product_id")) == 3  # the catalog stays whole


def test_tsv_with_other_names_and_no_locale_is_read_without_quoting(spark: SparkSession, tmp_path: Path) -> None:
    pd.DataFrame(
        [("P1", 'Frame 5" \\', "Oak", "", "Home > Frames"), ("P2", '"Best" lamp', "", "Green", "")],
        columns=["product_id", "title", "brand", "color", "category"],
    ).to_parquet(tmp_path / "products.parquet")
    lines = [
        "query_id\tquery\tproduct_id\tlabel\tsplit",
        '1\t"5 inch frame\tP1\tE\ttrain',
        "2\tNA\tP2\tI\tdev",
        '1\t"5 inch frame\tP2\tI\ttrain',
    ]
    (tmp_path / "judgments.tsv.gz").write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    assert run_import(tmp_path, "import_esci_sample.yaml") == 0
    assert rows(spark, tmp_path, "queries", "market", "query_id", "query") == {
        ("us", "1", '"5 inch frame'),
        ("us", "2", "NA"),
    }
    assert rows(spark, tmp_path, "catalog", "product_id", "title", "brand", "category") == {
        ("P1", 'Frame 5" \\', "Oak", "Home > Frames"),
        ("P2", '"Best" lamp', "", ""),
    }
    assert rows(spark, tmp_path, "judgments", "query_id", "product_id", "grade", "split") == {
        ("1", "P1", "E", "train"),
        ("1", "P2", "I", "train"),
        ("2", "P2", "I", "dev"),
    }


def test_all_problems_of_the_examples_come_in_one_message(spark: SparkSession, tmp_path: Path) -> None:
    examples = EXAMPLES.copy()
    examples.loc[0, "esci_label"] = "good"
    examples.loc[1, "query"] = "parasol"
    examples.loc[2, "product_id"] = "P2"  # the us market has it, jp does not
    write_public_files(tmp_path, examples=examples)
    with pytest.raises(InputError) as caught:
        run_import(tmp_path)
    message = str(caught.value)
    assert "examples.parquet': 3 problems:" in message
    assert "unknown labels (with their rows) {'good': 1}; expected ['C', 'Complement'" in message
    assert "1 query ids have more than one text, for example us 7: ['parasol', 'umbrella']" in message
    assert "1 judged pairs have no product in" in message
    assert "market jp, query 8, product P2" in message
    assert not (tmp_path / "out").exists()


def test_the_problems_of_both_files_come_in_one_message(spark: SparkSession, tmp_path: Path) -> None:
    write_public_files(
        tmp_path,
        products=pd.concat([PRODUCTS, PRODUCTS[:1]]),
        examples=EXAMPLES.drop(columns=["esci_label", "split"]),
    )
    with pytest.raises(InputError) as caught:
        run_import(tmp_path, "import_esci.yaml", "splits=[train]")
    assert "product_locale='us', product_id='P1' (2 rows)" in str(caught.value)
    assert re.search("(?s)2 problems.*missing column 'esci_label'.*missing column 'split'", str(caught.value))


def test_settings_that_leave_no_rows_are_an_error(spark: SparkSession, tmp_path: Path) -> None:
    write_public_files(tmp_path)
    with pytest.raises(InputError, match=r"splits \['validation'\].*got none"):
        run_import(tmp_path, "import_esci.yaml", "splits=[validation]")


def test_locales_must_have_markets_of_their_own() -> None:
    for setting in ("locales={us: us, uk: us}", "locales={us: fr}", "default_locale=fr"):
        with pytest.raises(ConfigError, match=r"needs a market of its own|not among the keys"):
            load_config(CONF / "import_esci.yaml", ImportConfig, [setting])
    with pytest.raises(ConfigError, match="markets: Dictionary should have at least 1 item"):
        load_config(CONF / "import_esci.yaml", ImportConfig, ["markets={}"])


def test_the_real_sample_is_imported_whole(spark: SparkSession, tmp_path: Path) -> None:
    if "CSRM_DATA" not in os.environ:
        pytest.skip("CSRM_DATA does not name the folder that holds esci_us")
    data = f"{os.environ['CSRM_DATA']}/esci_us"
    assert run_import(tmp_path, "import_esci_sample.yaml", f"data={data}") == 0
    judgments_df = spark.read.format("delta").load(f"{tmp_path}/out/judgments")
    counts = {row["grade"]: row["count"] for row in judgments_df.groupBy("grade").count().collect()}
    assert counts == {"E": 2774, "S": 1502, "C": 239, "I": 814}
    assert spark.read.format("delta").load(f"{tmp_path}/out/catalog").count() == 5434
    assert spark.read.format("delta").load(f"{tmp_path}/out/queries").count() == 120
