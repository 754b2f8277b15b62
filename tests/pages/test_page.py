"""Pages show foreign text as what it is."""

import pytest

from csrm.pages.page import number, seen
from csrm.pages.plots import INK, new_figure, svg


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("여성 운동화, 透明手機殼, é", "여성 운동화, 透明手機殼, é"),
        ("\u202egnp.exe\u202c", "⟨U+202E⟩gnp.exe⟨U+202C⟩"),
        ("a\u200bb\ufeffc\u2060d\u00ade", "a⟨U+200B⟩b⟨U+FEFF⟩c⟨U+2060⟩d⟨U+00AD⟩e"),
        ("\u3164\u2800\U000e0041", "⟨U+3164⟩⟨U+2800⟩⟨U+E0041⟩"),
        ("a\nb\x00\ud800", "a⟨U+000A⟩b⟨U+0000⟩⟨U+D800⟩"),
        ("👩\u200d💻 ❤\ufe0f", "👩\u200d💻 ❤\ufe0f"),  # these are spelled with a joiner and a variation selector
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("e" + "\u0301" * 10, "e" + "\u0301" * 8 + "⟨U+0301⟩" * 2),
    ],
)
def test_characters_that_cannot_be_seen_are_written_out(text: str, shown: str) -> None:
    assert seen(text) == shown


def test_a_number_that_is_not_known_is_a_dash() -> None:
    assert [number(value, ".1f") for value in (1.25, 0, None, float("nan"))] == ["1.2", "0.0", "–", "–"]


def test_a_plot_has_the_ink_of_the_page_and_no_ids_that_another_plot_has() -> None:
    figure, axes = new_figure("x", "y")
    axes.plot([0, 1], [0, 1])
    drawing = str(svg(figure, 'a "plot" \u202e <b>'))
    assert drawing.startswith('<svg role="img" aria-label="a &#34;plot&#34; ⟨U+202E⟩ &lt;b&gt;"')
    assert "currentColor" in drawing
    assert INK not in drawing
    assert '<g id="' not in drawing
