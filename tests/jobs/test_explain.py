"""The page about a query, on real Delta tables and with a real bundle."""

from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import SparkSession

from csrm.bundle.loading import load_scorer
from csrm.cli import run_job
from csrm.commands.explain import main
from csrm.config import load_config
from csrm.errors import ConfigError, InputError
from csrm.operations.explanation import ExplanationConfig, explain_query
from csrm.schemas import REJECTED_PAIRS, RELEVANCE_SCORES, RETRIEVAL_TABLE, SCORING_RUNS
from csrm.scoring.packing import Pack
from csrm.scoring.prompts import Product
from csrm.scoring.runtime import load_pack_scorer
from csrm.scoring.scorer import PairScorer
from tests.operations.test_history import STARTED, run_row, write
from tests.operations.test_report import HOSTILE, SHOWN, Page

pytestmark = pytest.mark.spark

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "conf" / "demo_bundle"
CATALOG = [
    ("us", "p1", "Red Canvas Backpack", "Norvia", "Bags", '{"Color": "Red"}'),
    ("us", "p2", "Wireless Mouse", None, None, None),
    ("us", "p3", "Blue Backpack", None, "Bags", None),
    ("us", "p4", HOSTILE, HOSTILE, None, None),
    ("us", "p5", " ", None, None, None),
    ("kr", "p1", "빨간 배낭", None, None, None),
]
QUERIES = [
    ("us", "q1", "Red  Backpack", 5),
    ("us", "q2", "red backpack", 9),
    ("us", "q3", HOSTILE, None),
    ("us", "q4", None, None),
    ("kr", "q1", "배낭", 1),
]
TITLES = [("us", "q2", 1, "p3", "Blue Backpack", 1.0, "lexical"), ("us", "q2", 2, "p1", HOSTILE, 0.5, "behaviour")]


@pytest.fixture(scope="module")
def scorer() -> PairScorer:
    return load_scorer(BUNDLE, "cpu", threads=1)


