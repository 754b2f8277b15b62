from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from csrm.commands.build_retrieval_table import main
from csrm.errors import ConfigError, InputError
from csrm.schemas import RETRIEVAL_TABLE
from csrm.spark.tables import read_table, table_path

pytestmark = pytest.mark.spark


@pytest.fixture(scope="module")
def inputs(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet inputs of two markets: behaviour for the query q1 of us, one of its pairs judged."""
    folder = tmp_path_factory.mktemp("retrieval-inputs")
    tables = {
        "catalog": (
            "market string, product_id string, title string, language string",
            [
                ("us", "p1", "red shoe", None),
                ("us", "p2", "blue shoe", None),
                ("us", "p3", None, None),
                ("us", "p4", "green hat", None),
                ("us", "p5", "캠핑 램프", "ko"),
                ("kr", "p1", "빨간 운동화", None),
            ],
        ),
        "queries": (
            "market string, query_id string, query string",
            [("us", "q1", "Shoe"), ("us", "q2", "hat"), ("us", "q3", "lamp"), ("kr", "q1", "운동화")],
        ),
        "behaviour": (
            "market string, query string, product_id string, count bigint",
            [("us", "shoe", "p1", 9), ("us", "shoe", "p2", 4), ("us", "shoe", "p3", 7), ("us", "hat", "p4", 1)],
        ),
        "judgments": (
            "market string, query_id string, product_id string, grade string",
            [("us", "q1", "p1", "E")],
        ),
        "parallel_text": (
            "source_language string, target_language string, source_text string, target_text string",
            [("ko", "en", "램프", "Lamp"), ("ko", "en", "모자", "hat")],
        ),
    }
    for name, (schema, rows) in tables.items():
        spark.createDataFrame(rows, schema).coalesce(1).write.parquet(str(folder / f"{name}.parquet"))
    return folder


def arguments(inputs: Path, tables: Path, *more: str) -> list[str]:
    names = ("catalog", "queries", "behaviour", "judgments", "parallel_text")
    values = [f"inputs.{name}={{path: {inputs}/{name}.parquet, format: parquet}}" for name in names]
    values += [f"tables={tables}", 'markets={"us": "en", "kr": "ko"}', *more]
    return ["--config", "conf/build_retrieval_table.yaml", *(part for value in values for part in ("--set", value))]


def test_titles_of_all_sources_are_written_and_counted(
    spark: SparkSession, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(inputs, tmp_path)) == 0
    written = read_table(spark, RETRIEVAL_TABLE, table_path(str(tmp_path), RETRIEVAL_TABLE))
    assert sorted(tuple(row) for row in written.collect()) == [
        ("kr", "q1", 1, "p1", "빨간 운동화", 1.0, "lexical"),
        ("us", "q1", 1, "p2", "blue shoe", 1.0, "behaviour"),
        ("us", "q2", 1, "p4", "green hat", 1.0, "lexical"),
        ("us", "q3", 1, "p5", "캠핑 램프", 1.0, "translated"),
    ]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][-1] == "1"
    assert lines[1:4] == [
        ["market", "queries", "behaviour", "lexical", "translated", "semantic", "no", "titles"],
        ["us", "3", "1", "1", "1", "0", "0"],
        ["kr", "1", "0", "1", "0", "0", "0"],
    ]


@pytest.mark.slow
def test_a_run_for_one_market_leaves_the_others_rows(spark: SparkSession, inputs: Path, tmp_path: Path) -> None:
    assert main(arguments(inputs, tmp_path)) == 0
    words_alone = (*(f"inputs.{name}=null" for name in ("behaviour", "judgments", "parallel_text")), "num_titles=1")
    assert main(arguments(inputs, tmp_path, *words_alone, 'markets={"us": "en"}')) == 0
    written = read_table(spark, RETRIEVAL_TABLE, table_path(str(tmp_path), RETRIEVAL_TABLE))
    assert sorted((row.market, row.query_id, row.title, row.source) for row in written.collect()) == [
        ("kr", "q1", "빨간 운동화", "lexical"),
        ("us", "q1", "red shoe", "lexical"),
        ("us", "q2", "green hat", "lexical"),
    ]


def test_settings_out_of_range_are_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_titles"):
        main(arguments(inputs, tmp_path, "num_titles=0"))


def test_markets_without_rows_are_an_error_and_the_table_stays(
    spark: SparkSession, inputs: Path, tmp_path: Path
) -> None:
    assert main(arguments(inputs, tmp_path, 'markets={"us": "en"}')) == 0
    path = table_path(str(tmp_path), RETRIEVAL_TABLE)
    before = sorted(map(tuple, read_table(spark, RETRIEVAL_TABLE, path).collect()))
    no_rows = tmp_path / "none.parquet"
    spark.read.parquet(f"{inputs}/catalog.parquet").limit(0).write.parquet(str(no_rows))
    with pytest.raises(InputError, match=r"catalog .*: no rows for the markets \['US'\]; it has \['us'\]"):
        main(arguments(inputs, tmp_path, 'markets={"us": "en", "US": "en"}'))
    with pytest.raises(InputError, match=r"catalog .*: no rows for the markets \['us'\]; it has \[\]"):
        main(arguments(inputs, tmp_path, 'markets={"us": "en"}', f"inputs.catalog.path={no_rows}"))
    assert before
    assert sorted(map(tuple, read_table(spark, RETRIEVAL_TABLE, path).collect())) == before


def test_judgments_that_join_no_query_are_an_error(spark: SparkSession, inputs: Path, tmp_path: Path) -> None:
    """Their behaviour would be kept, and titles be chosen because of labels, without a word."""
    judged = tmp_path / "judged.parquet"
    spark.createDataFrame(
        [("us", "17", "p1", "E")], "market string, query_id string, product_id string, grade string"
    ).write.parquet(str(judged))
    with pytest.raises(
        InputError, match=r"expected query ids of queries .*, got none, for example '17' of market 'us'"
    ):
        main(arguments(inputs, tmp_path, f"inputs.judgments.path={judged}"))
    assert not (tmp_path / RETRIEVAL_TABLE.name).exists()
