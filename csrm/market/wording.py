"""Titles as sellers write them and queries as shoppers type them, from facts."""

import numpy as np

from csrm.market.facts import NOTHING, Facts
from csrm.market.lexicon import Category, Forms, Lexicon

SYNONYM_SHARE = 0.55
"""Of category names in titles and in queries."""
VALUE_SYNONYM_SHARE = 0.3
NO_CATEGORY_SHARE = 0.05
"""Titles that name no category at all."""
NO_BRAND_SHARE = 0.12
"""Titles that leave out a brand which the product has."""
ATTRIBUTE_SHARE = 0.8
"""Attributes that a title names."""
MODEL_SHARE = 0.25
DEPARTMENT_SHARE = 0.1
EXTRA_SHARE = 0.15
"""Of a prefix, and of a suffix."""
UNSPACED_QUERY_SHARE = {"ko": 0.15, "zh-TW": 0.6, "ja": 0.6}
"""Queries typed without spaces, by language."""

_ROWS_AT_ONCE = 50_000


def product_titles(rng: np.random.Generator, lexicon: Lexicon, products: Facts) -> list[str]:
    """One title for each product; none is empty."""
    titles = []
    for start in range(0, len(products.category), _ROWS_AT_ONCE):
        part = products.rows(slice(start, start + _ROWS_AT_ONCE))
        chances = rng.random((len(part.category), 10 + 2 * part.values.shape[1]))
        rows = zip(part.category.tolist(), part.brand.tolist(), part.values.tolist(), chances.tolist(), strict=True)
        titles += [_title(lexicon, *row) for row in rows]
    return titles


def _title(lexicon: Lexicon, place: int, brand: int, values: list[int], chances: list[float]) -> str:
    category = lexicon.categories[place]
    (
        names_category,
        names_brand,
        by_form,
        by_brand,
        by_model,
        by_template,
        by_department,
        by_prefix,
        by_suffix,
        by_extra,
    ) = chances[:10]
    name = _form(category.names, by_form, SYNONYM_SHARE)
    shown = [
        value if chance < ATTRIBUTE_SHARE else NOTHING for value, chance in zip(values, chances[10:], strict=False)
    ]
    before, after = _value_words(lexicon, category, shown, chances[10 + len(values) :])
    words = {
        "category": [name] if names_category >= NO_CATEGORY_SHARE else [],
        "before": before,
        "after": after,
        "brand": [_form(lexicon.brands[brand], by_brand, 0.4)]
        if brand != NOTHING and names_brand >= NO_BRAND_SHARE
        else [],
        "model": [_model(by_model)] if by_model < MODEL_SHARE else [],
    }
    template = lexicon.templates[int(by_template * len(lexicon.templates))]
    parts = [template.glue.join(word for key in part for word in words[key]) for part in template.parts]
    title = template.separator.join(part for part in parts if part) or name
    if by_department < DEPARTMENT_SHARE:
        title = f"{title} {category.department}"
    if by_prefix < EXTRA_SHARE:
        title = f"{lexicon.prefixes[int(by_extra * len(lexicon.prefixes))]} {title}"
    if by_suffix < EXTRA_SHARE:
        title = f"{title} {lexicon.suffixes[int(by_extra * len(lexicon.suffixes))]}"
    return title


def query_text(rng: np.random.Generator, lexicon: Lexicon, wanted: Facts) -> str:
    """How a shopper types one query: `wanted` has one row."""
    category = lexicon.categories[int(wanted.category[0])]
    brand = int(wanted.brand[0])
    by_form, by_brand, by_order, by_case, by_space = rng.random(5)
    before, after = _value_words(
        lexicon, category, wanted.values[0].tolist(), rng.random(len(category.attributes)).tolist()
    )
    name = _form(category.names, by_form, SYNONYM_SHARE)
    brands = [_form(lexicon.brands[brand], by_brand, 0.4)] if brand != NOTHING else []
    words = [name, *brands, *before, *after] if by_order < 0.15 else [*brands, *before, name, *after]
    text = ("" if by_space < UNSPACED_QUERY_SHARE.get(lexicon.language, 0.0) else " ").join(words)
    return text.lower() if by_case < 0.8 else text


def _value_words(
    lexicon: Lexicon, category: Category, values: list[int], chances: list[float]
) -> tuple[list[str], list[str]]:
    """Words that go before the category, and words that go after it; NOTHING has none."""
    before: list[str] = []
    after: list[str] = []
    for key, value, chance in zip(category.attributes, values, chances, strict=False):
        if value != NOTHING:
            attribute = lexicon.attributes[key]
            (after if attribute.after else before).append(_form(attribute.values[value], chance, VALUE_SYNONYM_SHARE))
    return before, after


def _form(forms: Forms, chance: float, synonym_share: float) -> str:
    """The main form, or with probability `synonym_share` one of the others."""
    if chance >= synonym_share or len(forms) == 1:
        return forms[0]
    return forms[1 + int(chance / synonym_share * (len(forms) - 1))]


def _model(chance: float) -> str:
    number = int(chance * 1e9)
    return f"{chr(65 + number % 26)}{chr(65 + number // 26 % 26)}-{100 + number // 676 % 900}"
