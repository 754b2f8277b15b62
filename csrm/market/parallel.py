"""Parallel text of invented markets: the lexicon's words and some titles, in every pair of languages."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product

import numpy as np
import pandas as pd

from csrm.market.facts import draw_products
from csrm.market.generator import split_of
from csrm.market.lexicon import Forms, Lexicon
from csrm.market.wording import product_titles
from csrm.schemas import PARALLEL_TEXT

NUM_TITLES = 1_000
"""Titles for each pair of languages, of products that no market has."""


def parallel_text(seed: int, lexicons: Sequence[Lexicon]) -> pd.DataFrame:
    """Names of categories, brands and attributes, values and titles of each two languages: columns of `parallel_text`.

    Words are of split train, as a dictionary is; a title and its translations are in one split, which its first
    language's text decides. Values and titles are left out where the two lexicons do not have the same values, as
    happens with a taxonomy; the split of a name is then decided as that of a title.

    Args:
        seed: of the titles.
        lexicons: their categories are the same, in the same order.

    >>> from csrm.market import builtin_lexicon
    >>> texts = parallel_text(7, [builtin_lexicon("ko"), builtin_lexicon("en")])
    >>> sorted(set(texts["kind"]))
    ['attribute', 'taxonomy name', 'title']
    """
    rows: list[tuple[str, ...]] = []
    for one, other in combinations(lexicons, 2):
        texts = [("taxonomy name", *pair) for pair in _names(one, other)]
        words: set[str] = set()
        if _value_counts(one) == _value_counts(other):
            texts += [("attribute", *pair) for pair in _values(one, other)]
            words = {source for _, source, _ in texts}
            texts += [("title", *pair) for pair in _titles(seed, one, other)]
        for kind, source, target in dict.fromkeys(texts):
            split = "train" if source in words else split_of(source)
            rows.append((one.language, other.language, source, target, kind, split))
    return pd.DataFrame(rows, columns=PARALLEL_TEXT.column_names)


def _names(one: Lexicon, other: Lexicon) -> Iterator[tuple[str, str]]:
    for a, b in zip(one.categories, other.categories, strict=True):
        yield from product(a.names, b.names)
        yield a.department, b.department


def _values(one: Lexicon, other: Lexicon) -> Iterator[tuple[str, str]]:
    for key, attribute in one.attributes.items():
        yield attribute.name, other.attributes[key].name
        forms: Iterator[tuple[Forms, Forms]] = zip(attribute.values, other.attributes[key].values, strict=True)
        for a, b in forms:
            yield from product(a, b)
    for a, b in zip(one.brands, other.brands, strict=True):
        yield from product(a, b)


def _titles(seed: int, one: Lexicon, other: Lexicon) -> Iterator[tuple[str, str]]:
    products = draw_products(np.random.default_rng([seed, 5]), one, NUM_TITLES, no_brand=0.0)
    titles = (product_titles(np.random.default_rng([seed, 6]), lexicon, products) for lexicon in (one, other))
    return zip(*titles, strict=True)


def _value_counts(lexicon: Lexicon) -> Mapping[str, int]:
    return {key: len(attribute.values) for key, attribute in lexicon.attributes.items()}
