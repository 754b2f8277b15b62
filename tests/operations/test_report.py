"""The page about a run says what there is, right and first things first; foreign text does nothing in it."""

import json
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest

from csrm.operations.findings import NUM_PLOT_BINS, Comparison, RunFindings, Texts, shortened
from csrm.operations.report import audit_results, night_report_html, pair_counts, pairs_per_second, verdict

MADE_AT = datetime(2026, 11, 24, 5, 6, tzinfo=UTC)
HOSTILE = (
    '<script>alert("1")</script><img src="http://127.0.0.1:9/x.png" onerror="alert(1)"> &lt;b&gt; {{ title }} '
    "\u202egnp.exe\u202c a\u200bb $x$"
)
SHOWN = (
    '<script>alert("1")</script><img src="http://127.0.0.1:9/x.png" onerror="alert(1)"> &lt;b&gt; {{ title }} '
    "⟨U+202E⟩gnp.exe⟨U+202C⟩ a⟨U+200B⟩b $x$"
)


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.text += data


def page_of(night: RunFindings) -> Page:
    return Page(night_report_html(night, MADE_AT))


def check(market: str, name: str, passed: bool, **values: Any) -> dict[str, Any]:
    sentence = f"What {name} says of {market}."
    preset = {"value": 0.5, "bound": "<= 0.25", "severity": "error", "sentence": sentence, "accepted": None}
    return {"market": market, "name": name, "passed": passed, **preset, **values}


def run_row(**values: Any) -> dict[str, Any]:
    started_at = datetime(2026, 11, 24, 1, 2, 3, tzinfo=UTC)
    return {
        "run_id": "night-24",
        "data_date": date(2026, 11, 24),
        "markets": ["kr", "tw"],
        "started_at": started_at,
        "finished_at": started_at + timedelta(minutes=2),
        "verdict": "published",
        "inputs": {"catalog": "s3://lake/catalog@v812", "queries": "s3://lake/queries@v233"},
        "bundle_digest": "0123456789abcdef" * 4,
        "precision": "int8",
        "device": "cuda:0 (CUDAExecutionProvider)",
        "versions": {"csrm": "0.1.0"},
        "num_candidates": 10_000,
        "num_unchanged": 8_900,
        "num_reused": 60,
        "num_scored": 1_000,
        "rejected": {"no_product": 30, "empty_title": 10},
        "changes": {"insert": 100, "update": 960, "delete": 7},
        "num_tokens": 64_000,
        "seconds": {"inputs": 5.0, "plan": 6.0, "scoring": 2.0, "audit": 7.0},
        "audit": json.dumps([check("kr", "drift.changed_psi", True), check("tw", "drift.grades", True)]),
        "base_version": 41,
        "published_version": 43,
        **values,
    }


def comparison() -> Comparison:
    bins = [
        ("kr", "before", "E", 22, 3),
        ("kr", "before", "I", 0, 97),
        ("kr", "after", "E", 22, 8),
        ("kr", "after", "I", 0, 92),
    ]
    summary = [("kr", "before", 0.11, 0.01, 0.02, 0.9), ("kr", "after", 0.12, 0.01, 0.03, 0.91)]
    changes = [
        ("kr", "insert", 100, 0, None, None),
        ("kr", "update", 960, 955, 0.0625, 0.75),
        ("kr", "delete", 7, 0, None, None),
    ]
    moves = ["market", "id", "num_up", "num_down", "total_move", "other_id", "before", "after"]
    return Comparison(
        bins=pd.DataFrame(bins, columns=["market", "state", "grade", "bin", "num_pairs"]),
        summary=pd.DataFrame(summary, columns=["market", "state", "mean", "p10", "p50", "p90"]),
        changes=pd.DataFrame(
            changes, columns=["market", "operation", "num_pairs", "num_moved", "mean_move", "largest_move"]
        ),
        queries=pd.DataFrame([("kr", "q1", 3, 21, 2.875, "p1", 0.125, 0.875)], columns=moves),
        products=pd.DataFrame([("kr", "p1", 1, 0, 0.75, "q1", 0.125, 0.875)], columns=moves),
        lost_queries=pd.DataFrame([("kr", "q1", 6_543, 12)], columns=["market", "id", "num_lost", "num_left"]),
        lost_products=pd.DataFrame([("kr", "gone", 7, 0)], columns=["market", "id", "num_lost", "num_left"]),
    )


