import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from csrm.scoring.prompts import neutralize
from csrm.spark.text import is_blank, text_key_udf
from csrm.text import SHORT, has_text, normalized, search_terms, text_key, unknown_phrases
from csrm.training.data.database import has_text as has_text_sql
from csrm.training.data.database import open_database


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


SAME_TEXTS = [
    ("cafe\u0301", "CAF\u00c9"),
    ("Stra\u00dfe", "STRASSE"),
    ("\u0130stanbul", "i\u0307stanbul"),
    ("\ufb01ne", "FINE"),
    ("\u03a3\u038a\u03a3\u03a5\u03a6\u039f\u03a3", "\u03c3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2"),  # final sigma
    ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0645\u06cc\u062e\u0648\u0627\u0647\u0645"),  # ZWNJ
    ("\U0001f469\u200d\U0001f467", "\U0001f469\U0001f467"),  # ZWJ
    ("\ufefftea", "tea"),
    ("soft\u00adware", "software"),
    ("tea\u200bpot", "teapot"),
    ("\u1112\u1161\u11ab\u1100\u116e\u11a8", "\ud55c\uad6d"),  # Hangul Jamo
    ("\uff34\uff25\uff21\u3000\uff11", "tea 1"),
    ("\uff76\uff9e", "\u30ac"),  # half-width kana
    ("red\u00a0 tea\t", " Red tea"),
    ("red\x00tea", "red\ue000tea"),
    ("red\u2028tea", "red\x1ftea"),
]
OTHER_TEXTS = [("istanbul", "\u0131stanbul"), ("cafe", "caf\u00e9"), ("tea pot", "teapot"), ("\u30ab", "\u30ac")]
NOTHING = [
    "",
    " ",
    "\u3000\u200b",
    "\u3164",
    "\u2800",
    "\ufe0f",
    "\U000e0020",
    "\ue000",
    "\uffff",
    "\u200d",
    "\x00",
    "\u115f",
]
SOMETHING = ["a", "\u0301", "\U0001f469", "\u0378", "\U0001e4d0", "\u30fc", "\ufffd"]


@pytest.mark.parametrize(("one", "other"), SAME_TEXTS)
def test_spellings_of_one_text_have_one_key(one: str, other: str) -> None:
    assert text_key(one) == text_key(other) != ""


@pytest.mark.parametrize(("one", "other"), OTHER_TEXTS)
def test_different_texts_have_different_keys(one: str, other: str) -> None:
    assert text_key(one) != text_key(other)


@given(st.text(st.characters(exclude_categories=())))
def test_a_key_is_its_own_key_and_is_empty_where_there_is_no_text(text: str) -> None:
    key = text_key(text)
    assert text_key(key) == key == " ".join(key.split())
    assert has_text(text) or key == ""


def test_what_shows_nothing_is_what_unicode_says() -> None:
    nothing = regex.compile(
        r"[\s\p{Z}\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Default_Ignorable_Code_Point}\p{Noncharacter_Code_Point}\u2800]"
    )
    wrong = [code for code in range(0x110000) if has_text(chr(code)) == bool(nothing.match(chr(code)))]
    assert not wrong


def test_duckdb_knows_the_same_texts_as_python(tmp_path: Path) -> None:
    texts = [*(text for pair in SAME_TEXTS + OTHER_TEXTS for text in pair), *NOTHING, *SOMETHING, None]
    with open_database(str(tmp_path)) as database:
        database.execute("CREATE TABLE texts AS SELECT unnest($texts::VARCHAR[]) AS text", {"texts": texts})
        rows = database.execute(f"SELECT text, text_key(text), {has_text_sql('text')} FROM texts").fetchall()
    assert rows == [(text, None if text is None else text_key(text), has_text(text)) for text in texts]


@pytest.mark.spark
def test_spark_knows_the_same_texts_as_python(spark: SparkSession) -> None:
    texts = [*(text for pair in SAME_TEXTS + OTHER_TEXTS for text in pair), *NOTHING, *SOMETHING, None]
    rows = (
        spark.createDataFrame([(text,) for text in texts], "text string")
        .select("text", text_key_udf("text"), ~is_blank(F.col("text")))
        .collect()
    )
    assert [tuple(row) for row in rows] == [
        (text, None if text is None else text_key(text), has_text(text)) for text in texts
    ]


def test_nothing_is_no_text_and_what_a_newer_unicode_knows_is_some() -> None:
    assert not any(map(has_text, NOTHING))
    assert all(map(has_text, SOMETHING))


@pytest.mark.parametrize(
    ("text", "known", "phrases"),
    [
        ("Red shoe, red!", {"shoe"}, ["red"]),
        ("紅色手機殼", {"紅色", "手機", "機殼"}, []),  # 色手 is across two words
        ("紅色攀岩鞋男", {"紅色", "鞋男"}, ["攀岩"]),
        ("攀岩鞋", {"鞋男"}, ["攀岩鞋"]),
        ("紅色攀岩", {"紅色"}, ["攀岩"]),
        ("攀岩紅色", {"紅色"}, ["攀岩"]),
        ("女手機", {"手機"}, []),  # one character of a run says too little
        ("茶 tea", {"tea"}, ["茶"]),
        ("LG전자", {"lg"}, ["전자"]),
        ("", set(), []),
    ],
)
def test_unknown_phrases_are_whole_words_where_no_space_is_written(
    text: str, known: set[str], phrases: list[str]
) -> None:
    assert unknown_phrases(text, [term in known for term in search_terms(text)]) == phrases


@given(st.text())
def test_without_known_terms_every_run_is_a_phrase_and_with_all_of_them_none_is(text: str) -> None:
    num_terms = len(search_terms(text))
    phrases = unknown_phrases(text, [False] * num_terms)
    assert bool(phrases) == bool(num_terms)
    assert unknown_phrases(text, [True] * num_terms) == []


MANY_MARKS = "a" + "\u0301" * 20_000 + "\u0327" * 20_000
"""A title that Unicode normalisation alone takes ten seconds for, in each of its prompts."""


@pytest.mark.parametrize("cleaned", [text_key, neutralize, lambda text: "".join(search_terms(text))])
@pytest.mark.parametrize("text", [MANY_MARKS, ("\u0301" * 30 + "\u034f") * 1_000 + "\u0327" * 20_000])
def test_a_text_of_many_marks_takes_no_longer_than_others(cleaned: Callable[[str], str], text: str) -> None:
    before = time.process_time()
    found = cleaned(text)
    assert time.process_time() - before < 1
    assert cleaned(found) == found


def test_marks_that_a_language_needs_are_kept_in_texts_of_any_length() -> None:
    vietnamese, many = "e\u0302\u0323" * 1_000, "a" + "\u0301" * (SHORT - 1)
    assert normalized("NFC", vietnamese) == "\u1ec7" * 1_000
    assert normalized("NFC", many) == unicodedata.normalize("NFC", many)
    assert normalized("NFC", many + "b") == "\u00e1" + "\u0301" * 29 + "b"
