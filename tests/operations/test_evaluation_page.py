"""The page about an evaluation: what it says, and foreign text does nothing in it."""

from dataclasses import replace

import pandas as pd

from csrm.evaluation.calibration import calibration, threshold_metrics
from csrm.evaluation.examples import false_friends, first_and_best, missing_products, moved_queries, worst_queries
from csrm.evaluation.metrics import evaluate_scores
from csrm.operations.evaluation import PublishedEvaluation
from csrm.operations.evaluation_page import evaluation_html
from csrm.operations.findings import shortened
from tests.operations.test_report import HOSTILE, MADE_AT, SHOWN, Page

GAINS = {"E": 1.0, "I": 0.0}


def measured(market: str = "kr", text: str = "text", *, swap: bool = False) -> PublishedEvaluation:
    """Thirty queries with a relevant and an irrelevant product; the published scores put the relevant one first.

    Args:
        market: name of the market.
        text: every id of a product, query and title; of queries, with its number.
        swap: put the irrelevant one first, and let engine be right.
    """
    rows = []
    for number in range(30):
        query = f"{number} {text}"
        rows.append((market, query, f"good {text}", "E", 0.9 - swap * 0.5, 0.1 + swap * 0.5, 12.0))
        rows.append((market, query, f"bad {text}", "I", 0.5, 0.5, 2.0))
    columns = ["market", "query_id", "product_id", "grade", "relevance_score", "engine", "rank"]
    judged = pd.DataFrame(rows, columns=columns).assign(
        bundle_digest=text, num_ranked=20.0, has_product=True, has_query=True, query=text
    )
    evaluation = evaluate_scores(
        judged, ["relevance_score", "engine"], gains=GAINS, relevant_grades=["E"], irrelevant_grades=["I"]
    )
    evaluation = replace(evaluation, notes=(text,))
    ranked = judged.assign(**{"rank by relevance_score": 1.0, "rank by engine": 2.0})
    return PublishedEvaluation(
        evaluation=evaluation,
        queries=evaluation.queries,
        judged=judged,
        curves=calibration(judged, "relevance_score", relevant_grades=["E"]),
        thresholds=threshold_metrics(judged, "relevance_score", relevant_grades=["E"]),
        worst=first_and_best(judged, worst_queries(evaluation.queries, "relevance_score", 5), GAINS),
        moved={
            "engine": first_and_best(judged, moved_queries(evaluation.queries, "relevance_score", "engine", 5), GAINS)
        },
        false_friends=false_friends(ranked, "relevance_score", ["I"], 5),
        missing=missing_products(ranked, ["E"], 5),
        titles={(market, f"good {text}"): shortened(text), (market, f"bad {text}"): shortened(text)},
        provenance={
            "inputs": {"judgments": {"path": text, "version": 3}},
            "bundle_digests": [text],
            "versions": {"csrm": text},
            "config": {"gains": GAINS, "splits": [text], "relevant_grades": ["E"]},
        },
    )


def hostile_evaluation() -> str:
    """A page in which every text of the market is the same hostile one."""
    return evaluation_html(measured(HOSTILE, HOSTILE, swap=True), {HOSTILE: HOSTILE}, MADE_AT)


def test_foreign_text_does_nothing_in_the_page() -> None:
    page = Page(hostile_evaluation())
    assert {"script", "img", "b"}.isdisjoint(page.tags)
    assert page.text.count(SHOWN) > 30


def test_the_page_says_first_whether_another_ranking_is_better() -> None:
    text = " ".join(Page(evaluation_html(measured(), {"kr": "ko"}, MADE_AT)).text.split())
    assert "By nDCG@10, relevance_score is better than engine: +0.369 [+0.369, +0.369]." in text
    html = evaluation_html(measured(swap=True), {"kr": "ko"}, MADE_AT)
    assert "relevance_score is worse than engine: -0.369 [-0.369, -0.369]." in " ".join(Page(html).text.split())
    assert '<header class="warn">' in html


def test_a_plot_shows_all_five_metrics_of_each_ranking() -> None:
    html = evaluation_html(measured(), {"kr": "ko"}, MADE_AT)
    plot, reliability = [part.split("</svg>")[0] for part in html.split("<svg")[1:]]
    assert "share of relevant pairs by score" in reliability
    for word in ("nDCG@10", "MRR@10", "defect rate@10", "ROC-AUC", "average precision", "engine", "random"):
        assert word in plot
    assert "the five metrics of 3 rankings with 95 % intervals; nDCG@10 of relevance_score is 1.000" in plot


def test_a_market_where_nothing_is_wrong_has_a_page() -> None:
    fine = measured()
    none = fine.judged.iloc[:0]
    html = evaluation_html(replace(fine, moved={}, false_friends=none, missing=none), {"kr": "ko"}, MADE_AT)
    text = " ".join(Page(html).text.split())
    assert "No query is ranked worse than people would rank it." in text
    assert text.count("There are none.") == 2
    assert "Better and worse queries" not in text
