"""Texts in another language, phrase by phrase: parallel text as a dictionary."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial

import regex

from csrm.scoring.prompts import Translation, neutralize

MAX_PHRASE_CHARACTERS = 48
"""Longer texts are sentences, which do not occur inside a title."""
_DENSE = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]")


class Phrasebook:
    """Phrases of parallel text with their translations, in memory."""

    def __init__(self, texts: Iterable[Sequence[Translation]]) -> None:
        """Collect the phrases of parallel text.

        Args:
            texts: batches. A phrase may have several translations.
        """
        # no lambda, so that a phrasebook can be pickled
        self._phrases: dict[str, dict[str, dict[str, list[str]]]] = defaultdict(
            partial(defaultdict, partial(defaultdict, list))
        )
        self._longest: dict[str, int] = defaultdict(int)
        for batch in texts:
            for text in batch:
                phrase = neutralize(text.source_text).lower()
                if phrase and len(phrase) <= MAX_PHRASE_CHARACTERS:
                    translations = self._phrases[text.source_language][text.target_language][phrase]
                    if (translation := neutralize(text.target_text)) not in translations:
                        translations.append(translation)
                    self._longest[text.source_language] = max(self._longest[text.source_language], len(phrase))

    def known_languages(self) -> set[str]:
        """Those that have phrases."""
        return set(self._longest)

    def languages(self, language: str) -> list[str]:
        """What a language can be put into."""
        return sorted(self._phrases[language]) if language in self._phrases else []

    def translate(self, text: str | None, language: str, other: str, choice: int = 0) -> str:
        """A text with the phrases that are known in the other language, the longest first; the rest stays.

        Phrases start and end where words do; Han and kana, which are written without spaces, anywhere.

        Args:
            choice: which of a phrase's translations, at least 0; after the last comes the first.
        """
        return self.translate_and_rest(text, language, other, choice)[0]

    def translate_and_rest(self, text: str | None, language: str, other: str, choice: int = 0) -> tuple[str, str]:
        """As `translate`, and what stayed as it was, with a space for each phrase.

        >>> phrasebook = Phrasebook([[Translation("ko", "en", "여행 가방", "suitcase")]])
        >>> phrasebook.translate_and_rest("Norvia 여행 가방", "ko", "en")
        ('Norvia suitcase', 'Norvia')
        """
        phrases = self._phrases[language][other]
        clean = neutralize(text)
        lowered = clean.lower()
        if len(lowered) != len(clean):  # a few letters grow when they are lowered
            return clean, clean
        said, rest, start = [], [], 0
        while start < len(clean):
            end = next(
                (
                    end
                    for end in range(min(len(clean), start + self._longest[language]), start, -1)
                    if lowered[start:end] in phrases and _is_boundary(clean, start) and _is_boundary(clean, end)
                ),
                None,
            )
            if end is None:
                said.append(clean[start])
                rest.append(clean[start])
            else:
                translations = phrases[lowered[start:end]]
                said.append(translations[choice % len(translations)])
                rest.append(" ")
            start = start + 1 if end is None else end
        return "".join(said), " ".join("".join(rest).split())


def _is_boundary(text: str, place: int) -> bool:
    """Whether a phrase may start or end before this character."""
    if place in (0, len(text)):
        return True
    before, after = text[place - 1], text[place]
    return not (before.isalnum() and after.isalnum()) or bool(_DENSE.match(before) or _DENSE.match(after))
