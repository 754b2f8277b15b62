"""The launch report on real Delta tables, from the command line to page and tables; expected values worked by hand."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pyspark.sql import SparkSession

from csrm.cli import run_job, setting_arguments
from csrm.commands.launch_report import build_parser, main
from csrm.errors import ConfigError, InputError
from csrm.operations.launch import with_behaviour_counts
from csrm.operations.live_queries import LiveQueries, live_answers, translated_queries
from csrm.schemas import LAUNCH_FINDINGS, LAUNCH_QUERIES, RELEVANCE_SCORES, UNCOVERED_PRODUCTS
from csrm.spark.tables import read_table, table_path
from tests.operations.test_history import DIGEST, STARTED, write
from tests.operations.test_launch_report import words_of

pytestmark = pytest.mark.spark

CONF = Path(__file__).parents[2] / "conf" / "launch_report.yaml"
MARKETS = {"tw": "zh-TW", "jp": "ja"}
# id, title, category, language; the threshold is 0.5
PRODUCTS = [
    ("p1", "防水登山外套", "服飾 > 外套", None),
    ("p2", "등산 재킷", "의류", "ko"),
    ("p3", "iPhone 透明手機殼", "3C > 手機殼", "zh-TW"),
    ("p4", "휴대폰 케이스", None, "KO"),
    ("p5", "露營帳篷", None, "zh-TW"),
    ("p6", " ", None, "zh-TW"),
    ("p7", "睡袋", None, "zh-TW"),
]
QUERIES = [
    ("q1", "登山外套", 50.0),
    ("q2", "手機殼", 30.0),
    ("q3", "wireless 充電器", 10.0),
    ("q4", "帳篷", None),  # 10 times in behaviour
    ("q5", " ", 1000.0),
]
SCORES = [
    *[("q1", "p1", 0.9), ("q1", "p2", 0.6), ("q2", "p4", 0.7), ("q2", "p3", 0.3), ("q3", "p3", 0.1)],
    *[("q3", "gone", 0.8), ("gone", "p7", 0.8)],  # neither in catalog or queries any more: says nothing
]
LIVE = [
    ("k1", "등산 재킷", 100.0),
    ("k2", "휴대폰 케이스", 50.0),
    ("k3", "무선 충전기", 20.0),
    ("k4", "텐트", 10.0),
    ("k5", "재킷", None),
    ("k6", "무선 충전", 5.0),
    ("k7", "iPhone 재킷", 4.0),  # iPhone is in a title
    ("k8", "재 킷  ", 3.0),
]
PHRASES = [
    ("등산", "登山"),
    ("재킷", "外套"),
    ("휴대폰 케이스", "手機套"),
    ("휴대폰 케이스", "手機殼"),
    ("텐트", "帳篷"),
]


@pytest.fixture(scope="module")
def folder(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    tables = folder / "tables"
    scores = [("tw", *pair, "S", DIGEST, 1, STARTED, "r1") for pair in SCORES]
    write(spark, tables, RELEVANCE_SCORES, [*scores, ("kr", "k1", "p1", 0.9, "S", "e" * 64, 1, STARTED, "r1")])
    write(spark, tables, UNCOVERED_PRODUCTS, [("tw", "p5", "no_shared_term"), ("tw", "p6", "no_title")])

    def save(name: str, rows: list[tuple[Any, ...]], columns: str) -> None:
        pd.DataFrame(rows, columns=columns.split()).to_parquet(folder / f"{name}.parquet")

    save("catalog", [("tw", *row) for row in PRODUCTS], "market product_id title category language")
    save("queries", [("tw", *row) for row in QUERIES], "market query_id query frequency")
    save("live_queries", [("kr", *row) for row in LIVE], "market query_id query frequency")
    save("behaviour", [("tw", "帳篷", "p5", 7), ("tw", " 帳篷", "p7", 3)], "market query product_id count")
    phrases = [("ko", "zh-TW", *row) for row in PHRASES] + [("JA", "ko", "ジャケット", "재킷")]
    save("parallel_text", phrases, "source_language target_language source_text target_text")
    save("query_translations", [("kr", "k6", "wireless充電器"), ("kr", "k3", " ")], "market query_id translation")
    return folder


def arguments(folder: Path, *inputs: str, **settings: Any) -> list[str]:
    names = ("catalog", "queries", "behaviour", "live_queries", "parallel_text", *inputs)
    given = {name: {"path": f"{folder}/{name}.parquet", "format": "parquet"} for name in names}
    values = {"tables": f"{folder}/tables", "output": f"{folder}/reports", "live_markets": {"kr": "ko"}}
    return ["--config", str(CONF), *setting_arguments(**{"threshold": 0.5, **values, "inputs": given, **settings})]


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    assert main(arguments(folder, "query_translations", num_examples=5)) == 0
    return words_of((folder / "reports" / "launch-tw.html").read_text(encoding="utf-8"))


def findings(spark: SparkSession, folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    found: dict[str, list[tuple[Any, ...]]] = {}
    for row in read_table(spark, LAUNCH_FINDINGS, table_path(f"{folder}/tables", LAUNCH_FINDINGS)).collect():
        score = None if row["score"] is None else round(row["score"], 3)
        found.setdefault(row["finding"], []).append(
            (row["origin"], row["item"], row["text"], row["language"], row["category"], row["searches"], score)
        )
    return {name: sorted(rows) for name, rows in found.items()}


def test_the_table_has_what_the_market_lacks(page: str, spark: SparkSession, folder: Path) -> None:
    assert findings(spark, folder) == {
        "query_without_good_product": [
            ("tw", "q3", "wireless 充電器", "zh-tw", "3C", 10, 0.1),
            ("tw", "q4", "帳篷", "zh-tw", None, 10, None),
        ],
        "query_all_foreign": [("tw", "q2", "手機殼", "zh-tw", None, 30, 0.7)],
        "unknown_term": [
            ("tw", "wireless", "wireless 充電器", None, None, 10, None),
            ("tw", "充電器", "wireless 充電器", None, None, 10, None),
        ],
        "product_unreached": [
            ("tw", "p3", "iPhone 透明手機殼", "zh-tw", "3C > 手機殼", None, 0.3),
            ("tw", "p5", "露營帳篷", "zh-tw", None, None, None),
            ("tw", "p7", "睡袋", "zh-tw", None, None, None),
        ],
        "live_query_without_good_product": [("kr", "k6", "wireless充電器", None, None, 5, 0.1)],
        "live_query_not_scored": [
            ("kr", "k4", "帳篷", None, None, 10, None),
            ("kr", "k5", "外套", None, None, None, None),
            ("kr", "k7", "iPhone 外套", None, None, 4, None),
        ],
        "live_query_untranslated": [
            ("kr", "k3", "무선 충전기", None, None, 20, None),
            ("kr", "k8", "재 킷  ", None, None, 3, None),
        ],
    }


def test_queries_of_live_markets_become_queries_of_the_market_each_text_once(
    page: str, spark: SparkSession, folder: Path
) -> None:
    queries_df = read_table(spark, LAUNCH_QUERIES, table_path(f"{folder}/tables", LAUNCH_QUERIES))
    assert sorted((row["query_id"], row["query"], row["frequency"]) for row in queries_df.collect()) == [
        ("kr:k1", "登山 外套", 100),
        ("kr:k2", "手機殼", 50),
        ("kr:k4", "帳篷", 10),
        ("kr:k5", "外套", None),
        ("kr:k6", "wireless充電器", 5),
        ("kr:k7", "iPhone 外套", 4),
    ]
    assert {(row["market"], row["language"]) for row in queries_df.collect()} == {("tw", "zh-TW")}


def test_the_page_says_the_same(page: str) -> None:
    assert "2 of 4 queries find a good product" in page
    assert "2 queries find none, which is 20.0% of all searches; 1 of them have no scored product at all." in page
    assert "1 queries find good products, but the best 5 of these are all from abroad. 3 of 6 products" in page
    # queries, without, their share, of searches, not scored, only from abroad
    for segment in (
        "head 1 0 0.0% 0.0% 0 0",
        "torso 2 1 50.0% 25.0% 0 1",
        "tail 1 1 100.0% 100.0% 1 0",
        "1 term 1 1 100.0% 100.0% 1 0",
        "2 terms 1 0 0.0% 0.0% 0 1",
        "3 or 4 terms 2 1 50.0% 16.7% 0 0",
        "服飾 1 0 0.0% 0.0% 0 0",
        "3C 1 1 100.0% 100.0% 0 0",
        "none known 2 1 50.0% 25.0% 1 1",
        "zh-tw 4 3 75.0% 1 low_score, 1 no_scored_pair, 1 no_shared_term",
        "ko 2 0 0.0%",
    ):
        assert segment in page, segment
    for row in ("充電器 1 10 wireless 充電器", "good has a good product here 2 25.0% 78.1%"):
        assert row in page, row
    assert "휴대폰 케이스" in page  # the best title of 手機殼, which is from abroad
    assert "version 1" in page
    assert DIGEST[:12] in page
    assert "e" * 12 not in page  # a bundle of another market


def test_a_market_without_scores_is_refused_after_the_queries_of_live_ones_are_there_to_be_scored(
    spark: SparkSession, folder: Path, page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job(main, arguments(folder, markets={"jp": "ja"})) == 2
    error = capsys.readouterr().err
    assert "markets ['jp']: expected published scores" in error
    assert "score the market first" in error
    path = table_path(f"{folder}/tables", LAUNCH_QUERIES)
    assert path in error
    assert not (folder / "reports" / "launch-jp.html").exists()
    queries_df = read_table(spark, LAUNCH_QUERIES, path)
    assert [tuple(row) for row in queries_df.where("market = 'jp'").collect()] == [
        ("jp", "kr:k5", "ジャケット", None, "ja")
    ]
    assert queries_df.where("market = 'tw'").count() == 6  # those of the other market stay


def test_without_live_markets_the_way_out_names_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*arguments(folder, live_markets={}, tables=str(tmp_path)), "--set", "inputs.live_queries=null"]
    assert run_job(main, words) == 2
    assert "give inputs.live_queries" in capsys.readouterr().err


def test_parallel_text_of_other_languages_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job(main, arguments(folder, live_markets={"kr": "en"})) == 2
    assert "from en to zh-tw, got none. It has texts from ja to ko" in capsys.readouterr().err


def test_a_live_query_in_the_language_of_the_market_stays_as_it_is(spark: SparkSession) -> None:
    rows = [("hk", "h1", "登山鞋", 3.0, "zh-tw"), ("hk", "h2", "背包", 2.0, "zh-tw"), ("kr", "k1", "등산화", 1.0, "ko")]
    queries_df = spark.createDataFrame(
        rows, "market string, query_id string, query string, frequency double, language string"
    )
    given_df = spark.createDataFrame([("hk", "h2", "後背包")], "market string, query_id string, translation string")
    said_df = translated_queries(LiveQueries(queries_df, given_df, None), "zh-TW")
    assert {row["query_id"]: row["texts"] for row in said_df.collect()} == {
        "h1": ["登山鞋"],
        "h2": ["後背包"],
        "k1": [],
    }


def test_the_first_translation_that_has_a_score_is_taken(spark: SparkSession) -> None:
    live = [
        ("kr", "k1", "휴대폰 케이스", 5, ["手機套", "手機殼", "手機 外殼"], ""),
        ("kr", "k2", "덮개", 4, ["蓋子", "手機套"], ""),
        ("kr", "k3", "뚜껑", 3, ["蓋子", "瓶蓋"], ""),
    ]
    translated_df = spark.createDataFrame(
        live, "origin string, query_id string, query string, searches long, texts array<string>, rest string"
    )
    answers = [("手機套", None, False), ("手機殼", 0.7, True), ("手機外殼", 0.9, True)]
    answers_df = spark.createDataFrame(answers, "query string, score float, is_good boolean")
    rows = live_answers(translated_df, answers_df, spark.createDataFrame([], "term string")).collect()
    assert {row["query_id"]: (row["translation"], row["state"]) for row in rows} == {
        "k1": ("手機殼", "good"),  # the first is asked here, but has no score
        "k2": ("手機套", "not_scored"),  # the first is not asked here
        "k3": ("蓋子", "not_scored"),
    }


def test_queries_of_one_text_share_its_count_in_behaviour(spark: SparkSession) -> None:
    queries = [("q1", "帳篷", None), ("q2", " 帳篷", None), ("q3", "帳篷", 4), ("q4", "睡袋", None), ("q5", "鞋", 7)]
    queries += [("q6", "鍋", 90), ("q7", "鍋", None)]
    queries_df = spark.createDataFrame(queries, "query_id string, query string, frequency long")
    behaviour = [("帳篷", "p5", 7), ("帳篷 ", "p7", 4), ("鞋", "p1", 50), ("鍋", "p2", 60)]
    behaviour_df = spark.createDataFrame(behaviour, "query string, product_id string, count long")
    found = {row["query_id"]: row["frequency"] for row in with_behaviour_counts(queries_df, behaviour_df).collect()}
    assert found == {"q1": 4, "q2": 3, "q3": 4, "q4": None, "q5": 7, "q6": 90, "q7": 0}  # no search counts twice


def test_live_markets_of_the_same_language_need_nothing_that_translates_them(folder: Path) -> None:
    words = arguments(folder, live_markets={"kr": "zh-tw"})
    with pytest.raises(InputError, match=r"no rows for the markets \['tw'\]; it has \[\]"):
        main(
            [
                *words,
                "--set",
                "inputs.parallel_text=null",
                "--set",
                f"inputs.queries.path={folder}/live_queries.parquet",
            ]
        )


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"live_markets": {}}, "go together"),
        ({"live_markets": {"tw": "zh-TW"}}, "to be opened, or live"),
        ({"markets": MARKETS}, "query_translations: is in one language"),
        ({"threshold": 1.5}, "threshold"),
    ],
)
def test_settings_that_make_no_sense_are_refused(folder: Path, settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        main(arguments(folder, "query_translations", **settings))


def test_live_queries_need_something_that_translates_them(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected inputs\.parallel_text or inputs\.query_translations"):
        main([*arguments(folder), "--set", "inputs.parallel_text=null"])


def test_a_scheduler_can_parse_its_command_line() -> None:
    assert build_parser().parse_args([]).config == "conf/launch_report.yaml"
