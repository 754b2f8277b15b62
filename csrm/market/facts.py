"""The hidden truth about products and queries, and the grade that follows from it. No output table holds it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from csrm.market.lexicon import Category, Lexicon

GRADES = ("E", "S", "C", "I")
NOTHING = -1
"""In facts: no brand, or an attribute that the category lacks or the query does not ask for."""


@dataclass(frozen=True)
class Facts:
    """What products are, or what queries ask for: places in the lexicon, one row each."""

    category: np.ndarray
    """Shape (rows,)."""
    brand: np.ndarray
    """Shape (rows,), or NOTHING."""
    values: np.ndarray
    """Shape (rows, slots): the value of the category's first, second, ... attribute, or NOTHING."""

    def rows(self, selection: np.ndarray | slice) -> "Facts":
        return Facts(self.category[selection], self.brand[selection], self.values[selection])


def grade_products(wanted: Facts, products: Facts, categories: Sequence[Category]) -> np.ndarray:
    """Grades of products for one query, as places in GRADES.

    E: the category that is asked for, with the brand and every value that is asked for. S: that category otherwise,
    or a category that replaces it. C: a category that goes with it. I: anything else.

    Args:
        wanted: one row.
        products: any number of rows.
        categories: of the lexicon.
    """
    asked = categories[int(wanted.category[0])]
    same = products.category == wanted.category
    brand_fits = (wanted.brand == NOTHING) | (wanted.brand == products.brand)
    values_fit = ((wanted.values == NOTHING) | (wanted.values == products.values)).all(axis=1)
    conditions = [
        same & brand_fits & values_fit,
        same | np.isin(products.category, sorted(asked.substitutes)),
        np.isin(products.category, sorted(asked.complements)),
    ]
    return np.select(conditions, [0, 1, 2], default=3)


class Pools:
    """Products by category, brand and value, to draw what may be shown for a query."""

    def __init__(self, lexicon: Lexicon, products: Facts) -> None:
        self._categories = lexicon.categories
        self._products = products
        _, first_ids = _value_tables(lexicon)
        self._value_ids = np.where(
            products.values == NOTHING,
            NOTHING,
            first_ids[products.category][:, : products.values.shape[1]] + products.values,
        )
        num_slots = self._value_ids.shape[1]
        self._by_category = _Pool(products.category, np.arange(len(products.category)))
        self._by_brand = _Pool(products.brand, np.arange(len(products.brand)))
        self._by_value = _Pool(self._value_ids.ravel(), np.repeat(np.arange(len(products.category)), num_slots))

    def draw(self, rng: np.random.Generator, source: int) -> np.ndarray:
        """Rows of products near a source product: its category, partners of that, its brand and values, and any.

        Returns:
            Distinct rows, ascending. With many products, most queries about the source find each grade in them.
        """
        category = int(self._products.category[source])
        asked = self._categories[category]
        drawn = [self._by_category.draw(rng, category, 150), rng.integers(len(self._products.category), size=20)]
        drawn += [self._by_category.draw(rng, partner, 15) for partner in sorted(asked.substitutes)[:8]]
        drawn += [self._by_category.draw(rng, partner, 15) for partner in sorted(asked.complements)[:8]]
        drawn.append(self._by_brand.draw(rng, int(self._products.brand[source]), 10))
        drawn += [self._by_value.draw(rng, int(value), 10) for value in self._value_ids[source]]
        return np.unique(np.concatenate(drawn))


class _Pool:
    """Rows by key, drawn with replacement."""

    def __init__(self, keys: np.ndarray, rows: np.ndarray) -> None:
        order = np.argsort(keys, kind="stable")
        self._keys, self._rows = keys[order], rows[order]

    def draw(self, rng: np.random.Generator, key: int, size: int) -> np.ndarray:
        first, end = np.searchsorted(self._keys, [key, key + 1])
        if key == NOTHING or first == end:
            return self._rows[:0]
        return self._rows[rng.integers(first, end, size=size)]


def draw_products(rng: np.random.Generator, lexicon: Lexicon, num_products: int, no_brand: float) -> Facts:
    """Products of some categories of the lexicon, few popular and many not, at most one category per 20 products.

    Args:
        rng: source of chance.
        lexicon: what there is.
        num_products: how many, at least 1.
        no_brand: share of products without a brand.
    """
    group_names = sorted({category.group for category in lexicon.categories})
    group_order = dict(zip(group_names, rng.permutation(len(group_names)).tolist(), strict=True))
    by_group = sorted(range(len(lexicon.categories)), key=lambda place: group_order[lexicon.categories[place].group])
    sold = rng.permutation(by_group[: max(8, num_products // 20)])
    popularity = (np.arange(len(sold)) + 3.0) ** -0.6
    category = rng.choice(sold, size=num_products, p=popularity / popularity.sum())

    num_values, _ = _value_tables(lexicon)
    counts = num_values[category]
    values = np.where(counts > 0, (rng.random(counts.shape) ** 1.5 * counts).astype(np.int64), NOTHING)

    num_brands = np.array([len(entry.brands) for entry in lexicon.categories])
    brand_table = np.full((len(num_brands), max(num_brands)), NOTHING)
    for place, entry in enumerate(lexicon.categories):
        brand_table[place, : len(entry.brands)] = entry.brands
    brand = brand_table[category, (rng.random(num_products) * num_brands[category]).astype(np.int64)]
    brand[rng.random(num_products) < no_brand] = NOTHING
    return Facts(category, brand, values)


def _value_tables(lexicon: Lexicon) -> tuple[np.ndarray, np.ndarray]:
    """For each category and slot: the number of values (0: no such slot), and an id of the attribute's first value."""
    first_id, next_id = {}, 0
    for key, attribute in lexicon.attributes.items():
        first_id[key] = next_id
        next_id += len(attribute.values)
    num_slots = max(1, *(len(category.attributes) for category in lexicon.categories))
    num_values = np.zeros((len(lexicon.categories), num_slots), dtype=np.int64)
    first_ids = np.zeros_like(num_values)
    for place, category in enumerate(lexicon.categories):
        for slot, key in enumerate(category.attributes):
            num_values[place, slot] = len(lexicon.attributes[key].values)
            first_ids[place, slot] = first_id[key]
    return num_values, first_ids
