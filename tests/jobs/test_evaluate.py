"""The evaluation job on real Delta and Parquet tables; expected values are worked by hand."""

import json
import re
from datetime import UTC, datetime
from math import log2
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pyspark.sql import SparkSession

from csrm.commands.evaluate import main
from csrm.config import load_config
from csrm.embedding.encoder import load_encoder
from csrm.errors import ConfigError, InputError
from csrm.operations.evaluation import EvaluationConfig
from csrm.retrieval.semantic import cosine_scores
from csrm.schemas import RELEVANCE_SCORES
from csrm.spark.tables import replace_rows, spark_schema, table_path

pytestmark = pytest.mark.spark

CONF = Path(__file__).parents[2] / "conf" / "evaluate.yaml"

# kr q1: the model ranks a (E), b (S), c (I); of the titles only c's has a word of the query.
# tw q1: the model ranks y (I), x (E); only x's title has the query's words.
CATALOG = [
    ("kr", "a", "운동화"),
    ("kr", "b", "구두"),
    ("kr", "c", "빨간 우산"),
    ("tw", "x", "雨傘"),
    ("tw", "y", "手套"),
]
QUERIES = [("kr", "q1", "빨간 신발"), ("kr", "q2", "장갑"), ("tw", "q1", "雨傘")]
JUDGMENTS = [
    ("kr", "q1", "a", "E", "test"),
    ("kr", "q1", "b", "S", "test"),
    ("kr", "q1", "c", "I", "test"),
    ("kr", "q2", "gone", "E", "test"),  # the catalog does not have it, so it has no score
    ("kr", "q2", "a", "I", "train"),
    ("tw", "q1", "x", "E", "test"),
    ("tw", "q1", "y", "I", "test"),
]
KEY_AND_SCORE = ["market", "query_id", "product_id", "score"]
SCORES = [
    ("kr", "q1", "a", 0.9),
    ("kr", "q1", "b", 0.5),
    ("kr", "q1", "c", 0.1),
    ("kr", "q2", "a", 0.3),
    ("kr", "q2", "b", 0.2),  # not judged
    ("tw", "q1", "x", 0.4),
    ("tw", "q1", "y", 0.6),
]


