"""Catalog, queries, behaviour and judgments of invented markets."""

import hashlib
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from csrm.errors import ConfigError
from csrm.market.facts import GRADES, NOTHING, Facts, Pools, draw_products, grade_products
from csrm.market.lexicon import Lexicon, builtin_lexicon
from csrm.market.wording import product_titles, query_text
from csrm.schemas import BEHAVIOUR, CANDIDATES, CATALOG, JUDGMENTS, QUERIES
from csrm.text import text_key

JUDGED_PER_QUERY = {"E": 6, "S": 6, "C": 4, "I": 8}
"""Most judged products of each grade."""

NO_BRAND_SHARE = 0.04
"""This and the next six are the dirt that real catalogs have, as shares of products; these six are rounded up, so that
every market has some. A title is null, between emoji, or repeated until it is far too long."""
NO_TITLE_SHARE = 0.002
EMOJI_TITLE_SHARE = 0.01
LONG_TITLE_SHARE = 0.002
NO_ATTRIBUTES_SHARE = 0.03
NO_CATEGORY_SHARE = 0.03
NO_LANGUAGE_SHARE = 0.05
LONG_TITLE_CHARACTERS = 600
ONLY_DEPARTMENT_SHARE = 0.8
"""Of category paths: most shops file by departments, so words of the path alone do not tell the products apart."""

CLICKED_QUERIES_SHARE = 0.6
LISTED_SHARE = 0.1
"""Products that a market has listed from abroad, for each of its own."""
NUM_SHOWN = 15
"""Products that a query's shoppers see."""
SHOWN_STRENGTH = np.array([3.0, 1.5, 0.5, 0.0])
"""How well each grade does in the invented ranking, beside standard Gumbel noise."""
CLICK_RATE = np.array([0.3, 0.1, 0.03, 0.01])
"""Clicks per search on a product of each grade in first place."""


@dataclass(frozen=True)
class Market:
    """Input tables of one or more markets, with the columns of csrm.schemas. Attributes are dicts or None.

    >>> from csrm.market import generate_market
    >>> market = generate_market(7, {"us": "en"}, num_products=50, num_queries=5)
    >>> {"E", "I"} <= set(market.judgments["grade"]), list(market.candidates.columns)
    (True, ['market', 'query_id', 'product_id', 'source'])
    """

    catalog: pd.DataFrame
    queries: pd.DataFrame
    behaviour: pd.DataFrame
    judgments: pd.DataFrame

    @property
    def candidates(self) -> pd.DataFrame:
        """Pairs as a search log holds them: the judged ones, without their grades."""
        return self.judgments[list(CANDIDATES.key)].assign(source="given")


