"""A lexicon from a folder of product taxonomy tables: thousands of categories in five languages."""

import zlib
from collections import defaultdict
from pathlib import Path

import pandas as pd

from csrm.errors import InputError
from csrm.market.lexicon import Attribute, Category, Lexicon, lexicon_of

LANGUAGE_COLUMNS = {"en": "en", "ko": "ko", "zh-TW": "zh_TW", "ja": "ja", "es": "es"}
"""Language to the column that holds its names."""

MAX_ATTRIBUTES = 4
NUM_BRANDS_PER_DEPARTMENT = 6


def read_taxonomy_lexicon(folder: str | Path, language: str) -> Lexicon:
    """Lexicon of the taxonomy's leaf categories with their first four attributes.

    The taxonomy says neither what goes together nor what replaces what: the other leaves of a category's parent
    count as its substitutes, and no category has complements, so that grade C does not occur. It has no synonyms.

    Args:
        folder: has categories.tsv.gz (id, parent_id, en, ko, zh_TW, ja, es and en_path ...), values.tsv.gz
            (attribute_id and names), attributes.tsv.gz (id and names), category_attributes.tsv.gz (category_id,
            attribute_id): tab-separated, UTF-8, not quoted.
        language: en, ko, zh-TW, ja or es.

    Raises:
        InputError: another language, or files that are missing or malformed; all of these in one message.

    >>> read_taxonomy_lexicon("taxonomy", "fr")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    csrm.errors.InputError: taxonomy 'taxonomy': expected a language of ['en', 'ko', 'zh-TW', 'ja', 'es'], got 'fr'...
    """
    if language not in LANGUAGE_COLUMNS:
        raise InputError(
            f"taxonomy {str(folder)!r}: expected a language of {list(LANGUAGE_COLUMNS)}, got {language!r}. "
            "Choose one of these for the market."
        )
    name = LANGUAGE_COLUMNS[language]
    path = f"{name}_path"
    columns = {
        "categories": ["id", "parent_id", name, path],
        "values": ["attribute_id", "en", name],
        "attributes": ["id", name],
        "category_attributes": ["category_id", "attribute_id"],
    }
    tables = read_taxonomy_tables(Path(folder), columns)

    values: dict[str, list[str]] = defaultdict(list)
    for attribute, english, value in tables["values"][["attribute_id", "en", name]].itertuples(index=False, name=None):
        if english != "Other" and value not in values[attribute]:
            values[attribute].append(value)
    attributes = {
        key: Attribute(name=label, values=tuple((value,) for value in values[key]))
        for key, label in tables["attributes"][["id", name]].itertuples(index=False, name=None)
        if values.get(key)
    }
    attributes_of: dict[str, list[str]] = defaultdict(list)
    for category, attribute in tables["category_attributes"][["category_id", "attribute_id"]].itertuples(
        index=False, name=None
    ):
        if attribute in attributes:
            attributes_of[category].append(attribute)

    categories = tables["categories"]
    leaves = categories[~categories["id"].isin(categories["parent_id"])]
    places_of_parent = {
        parent: frozenset(places)
        for parent, places in pd.Series(range(len(leaves))).groupby(leaves["parent_id"].to_numpy()).agg(list).items()
    }
    num_brands = len(lexicon_of(language, (), {}).brands)
    return lexicon_of(
        language,
        [
            Category(
                names=(label,),
                department=full_path.split(" > ")[0],
                attributes=tuple(attributes_of[key][:MAX_ATTRIBUTES]),
                brands=_brands_of(parent, num_brands),
                substitutes=places_of_parent[parent] - {place},
                group=parent,
            )
            for place, (key, parent, label, full_path) in enumerate(
                leaves[["id", "parent_id", name, path]].itertuples(index=False, name=None)
            )
        ],
        attributes,
    )


def _brands_of(group: str, num_brands: int) -> tuple[int, ...]:
    first = zlib.crc32(group.encode())
    return tuple((first + step) % num_brands for step in range(min(NUM_BRANDS_PER_DEPARTMENT, num_brands)))


def read_taxonomy_tables(folder: Path, columns: dict[str, list[str]]) -> dict[str, pd.DataFrame]:
    """Tables of a taxonomy's folder, all text.

    Args:
        folder: has the tables as `<name>.tsv.gz`: tab-separated, UTF-8, not quoted.
        columns: table to the columns that it must have; none but parent_id may have empty cells.

    Raises:
        InputError: files are missing or malformed; all of it in one message.
    """
    tables, problems = {}, []
    for table, expected in columns.items():
        file = folder / f"{table}.tsv.gz"
        try:
            tables[table] = pd.read_csv(file, sep="\t", quoting=3, keep_default_na=False, dtype=str, encoding="utf-8")
        except FileNotFoundError:
            problems.append(f"{file.name}: no such file")
            continue
        except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: of pandas' parser, and of UTF-8
            problems.append(f"{file.name}: expected gzipped tab-separated UTF-8 text, got {error}")
            continue
        missing = [column for column in dict.fromkeys(expected) if column not in tables[table].columns]
        if missing:
            problems.append(f"{file.name}: missing columns {missing}; it has {list(tables[table].columns)}")
        elif tables[table].empty:
            problems.append(f"{file.name}: expected at least one row, got none")
        elif empty := [column for column in expected if column != "parent_id" and (tables[table][column] == "").any()]:
            problems.append(f"{file.name}: expected text in every row of {empty}, got empty cells")
    if problems:
        raise InputError(
            f"taxonomy {str(folder)!r}: {len(problems)} problem{'s' * (len(problems) > 1)}:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + "\nIs this the folder with the taxonomy's four .tsv.gz files?"
        )
    return tables
