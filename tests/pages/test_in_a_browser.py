"""Reports in a real browser: nothing leaves the page, nothing is wrong with it, and it can be read on a phone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from csrm.operations.launch_report import launch_report_html
from csrm.operations.report import night_report_html
from tests.browser import Browser, Visit, open_browser
from tests.operations.test_comparison_page import hostile_comparison
from tests.operations.test_evaluation_page import hostile_evaluation
from tests.operations.test_launch_report import hostile_launch
from tests.operations.test_report import MADE_AT, full_night, hostile_night

NIGHTS = {"full": full_night(), "hostile": hostile_night()}

# Nothing answers at these addresses, and nothing needs to: asking is what must be noticed.
ASKING = """<!DOCTYPE html><link rel="stylesheet" href="http://127.0.0.1:9/style.css">
<style>@font-face { font-family: f; src: url(http://127.0.0.1:9/font.woff2); } p { font-family: f; }</style>
<p>text</p><img src="http://127.0.0.1:9/image.png"><iframe src="http://127.0.0.1:9/frame.html"></iframe>
<script>
fetch("http://127.0.0.1:9/fetch").catch(() => {});
new WebSocket("ws://127.0.0.1:9/socket");
navigator.sendBeacon("http://127.0.0.1:9/beacon");
setTimeout(() => fetch("http://127.0.0.1:9/later").catch(() => {}), 100);
</script>"""
COMPLAINING = """<!DOCTYPE html><script>
console.error("logged"); setTimeout(() => { throw new Error("thrown"); }, 50); Promise.reject(new Error("refused"));
</script>"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def visit(browser: Browser, folder: Path, html: str) -> Visit:
    page = folder / "page.html"
    page.write_text(html, encoding="utf-8")
    return browser.open(page)


def contrast(visit: Visit, selector: str) -> float:
    """Contrast of an element's text with the page, as WCAG 2 defines it, from 1 to 21."""

    def luminance(colour: str) -> float:
        shares = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ink = visit.value(f"getComputedStyle(document.querySelector({selector!r})).color")
    page = visit.value("getComputedStyle(document.body).backgroundColor")
    dark, light = sorted((luminance(ink), luminance(page)))
    return (light + 0.05) / (dark + 0.05)


def test_a_page_that_asks_for_anything_is_noticed(browser: Browser, tmp_path: Path) -> None:
    asked = {request.rpartition("/")[2] for request in visit(browser, tmp_path, ASKING).requests}
    expected = {"style.css", "font.woff2", "image.png", "frame.html", "fetch", "socket", "beacon", "later"}
    assert asked == expected


def test_a_page_that_complains_is_noticed(browser: Browser, tmp_path: Path) -> None:
    complaints = visit(browser, tmp_path, COMPLAINING).complaints
    assert len(complaints) == 3
    assert "logged" in complaints[0]


def test_a_script_in_the_page_would_be_refused_and_noticed(browser: Browser, tmp_path: Path) -> None:
    html = night_report_html(NIGHTS["full"], MADE_AT)
    marked = html.replace("</body>", "<script>document.title = 'ran'</script><p onclick='x'>text</p></body>")
    assert marked != html
    page = visit(browser, tmp_path, marked)
    assert page.value("document.title") == "Run night-24: Published"
    assert any("inline script" in complaint for complaint in page.complaints)


@pytest.mark.parametrize("name", NIGHTS)
def test_the_page_asks_for_nothing_and_complains_of_nothing(browser: Browser, tmp_path: Path, name: str) -> None:
    page = visit(browser, tmp_path, night_report_html(NIGHTS[name], MADE_AT))
    assert page.value("document.querySelectorAll('section').length") == 5
    assert page.requests == []
    assert page.complaints == []


@pytest.mark.parametrize("name", NIGHTS)
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_no_wider_than_the_window(browser: Browser, tmp_path: Path, name: str, width: int) -> None:
    page = visit(browser, tmp_path, night_report_html(NIGHTS[name], MADE_AT))
    page.resize(width)
    assert page.value("innerWidth") == width
    assert page.value("document.documentElement.scrollWidth") == width
    # what is wider than the window scrolls in a box of its own, which a keyboard reaches
    inside = "[...document.querySelectorAll('.wide')].every(box => box.tabIndex === 0 && box.clientWidth <= innerWidth)"
    assert page.value(inside)


def test_a_page_that_is_too_wide_is_noticed(browser: Browser, tmp_path: Path) -> None:
    html = night_report_html(NIGHTS["full"], MADE_AT).replace("</body>", "<p style='width: 500px'>text</p></body>")
    page = visit(browser, tmp_path, html)
    page.resize(360)
    assert page.value("document.documentElement.scrollWidth") > 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_read_in_light_and_in_dark(browser: Browser, tmp_path: Path, scheme: str) -> None:
    page = visit(browser, tmp_path, night_report_html(NIGHTS["hostile"], MADE_AT))
    page.emulate(scheme)
    is_dark = page.value("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert is_dark == (scheme == "dark")
    for selector in ("h1", "h1 .verdict", ".quiet", ".result.error", ".result.accepted", "del, .note", "svg text"):
        assert contrast(page, selector) >= 4.5, selector
    inks = "[...document.querySelectorAll('svg text')].map(text => getComputedStyle(text).fill)"
    ink = page.value("getComputedStyle(document.body).color")
    assert set(page.value(inks)) == {ink}


def test_what_is_folded_is_printed(browser: Browser, tmp_path: Path) -> None:
    page = visit(browser, tmp_path, night_report_html(NIGHTS["full"], MADE_AT))
    height = "document.querySelector('details').getBoundingClientRect().height"
    folded = page.value(height)
    page.emulate(media="print")
    assert page.value(height) > folded + 40
    assert page.value("getComputedStyle(document.querySelector('nav')).display") == "none"


@pytest.mark.parametrize("width", [360, 1280])
def test_a_launch_report_asks_for_nothing_and_is_no_wider_than_the_window(
    browser: Browser, tmp_path: Path, width: int
) -> None:
    page = visit(browser, tmp_path, launch_report_html(hostile_launch(), MADE_AT))
    page.resize(width)
    assert page.value("document.documentElement.scrollWidth") == width
    assert page.value("document.querySelectorAll('section').length") == 6
    assert page.requests == []
    assert page.complaints == []


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize(("html", "num_sections"), [(hostile_evaluation(), 8), (hostile_comparison(), 4)])
def test_pages_about_scores_ask_for_nothing_and_are_no_wider_than_the_window(
    browser: Browser, tmp_path: Path, html: str, num_sections: int, width: int
) -> None:
    page = visit(browser, tmp_path, html)
    page.resize(width)
    assert page.value("document.documentElement.scrollWidth") == width
    assert page.value("document.querySelectorAll('section').length") == num_sections
    assert page.requests == []
    assert page.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_evaluation_can_be_read_in_light_and_in_dark(browser: Browser, tmp_path: Path, scheme: str) -> None:
    page = visit(browser, tmp_path, hostile_evaluation())
    page.emulate(scheme)
    for selector in ("h1 .verdict", "td.bad", ".note", "svg text"):
        assert contrast(page, selector) >= 4.5, selector