def generate_market(
    seed: int,
    markets: Mapping[str, str],
    *,
    num_products: int,
    num_queries: int,
    label_noise: float = 0.0,
    lexicons: Mapping[str, Lexicon] | None = None,
    listed: Mapping[str, str] | None = None,
) -> Market:
    """Invented markets, each with its own products and queries.

    The same arguments give the same tables. A market's tables do not depend on the other markets. `label_noise` changes
    grades and nothing else; the true grade stands beside each. Behaviour comes from true relevance by a random stream
    of its own: it does not depend on what was judged. Judged products have titles. Products that are listed from abroad
    are neither clicked nor judged.

    Args:
        seed: 0 or more.
        markets: market to language.
        num_products: in each market, at least 1.
        num_queries: in each market, at least 1.
        label_noise: probability that a judged grade is replaced by one of the other grades, each equally likely.
        lexicons: language to lexicon; the built-in ones if None.
        listed: market to the language of the products that are listed there from abroad, LISTED_SHARE of its own.

    Raises:
        ConfigError: an argument is out of range, a language has no lexicon, or the lexicon has too few words for so
            many different queries.

    >>> market = generate_market(7, {"kr": "ko", "us": "en"}, num_products=50, num_queries=5)
    >>> market.catalog.groupby("market").size().to_dict()
    {'kr': 50, 'us': 50}
    """
    listed = listed or {}
    languages = dict.fromkeys([*markets.values(), *listed.values()])
    problems = [
        f"{name}: expected {expected}, got {got}"
        for name, expected, got, valid in (
            ("seed", "0 or more", seed, seed >= 0),
            ("num_products", "1 or more", num_products, num_products >= 1),
            ("num_queries", "1 or more", num_queries, num_queries >= 1),
            ("label_noise", "0 to 1", label_noise, 0 <= label_noise <= 1),
            ("markets", "at least one market", dict(markets), bool(markets)),
            ("listed", f"markets of {list(markets)}", dict(listed), set(listed) <= set(markets)),
        )
        if not valid
    ]
    if problems:
        raise ConfigError("market generator: " + "; ".join(problems) + ". Change these settings.")
    if lexicons is None:
        lexicons = {language: builtin_lexicon(language) for language in languages}
    elif missing := sorted(set(languages) - set(lexicons)):
        raise ConfigError(
            f"market generator: expected a lexicon for each language of {dict(markets)}, "
            f"got none for {missing}. Add these lexicons or drop the markets."
        )
    parts = [
        _one_market(seed, market, lexicons[language], num_products, num_queries, label_noise)
        for market, language in markets.items()
    ]
    catalogs = [part.catalog for part in parts]
    catalogs += [
        _listed_products(seed, market, lexicons[language], math.ceil(LISTED_SHARE * num_products))
        for market, language in listed.items()
    ]
    return Market(
        catalog=pd.concat(catalogs, ignore_index=True),
        queries=pd.concat([part.queries for part in parts], ignore_index=True),
        behaviour=pd.concat([part.behaviour for part in parts], ignore_index=True),
        judgments=pd.concat([part.judgments for part in parts], ignore_index=True),
    )