def nothing_changed() -> Comparison:
    same = comparison()
    frames = ("changes", "queries", "products", "lost_queries", "lost_products")
    return replace(same, **{name: getattr(same, name).head(0) for name in frames})


def full_night(text: str = "운동화", **run: Any) -> RunFindings:
    """A run of which everything is known, after three others; `text` is the name of everything that has one."""
    rows = [
        run_row(run_id=f"night-{day}", data_date=date(2026, 11, day), num_scored=day * 10, num_candidates=day * 100)
        for day in (23, 22, 21)
    ]
    return RunFindings(
        runs=[run_row(**run), *rows],
        comparison=comparison(),
        rejected=pd.DataFrame([("kr", "no_product", 30)], columns=["market", "reason", "num_pairs"]),
        samples=pd.DataFrame(
            [("kr", "q1", "gone", "no_product")], columns=["market", "query_id", "product_id", "reason"]
        ),
        queries=Texts({("kr", "q1"): shortened(text)}, {("kr", "q1"): shortened(f"old {text}")}),
        products=Texts({("kr", "p1"): shortened(text)}),
        languages={"kr": "ko"},
    )


def hostile_night() -> RunFindings:
    """Everything that can be foreign is hostile."""
    market, run_id, many = f"m {HOSTILE}", f"r {HOSTILE}", HOSTILE * 50
    frames = comparison()
    frames = replace(
        frames,
        **{
            name: getattr(frames, name).assign(market=market)
            for name in ("bins", "summary", "changes", "queries", "products", "lost_queries", "lost_products")
        },
    )
    run = {
        "run_id": run_id,
        "markets": [market],
        "verdict": "rejected",
        "published_version": None,
        "inputs": {HOSTILE: many},
        "bundle_digest": "<script>",
        "precision": HOSTILE,
        "device": HOSTILE,
        "versions": {HOSTILE: HOSTILE},
        "rejected": {HOSTILE: 1},
        "seconds": {HOSTILE: 2.0, "scoring": 1.0},
        "audit": json.dumps(
            [
                check(market, HOSTILE, False, bound=HOSTILE, sentence=HOSTILE),
                check(market, HOSTILE, False, value=HOSTILE, accepted=many),
            ]
        ),
    }
    night = full_night(**run)
    texts = Texts({(market, "q1"): shortened(many), (market, "p1"): shortened(many)})
    return replace(
        night,
        runs=[night.runs[0], {**night.runs[0], "run_id": HOSTILE}],
        comparison=replace(frames, bins=frames.bins.assign(grade=HOSTILE)),
        rejected=pd.DataFrame([(market, HOSTILE, 1)], columns=["market", "reason", "num_pairs"]),
        samples=pd.DataFrame(
            [(market, HOSTILE, HOSTILE, HOSTILE)], columns=["market", "query_id", "product_id", "reason"]
        ),
        queries=texts,
        products=texts,
        languages={market: HOSTILE},
        notes=[HOSTILE],
    )


def test_the_figures_of_a_run_are_on_its_page() -> None:
    page = page_of(full_night())
    for shown in (
        "relevance_scores went from version 41 to version 43: 100 inserted, 960 updated, 7 deleted.",
        *("10,000", "8,900", "89.0%", "60", "1,000", "40"),
        "500",  # pairs/s: 1,000 in 2 s
        "32,000",  # tokens/s
        *("0123456789ab, int8", "cuda:0 (CUDAExecutionProvider)", "data of 2026-11-24"),
        *("s3://lake/catalog@v812", "s3://lake/queries@v233"),
        *("2026-11-24 01:02:03", "2026-11-24 01:04:03"),
        *("0.0625", "0.7500", "2.875", "0.125", "0.875", "old 운동화"),
        "the catalog does not have the product",
        *("night-21", "This run and the 3 before it."),
        "All 2 checks passed.",
        "Made 2026-11-24 05:06 UTC.",
    ):
        assert shown in page.text, shown
    for absent in ("None", "nan", "NaN"):
        assert absent not in page.text, absent
    assert page.tags.count("svg") == 3
    assert ("lang", "ko") in page.attributes


