"""The page about a market that is to be opened: what there is, and foreign text does nothing in it."""

from typing import Any

import numpy as np
import pandas as pd

from csrm.operations.findings import shortened
from csrm.operations.launch_findings import NUM_SCORE_STEPS, LaunchFindings
from csrm.operations.launch_report import launch_report_html, launch_summary
from tests.operations.test_report import HOSTILE, MADE_AT, SHOWN, Page

SEGMENT = ["dimension", "value", "num_queries", "num_without", "num_unscored", "num_foreign", "searches"]


def words_of(html: str) -> str:
    """Text of a page, with one space between cells."""
    return " ".join(Page(html.replace("</td>", " </td>").replace("</th>", " </th>")).text.split())


def hostile_launch(text: str = HOSTILE) -> LaunchFindings:
    """Every text of a market is the same one."""
    one = shortened(text)
    segments = [
        (name, text, 40, 10, 4, 3, 1000.0, 200.0) for name in ("all", "category", "length", "language", "frequency")
    ]
    of_query = {"query_id": one, "query": one, "language": text, "searches": np.nan, "score": None}
    return LaunchFindings(
        market=text,
        language=text,
        threshold=0.5,
        num_best=5,
        scores_version=7,
        bundle_digests=["0123456789abcdef" * 4],
        curve=[1 - step / NUM_SCORE_STEPS for step in range(NUM_SCORE_STEPS + 1)],
        segments=pd.DataFrame(segments, columns=[*SEGMENT, "searches_without"]),
        queries=pd.DataFrame([{**of_query, "title": None}, {**of_query, "title": one}]),
        foreign_queries=pd.DataFrame([{**of_query, "titles": [(one, text)]}]),
        terms=pd.DataFrame([{"term": one, "num_queries": 2, "searches": None, "query": one}]),
        num_terms=1,
        products=pd.DataFrame([(text, text, 5)], columns=["language", "reason", "num_products"]),
        unreached=pd.DataFrame(
            [{"product_id": one, "title": one, "language": text, "reason": text, "score": 0.25, "query": one}]
        ),
        live=pd.DataFrame([(text, "weak", 4, 8.0)], columns=["origin", "state", "num_queries", "searches"]),
        live_queries=pd.DataFrame(
            [{"origin": text, **of_query, "translation": one, "state": "weak"} | {"score": 0.125}]
        ),
        languages={text: text},
        notes=[text],
    )


def launch_of(**values: Any) -> LaunchFindings:
    """A market without queries, products, or anything that could be shown."""
    empty = {
        "segments": [*SEGMENT, "searches_without"],
        "queries": ["query_id", "query"],
        "foreign_queries": ["query_id", "query"],
        "terms": ["term"],
        "products": ["language", "reason", "num_products"],
        "unreached": ["product_id"],
        "live": ["origin", "state", "num_queries", "searches"],
        "live_queries": ["origin", "query_id"],
    }
    frames = {name: pd.DataFrame(columns=columns) for name, columns in empty.items()}
    given: dict[str, Any] = {"market": "tw", "language": "zh-TW", "threshold": 0.4, "num_best": 5, "num_terms": 0}
    given |= {"scores_version": 1, "bundle_digests": (), "curve": [0.0] * (NUM_SCORE_STEPS + 1), **frames, **values}
    return LaunchFindings(**given)


def test_foreign_text_is_only_text() -> None:
    page = Page(launch_report_html(hostile_launch(), MADE_AT))
    assert {"script", "img", "b"}.isdisjoint(page.tags)
    assert page.text.count(SHOWN) > 15
    languages = [value for name, value in page.attributes if name == "lang" and value is not None]
    assert SHOWN in languages
    assert "<" not in page.text.replace(SHOWN, "")


def test_counts_and_shares_are_those_of_the_segments() -> None:
    text = words_of(launch_report_html(hostile_launch("x"), MADE_AT))
    assert "30 of 40 queries find a good product" in text
    assert "10 queries find none, which is 20.0% of all searches; 4 of them have no scored product at all." in text
    assert "x 40 10 25.0% 20.0% 4 3" in text
    assert "weak was asked here, and has no good product 4 100.0% 100.0%" in text


def test_a_market_where_nothing_is_wanting_or_known_has_a_page() -> None:
    text = words_of(launch_report_html(launch_of(), MADE_AT))
    assert "0 of 0 queries find a good product" in text
    assert "Every query has one." in text
    assert "Queries of live markets" not in text


def test_the_summary_is_two_lines() -> None:
    assert launch_summary(hostile_launch("x")).splitlines() == [
        "x: 40 queries, 10 without a product of score 0.5 or more, 3 whose best titles are all from abroad; "
        "1 terms that no title has; 5 of 5 products that no query reaches",
        "x: 4 queries of x: 0 good, 4 weak, 0 not_scored, 0 untranslated",
    ]
