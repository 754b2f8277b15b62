"""Markets whose queries are broad categories and whose products are of narrow ones: words seldom tell what is relevant.

A query is an inner category of a taxonomy ("Activewear"); relevant products are of leaves below it ("Leggings, black"),
irrelevant ones of leaves beside it. The texts of a judged pair share no search term. Some other titles name a category
above their leaf, as sellers do: a search finds these, and they can augment the query.

The taxonomy puts each category into split train, dev or test. A judged pair is of its query's split, and so is its
product's leaf. Parallel text is split likewise, and attribute values in titles are of split train.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import combinations, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from csrm.errors import InputError
from csrm.market.taxonomy import LANGUAGE_COLUMNS, read_taxonomy_tables
from csrm.schemas import CATALOG, JUDGMENTS, PAIR_KEY, PARALLEL_TEXT, QUERIES
from csrm.text import search_terms

RELEVANT, IRRELEVANT = "yes", "no"
PRODUCTS_PER_LEAF = 2
"""Products of each leaf that may be judged."""
NAMED_SHARE = 0.4
"""Probability that a leaf has a product whose title names a given category above it."""
RELEVANT_PER_QUERY = 3
SIBLINGS_PER_QUERY = 4
"""Irrelevant products, of the leaves that are nearest to the query."""
OTHERS_PER_QUERY = 1
"""Irrelevant products of any leaf."""
MORE_TO_MEASURE = 2
"""Times as many of each for a query of split dev or test."""
_ROOT = ""


class Storefront(NamedTuple):
    """A market."""

    market: str
    language: str
    """Of its queries and of its own products."""
    listed_language: str | None = None
    """Of the same products listed from abroad, judged too; None where there are none."""


class CategoryMarkets(NamedTuple):
    """Tables with the columns of csrm.schemas."""

    catalog: pd.DataFrame
    queries: pd.DataFrame
    judgments: pd.DataFrame
    parallel_text: pd.DataFrame


class _Item(NamedTuple):
    """A product before its words: what it is in every language."""

    id: str
    leaf: str
    values: tuple[str, ...]
    """Ids of attribute values."""
    named: str | None
    """Category above the leaf that the title names."""
    value_first: bool


class _Taxonomy(NamedTuple):
    names: Mapping[str, Mapping[str, str]]
    """Language to id of a category or value to its name."""
    split: Mapping[str, str]
    above: Mapping[str, tuple[str, ...]]
    """Category to those above it, the nearest first."""
    leaves: tuple[str, ...]
    values: Mapping[str, tuple[str, ...]]
    """Leaf to the ids of its attributes' values, those of split train."""


def category_markets(
    folder: Path, storefronts: Sequence[Storefront], languages: Sequence[str], label_noise: float = 0.0, seed: int = 0
) -> CategoryMarkets:
    """Markets of the same queries and products, each in its languages, and parallel text of all languages.

    Args:
        folder: a taxonomy, see csrm.market.taxonomy.read_taxonomy_lexicon; its tables have a column split.
        storefronts: the markets.
        languages: of the parallel text.
        label_noise: probability that a grade of split train is the wrong one.
        seed: of products, judged pairs and noise.

    Raises:
        InputError: another language, or files of the taxonomy that are missing or malformed.
    """
    spoken = list(
        dict.fromkeys(
            [*languages, *(language for front in storefronts for language in front[1:] if language is not None)]
        )
    )
    for language in spoken:
        if language not in LANGUAGE_COLUMNS:
            raise InputError(
                f"taxonomy {str(folder)!r}: expected languages of {list(LANGUAGE_COLUMNS)}, got {language!r}."
            )
    tables = _read(folder, spoken)
    taxonomy = _taxonomy(tables, spoken)
    items = list(_items(np.random.default_rng([seed, 1]), taxonomy))
    catalog, queries, judgments = [], [], []
    for market, language, listed in storefronts:
        shown = {language: [*items]} | ({listed: []} if listed else {})
        for of_titles in shown:
            pairs = list(_pairs(np.random.default_rng([seed, 2]), taxonomy, items, language, of_titles))
            if of_titles == listed:
                ids = {id_ for _, id_, _, _ in pairs}
                shown[listed] = [item._replace(id=f"{item.id}_{listed}") for item in items if item.id in ids]
                pairs = [(query, f"{id_}_{listed}", grade, split) for query, id_, grade, split in pairs]
            judgments += [(market, *pair) for pair in pairs]
        catalog += [
            (market, item.id, _title(item, taxonomy.names[of_titles]), of_titles)
            for of_titles, of_language in shown.items()
            for item in of_language
        ]
        names = taxonomy.names[language]
        asked = dict.fromkeys(query for of_market, query, *_ in judgments if of_market == market)
        queries += [(market, query, names[query], language) for query in asked]
    judged = pd.DataFrame(judgments, columns=[*PAIR_KEY, "true_grade", "split"])
    return CategoryMarkets(
        catalog=_frame(catalog, ["market", "product_id", "title", "language"], CATALOG.column_names),
        queries=_frame(queries, ["market", "query_id", "query", "language"], QUERIES.column_names),
        judgments=_with_noise(judged, label_noise, seed),
        parallel_text=_parallel_text(tables, languages),
    )