def test_a_page_is_the_same_each_time() -> None:
    assert night_report_html(full_night(), MADE_AT) == night_report_html(full_night(), MADE_AT)


@pytest.mark.parametrize(
    ("run", "tone", "word", "said"),
    [
        ({}, "good", "Published", "went from version 41 to version 43: 100 inserted, 960 updated, 7 deleted"),
        ({"base_version": None, "changes": {"insert": 5}}, "good", "Published", "went to version 43: 5 inserted."),
        (
            {"verdict": "already_published", "changes": {}},
            *("good", "Already published", "version 43 has these scores already"),
        ),
        (
            {"verdict": "running", "finished_at": None, "changes": None},
            *("warn", "Running, or died", "it still runs, or it died"),
        ),
        ({"verdict": "superseded", "changes": None}, "warn", "Superseded", "another run had published"),
        ({"verdict": "discarded", "changes": None}, "warn", "Discarded", "the scores were thrown away"),
        ({"verdict": "rejected", "changes": None}, "bad", "Rejected", "Nothing was published"),
    ],
)
def test_each_verdict_is_said_in_words(run: dict[str, Any], tone: str, word: str, said: str) -> None:
    found = verdict(run_row(**run))
    assert (found.tone, found.word) == (tone, word)
    assert said in found.sentences[0]
    page = page_of(full_night(**run))
    assert f": {word}" in page.text
    assert ("class", tone) in page.attributes


def test_queries_and_products_that_lost_pairs_are_named() -> None:
    page = page_of(full_night())

    assert "Queries that lost most pairs" in page.text
    assert "6,543" in page.text
    assert "Products that lost most pairs" in page.text
    assert "lost most pairs" not in page_of(replace(full_night(), comparison=nothing_changed())).text


def test_what_was_taken_back_since_is_said_first_and_in_the_history() -> None:
    sentence = "Market kr was rolled back to run r0 in version 9 of relevance_scores, 2026-11-28 22:00 UTC."
    findings = full_night(verdict="published", published_version=8)
    page = page_of(replace(findings, taken_back={findings.runs[0]["run_id"]: [sentence]}))

    assert ": Published, then changed" in page.text
    assert sentence in page.text
    assert ("class", "result warning") in page.attributes
    assert ("title", sentence) in page.attributes
    assert ("class", "warn") in page.attributes
    assert "then changed" not in page_of(findings).text


def test_a_rollback_stands_in_the_history_between_the_runs() -> None:
    findings = full_night()
    day, known = timedelta(days=1), full_night().runs
    runs = [{**run, "started_at": run["started_at"] - day * place} for place, run in enumerate(known)]
    newest, before = runs[:2]
    rolled_back, retired = "Market kr was rolled back to run r0.", "Market tw was retired: closed"
    events = [(newest["started_at"] + day / 4, retired), (newest["started_at"] - day / 4, rolled_back)]
    text = page_of(replace(findings, runs=runs, interventions=events)).text
    history = text[text.rindex("candidates") :]
    places = [history.index(one) for one in (retired, newest["run_id"], rolled_back, before["run_id"])]
    assert places == sorted(places)
    assert f"This run and the {len(findings.runs) - 1} before it." in text


def test_a_rejected_run_names_what_can_be_done() -> None:
    audit = [
        check("kr", "drift.changed_psi", False),
        check("tw", "drift.changed_psi", False),
        check("tw", "deleted", False),
        check("tw", "drift.new_ks", False, severity="warning"),
    ]
    found = verdict(run_row(run_id="it's", verdict="rejected", audit=json.dumps(audit)))
    again = """csrm publish --config FOLDER/publish.yaml --run-id 'it'"'"'s'"""
    assert found.commands == [
        f"""{again} --accept deleted --accept drift.changed_psi --reason "...\"""",
        f"{again} --discard",
    ]
    assert "failed in 3 checks" in found.sentences[0]
    assert found.sentences[1:] == ["The audit warns of 1 check."]


def test_what_no_reason_overrules_is_not_offered() -> None:
    audit = json.dumps([check("kr", "finite", False), check("kr", "deleted", False)])
    found = verdict(run_row(verdict="rejected", audit=audit))
    assert found.commands == ["csrm publish --config FOLDER/publish.yaml --run-id night-24 --discard"]
    assert "can be thrown away" in found.sentences[0]


