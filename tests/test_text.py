import pytest
from hypothesis import given
from hypothesis import strategies as st

from csrm.text import search_terms


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("Red shoe, red!", ["red", "shoe", "red"]),
        ("Women's 1.5L", ["women", "s", "1", "5l"]),
        ("LG전자 3겹 휴지", ["lg", "전자", "3", "겹", "휴지"]),
        ("無線藍牙耳機 X9", ["無線", "線藍", "藍牙", "牙耳", "耳機", "x9"]),
        ("「日本、東京」", ["日本", "東京"]),
        ("ノート", ["ノー", "ート"]),
        ("हिन्दी", ["हिन्दी"]),
    ],
)
def test_words_stay_whole_and_runs_without_spaces_become_bigrams(text: str, terms: list[str]) -> None:
    assert search_terms(text) == terms


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Ｆｕｌｌ　Ｗｉｄｔｈ", "full width"),
        ("ｶﾞｰﾃﾞﾝ", "ガーデン"),
        ("한국", "한국"),
        ("Stra\u00dfe", "STRASSE"),
        ("cafe\u0301", "Caf\u00e9"),
        ("soft\u00adware", "software"),
        ("葛\U000e0100城", "葛城"),
    ],
)
def test_spellings_that_read_the_same_give_the_same_terms(one: str, other: str) -> None:
    assert search_terms(one) == search_terms(other) != []


@pytest.mark.parametrize("text", [None, "", " \t\n", "!?、。", "\x00\x07\x1b", "\ud800", "👩‍👩‍👧", "\u3099"])
def test_text_without_letters_or_digits_has_no_terms(text: str | None) -> None:
    assert search_terms(text) == []


def test_control_characters_and_lone_surrogates_separate() -> None:
    assert search_terms("a\x00b\ud800c") == ["a", "b", "c"]


@given(st.text(st.characters(exclude_categories=())))
def test_terms_of_any_text_are_storable_and_are_found_by_themselves(text: str) -> None:
    for term in search_terms(text):
        assert term.encode("utf-8")
        assert search_terms(term) == [term]
