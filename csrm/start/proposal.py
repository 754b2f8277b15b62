"""A configuration proposed for tables: their columns, markets, languages, grades and recipe."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from csrm.config import InputSpec
from csrm.errors import InputError
from csrm.schemas import BEHAVIOUR, CANDIDATES, CATALOG, JUDGMENTS, PARALLEL_TEXT, QUERIES, Table
from csrm.start.columns import ColumnProposal, propose_columns
from csrm.start.grades import Grades, propose_grades
from csrm.start.joins import check_references
from csrm.start.languages import propose_languages
from csrm.start.recipes import Recipe, choose_recipe
from csrm.start.tables import FoundTable, open_found

TABLES = {table.name: table for table in (CATALOG, QUERIES, JUDGMENTS, BEHAVIOUR, CANDIDATES, PARALLEL_TEXT)}
"""Tables that a company brings, by their names."""


@dataclass(frozen=True)
class Given:
    """What a person says of the tables."""

    paths: Mapping[str, str]
    """Table to where it is; catalog and queries are among them."""
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Table to CSRM's name of a column to the name there."""
    languages: Mapping[str, str] = field(default_factory=dict)
    """Market to its language."""
    gains: Mapping[str, float] = field(default_factory=dict)
    """Grade to its gain."""


@dataclass(frozen=True)
class Proposal:
    """What the tables are taken for."""

    inputs: Mapping[str, InputSpec]
    """Table to where it is and how its columns are called."""
    languages: Mapping[str, tuple[str, str]]
    """Market to its language, and why."""
    grades: Grades | None
    """None without judgments."""
    splits: Mapping[str, int]
    """Split of the judgments to its rows; those without one are of split train."""
    recipe: Recipe
    notes: tuple[str, ...]
    """What a person should know before going on."""

    @property
    def markets(self) -> dict[str, str]:
        return {market: language for market, (language, _) in self.languages.items()}


def propose(given: Given) -> Proposal:
    """Look at the tables, and propose what jobs need to know of them.

    Raises:
        InputError: a table cannot be read, or lacks columns; all problems in one message.
        ConfigError: a language or a grade cannot be told; the message names the option that says it.
    """
    found = {name: _of_one_market(TABLES[name], open_found(path, name), given) for name, path in given.paths.items()}
    columns = {name: propose_columns(TABLES[name], table, given.columns.get(name, {})) for name, table in found.items()}
    problems = [problem for proposal in columns.values() for problem in proposal.problems]
    if unknown := sorted(set(given.columns) - set(found)):
        problems.append(f"--column: names the tables {unknown}, which are not given; given are {sorted(found)}")
    if problems:
        raise InputError("columns:\n" + "\n".join(f"  - {problem}" for problem in problems))
    named = {name: _Named(table, columns[name]) for name, table in found.items()}
    references = check_references({name: (table.found, table.columns.there) for name, table in named.items()})
    languages = _languages(named, given)
    grades, splits, judged = None, {}, set()
    if "judgments" in named:
        grades = propose_grades(named["judgments"].counts("grade"), given.gains)
        splits = _splits(named["judgments"])
        judged = set(named["judgments"].counts("market"))
    inputs = {
        name: InputSpec(
            path=table.path,
            format=table.format,
            columns=dict(columns[name].columns),
            market=table.market,
            options=dict(table.options),
        )
        for name, table in found.items()
    }
    recipe = choose_recipe(list(languages), judged, has_parallel_text="parallel_text" in found)
    return Proposal(inputs, languages, grades, splits, recipe, (*references, *_notes(named, languages, recipe, splits)))


def _of_one_market(table: Table, found: FoundTable, given: Given) -> FoundTable:
    """The table, all of the only market whose language is given where no column stands for the market."""
    if "market" not in table.column_names or len(given.languages) != 1:
        return found
    has_column = "market" in propose_columns(table, found, given.columns.get(table.name, {})).there
    return found if has_column else replace(found, market=next(iter(given.languages)))


@dataclass(frozen=True)
class _Named:
    """A table whose columns are known by CSRM's names."""

    found: FoundTable
    columns: ColumnProposal

    def has(self, column: str) -> bool:
        return column in self.columns.there

    def counts(self, column: str) -> Counter[str]:
        return self.found.counts(self.columns.there[column])

    def sample(self, column: str) -> dict[str, list[str]]:
        return self.found.sample(self.columns.there["market"], self.columns.there[column])


def _languages(named: Mapping[str, _Named], given: Given) -> dict[str, tuple[str, str]]:
    catalog = named["catalog"]
    titles: dict[str, list[str]] = {market: [] for market in sorted(catalog.counts("market"))}
    titles |= catalog.sample("title")
    said = catalog.sample("language") if catalog.has("language") else {}
    known: set[str] = set()
    if "parallel_text" in named:
        for column in ("source_language", "target_language"):
            known |= set(named["parallel_text"].counts(column))
    return propose_languages(titles, given.languages, said, known, market_column=catalog.columns.there["market"])


def _splits(judgments: _Named) -> dict[str, int]:
    counts = judgments.counts("split") if judgments.has("split") else Counter()
    counts["train"] += sum(judgments.counts("grade").values()) - counts.total()
    return {split: count for split, count in sorted(counts.items()) if count}


def _notes(
    named: Mapping[str, _Named], languages: Mapping[str, object], recipe: Recipe, splits: Mapping[str, int]
) -> list[str]:
    notes = []
    asked = named["queries"].counts("market")
    if silent := sorted(set(languages) - set(asked)):
        notes.append(
            f"markets without queries: {', '.join(silent)}. No job can score them; take them out of market.yaml."
        )
    for name in ("queries", "judgments"):
        unknown = sorted(set(named[name].counts("market")) - set(languages)) if name in named else []
        if unknown:
            notes.append(
                f"{name} of markets that the catalog lacks: {', '.join(unknown)}. No job reads them; the catalog has "
                f"{', '.join(sorted(languages))}."
            )
    if recipe.judged and "dev" not in splits:
        notes.append(
            "judgments have no rows of split dev, so nothing measures the model while it is made. Add a column split, "
            "with dev and test for a tenth of the queries each."
        )
    if recipe.judged and not {"dev", "test"} & set(splits):
        notes.append(
            "judgments have no rows of split test or dev, so evaluate.yaml takes all judged pairs. For a model that "
            "was trained on them, its figures are too good."
        )
    read_by_training = ("catalog", "queries", "judgments", "parallel_text")
    of_csv = [name for name in read_by_training if name in named and named[name].found.format == "csv"]
    if of_csv:
        notes.append(
            f"{', '.join(of_csv)}: CSV. Nights read it; training and export read Delta, Parquet and JSON lines only."
        )
    return notes


def base_model_setting(path: str) -> dict[str, str]:
    """The setting `base_model` for a folder, or for a GGUF file."""
    place = Path(path)
    return {"folder": str(place.parent), "gguf_file": place.name} if place.suffix == ".gguf" else {"folder": path}