def test_what_failed_comes_first_and_errors_before_warnings() -> None:
    audit = [
        check("kr", "unique", True),
        check("kr", "drift.new_ks", False, severity="warning"),
        check("kr", "deleted", False, accepted="half of the shop closed"),
        check("tw", "canary", False, value=None, bound="<= 1e-05"),
    ]
    results = audit_results(run_row(audit=json.dumps(audit)))
    assert [(one["name"], one["result"]) for one in results] == [
        ("canary", "error"),
        ("drift.new_ks", "warning"),
        ("deleted", "accepted"),
        ("unique", "passed"),
    ]
    assert verdict(run_row(audit=json.dumps(audit))).tone == "warn"
    text = page_of(full_night(audit=json.dumps(audit))).text
    places = [text.index(f"What {name} says of") for name in ("canary", "drift.new_ks", "deleted", "unique")]
    assert places == sorted(places)
    assert "Accepted: half of the shop closed" in text
    assert "no number" in text
    assert "1 checks that passed" in text


def test_values_are_written_by_what_they_are() -> None:
    audit = [check("kr", "x", True, value=value) for value in (13190, 0.0312555, 2.0, 1.2e-7)]
    assert [one["shown"] for one in audit_results(run_row(audit=json.dumps(audit)))] == [
        "13,190",
        "0.03126",
        "2",
        "1.2e-07",
    ]


def test_candidates_are_accounted_for() -> None:
    assert [(name, count) for name, _, count in pair_counts(run_row())] == [
        ("unchanged", 8_900),
        ("reused", 60),
        ("scored", 1_000),
        ("rejected", 40),
    ]
    pending = pd.DataFrame({"operation": ["pending", "pending", "update"], "num_pairs": [3, 4, 9]})
    *_, last = pair_counts(run_row(rejected=None), replace(comparison(), changes=pending))
    assert last == ("missing", "not scored yet", 7)


@pytest.mark.parametrize(
    "run", [{"num_scored": None}, {"num_scored": 0}, {"seconds": {}}, {"seconds": {"scoring": 0.0}}]
)
def test_a_run_that_scored_nothing_has_no_throughput(run: dict[str, Any]) -> None:
    row = run_row(**run)
    assert pairs_per_second(row, [row, run_row()]) is None
    assert "nan" not in page_of(full_night(**run)).text


def test_the_throughput_of_runs_that_scored_little_is_not_shown() -> None:
    large, small = run_row(num_scored=5_560), run_row(num_scored=145)
    assert pairs_per_second(large, [small, large]) == 5_560 / large["seconds"]["scoring"]
    assert pairs_per_second(small, [small, large]) is None
    assert pairs_per_second(small, [small]) == 145 / small["seconds"]["scoring"]


def test_runs_of_one_day_are_told_apart_by_their_times() -> None:
    morning, evening = datetime(2026, 11, 28, 6, 5, tzinfo=UTC), datetime(2026, 11, 28, 18, 7, tzinfo=UTC)
    day = {"data_date": date(2026, 11, 28)}
    night = full_night()
    runs = [run_row(run_id="b", started_at=evening, **day), run_row(run_id="a", started_at=morning, **day)]
    html = night_report_html(replace(night, runs=runs), MADE_AT)
    assert "28 Nov 06:05" in html
    assert "28 Nov 18:07" in html


def test_stages_are_in_the_order_in_which_a_run_takes_them() -> None:
    text = page_of(full_night(seconds={"later": 1.0, "publish": 2.5, "scoring": 3.5, "inputs": 4.5})).text
    places = [text.index(shown) for shown in ("4.5 s", "3.5 s", "2.5 s", "1.0 s")]
    assert places == sorted(places)


def test_a_run_without_any_change_says_so() -> None:
    page = page_of(replace(full_night(), comparison=nothing_changed()))
    assert "No row changed." in page.text
    assert "moved most" not in page.text


