"""The report's numbers are right, it shows what there is and nothing else, and foreign text does nothing in it."""

from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from csrm.training.report import RoundRecord, StageRecord, largest_moves, reliability, report_html

STAGES = [
    StageRecord(
        "translation",
        num_packs=1200,
        settings={"learning_rate": 2e-4, "parallel_text": {"path": "texts"}},
        losses={"translation": [(10, 3.2), (20, 2.9)]},
    ),
    StageRecord("round-0", losses={"relevance": [(10, 1.2), (20, 0.9)], "translation": [(10, 2.9), (20, 2.8)]}),
]
ROUNDS = [
    RoundRecord(0, ndcg=0.71, auc=0.8),
    RoundRecord(1, is_kept=True, ndcg=0.74, auc=0.82, agreement=0.6543, control_auc=0.715, flipped_share=0.125),
]
HOSTILE = '<script>alert("1")</script> \u202egnp.exe\u202c \u2067x\u2069 \x00 \ud800 & ${x}$ {{ title }}'


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.get_starttag_text() == "<h2>" and data.strip():
            self.headings.append(data)


def hostile_tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    texts = {"query": [HOSTILE], "title": [HOSTILE], "grade": [HOSTILE]}
    issues = pd.DataFrame(
        {**texts, "suggested_label": ["I"], "given_probability": [0.031], "suggested_probability": [0.951]}
    )
    return issues, pd.DataFrame({**texts, "before": [0.111], "after": [0.888]})


def test_reliability_and_its_error_are_those_worked_by_hand() -> None:
    scores = np.array([0.05, 0.05, 0.95, 0.85, 0.1, 1.0])
    found = reliability(scores, np.array([False, True, True, False, False, True]))
    np.testing.assert_allclose(found.mean_scores, [0.2 / 3, 0.85, 0.975], atol=1e-6)
    np.testing.assert_allclose(found.relevant_shares, [1 / 3, 0.0, 1.0])
    assert found.num_pairs.tolist() == [2 + 1, 1, 2]
    assert found.expected_error == pytest.approx((3 * (1 / 3 - 0.2 / 3) + 0.85 + 2 * 0.025) / 6)


def test_scores_that_are_the_share_of_relevant_pairs_have_no_calibration_error() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random(50_000)
    is_relevant = rng.random(50_000) < scores
    assert reliability(scores, is_relevant).expected_error < 0.01
    assert reliability(scores**3, is_relevant).expected_error > 0.1


def test_the_pairs_that_moved_most_come_first_and_those_that_did_not_move_are_left_out() -> None:
    pairs = pd.DataFrame({"query": "q", "title": list("abcd"), "grade": "E", "market": "us"}, index=[7, 7, 8, 9])
    pairs = pairs.reset_index(drop=True)
    moves = largest_moves(pairs, [0.5, 0.1, 0.9, 0.3], [0.5, 0.3, 0.2, 0.31], num_rows=2)
    assert moves["title"].tolist() == ["c", "b"]
    assert list(moves.columns) == ["query", "title", "grade", "before", "after"]
    assert len(largest_moves(pairs, [0.5, 0.1, 0.9, 0.3], [0.5, 0.3, 0.2, 0.31])) == 3


def test_a_full_report_shows_every_part() -> None:
    issues, moves = hostile_tables()
    page = Page(report_html("Run 7", STAGES, ROUNDS, reliability(np.array([0.2]), np.array([True])), issues, moves))
    assert page.headings == [
        "Stages",
        "Rounds",
        "Calibration on the dev split",
        "Given labels that look wrong",
        "Examples that moved most",
    ]
    assert page.tags.count("svg") == 4
    numbers = ("0.7400", "0.7150", "0.8200", "0.6543", "12.5%", "0.800", "0.95", "0.89")
    for shown in ("1,200 packs", "learning_rate", "kept", *numbers):
        assert shown in page.text, shown


def test_what_is_not_there_is_left_out() -> None:
    assert Page(report_html("Run")).headings == []
    page = Page(report_html("Run", [StageRecord("model")], [RoundRecord(0, ndcg=0.5, auc=float("nan"))]))
    assert page.headings == ["Stages", "Rounds"]
    assert "svg" not in page.tags
    assert "details" not in page.tags
    for absent in ("AUC", "flipped", "nan", "None", "packs"):
        assert absent not in page.text, absent


def test_a_missing_text_or_number_is_not_written_as_a_word() -> None:
    issues, moves = hostile_tables()
    issues.loc[0, ["title", "grade", "given_probability"]] = None
    moves.loc[0, ["query", "before"]] = [float("nan"), None]
    page = Page(report_html("Run", label_issues=issues, moves=moves))
    assert "None" not in page.text
    assert "nan" not in page.text
    assert page.text.count("–") == 2


def test_foreign_text_is_only_text() -> None:
    issues, moves = hostile_tables()
    stage = StageRecord(HOSTILE, settings={HOSTILE: HOSTILE}, losses={"\ud800<script>$x$": [(1, 2.0), (2, 1.0)]})
    html = report_html(HOSTILE, [stage], ROUNDS, None, issues, moves)
    page = Page(html)
    assert html.encode("utf-8")
    assert "script" not in page.tags
    assert '<script>alert("1")</script> ⟨U+202E⟩gnp.exe⟨U+202C⟩ ⟨U+2067⟩x⟨U+2069⟩ ⟨U+0000⟩ ⟨U+D800⟩' in page.text
    assert "{{ title }}" in page.text
    assert not any(character in html for character in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\x00")
    assert page.tags.count("bdi") == 4


def test_the_page_needs_no_network_and_is_the_same_each_time() -> None:
    issues, moves = hostile_tables()
    first, second = (report_html("Run", STAGES, ROUNDS, None, issues, moves) for _ in range(2))
    assert first == second
    page = Page(first)
    assert {"link", "script", "img", "iframe", "object"}.isdisjoint(page.tags)
    assert "url(http" not in first
    assert "@import" not in first
    for name, value in page.attributes:
        assert name in ("xmlns", "xmlns:xlink") or not (value or "").startswith(("http", "//")), (name, value)
        assert not name.startswith("on")
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_plots_have_the_ink_of_the_page() -> None:
    html = report_html("Run", STAGES, ROUNDS)
    assert "currentColor" in html
    assert "#010203" not in html
    assert "#000000" not in html