def _read(folder: Path, languages: Sequence[str]) -> dict[str, pd.DataFrame]:
    names = [LANGUAGE_COLUMNS[language] for language in languages]
    return read_taxonomy_tables(
        folder,
        {
            "categories": ["id", "parent_id", "split", *names],
            "values": ["id", "attribute_id", "en", "split", *names],
            "attributes": ["split", *(f"{name}_description" for name in names)],
            "category_attributes": ["category_id", "attribute_id"],
        },
    )


def _taxonomy(tables: Mapping[str, pd.DataFrame], languages: Sequence[str]) -> _Taxonomy:
    categories, values = tables["categories"], tables["values"]
    parent = dict(zip(categories["id"], categories["parent_id"], strict=True))
    inner = set(parent.values())
    usable = values[(values["split"] == "train") & (values["en"] != "Other")]
    values_of = usable.groupby("attribute_id")["id"].agg(tuple).to_dict()
    values_of_leaf: dict[str, tuple[str, ...]] = defaultdict(tuple)
    for leaf, attribute in tables["category_attributes"][["category_id", "attribute_id"]].itertuples(index=False):
        values_of_leaf[leaf] += values_of.get(attribute, ())

    def above(category: str) -> Iterator[str]:
        while category := parent.get(category, ""):
            yield category

    both = pd.concat([categories, values])
    return _Taxonomy(
        names={
            language: dict(zip(both["id"], both[LANGUAGE_COLUMNS[language]], strict=True)) for language in languages
        },
        split=dict(zip(categories["id"], categories["split"], strict=True)),
        above={category: tuple(above(category)) for category in parent},
        leaves=tuple(category for category in parent if category not in inner),
        values=values_of_leaf,
    )


def _items(rng: np.random.Generator, taxonomy: _Taxonomy) -> Iterator[_Item]:
    """Products of every leaf: PRODUCTS_PER_LEAF plain ones, and some that name a category above the leaf."""
    for leaf in taxonomy.leaves:
        named = [category for category in taxonomy.above[leaf] if rng.random() < NAMED_SHARE]
        for number, category in enumerate([*[None] * PRODUCTS_PER_LEAF, *named]):
            choice = taxonomy.values.get(leaf, ())
            size = min(len(choice), int(rng.integers(0, 3)))
            values = tuple(choice[place] for place in rng.choice(len(choice), size=size, replace=False)) if size else ()
            yield _Item(f"{leaf}_{number}", leaf, values, category, bool(rng.random() < 0.5))


def _title(item: _Item, names: Mapping[str, str]) -> str:
    words = [names[value] for value in item.values]
    name = " ".join(names[category] for category in (item.named, item.leaf) if category)
    return " ".join([*words[:1], name, *words[1:]] if item.value_first else [name, *words])


