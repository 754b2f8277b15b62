"""The page about two tables of scores: what it says, and foreign text does nothing in it."""

import dataclasses

import numpy as np
import pandas as pd

from csrm.operations.comparison import ScoreComparison, most_changed_queries, summarize
from csrm.operations.comparison_page import comparison_html, comparison_text
from csrm.operations.findings import shortened
from tests.operations.test_report import HOSTILE, MADE_AT, SHOWN, Page


def comparison_of(market: str, text: str, *, num_kept: int = 4) -> ScoreComparison:
    """One query of a market, whose every text is the same."""
    query = {
        **{"market": market, "query_id": text, "query": text, "num_before": 12, "num_after": 12, "num_shared": 12},
        **{"rank_correlation": 0.25, "num_top_before": 10, "num_top_after": 10, "num_kept": num_kept},
        **{"is_first_same": num_kept == 10, "num_graded": 12, "num_regraded": 3 if num_kept < 10 else 0},
    }
    queries = pd.DataFrame([query])
    pair = {"market": market, "query_id": text, "product_id": text}
    moves = [{**pair, "before_rank": 2, "after_rank": np.nan}, {**pair, "before_rank": 11, "after_rank": 3}]
    regraded = {**pair, "before_score": 0.9, "before_grade": text, "before_rank": 2}
    regraded |= {"after_score": 0.1, "after_grade": "I", "after_rank": 40}
    grades = {"market": market, "before_grade": [text, text], "after_grade": [text, "I"], "num_pairs": [9, 3]}
    return ScoreComparison(
        summary=summarize(queries, [market]),
        queries=queries,
        grades=pd.DataFrame(grades),
        most_changed=most_changed_queries(queries, 10),
        changes=pd.DataFrame(moves),
        regraded=pd.DataFrame([regraded]),
        query_texts={(market, text): shortened(text)},
        product_texts={(market, text): shortened(text)},
        places={"before": text, "after": text},
    )


def hostile_comparison() -> str:
    """A page in which every text is the same hostile one."""
    return comparison_html(comparison_of(HOSTILE, HOSTILE), {HOSTILE: HOSTILE}, MADE_AT)


def words_of(html: str) -> str:
    return " ".join(Page(html.replace("</td>", " </td>").replace("</th>", " </th>")).text.split())


def test_foreign_text_does_nothing_in_the_page() -> None:
    page = Page(hostile_comparison())
    assert {"script", "img", "b"}.isdisjoint(page.tags)
    assert page.text.count(SHOWN) > 15


def test_the_page_says_what_leaves_and_enters_and_which_grades_change() -> None:
    text = words_of(comparison_html(comparison_of("kr", "x"), {"kr": "ko"}, MADE_AT))
    assert "The first 10 products change in 100.0% of 1 queries" in text
    assert "40.0% of the first 10 stay, and the ranks have a correlation of 0.250. 25.0% of pairs" in text
    assert "kr x x 4 of 10 0.250 2 → – x x 11 → 3 x x" in text
    assert "x 12 25.0% 75.0%" in text
    assert "kr x x x x x → I 0.9000 0.1000 2 40" in text


def test_a_market_without_change_has_a_page() -> None:
    same = comparison_of("kr", "x", num_kept=10)
    text = words_of(comparison_html(same, {"kr": "ko"}, MADE_AT))
    assert "Every query keeps its first 10." in text
    assert "the first 10 change in 0.0% of queries, where 100.0% of products stay" in comparison_text(same)


def test_a_market_without_scores_is_shown_too() -> None:
    comparison = comparison_of("kr", "x")
    comparison = dataclasses.replace(comparison, summary=summarize(comparison.queries, ["kr", "US"]))
    lines = comparison_text(comparison).splitlines()
    assert lines[0] == "US: 0 queries and 0 pairs are in both; 0 pairs before alone, 0 after alone"
    assert lines[2].startswith("kr: 1 queries and 12 pairs are in both")
    assert "US 0" in words_of(comparison_html(comparison, {"kr": "ko", "US": "en"}, MADE_AT))