@pytest.fixture(scope="module")
def folder(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs as Parquet and the published scores as Delta."""
    folder = tmp_path_factory.mktemp("evaluate")
    pd.DataFrame(CATALOG, columns=["market", "product_id", "title"]).to_parquet(folder / "catalog.parquet")
    pd.DataFrame(QUERIES, columns=["market", "query_id", "query"]).to_parquet(folder / "queries.parquet")
    judgments = pd.DataFrame(JUDGMENTS, columns=["market", "query_id", "product_id", "grade", "split"])
    judgments.to_parquet(folder / "judgments.parquet")
    scored_at = datetime(2026, 11, 1, tzinfo=UTC)
    rows = [(*key_and_score, "E", "digest-1", 1, scored_at, "run-1", None) for key_and_score in SCORES]
    scores_df = spark.createDataFrame(rows, spark_schema(RELEVANCE_SCORES))
    replace_rows(scores_df, RELEVANCE_SCORES, table_path(str(folder / "tables"), RELEVANCE_SCORES))
    return folder


def evaluate(folder: Path, *settings: str) -> dict[str, Any]:
    argv = ["--config", str(CONF)]
    overrides = [f"inputs.{name}.path={folder}/{name}.parquet" for name in ("judgments", "catalog", "queries")]
    overrides += [f"tables={folder}/tables", f"output={folder}/output", "num_resamples=100", *settings]
    for override in overrides:
        argv += ["--set", override]
    assert main(argv) == 0
    return json.loads((folder / "output" / "metrics.json").read_text(encoding="utf-8"))


def value(result: dict[str, Any], market: str, ranking: str, metric: str) -> float | None:
    rows = {(row["market"], row["ranking"], row["metric"]): row["value"] for row in result["metrics"]}
    return rows[(market, ranking, metric)]


def test_cosines_of_an_encoder_are_measured_on_the_same_pairs(folder: Path, tiny_encoder: Path) -> None:
    result = evaluate(folder, "splits=[test]", f"baseline_encoder={tiny_encoder}")

    encoder = load_encoder(tiny_encoder)
    asked, *titles = encoder.embed(["빨간 신발"], "query"), *encoder.embed(["운동화", "구두", "빨간 우산"])
    best, second, irrelevant = (float(asked[0] @ title) for title in titles)
    auc = ((best > second) + (best > irrelevant)) / 2
    assert value(result, "kr", "encoder", "ROC-AUC") == auc
    assert {row["ranking"] for row in result["differences"]} == {"bm25", "encoder"}


def test_a_pair_without_a_text_has_no_cosine(spark: SparkSession, tiny_encoder: Path) -> None:
    catalog_df = spark.createDataFrame(
        [("us", "a", "red shoe"), ("us", "b", " ")], "market string, product_id string, title string"
    )
    queries_df = spark.createDataFrame([("us", "q", "shoe")], "market string, query_id string, query string")
    judgments_df = spark.createDataFrame(
        [("us", "q", "a"), ("us", "q", "b")], "market string, query_id string, product_id string"
    )

    scored = cosine_scores(judgments_df, catalog_df, queries_df, encoder=str(tiny_encoder), device="cpu")

    scores = {row["product_id"]: row["score"] for row in scored.collect()}
    encoder = load_encoder(tiny_encoder)
    expected = encoder.embed(["shoe"], "query")[0] @ encoder.embed(["red shoe"])[0]
    assert scores == {"a": pytest.approx(float(expected), abs=1e-6), "b": None}


def test_scores_are_measured_beside_bm25_and_a_random_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluate(folder, "splits=[test]")

    assert value(result, "kr", "relevance_score", "nDCG@10") == 1.0
    assert value(result, "tw", "relevance_score", "MRR@10") == 0.5
    assert value(result, "tw", "relevance_score", "ROC-AUC") == 0.0
    assert value(result, "tw", "bm25", "ROC-AUC") == 1.0
    # kr: bm25 of a and b is 0, a tie; c is above: (1/2 + 0) / 2
    assert value(result, "kr", "bm25", "ROC-AUC") == 0.25
    assert value(result, "all markets", "relevance_score", "defect rate@10") == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert {row["ranking"] for row in result["metrics"]} == {"relevance_score", "bm25", "random"}

    curves = {row["market"]: row for row in result["calibration"]}
    assert list(curves) == ["kr", "tw", "all markets"]
    assert curves["kr"]["share_relevant"] == pytest.approx(1 / 3)
    at_half = {row["market"]: row["recall"] for row in result["thresholds"] if row["threshold"] == 0.5}
    assert at_half == {"kr": 1.0, "tw": 0.0, "all markets": 0.5}

    printed = capsys.readouterr().out
    assert f"kr: calibration error {curves['kr']['error']:.3f}; no curve" in printed
    assert "kr: 1 of 2 judged queries, 3 of 4 judged pairs have a score" in printed
    assert "note: kr: 1 judged pairs name a product_id that catalog does not have, such as gone." in printed
    page = (folder / "output" / "evaluation.html").read_text(encoding="utf-8")
    assert "relevance_scores: <span" in page


def test_each_query_has_its_metrics_in_a_table(folder: Path) -> None:
    evaluate(folder, "splits=[test]")
    queries = pd.read_parquet(folder / "output" / "queries.parquet")
    own = queries[queries["ranking"] == "relevance_score"].set_index(["market", "query_id"])
    assert own.index.tolist() == [("kr", "q1"), ("tw", "q1")]
    assert own["query"].tolist() == ["빨간 신발", "雨傘"]
    assert own["num_pairs"].tolist() == [3, 2]
    assert own["num_relevant"].tolist() == [1, 1]
    assert own["mrr_at_10"].tolist() == [1.0, 0.5]
    assert own["defect_rate_at_10"].tolist() == pytest.approx([1 / 3, 1 / 2])
    assert own["ndcg_at_10"].tolist() == pytest.approx([1.0, 1 / log2(3)])
    assert set(queries["ranking"]) == {"relevance_score", "bm25", "random"}


def test_other_scores_are_measured_on_the_same_pairs_with_paired_differences(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # it orders the two of tw rightly, those of kr the wrong way round, and does not know kr q2
    rows = [
        ("kr", "q1", "a", 1),
        ("kr", "q1", "b", 2),
        ("kr", "q1", "c", 30),
        ("tw", "q1", "x", 5),
        ("tw", "q1", "y", 4),
    ]
    pd.DataFrame(rows, columns=["shop", "query_id", "product_id", "points"]).to_parquet(folder / "engine.parquet")
    result = evaluate(
        folder,
        "baseline_bm25=false",
        f"inputs.compare.engine={{path: '{folder}/engine.parquet', format: parquet, "
        "columns: {market: shop, score: points}}",
        f"inputs.compare.last_night={{path: '{folder}/tables/relevance_scores', columns: {{score: relevance_score}}}}",
    )
    assert value(result, "kr", "engine", "MRR@10") == pytest.approx(1 / 3)
    assert value(result, "tw", "engine", "MRR@10") == 1.0
    differences = {(row["market"], row["ranking"], row["metric"]): row for row in result["differences"]}
    assert differences[("kr", "engine", "MRR@10")]["difference"] == pytest.approx(2 / 3)
    assert differences[("tw", "engine", "MRR@10")]["difference"] == -0.5
    overall = differences[("all markets", "engine", "MRR@10")]
    assert overall["difference"] == pytest.approx((2 / 3 - 1 / 2) / 2)
    assert (overall["low"], overall["high"]) == pytest.approx((-1 / 2, 2 / 3))  # a resample may draw one query twice
    same = differences[("all markets", "last_night", "ROC-AUC")]
    assert (same["difference"], same["low"], same["high"]) == (0.0, 0.0, 0.0)
    assert result["inputs"]["compare.last_night"]["version"] == 1
    printed = capsys.readouterr().out
    assert "note: engine has no score for 1 of 6 judged pairs; they are left out of all rankings." in printed
    assert "relevance_score less" in printed
    assert "+0.083 [-0.500, +0.667]" in printed


def test_the_page_names_the_worst_queries_false_friends_and_missing_products(folder: Path) -> None:
    pd.DataFrame([("tw", "q1", "x", 1.0), ("tw", "q1", "y", 0.0)], columns=KEY_AND_SCORE).to_parquet(
        folder / "e5.parquet"
    )
    evaluate(
        folder,
        "baseline_bm25=false",
        "markets={kr: ko, tw: zh-TW}",
        f"inputs.compare.e5={{path: '{folder}/e5.parquet', format: parquet}}",
    )
    page = (folder / "output" / "evaluation.html").read_text(encoding="utf-8")
    text = " ".join(re.sub(r"<svg.*?</svg>|<style.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL).split())
    assert "By nDCG@10, relevance_score is neither better nor worse beyond chance than e5: -0.369." in text
    # the query of tw shows y first, which is irrelevant; x, the best, is second
    assert "tw 雨傘 q1 0.631 0.500 0.500 2 1 I 手套 y E 雨傘 x 2" in text
    assert "tw 雨傘 q1 -0.369 0.631 1.000 2 I 手套 y E 雨傘 x 2" in text
    # irrelevant products, highest score first in each market, with their places among published and judged products
    assert "kr 장갑 q2 운동화 a I 0.3000 1 of 2 1 – kr 빨간 신발 q1 빨간 우산 c I 0.1000 3 of 3 3 –" in text
    assert "tw 雨傘 q1 手套 y I 0.6000 1 of 2 1 2" in text
    # the only relevant product that is not among the first ten
    assert "kr no_product the catalog does not have the product 1" in text
    assert "kr no_product 장갑 q2 gone E – – – –" in text


@pytest.mark.parametrize("name", ["bm25", "grade", "a b", "1st"])
def test_a_name_of_a_ranking_that_would_be_unclear_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"inputs\.compare\..*such as search_engine"):
        load_config(CONF, EvaluationConfig, [f"inputs.compare={{'{name}': {{path: x}}}}"])


def test_other_scores_of_none_of_the_pairs_are_an_error(folder: Path) -> None:
    pd.DataFrame([("kr", "Q1", "a", 1.0)], columns=KEY_AND_SCORE).to_parquet(folder / "none.parquet")
    expected = r"input compare\.other at .*it has none of the 6 that are published\. Are its markets and ids"
    with pytest.raises(InputError, match=expected):
        evaluate(folder, f"inputs.compare.other={{path: '{folder}/none.parquet', format: parquet}}")


def test_the_result_says_what_it_was_made_from(folder: Path) -> None:
    result = evaluate(folder, "baseline_bm25=false", "markets={kr: ko}")
    assert result["inputs"]["relevance_scores"] == {"path": f"{folder}/tables/relevance_scores", "version": 1}
    assert result["bundle_digests"] == ["digest-1"]
    assert result["config"]["gains"] == {"E": 1.0, "S": 0.1, "C": 0.01, "I": 0.0}
    assert {"csrm", "ir-measures", "scikit-learn"} <= set(result["versions"])
    assert {row["market"] for row in result["metrics"]} == {"kr"}
    assert {row["ranking"] for row in result["metrics"]} == {"relevance_score", "random"}
    # without a split filter q2's judged pair of the train split counts too
    assert result["counts"] == [
        {"market": "kr", "num_judged": 5, "num_pairs": 4, "num_judged_queries": 2, "num_queries": 2}
    ]


def test_no_judgments_of_a_split_is_an_error(folder: Path) -> None:
    with pytest.raises(InputError, match=r"expected rows of markets .* and splits \['dev'\], got none"):
        evaluate(folder, "splits=[dev]", "baseline_bm25=false")


def test_a_market_without_judgments_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(folder, 'markets={"kr": "ko", "us": "en"}')
    assert "note: us: is not measured, it has no judgments of these splits." in capsys.readouterr().out


def test_settings_without_a_market_are_refused() -> None:
    with pytest.raises(ConfigError, match="markets: Dictionary should have at least 1 item"):
        load_config(CONF, EvaluationConfig, ["markets={}"])


def test_a_table_that_was_never_published_is_an_error(folder: Path) -> None:
    with pytest.raises(InputError, match="expected a Delta table, found none"):
        evaluate(folder, f"tables={folder}/nothing")