def _pairs(
    rng: np.random.Generator, taxonomy: _Taxonomy, items: Sequence[_Item], query_language: str, title_language: str
) -> Iterator[tuple[str, str, str, str]]:
    """query_id, product_id, grade and split of the judged pairs; queries in random order."""
    below: dict[tuple[str, str], list[_Item]] = defaultdict(list)
    """Category and split to the products of leaves below it that may be judged."""
    for item in items:
        if item.named is None:
            for category in (*taxonomy.above[item.leaf], _ROOT):
                below[category, taxonomy.split[item.leaf]].append(item)
    titles = taxonomy.names[title_language]
    terms_of = cache(lambda item: set(search_terms(_title(item, titles))))

    def some(category: str, query: str, num_items: int, without: str | None = None) -> list[_Item]:
        """Random products below a category that share no term with the query, none of them below another category."""
        found = below[category, taxonomy.split[query]]
        own = set(search_terms(taxonomy.names[query_language][query]))
        shuffled = (found[place] for place in rng.permutation(len(found)))
        fitting = (
            item for item in shuffled if without not in taxonomy.above[item.leaf] and own.isdisjoint(terms_of(item))
        )
        return list(islice(fitting, num_items))

    inner = sorted({category for category, _ in below} - {_ROOT})
    for query in (inner[place] for place in rng.permutation(len(inner))):
        split = taxonomy.split[query]
        more = 1 if split == "train" else MORE_TO_MEASURE
        relevant = some(query, query, more * RELEVANT_PER_QUERY)
        irrelevant: dict[str, _Item] = {}
        for category in (*taxonomy.above[query], _ROOT):
            wanted = more * (SIBLINGS_PER_QUERY + (OTHERS_PER_QUERY if category == _ROOT else 0))
            for item in some(category, query, wanted, without=query):
                if len(irrelevant) < wanted:
                    irrelevant[item.id] = item
        if relevant and irrelevant:
            yield from ((query, item.id, RELEVANT, split) for item in relevant)
            yield from ((query, id_, IRRELEVANT, split) for id_ in irrelevant)


def _with_noise(judgments: pd.DataFrame, label_noise: float, seed: int) -> pd.DataFrame:
    wrong = np.random.default_rng([seed, 3]).random(len(judgments)) < label_noise
    wrong &= (judgments["split"] == "train").to_numpy()
    other = judgments["true_grade"].map({RELEVANT: IRRELEVANT, IRRELEVANT: RELEVANT})
    return judgments.assign(grade=judgments["true_grade"].mask(wrong, other))[JUDGMENTS.column_names]


def _parallel_text(tables: Mapping[str, pd.DataFrame], languages: Sequence[str]) -> pd.DataFrame:
    """Names of categories and values, and the attributes' descriptions, of each two languages."""
    parts = []
    for one, other in combinations(languages, 2):
        for table, kind, suffix in (
            ("categories", "taxonomy name", ""),
            ("values", "attribute", ""),
            ("attributes", "sentence", "_description"),
        ):
            frame = tables[table]
            parts.append(
                pd.DataFrame(
                    {
                        "source_language": one,
                        "target_language": other,
                        "source_text": frame[LANGUAGE_COLUMNS[one] + suffix],
                        "target_text": frame[LANGUAGE_COLUMNS[other] + suffix],
                        "kind": kind,
                        "split": frame["split"],
                    }
                )
            )
    if not parts:
        return pd.DataFrame(columns=PARALLEL_TEXT.column_names)
    return pd.concat(parts).drop_duplicates(ignore_index=True)


def _frame(rows: Sequence[tuple[str, ...]], names: list[str], columns: list[str]) -> pd.DataFrame:
    """Columns that have no name are null."""
    nothing = dict.fromkeys(set(columns) - set(names))
    return pd.DataFrame(list(rows), columns=names).assign(**nothing)[columns]