def test_a_run_that_died_early_has_a_page() -> None:
    died = dict.fromkeys(
        [
            *("finished_at", "num_candidates", "num_unchanged", "num_reused", "num_scored", "rejected", "changes"),
            *("num_tokens", "audit", "base_version", "published_version"),
        ]
    )
    run = run_row(verdict="running", seconds={}, **died)
    page = page_of(RunFindings(runs=[run], notes=["run_pairs has no pairs of this run."]))
    for shown in ("There are no audit results", "There are no scores to show", "There is nothing to compare"):
        assert shown in page.text
    assert "This is the first run." in page.text
    assert "None" not in page.text
    assert "svg" not in page.tags


def test_a_first_run_has_only_a_state_after_it() -> None:
    first = comparison()
    first = replace(
        first,
        bins=first.bins[first.bins["state"] == "after"],
        summary=first.summary[first.summary["state"] == "after"],
        changes=first.changes[first.changes["operation"] == "insert"],
        queries=first.queries.head(0),
        products=first.products.head(0),
    )
    page = page_of(replace(full_night(base_version=None), comparison=first))
    assert "relevance_scores: none yet" in page.text
    described = [value for name, value in page.attributes if name == "aria-label" and "relevance score" in str(value)]
    assert described == [
        "Market 1 of 2: share of pairs by relevance score; after the run 100 pairs of median score 0.030"
    ]


def test_scores_that_are_no_scores_are_counted_and_not_drawn() -> None:
    frames = comparison()
    broken = pd.DataFrame([("kr", "after", "E", -1, 100)], columns=frames.bins.columns)
    bins = pd.concat([frames.bins[frames.bins["state"] == "before"], broken])
    summary = frames.summary.assign(**dict.fromkeys(("mean", "p10", "p50", "p90"), np.nan))
    page = page_of(replace(full_night(), comparison=replace(frames, bins=bins, summary=summary)))
    assert "100, of which 100 outside [0, 1]" in page.text
    assert "nan" not in page.text


def test_all_scores_may_be_equal() -> None:
    frames = comparison()
    one = pd.DataFrame([("kr", "after", "E", NUM_PLOT_BINS - 1, 5)], columns=frames.bins.columns)
    assert page_of(replace(full_night(), comparison=replace(frames, bins=one))).tags.count("svg") == 3


def test_rejected_pairs_are_counted_from_the_runs_row_where_their_rows_are_gone() -> None:
    page = page_of(replace(full_night(), rejected=None, samples=None))
    assert page.text.index("no_product") < page.text.index("empty_title")
    assert "the product has no title" in page.text


def test_long_texts_are_cut_and_their_length_is_said() -> None:
    page = page_of(full_night("가" * 1234))
    assert "가" * 140 + "… (1,234 characters)" in page.text
    assert "가" * 141 not in page.text


def test_a_text_without_anything_to_see_is_said_to_be_empty() -> None:
    assert "empty" in page_of(full_night(" ")).text


def test_runs_that_started_later_are_counted() -> None:
    assert "2 started later." in page_of(replace(full_night(), num_newer=2)).text


def test_foreign_text_is_only_text() -> None:
    html = night_report_html(hostile_night(), MADE_AT)
    page = Page(html)
    assert html.encode("utf-8")
    assert {"script", "img", "b"}.isdisjoint(page.tags)
    assert page.text.count(SHOWN) > 20
    assert not any(character in html for character in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200b")
    assert f"… ({50 * len(HOSTILE):,} characters)" in page.text


@pytest.mark.parametrize("night", [full_night(), hostile_night()], ids=["full", "hostile"])
def test_the_page_needs_no_network(night: RunFindings) -> None:
    html = night_report_html(night, MADE_AT)
    page = Page(html)
    assert {"link", "script", "img", "iframe", "object", "form", "base"}.isdisjoint(page.tags)
    assert "url(http" not in html
    assert "@import" not in html
    for name, value in page.attributes:
        assert name in ("xmlns", "xmlns:xlink", "title") or not (value or "").startswith(("http", "//")), (name, value)
        assert not name.startswith("on"), name
        assert name != "href" or (value or "").startswith("#")
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_tables_have_headers_and_plots_are_described() -> None:
    html = night_report_html(full_night(), MADE_AT)
    page = Page(html)
    assert page.tags.count("th") == sum(name == "scope" for name, _ in page.attributes)
    assert html.count('<svg role="img" aria-label="') == page.tags.count("svg")
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
