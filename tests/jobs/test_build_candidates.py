from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from csrm.commands.build_candidates import main
from csrm.errors import ConfigError, InputError
from csrm.schemas import CANDIDATES, UNCOVERED_PRODUCTS, Table
from csrm.spark.tables import read_table, table_path

pytestmark = pytest.mark.spark


@pytest.fixture(scope="module")
def inputs(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("candidate-inputs")
    tables = {
        "catalog": (
            "market string, product_id string, title string, language string",
            [
                ("us", "p1", "red shoe", None),
                ("us", "p2", "red leather shoe with laces", None),
                ("us", "p3", None, None),
                ("us", "p4", "lamp", None),
                ("tw", "p1", "藍牙耳機", "zh-TW"),
                ("tw", "p2", "무선 이어폰", "KO"),
                ("tw", "p3", "의자", "ko"),
            ],
        ),
        "queries": (
            "market string, query_id string, query string",
            [("us", "q1", "red shoe"), ("us", "q2", "chair"), ("tw", "q1", "耳機")],
        ),
        "given": (
            "market string, query_id string, product_id string",
            [("us", "q1", "p1"), ("us", "q2", "p9"), ("us", "q9", "p4"), ("kr", "q1", "p1")],
        ),
        "parallel_text": (
            "source_language string, target_language string, source_text string, target_text string",
            [("zh-tw", "ko", "耳機", "이어폰"), ("ko", "zh-TW", "의자", "椅子")],
        ),
    }
    for name, (schema, rows) in tables.items():
        spark.createDataFrame(rows, schema).coalesce(1).write.parquet(str(folder / f"{name}.parquet"))
    return folder


def arguments(inputs: Path, tables: Path, *more: str) -> list[str]:
    values = [
        f"inputs.catalog.path={inputs}/catalog.parquet",
        f"inputs.queries.path={inputs}/queries.parquet",
        "inputs.parallel_text=null",
        f"tables={tables}",
        'markets={"us": "en", "tw": "zh-TW"}',
        *more,
    ]
    return ["--config", "conf/build_candidates.yaml", *(part for value in values for part in ("--set", value))]


def rows(spark: SparkSession, table: Table, tables: Path) -> list[tuple[object, ...]]:
    return sorted(tuple(row) for row in read_table(spark, table, table_path(str(tables), table)).collect())


def test_every_product_is_in_a_pair_or_listed_as_uncovered(
    spark: SparkSession, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = f"inputs.candidates={{path: {inputs}/given.parquet, format: parquet}}"
    assert main(arguments(inputs, tmp_path, given, "products_per_query=1", "queries_per_product=1")) == 0
    assert rows(spark, CANDIDATES, tmp_path) == [
        ("tw", "q1", "p1", "query"),
        ("us", "q1", "p1", "given"),
        ("us", "q1", "p2", "product"),
        ("us", "q2", "p9", "given"),
        ("us", "q9", "p4", "given"),
    ]
    assert rows(spark, UNCOVERED_PRODUCTS, tmp_path) == [
        ("tw", "p2", "no_shared_term"),
        ("tw", "p3", "no_shared_term"),
        ("us", "p3", "no_title"),
        ("us", "p4", "no_shared_term"),
    ]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:10] == [
        ["market", "pairs", "given", "query", "product", "translated", "semantic"],
        ["us", "4", "3", "0", "1", "0", "0"],
        ["tw", "1", "0", "1", "0", "0", "0"],
        ["market", "products", "covered", "no_title", "no_shared_term", "too_dissimilar", "not_among_best"],
        ["us", "4", "2", "(50.0%)", "1", "(25.0%)", "1", "(25.0%)", "0", "(0.0%)", "0", "(0.0%)"],
        ["tw", "3", "1", "(33.3%)", "0", "(0.0%)", "2", "(66.7%)", "0", "(0.0%)", "0", "(0.0%)"],
        ["market", "language", "products", "words", "translated", "semantic", "given", "uncovered"],
        ["us", "en", "4", "1", "0", "0", "1", "2"],
        ["tw", "ko", "2", "0", "0", "0", "0", "2"],
        ["tw", "zh-tw", "1", "1", "0", "0", "0", "0"],
    ]


def test_products_in_another_language_are_found_by_translations(
    spark: SparkSession, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    translated = f"inputs.parallel_text={{path: {inputs}/parallel_text.parquet, format: parquet}}"
    assert main(arguments(inputs, tmp_path, translated, "inputs.candidates=null")) == 0
    assert [row for row in rows(spark, CANDIDATES, tmp_path) if row[0] == "tw"] == [
        ("tw", "q1", "p1", "query"),
        ("tw", "q1", "p2", "translated"),
    ]
    assert ("tw", "p3", "no_shared_term") in rows(spark, UNCOVERED_PRODUCTS, tmp_path)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[8:10] == [["tw", "ko", "2", "0", "1", "0", "0", "1"], ["tw", "zh-tw", "1", "1", "0", "0", "0", "0"]]


def test_the_language_of_products_may_have_another_name_or_be_left_out(
    spark: SparkSession, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "listings.parquet"
    names = ("shop", "sku", "name", "listing_language")
    spark.read.parquet(f"{inputs}/catalog.parquet").toDF(*names).coalesce(1).write.parquet(str(path))
    translated = f"inputs.parallel_text={{path: {inputs}/parallel_text.parquet, format: parquet}}"

    def found(language: str) -> list[list[str]]:
        columns = f"{{market: shop, product_id: sku, title: name, language: {language}}}"
        catalog = f"inputs.catalog={{path: {path}, format: parquet, columns: {columns}}}"
        assert main(arguments(inputs, tmp_path, catalog, translated, "inputs.candidates=null")) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        header = next(number for number, line in enumerate(lines) if line[:2] == ["market", "language"])
        return [line for line in lines[header + 1 :] if line[0] == "tw"]

    assert found("listing_language") == [
        ["tw", "ko", "2", "0", "1", "0", "0", "1"],
        ["tw", "zh-tw", "1", "1", "0", "0", "0", "0"],
    ]
    assert ("tw", "q1", "p2", "translated") in rows(spark, CANDIDATES, tmp_path)
    # without the column, each product is in its market's language, so that nothing needs a translation
    assert found("null") == [["tw", "zh-tw", "3", "1", "0", "0", "0", "2"]]
    assert ("tw", "p2", "no_shared_term") in rows(spark, UNCOVERED_PRODUCTS, tmp_path)


def test_without_queries_per_product_the_rest_is_not_among_the_best(
    spark: SparkSession, inputs: Path, tmp_path: Path
) -> None:
    assert (
        main(arguments(inputs, tmp_path, "inputs.candidates=null", "products_per_query=1", "queries_per_product=0"))
        == 0
    )
    assert rows(spark, CANDIDATES, tmp_path) == [("tw", "q1", "p1", "query"), ("us", "q1", "p1", "query")]
    assert ("us", "p2", "not_among_best") in rows(spark, UNCOVERED_PRODUCTS, tmp_path)


def test_settings_out_of_range_are_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_term_share"):
        main(arguments(inputs, tmp_path, "max_term_share=0"))


def test_a_market_that_the_tables_do_not_have_is_an_error_before_anything_is_replaced(
    spark: SparkSession, inputs: Path, tmp_path: Path
) -> None:
    assert main(arguments(inputs, tmp_path, "inputs.candidates=null")) == 0
    before = rows(spark, CANDIDATES, tmp_path)

    with pytest.raises(
        InputError, match=r"(?s)catalog at .*no rows for the markets \['US'\]; it has \['tw'\].*queries"
    ):
        main(arguments(inputs, tmp_path, "inputs.candidates=null", 'markets={"US": "en", "tw": "zh-TW"}'))

    assert rows(spark, CANDIDATES, tmp_path) == before != []
