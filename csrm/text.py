"""What text is: whether there is any, when two texts are the same, and the terms that lexical retrieval matches on.

Every engine asks here. Spark and DuckDB have their own rules, which differ by engine and by version.
"""

import re
import unicodedata
from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import regex

_NOTHING = """
    0-20 7f-a0 ad 34f 600-605 61c 6dd 70f 890-891 8e2 115f-1160 1680 17b4-17b5 180b-180f 2000-200f 2028-202f 205f-206f
    2800 3000 3164 e000-f8ff fdd0-fdef fe00-fe0f feff ffa0 fff0-fffb fffe-ffff 110bd 110cd 13430-1343f 1bca0-1bca3
    1d173-1d17a 1fffe-1ffff 2fffe-2ffff 3fffe-3ffff 4fffe-4ffff 5fffe-5ffff 6fffe-6ffff 7fffe-7ffff 8fffe-8ffff
    9fffe-9ffff afffe-affff bfffe-bffff cfffe-cffff dfffe-e0fff efffe-10ffff
"""
_RANGES = [(part.partition("-")[0], part.rpartition("-")[2]) for part in _NOTHING.split()]
NOTHING_CLASS = "".join(rf"\x{{{first}}}-\x{{{last}}}" for first, last in _RANGES)
"""Characters that show nothing, as Java's and RE2's regular expressions write them between [ and ].

They are white space; control, format and private characters; those that Unicode says to ignore; what is no character;
and the empty Braille cell. `has_text` counts lone surrogates too, which neither engine can hold.
"""
_PYTHON_CLASS = r"\ud800-\udfff" + "".join(rf"\U{first:0>8}-\U{last:0>8}" for first, last in _RANGES)
_NOTHING_RUN = re.compile(f"[{_PYTHON_CLASS}]+")
_SOMETHING = re.compile(f"[^{_PYTHON_CLASS}]")
_IGNORABLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")
SHORT = 256
"""Characters of a text that may be anything: see normalized."""
_MANY_MARKS = regex.compile(r"(\P{ccc=0}{30})\P{ccc=0}+")
# Script extensions, so that the prolonged sound mark of kana counts as kana. Each of the two groups is one kind of run.
_RUNS = regex.compile(
    r"(?V1)(?P<dense>[[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Hangul}]&&[\p{L}\p{N}]]+)"
    r"|(?P<word>[\p{L}\p{N}][[\p{L}\p{N}\p{Mn}\p{Mc}]--[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Hangul}]]*)"
)


def normalized(form: Literal["NFC", "NFKC"], text: str) -> str:
    """A text in a Unicode form, in time that grows with its length.

    Putting the marks of one character in order takes the square of their number: 40,000 of them, as a hostile title may
    have, ten seconds. In texts of over SHORT characters, marks after the thirtieth of a character are left out. No
    language needs more (Unicode Standard Annex 15, Stream-Safe Text Format).

    >>> normalized("NFC", "Cafe\u0301") == "Caf\u00e9"
    True
    """
    if len(text) <= SHORT:
        return unicodedata.normalize(form, text)
    few = unicodedata.normalize(form, _MANY_MARKS.sub(r"\1", text))
    return _MANY_MARKS.sub(r"\1", few)


def has_text(text: str | None) -> bool:
    """Whether a text has more than white space and invisible characters, those of any script.

    >>> has_text("tea"), has_text("\\u3000\\u200b"), has_text(None)
    (True, False, False)
    """
    return text is not None and _SOMETHING.search(text) is not None


def text_key(text: str) -> str:
    """The same for all spellings of a text: those that differ in Unicode form, case and invisible characters alone.

    The text is put into NFKC, case-folded without regard to a language, and freed of the characters that Unicode says
    to ignore (Unicode's NFKC_Casefold). So "ß" is "ss", "ﬁ" is "fi", and full-width letters are letters. Then a run of
    white space, control and private characters is one space, and none is at an end. A key is its own key.

    >>> text_key("Cafe\\u0301\\u00a0 STRASSE") == text_key("caf\\u00e9 stra\\u00dfe\\ufeff")
    True
    """
    if text.isascii() and text.isprintable():
        return " ".join(text.lower().split())
    return _NOTHING_RUN.sub(" ", _folded(text)).strip(" ")


def search_terms(text: str | None) -> list[str]:
    """Terms of a text, in order, with repetitions.

    The text is put into NFKC, case-folded, and freed of invisible characters (Unicode's NFKC_Casefold). Then each run
    of letters and digits is one term; a run of Han, kana or Hangul, which are written without spaces or glue particles
    to words, gives its character bigrams (one character alone gives itself). Everything else, control characters and
    lone surrogates too, only separates. Thai, Lao, Khmer and Burmese are not segmented: a run of them is one term.

    Args:
        text: any string; None counts as empty.

    Returns:
        Terms, none of them empty.
    """
    if text is None:
        return []
    terms: list[str] = []
    for run in _RUNS.finditer(_folded(text)):
        characters = run.group()
        if run.lastgroup == "word" or len(characters) == 1:
            terms.append(characters)
        else:
            terms.extend(characters[i : i + 2] for i in range(len(characters) - 1))
    return terms


def unknown_phrases(text: str, is_known: Sequence[bool]) -> list[str]:
    """Phrases of a text that have no known term, each once, in order.

    In scripts that are written without spaces, terms are pairs of neighbours, and a pair across two words is rarely in
    any other text. So one unknown pair between known ones is no phrase, and of more the outer characters, which belong
    to known pairs, are left out.

    Args:
        text: any string.
        is_known: for each of `search_terms(text)`, whether it is known.

    >>> text = "남성용 blue 클라이밍화"
    >>> search_terms(text)
    ['남성', '성용', 'blue', '클라', '라이', '이밍', '밍화']
    >>> unknown_phrases(text, [True, True, False, False, False, False, False])
    ['blue', '클라이밍화']
    >>> unknown_phrases("手機殼", [True, False])
    []
    """
    found: dict[str, None] = {}
    start = 0
    for run in _RUNS.finditer(_folded(text)):
        characters = run.group()
        if run.lastgroup == "word" or len(characters) == 1:
            if not is_known[start]:
                found[characters] = None
            start += 1
            continue
        num_terms = len(characters) - 1
        known = is_known[start : start + num_terms]
        for is_term_known, places in groupby(range(num_terms), key=known.__getitem__):
            if not is_term_known:
                pairs = list(places)
                first = pairs[0] if pairs[0] == 0 else pairs[0] + 1
                last = pairs[-1] + 1 if pairs[-1] == num_terms - 1 else pairs[-1]
                if last > first:
                    found[characters[first : last + 1]] = None
        start += num_terms
    return list(found)


def _folded(text: str) -> str:
    """Unicode's NFKC_Casefold."""
    if text.isascii():
        return text.lower()
    folded = normalized("NFKC", normalized("NFKC", text).casefold())
    return normalized("NFKC", _IGNORABLE.sub("", folded))