def _one_market(
    seed: int, market: str, lexicon: Lexicon, num_products: int, num_queries: int, label_noise: float
) -> Market:
    product_rng, query_rng, judgment_rng, noise_rng, behaviour_rng = (
        np.random.default_rng([seed, zlib.crc32(market.encode()), stream]) for stream in range(5)
    )
    products = draw_products(product_rng, lexicon, num_products, NO_BRAND_SHARE)
    catalog = _catalog(product_rng, market, lexicon, products)
    wanted, sources, texts = _draw_queries(query_rng, market, lexicon, products, num_queries)
    frequencies = np.maximum(1, 20_000 // (query_rng.permutation(num_queries) + 1))
    queries = pd.DataFrame(
        {
            "market": market,
            "query_id": [f"q{number:06d}" for number in range(num_queries)],
            "query": texts,
            "frequency": frequencies,
            "language": lexicon.language,
        }
    )[QUERIES.column_names]

    pools = Pools(lexicon, products)
    product_ids = catalog["product_id"].to_numpy()
    has_title = catalog["title"].notna().to_numpy()
    judged, clicked = [], []
    for number, source in enumerate(sources):
        asked = wanted.rows(slice(number, number + 1))
        judged.append(_judge(judgment_rng, pools, lexicon, asked, products, source, has_title))
        if behaviour_rng.random() < CLICKED_QUERIES_SHARE:
            clicked.append(_click(behaviour_rng, pools, lexicon, asked, products, source, int(frequencies[number])))
        else:
            clicked.append((np.array([], dtype=np.int64), np.array([], dtype=np.int64)))

    judged_queries = np.repeat(np.arange(num_queries), [len(rows) for rows, _ in judged])
    true_grades = np.concatenate([grades for _, grades in judged])
    grades = with_label_noise(noise_rng, true_grades, label_noise)
    judgments = pd.DataFrame(
        {
            "market": market,
            "query_id": queries["query_id"].to_numpy()[judged_queries],
            "product_id": product_ids[np.concatenate([rows for rows, _ in judged])],
            "grade": np.array(GRADES, dtype=object)[grades],
            "split": np.array([split_of(text) for text in texts], dtype=object)[judged_queries],
            "true_grade": np.array(GRADES, dtype=object)[true_grades],
        }
    )[JUDGMENTS.column_names]
    clicked_queries = np.repeat(np.arange(num_queries), [len(rows) for rows, _ in clicked])
    behaviour = pd.DataFrame(
        {
            "market": market,
            "query": queries["query"].to_numpy()[clicked_queries],
            "product_id": product_ids[np.concatenate([rows for rows, _ in clicked])],
            "count": np.concatenate([clicks for _, clicks in clicked]),
        }
    )[BEHAVIOUR.column_names]
    return Market(catalog, queries, behaviour, judgments)


def _listed_products(seed: int, market: str, lexicon: Lexicon, num_products: int) -> pd.DataFrame:
    """Products that are listed from abroad; each names its language."""
    rng = np.random.default_rng([seed, zlib.crc32(market.encode()), 5])
    catalog = _catalog(rng, market, lexicon, draw_products(rng, lexicon, num_products, NO_BRAND_SHARE))
    return catalog.assign(product_id=catalog["product_id"] + f"_{lexicon.language}", language=lexicon.language)


def split_of(query: str) -> str:
    """train, dev or test (80, 10, 10 %) by a hash of its text_key: a text is in one split everywhere."""
    bucket = int.from_bytes(hashlib.sha256(text_key(query).encode()).digest()[:4], "big") % 10
    return {8: "dev", 9: "test"}.get(bucket, "train")


def with_label_noise(rng: np.random.Generator, grades: np.ndarray, label_noise: float) -> np.ndarray:
    """Grades of which a share is replaced by another grade, each other one equally likely.

    Args:
        rng: source of chance; as much is drawn from it whatever `label_noise` is.
        grades: places in GRADES, shape (pairs,).
        label_noise: probability of replacement.
    """
    replaced = rng.random(len(grades)) < label_noise
    others = (grades + rng.integers(1, len(GRADES), size=len(grades))) % len(GRADES)
    return np.where(replaced, others, grades).astype(np.int64)


def _catalog(rng: np.random.Generator, market: str, lexicon: Lexicon, products: Facts) -> pd.DataFrame:
    num_products = len(products.category)

    def few(share: float) -> list[int]:
        size = math.ceil(share * num_products)
        return np.sort(rng.choice(num_products, size=size, replace=False)).tolist()

    titles: list[str | None] = list(product_titles(rng, lexicon, products))
    for row in few(EMOJI_TITLE_SHARE):
        titles[row] = f"✨{titles[row]}🔥"
    for row in few(LONG_TITLE_SHARE):
        text = f"{titles[row]} {' '.join(lexicon.suffixes)}"
        titles[row] = " ".join([text] * (LONG_TITLE_CHARACTERS // len(text) + 1))
    for row in few(NO_TITLE_SHARE):
        titles[row] = None

    paths: list[str | None] = []
    attributes: list[dict[str, str] | None] = []
    is_known = rng.random(products.values.shape) < 0.9
    only_department = rng.random(num_products) < ONLY_DEPARTMENT_SHARE
    for place, values, known, short in zip(
        products.category.tolist(), products.values.tolist(), is_known.tolist(), only_department.tolist(), strict=True
    ):
        category = lexicon.categories[place]
        paths.append(category.department if short else f"{category.department} > {category.names[0]}")
        found = {}
        for key, value, is_given in zip(category.attributes, values, known, strict=False):
            if value != NOTHING and is_given:
                attribute = lexicon.attributes[key]
                found[attribute.name] = attribute.values[value][0]
        attributes.append(found)
    for row in few(NO_CATEGORY_SHARE):
        paths[row] = None
    for row in few(NO_ATTRIBUTES_SHARE):
        attributes[row] = None
    languages: list[str | None] = [lexicon.language] * num_products
    for row in few(NO_LANGUAGE_SHARE):
        languages[row] = None
    return pd.DataFrame(
        {
            "market": market,
            "product_id": [f"p{number:07d}" for number in range(num_products)],
            "title": titles,
            "brand": [None if brand == NOTHING else lexicon.brands[brand][0] for brand in products.brand.tolist()],
            "category": paths,
            "attributes": attributes,
            "language": languages,
        }
    )[CATALOG.column_names]


def _draw_queries(
    rng: np.random.Generator, market: str, lexicon: Lexicon, products: Facts, num_queries: int
) -> tuple[Facts, list[int], list[str]]:
    """What each query asks for, the product that it was drawn from (which has all of it), and its text.

    No two texts have the same text_key.
    """
    found: dict[str, tuple[Facts, int, str]] = {}
    for _ in range(20 * num_queries):
        source = int(rng.integers(len(products.category)))
        wanted = _ask_for(rng, products.rows(slice(source, source + 1)))
        text = query_text(rng, lexicon, wanted)
        found.setdefault(text_key(text), (wanted, source, text))
        if len(found) == num_queries:
            asked, sources, texts = zip(*found.values(), strict=True)
            facts = Facts(
                np.concatenate([facts.category for facts in asked]),
                np.concatenate([facts.brand for facts in asked]),
                np.concatenate([facts.values for facts in asked]),
            )
            return facts, list(sources), list(texts)
    raise ConfigError(
        f"market generator: market {market!r}: expected {num_queries} different queries, got {len(found)} from "
        f"{len(products.category)} products. Ask for fewer queries or more products."
    )


def _ask_for(rng: np.random.Generator, product: Facts) -> Facts:
    """The product's category, with its brand (15 %) or none to two of its attribute values (35, 35 and 15 %)."""
    asks_for_brand, *picks = rng.random(1 + product.values.shape[1])
    num_asked = int(rng.choice(3, p=[0.41, 0.41, 0.18]))
    values = np.full_like(product.values, NOTHING)
    brand = np.full_like(product.brand, NOTHING)
    if asks_for_brand < 0.15 and product.brand[0] != NOTHING:
        brand = product.brand
    else:
        slots = np.argsort(picks)[:num_asked]
        values[:, slots] = product.values[:, slots]
    return Facts(product.category, brand, values)


def _judge(
    rng: np.random.Generator,
    pools: Pools,
    lexicon: Lexicon,
    wanted: Facts,
    products: Facts,
    source: int,
    has_title: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Judged products of a query, ascending, and their true grades as places in GRADES."""
    rows = np.union1d(pools.draw(rng, source), source)
    rows = rng.permutation(rows[has_title[rows]])
    rows = np.concatenate([rows[rows == source], rows[rows != source]])
    grades = grade_products(wanted, products.rows(rows), lexicon.categories)
    kept = np.concatenate(
        [np.flatnonzero(grades == place)[: JUDGED_PER_QUERY[grade]] for place, grade in enumerate(GRADES)]
    )
    kept = kept[np.argsort(rows[kept])]
    return rows[kept], grades[kept]


def _click(
    rng: np.random.Generator,
    pools: Pools,
    lexicon: Lexicon,
    wanted: Facts,
    products: Facts,
    source: int,
    frequency: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Clicked products of a query and their clicks: a noisy ranking is shown, and lower places are seen less."""
    rows = pools.draw(rng, source)
    grades = grade_products(wanted, products.rows(rows), lexicon.categories)
    ranked = np.argsort(-(SHOWN_STRENGTH[grades] + rng.gumbel(size=len(rows))))[:NUM_SHOWN]
    seen = 1.0 / (1.0 + 0.3 * np.arange(len(ranked)))
    clicks = rng.poisson(frequency * CLICK_RATE[grades[ranked]] * seen)
    return rows[ranked][clicks > 0], clicks[clicks > 0]
