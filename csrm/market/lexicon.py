"""The words of one language that a market is made of: categories, attributes, brands, and the make-up of titles."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from csrm.errors import ConfigError

Forms = tuple[str, ...]
"""Ways to write one thing: the main one, then synonyms."""


@dataclass(frozen=True)
class Attribute:
    """What a product can vary in, such as colour."""

    name: str
    values: tuple[Forms, ...]
    after: bool = False
    """Whether a value follows the category in a title (sizes, packs) instead of going before it."""


@dataclass(frozen=True)
class Category:
    """A kind of product. Other categories and brands are given by their place in the lexicon."""

    names: Forms
    department: str
    attributes: tuple[str, ...]
    brands: tuple[int, ...]
    substitutes: frozenset[int] = frozenset()
    complements: frozenset[int] = frozenset()
    group: str = ""
    """Categories of one group are near each other; a small market sells whole groups."""


@dataclass(frozen=True)
class Template:
    """Order of a title's parts. Parts that a title leaves out take their separator with them."""

    parts: tuple[tuple[str, ...], ...]
    """Of brand, model, before (attribute values), category and after (attribute values)."""
    separator: str
    glue: str
    """Joins what is inside one part."""


@dataclass(frozen=True)
class Lexicon:
    """All words of one language.

    >>> from csrm.market import builtin_lexicon
    >>> builtin_lexicon("en").language
    'en'
    """

    language: str
    categories: tuple[Category, ...]
    attributes: dict[str, Attribute]
    brands: tuple[Forms, ...]
    templates: tuple[Template, ...]
    prefixes: Forms
    """What sellers put before a title, such as an offer of free shipping."""
    suffixes: Forms


def builtin_lexicon(language: str) -> Lexicon:
    """CSRM's own lexicon.

    Args:
        language: en, ko or zh-TW.

    Raises:
        ConfigError: another language.

    >>> len(builtin_lexicon("ko").categories) == len(builtin_lexicon("en").categories)
    True
    """
    data = _builtin_data()
    languages = list(data["departments"]["shoes"])
    if language not in languages:
        raise ConfigError(
            f"built-in lexicon: expected a language of {languages}, got {language!r}. "
            "Other languages need a taxonomy folder that has them."
        )
    places = {key: place for place, key in enumerate(data["categories"])}
    substitutes = _partners(data["substitutes"], places)
    complements = _partners(data["complements"], places)
    categories = tuple(
        Category(
            names=tuple(entry["names"][language]),
            department=data["departments"][entry["department"]][language],
            attributes=tuple(entry["attributes"]),
            brands=tuple(
                place for place, brand in enumerate(data["brands"]) if entry["department"] in brand["departments"]
            ),
            substitutes=substitutes[places[key]],
            complements=complements[places[key]],
            group=entry["department"],
        )
        for key, entry in data["categories"].items()
    )
    attributes = {
        key: Attribute(
            name=entry["names"][language],
            values=tuple((value,) if isinstance(value, str) else tuple(value[language]) for value in entry["values"]),
            after=entry.get("after", False),
        )
        for key, entry in data["attributes"].items()
    }
    return lexicon_of(language, categories, attributes)


def lexicon_of(language: str, categories: Sequence[Category], attributes: dict[str, Attribute]) -> Lexicon:
    """These categories and attributes with the built-in brands and title templates of the language.

    Brands have their English form in a language that has no form of its own; `language` must have templates.
    """
    data = _builtin_data()
    wording = data["wording"][language]
    return Lexicon(
        language=language,
        categories=tuple(categories),
        attributes=attributes,
        brands=tuple(tuple(brand["names"].get(language, brand["names"]["en"])) for brand in data["brands"]),
        templates=tuple(
            Template(tuple(tuple(part) for part in entry["parts"]), entry["separator"], entry["glue"])
            for entry in wording["templates"]
        ),
        prefixes=tuple(wording["prefixes"]),
        suffixes=tuple(wording["suffixes"]),
    )


@cache
def _builtin_data() -> dict[str, Any]:
    text = files("csrm.market").joinpath("lexicon.yaml").read_text(encoding="utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    return data


def _partners(pairs: list[list[str]], places: dict[str, int]) -> list[frozenset[int]]:
    partners: list[set[int]] = [set() for _ in places]
    for one, other in pairs:
        partners[places[one]].add(places[other])
        partners[places[other]].add(places[one])
    return [frozenset(found) for found in partners]