@pytest.fixture(scope="module")
def folder(spark: SparkSession, scorer: PairScorer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two published nights: p1 gets another score in the second, and p2 comes. Titles were replaced since."""
    folder = tmp_path_factory.mktemp("explain")
    tables = folder / "tables"
    names = ["market", "product_id", "title", "brand", "category", "attributes"]
    pd.DataFrame(CATALOG, columns=names).to_parquet(folder / "catalog.parquet")
    pd.DataFrame(QUERIES, columns=["market", "query_id", "query", "frequency"]).to_parquet(folder / "queries.parquet")
    judgments = [("us", "q2", "p1", "E"), ("us", "q1", "p1", "I")]
    pd.DataFrame(judgments, columns=["market", "query_id", "product_id", "grade"]).to_parquet(
        folder / "judgments.parquet"
    )
    read = write(spark, tables, RETRIEVAL_TABLE, TITLES)
    write(spark, tables, RETRIEVAL_TABLE, [("us", "q2", 1, "p2", "Wireless Mouse", 1.0, "lexical")])
    pair = {"market": "us", "language": "en", "query": "red backpack", "retrieved_titles": [TITLES[0][4], HOSTILE]}
    products = [{**pair, "title": row[2], "brand": row[3], "category": row[4]} for row in CATALOG[:2]]
    products[0]["attributes"] = {"Color": "Red"}
    first, second = scorer.score(pd.DataFrame(products))["relevance_score"].tolist()
    digest = scorer.digest

    def row(query: str, product: str, score: float, run: str, day: int = 0) -> tuple[Any, ...]:
        return ("us", query, product, score, "S", digest, 1, STARTED + timedelta(days=day), run)

    write(spark, tables, RELEVANCE_SCORES, [row("q2", "p1", 0.125, "r0"), row("q3", "p4", 0.5, "r0")])
    write(
        spark,
        tables,
        RELEVANCE_SCORES,
        [row("q2", "p1", first, "r1", 1), row("q2", "p2", second, "r1", 1), row("q3", "p4", 0.5, "r0")],
    )
    write(
        spark,
        tables,
        REJECTED_PAIRS,
        [("us", "q2", "p5", "empty_title", "r1"), ("us", "q4", "p1", "empty_query", "r1")],
    )
    inputs = {
        "catalog": f"{folder}/catalog.parquet",
        "queries": f"{folder}/queries.parquet",
        "retrieval_table": f"{tables}/retrieval_table@v{read}",
    }
    runs = [
        run_row("r0", 0, "published", published_version=1, markets=["us"], inputs=inputs),
        run_row("r1", 1, "published", base_version=1, published_version=2, markets=["us"], inputs=inputs),
        run_row("r2", 2, "rejected", base_version=2, markets=["us"], inputs={}),
    ]
    write(spark, tables, SCORING_RUNS, runs)
    return folder


def arguments(folder: Path, *words: str, market: str = "us") -> list[str]:
    settings = [f"inputs.{name}.path={folder}/{name}.parquet" for name in ("catalog", "queries", "judgments")]
    settings += [f"tables={folder}/tables", f"output={folder}/pages", f"bundle={BUNDLE}"]
    words = ("--market", market, *words)
    config = ["--config", str(ROOT / "conf" / "explain.yaml")]
    return [*config, *(word for setting in settings for word in ("--set", setting)), *words]


def page_of(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    """What is printed, and the page."""
    assert main(arguments(folder, *words)) == 0
    out = capsys.readouterr().out
    path = Path(out.splitlines()[-1].removeprefix("page: "))
    assert path.parent == folder / "pages"
    return out, path.read_text(encoding="utf-8")


def test_a_query_is_found_by_its_text_and_its_best_product_is_explained(
    folder: Path, scorer: PairScorer, capsys: pytest.CaptureFixture[str]
) -> None:
    out, html = page_of(folder, capsys, "--query", "RED backpack ")
    page = Page(html)

    assert out.startswith("query q2 of us: red backpack\n")  # the most frequent one of this text
    assert "Other queries have the same text: q1. Name one by --query-id." in page.text
    assert "2 products have a score in relevance_scores, version 2. Run r1 published the market last." in page.text
    assert "get another score now" not in page.text  # titles are those of the run, not those of today
    assert "behaviour" in page.text
    assert "Published scores are of bundle" not in page.text
    assert {"script", "img", "b"}.isdisjoint(page.tags)
    assert SHOWN in page.text
    best = "p1" if "p1]" in out.splitlines()[3] else "p2"
    assert f"what moves the score of {best}" in out
    for part in ("market", "language", "query", "retrieved title", "title"):
        assert part in page.text


def test_a_named_product_has_its_parts_its_grade_and_its_history(
    folder: Path, scorer: PairScorer, capsys: pytest.CaptureFixture[str]
) -> None:
    _, html = page_of(folder, capsys, "--query-id", "q2", "--product", "p1")
    page = Page(html)

    pair = {"market": "us", "language": "en", "query": "red backpack", "retrieved_titles": [TITLES[0][4], HOSTILE]}
    fields = {"title": CATALOG[0][2], "brand": "Norvia", "category": "Bags", "attributes": {"Color": "Red"}}
    score = scorer.score(pd.DataFrame([{**pair, **fields}]))["relevance_score"].item()
    assert f"Its score is {score:.4f} now, and {score:.4f} is published." in page.text
    without = scorer.score(pd.DataFrame([{**pair, **fields, "brand": None}]))["relevance_score"].item()
    assert f"{without:.4f}" in page.text
    assert "0.1250" in page.text  # its score of the first night
    assert "r0" in page.text
    assert (folder / "pages" / "us.q2.p1.html").exists()
    assert "<td>E</td>" in html  # a person's grade; the predicted one is S
    assert "P(E)" in page.text


def test_a_product_without_a_score_is_scored_now_and_the_reason_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, html = page_of(folder, capsys, "--query-id", "q2", "--product", "p3")
    page = Page(html)

    assert "Product p3 has no published score for this query." in out
    assert "Run r1, the last one, rejected no such pair: it was no candidate, or its score was taken back." in page.text
    assert "what moves the score of p3" in out
    assert "The change feed has no score of this pair." in page.text


def test_a_query_that_no_product_has_a_score_for_says_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, html = page_of(folder, capsys, "--query-id", "q4")
    assert main(arguments(folder, "--query-id", "q4", "--product", "p1")) == 0
    assert "The model is not asked for p1: the query" in Page((folder / "pages" / "us.q4.p1.html").read_text()).text

    assert "No product has a published score for this query. Run r1, the last one, rejected: 1 empty_query." in out
    assert "There is no product to explain. Name one with --product." in Page(html).text


def test_hostile_text_is_only_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, html = page_of(folder, capsys, "--query-id", "q3")

    assert {"script", "img", "b"}.isdisjoint(Page(html).tags)
    assert "\x1b" not in out
    assert "\u202e" not in out


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--query", "red bagpack"], InputError, r"no query of this text. Similar ones: 'red backpack' \(q2\)"),
        (["--query-id", "q9"], InputError, r"--query-id 'q9': market 'us' has no such query"),
        (["--query-id", "q2", "--product", "p9"], InputError, r"--product 'p9': it has no score for this query, and"),
        (
            ["--query-id", "q2", "--product", "p5"],
            InputError,
            r"with a title\. Run r1, the last one, rejected: 1 empty_t",
        ),
        (["--query-id", "q2", "--set", "markets={kr: ko}"], ConfigError, r"--market 'us': expected one of \['kr'\]"),
        (["--query-id", "q2", "--set", "tables=/nothing"], InputError, r"expected a Delta table, found none"),
    ],
)
def test_bad_input_is_refused(folder: Path, words: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        main(arguments(folder, *words))


def test_another_bundle_than_the_published_one_is_said(
    folder: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = page_of(folder, capsys, "--query-id", "q2", "--set", f"bundle={tiny_bundle}")

    assert "Published scores are of bundle " in out


def test_neither_text_nor_id_is_refused_before_anything_starts(folder: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        run_job(main, arguments(folder))
    assert caught.value.code == 2


def test_a_product_that_the_model_fails_on_is_named_and_the_others_are_scored(
    spark: SparkSession, folder: Path, scorer: PairScorer
) -> None:
    mouse, backpack = scorer.tokenizer.suffix_ids([Product("Wireless Mouse"), Product("Red Canvas Backpack")])
    poison = sorted(set(mouse) - set(backpack))

    def fails_on_mice(pack: Pack) -> np.ndarray:
        if np.isin(poison, pack.input_ids).any():
            raise RuntimeError("a kernel does not like mice")
        return pack_scorer(pack)

    pack_scorer = load_pack_scorer(BUNDLE / "model.onnx", "cpu", 1)[0]
    fragile = PairScorer(scorer.tokenizer, scorer.labels, pack_scorer=fails_on_mice, tokens_per_call=512)
    fragile.score(pd.DataFrame([{"market": "us", "language": "en", "query": "bag", "title": "Bag"}]))
    given = arguments(folder)
    settings = [value for flag, value in pairwise(given) if flag == "--set"]
    config = load_config(ROOT / "conf" / "explain.yaml", ExplanationConfig, settings)

    found = explain_query(spark, config, fragile, market="us", query_id="q2", product_id="p2")

    assert "The model gives product p2 no score: model_error." in found.notes
    assert found.parts is None
    scores = found.products.set_index("product_id")["score_now"]
    assert scores.notna().to_dict() == {"p1": True, "p2": False}
