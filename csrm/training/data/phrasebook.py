"""Put training pairs into another language, phrase by phrase: parallel text as a dictionary.

Code-switched training text aligns the languages of a multilingual model (Qin et al. 2020, "CoSDA-ML"): the label of a
pair stays what it was when its query, its product or both are said in the other language.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from csrm.scoring.phrasebook import Phrasebook

NUM_CHOICES = 60
"""Of a phrase's translations: each of up to six is as likely as the others."""


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
    """Put the queries of some groups into another language with their titles, and half of these groups' products too.

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
