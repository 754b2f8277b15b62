"""Put training pairs into another language, phrase by phrase: parallel text as a dictionary.

Code-switched training text aligns the languages of a multilingual model (Qin et al. 2020, "CoSDA-ML"): the label of a
pair stays what it was when its query, its product or both are said in the other language.
"""

import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import regex

from csrm.scoring.prompts import Translation, neutralize

MAX_PHRASE_CHARACTERS = 48
"""Longer texts are sentences, which do not occur inside a title."""
NUM_CHOICES = 60
"""Of a phrase's translations: each of up to six is as likely as the others."""
_DENSE = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]")


class Phrasebook:
    """Phrases of parallel text with their translations, in memory."""

    def __init__(self, texts: Iterable[Sequence[Translation]]) -> None:
        """Collect the phrases of parallel text.

        Args:
            texts: batches. A phrase may have several translations.
        """
        self._phrases: dict[str, dict[str, dict[str, list[str]]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(list))
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
        phrases = self._phrases[language][other]
        clean = neutralize(text)
        lowered = clean.lower()
        if len(lowered) != len(clean):  # a few letters grow when they are lowered
            return clean
        said, start = [], 0
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
            else:
                translations = phrases[lowered[start:end]]
                said.append(translations[choice % len(translations)])
            start = start + 1 if end is None else end
        return "".join(said)


def _is_boundary(text: str, place: int) -> bool:
    """Whether a phrase may start or end before this character."""
    if place in (0, len(text)):
        return True
    before, after = text[place - 1], text[place]
    return not (before.isalnum() and after.isalnum()) or bool(_DENSE.match(before) or _DENSE.match(after))


class _Texts(NamedTuple):
    """What a pair says."""

    language: str
    query: str | None
    retrieved_titles: tuple[str, ...]
    title: str | None
    brand: str | None
    category: str | None
    attributes: Sequence[tuple[str, str | None]] | None


def with_switched_languages(
    batches: Iterable[pd.DataFrame], phrasebook: Phrasebook, share: float, seed: int
) -> Iterator[pd.DataFrame]:
    """Put the queries of some groups into another language with their retrieved titles, and half of these groups'
    products too.

    A market without labels has both: its own products, and products that are listed there from abroad. Brand, category
    and attributes go with their title: what stayed in the source language would tell there what the product is, and
    nothing in the market without labels. Half of the titles choose among a phrase's translations as their query does,
    the others on their own: a small model learns both that one word stays one word, and which words mean the same.

    Args:
        batches: group_number, language, query, retrieved_titles, title, brand, category, attributes.
        share: of the groups.
        seed: of the choice of groups and languages.
    """
    names = list(_Texts._fields)

    def choice_of(group: int, title: str | None, of_query: int) -> int:
        rng = np.random.default_rng([seed, group, zlib.crc32((title or "").encode())])
        return of_query if rng.random() < 0.5 else int(rng.integers(NUM_CHOICES))

    @lru_cache(maxsize=1)  # the pairs of a group, which follow one another, are switched alike
    def switched_query(
        group: int, language: str, query: str | None, titles: tuple[str, ...]
    ) -> tuple[str, str, tuple[str, ...], int, bool] | None:
        """Language, query and retrieved titles, the query's choice, and whether products are switched; or None."""
        rng = np.random.default_rng([seed, group])
        others = phrasebook.languages(language)
        if not others or rng.random() >= share:
            return None
        other = others[rng.integers(len(others))]
        choice, has_products = int(rng.integers(NUM_CHOICES)), bool(rng.random() < 0.5)
        say = partial(phrasebook.translate, language=language, other=other)
        said = tuple(say(title, choice=choice_of(group, title, choice)) for title in titles)
        return other, say(query, choice=choice), said, choice, has_products

    def switched(group: int, texts: _Texts) -> _Texts:
        found = switched_query(group, texts.language, texts.query, texts.retrieved_titles)
        if found is None:
            return texts
        other, query, titles, choice, has_products = found
        said = texts._replace(language=other, query=query, retrieved_titles=titles)
        if not has_products:
            return said
        choice = choice_of(group, texts.title, choice)
        say = partial(phrasebook.translate, language=texts.language, other=other, choice=choice)
        return said._replace(
            title=say(texts.title),
            brand=say(texts.brand),
            category=say(texts.category),
            attributes=[(say(name), say(value)) for name, value in texts.attributes or ()],
        )

    for batch in batches:
        texts = map(_Texts._make, batch[names].itertuples(index=False))
        rows = [switched(group, text) for group, text in zip(batch["group_number"], texts, strict=True)]
        columns: dict[str, Any] = {name: [row[place] for row in rows] for place, name in enumerate(names)}
        yield batch.assign(**columns)
