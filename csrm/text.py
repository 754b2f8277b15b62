"""Search terms of a text: what lexical retrieval matches on."""

import unicodedata

import regex

_VISIBLE = regex.compile(r"[^\s\p{Z}\p{C}]")
_IGNORABLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")
# Script extensions, so that the prolonged sound mark of kana counts as kana. Each of the two groups is one kind of run.
_RUNS = regex.compile(
    r"(?V1)(?P<dense>[[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Hangul}]&&[\p{L}\p{N}]]+)"
    r"|(?P<word>[\p{L}\p{N}][[\p{L}\p{N}\p{Mn}\p{Mc}]--[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Hangul}]]*)"
)


def has_text(text: str | None) -> bool:
    """Whether a text has more than white space and invisible characters, those of any script.

    >>> has_text("tea"), has_text("\\u3000\\u200b"), has_text(None)
    (True, False, False)
    """
    return text is not None and _VISIBLE.search(text) is not None


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
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    visible = unicodedata.normalize("NFKC", _IGNORABLE.sub("", folded))
    terms: list[str] = []
    for run in _RUNS.finditer(visible):
        characters = run.group()
        if run.lastgroup == "word" or len(characters) == 1:
            terms.append(characters)
        else:
            terms.extend(characters[i : i + 2] for i in range(len(characters) - 1))
    return terms
