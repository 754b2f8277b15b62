"""Configuration files: one YAML file a job, and one that jobs share; checked against the settings class of the job."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import to_jsonable_python

from csrm.errors import ConfigError


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys refused, every field described by its docstring."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


def _market_name(name: str) -> str:
    if name in ("", "__HIVE_DEFAULT_PARTITION__"):
        raise ValueError("is no name for a market: a partition of a table cannot be called so")
    return name


MarketName = Annotated[str, AfterValidator(_market_name)]
"""Name of a market, which is also the name of its partition in the published table."""
Markets = Annotated[dict[MarketName, str], Field(min_length=1)]
"""Market to the language of its text (BCP 47)."""


class SchemaPlace(NamedTuple):
    """Tables in a schema of Spark's catalog."""

    schema: str
    """Name of the schema, such as main.csrm."""
    folder: str
    """Folder of the tables, any URI; empty: the location of the schema."""


def schema_place(tables: str) -> SchemaPlace | None:
    """The schema that a place of tables names; None for a folder.

    >>> schema_place("schema:main.csrm?folder=s3://bucket/csrm")
    SchemaPlace(schema='main.csrm', folder='s3://bucket/csrm')
    >>> schema_place("schema:csrm")
    SchemaPlace(schema='csrm', folder='')
    >>> schema_place("data/csrm")

    Raises:
        ValueError: it names no schema, or something else beside it.
    """
    kind, _, named = tables.partition(":")
    if kind != "schema":
        return None
    schema, question_mark, option = named.partition("?")
    name, _, folder = option.partition("=")
    if not schema or (question_mark and (name != "folder" or not folder)):
        raise ValueError("expected schema:NAME or schema:NAME?folder=URI, such as schema:main.csrm")
    return SchemaPlace(schema, folder)


def folder_of_tables(tables: str, setting: str) -> str:
    """Folder of tables for what has no Spark to ask for a schema's location.

    Args:
        tables: a folder, or a schema with its folder; see schema_place.
        setting: that named it, for messages.

    Raises:
        ConfigError: a schema without its folder.
    """
    try:
        place = schema_place(tables)
    except ValueError as error:
        raise ConfigError(f"{setting} {tables!r}: {error}.") from error
    if place is None:
        return tables
    if not place.folder:
        raise ConfigError(
            f"{setting} {tables!r}: expected a folder, got a schema, whose location only Spark knows. Name it: "
            f"schema:{place.schema}?folder=URI; DESCRIBE SCHEMA {place.schema} shows it."
        )
    return place.folder


def _tables_place(tables: str) -> str:
    schema_place(tables)
    return tables


TablesDir = Annotated[str, Field(min_length=1), AfterValidator(_tables_place)]
"""Place of the tables that CSRM writes: a folder, any URI; or a schema, see schema_place."""


class TablesSettings(Settings):
    """Base of the settings of jobs that read or write CSRM's tables."""

    tables: TablesDir
    """Folder of the tables that CSRM writes, any URI. Or a schema of Spark's catalog, whose location is the folder:
    `schema:main.csrm`. `schema:main.csrm?folder=s3://bucket/csrm` names another folder for the schema's tables."""


def _local_path(path: str) -> str:
    if "://" in path:
        raise ValueError("is a URI; expected a folder of this machine, from which the files can be copied there")
    return path


LocalPath = Annotated[str, Field(min_length=1), AfterValidator(_local_path)]
"""Folder of the machine on which the job was started."""


def make_folder(path: str, setting: str = "output") -> Path:
    """A folder for what a job writes on this machine; called before the work.

    Args:
        path: of the folder.
        setting: that named it, for messages.

    Raises:
        ConfigError: it cannot be made or written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{setting} {path!r}: cannot be made ({error.strerror}: {error.filename}). Name another folder, such as "
            f"--set {setting}=/tmp/csrm."
        ) from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(
            f"{setting} {path!r}: cannot be written. Name another folder, such as --set {setting}=/tmp/csrm."
        )
    return folder


def require_file_place(path: str, setting: str) -> Path:
    """A file that a job replaces on this machine; its folder is made. Called before the work.

    Args:
        path: of the file.
        setting: that named it, for messages.

    Raises:
        ConfigError: it is a folder, or its folder cannot be made or written.
    """
    file = Path(path)
    if file.is_dir():
        raise ConfigError(f"{setting} {path!r}: expected a file, got a folder. Name a file in it.")
    make_folder(str(file.parent), setting)
    return file


_KNOWN_FORMATS = ("delta", "parquet", "csv", "json", "orc", "table")
"""Formats that CSRM has rules of its own for; any other name is Spark's, which may be that of a class."""


class InputSpec(Settings):
    """Where one input table is, and how its columns are called there."""

    path: str
    """Folder or file, any URI that Spark reads; relative paths start at the working directory. Of format table: the
    table's name, such as main.shop.products."""
    format: str = "delta"
    """Spark data source: delta, parquet, csv, json, ...; table: a table or view of Spark's catalog, of any format."""
    columns: dict[str, str | None] = {}
    """CSRM's column name to the name used there; columns of the same name need no entry. null leaves an optional column
    out, whatever is there."""
    market: str | None = Field(default=None, min_length=1)
    """Market of all rows, of a table that has no column for it."""
    options: dict[str, str] = {}
    """Options of the data source, such as header and sep for csv. `binaryAsString: "true"` of parquet reads bytes that
    nothing marks as text as text. `versionAsOf: "41"` of delta reads that version."""

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str) -> str:
        """Spark takes Delta and DELTA for delta too; only by one name its versions and types are looked at."""
        return name.lower() if name.lower() in _KNOWN_FORMATS else name

    def name_there(self, column: str) -> str | None:
        """What a column of CSRM's is called in the table; None where it is not read there."""
        return None if column == "market" and self.market is not None else self.columns.get(column, column)


class SharedInputs(Settings):
    """Tables of the markets; a job reads those that its own `inputs` know.

    Candidates are not among them: build_candidates adds what it is given to what it finds, a night scores nothing else.
    """

    catalog: InputSpec | None = None
    queries: InputSpec | None = None
    behaviour: InputSpec | None = None
    judgments: InputSpec | None = None
    parallel_text: InputSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_candidates(cls, values: Any) -> Any:
        if isinstance(values, dict) and "candidates" in values:
            raise ValueError(
                "candidates would replace those that the night builds; name them in build_candidates.yaml, which adds "
                "them to what it finds, or in score_catalog.yaml, which then scores nothing else"
            )
        return values


class SharedSettings(Settings):
    """What a market's jobs share: the file that theirs name as `extends`. A job takes the settings that it has.

    A setting in the job's own file replaces the shared one; of `inputs`, each table does.
    """

    markets: Markets | None = None
    inputs: SharedInputs = SharedInputs()
    tables: TablesDir | None = None
    bundle: str | None = None
    bundle_digest: str | None = None
    device: str | None = None


MOST_VALUES = 100_000
"""Values of one configuration file; aliases of aliases could stand for more than a machine holds."""
SettingsT = TypeVar("SettingsT", bound=Settings)


def load_config(path: str | Path, settings_class: type[SettingsT], overrides: Sequence[str] = ()) -> SettingsT:
    """Settings from a YAML file, and from the one that it names as `extends` (see SharedSettings).

    Args:
        path: the file.
        settings_class: what the file must hold.
        overrides: `dotted.key=value` strings that replace or add values; the value is read as YAML.

    Raises:
        ConfigError: no such file, not YAML, or any problem with its values; all problems in one message.
    """
    values = _read_values(path, settings_class).values
    for override in overrides:
        _apply_override(values, override)
    return _validated(values, settings_class, path)


def _validated(values: Mapping[str, Any], settings_class: type[SettingsT], path: str | Path) -> SettingsT:
    try:
        return settings_class.model_validate(values)
    except ValidationError as error:
        problems = problems_of(error, settings_class)
        raise ConfigError(
            f"config {str(path)!r}: {len(problems)} problem{'s' * (len(problems) > 1)}:\n" + "\n".join(problems)
        ) from error


class _Values(NamedTuple):
    """Values of a job's file, those of the shared one among them."""

    values: dict[str, Any]
    shared_path: str
    """Path of the shared file; empty where there is none."""
    shared_keys: set[tuple[str, ...]]
    """Keys whose values are the shared ones."""


def _read_values(path: str | Path, settings_class: type[Settings]) -> _Values:
    """Values of a job's file, laid over those of the file that it extends."""
    values = _read_mapping(path)
    if "extends" not in values:
        return _Values(values, "", set())
    name = values.pop("extends")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"config {str(path)!r}: extends: expected the name of a file beside it, got {name!r}.")
    shared_path = Path(path).parent / name
    shared = _read_mapping(shared_path)
    _validated(shared, SharedSettings, shared_path)
    fields, own = settings_class.model_fields, values.get("inputs", {})
    shared_keys: set[tuple[str, ...]] = {
        (name,) for name, value in shared.items() if value is not None and name in fields and name not in values
    }
    merged = {name: value for name, value in shared.items() if (name,) in shared_keys} | values
    if "inputs" in fields and shared.get("inputs") and isinstance(own, dict):
        known = getattr(fields["inputs"].annotation, "model_fields", {})
        inputs = {name: spec for name, spec in shared["inputs"].items() if spec and name in known and name not in own}
        merged["inputs"] = inputs | own
        shared_keys = (shared_keys - {("inputs",)}) | {("inputs", name) for name in inputs}
    return _Values(merged, str(shared_path), shared_keys)


def _read_mapping(path: str | Path) -> dict[str, Any]:
    """The settings of a file.

    Raises:
        ConfigError: it cannot be read, or is no mapping.
    """
    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"config {str(path)!r}: cannot be read ({error.strerror}). Is the path right? `csrm init conf` writes the "
            "configuration files of all commands into a folder conf."
        ) from error
    except ValueError as error:
        raise ConfigError(f"config {str(path)!r}: is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config {str(path)!r}: expected a mapping of settings, got {type(values).__name__}.")
    return values


def resolved_settings(config: Settings, config_path: str, overrides: Sequence[str] = ()) -> list[tuple[str, str, str]]:
    """Every setting, and where it comes from.

    Args:
        config: as of load_config.
        config_path: the file.
        overrides: see load_config.

    Returns:
        Dotted key, value as JSON, and its source: a file's path, `--set` or `default`; in the order of the declaration.
    """
    replaced = [override.partition("=")[0].split(".") for override in overrides]
    read = _read_values(config_path, type(config))

    def source_of(keys: tuple[str, ...]) -> str:
        if any(list(keys[: len(names)]) == names for names in replaced):
            return "--set"
        return read.shared_path if {keys[:1], keys[:2]} & read.shared_keys else config_path

    def walk(value: Any, keys: tuple[str, ...], is_given: bool) -> Iterator[tuple[str, str, str]]:
        parts = (
            {name: getattr(value, name) for name in type(value).model_fields} if isinstance(value, Settings) else value
        )
        if isinstance(parts, dict) and parts:
            for name, part in parts.items():
                own = is_given and (not isinstance(value, Settings) or name in value.model_fields_set)
                yield from walk(part, (*keys, str(name)), own)
            return
        shown = json.dumps(to_jsonable_python(value), ensure_ascii=False)
        yield ".".join(keys), shown, source_of(keys) if is_given else "default"

    return list(walk(config, (), True))


def parse_yaml(text: str) -> Any:
    """The values of a YAML text.

    Raises:
        ValueError: it is no YAML, names a key twice, or stands for more than MOST_VALUES values.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count_values(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("too many brackets, one inside the other") from None
    except (yaml.YAMLError, AttributeError, OverflowError) as error:  # AttributeError: !!timestamp of what is none
        raise ValueError(str(error)) from error


def _count_values(node: yaml.Node, counted: dict[int, int]) -> int:
    """Values that a node stands for, each alias counted as what it repeats.

    Raises:
        ValueError: too many, a key twice, or a value that contains itself.
    """
    if id(node) in counted:
        if not counted[id(node)]:
            raise ValueError("a value contains itself")
        return counted[id(node)]
    counted[id(node)] = 0  # until its parts are counted
    total = 1
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := sorted({key for key in keys if keys.count(key) > 1 and key != "<<"}):
            raise ValueError(f"the keys {repeated} are there twice, near line {node.start_mark.line + 1}")
        total += sum(_count_values(part, counted) for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count_values(part, counted) for part in node.value)
    if total > MOST_VALUES:
        raise ValueError(f"it stands for more than {MOST_VALUES:,} values, near line {node.start_mark.line + 1}")
    counted[id(node)] = total
    return total


def _apply_override(values: dict[str, Any], override: str) -> None:
    dotted_key, equals, text = override.partition("=")
    if not equals or not dotted_key:
        raise ConfigError(f"--set {override!r}: expected key=value, for example --set tables=/data/csrm.")
    *parents, last = dotted_key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override!r}: {parent!r} is a single value and has no keys inside.")
    try:
        values[last] = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from error


def problems_of(error: ValidationError, settings_class: type[Settings] | None = None) -> list[str]:
    """One line for each value that is wrong: its place, what was expected, and what it is.

    Args:
        error: of pydantic.
        settings_class: what was validated, by which a key that is misspelt or misplaced is told; None: it is not.
    """
    return [_describe(details, settings_class) for details in error.errors()]


def _describe(details: Any, settings_class: type[Settings] | None) -> str:
    where = ".".join(str(part) for part in details["loc"]) or "(whole file)"
    hint = ""
    if details["type"] == "string_type" and not isinstance(details["input"], (dict, list)):
        hint = "; put it in quotes in YAML"
    if details["type"] in ("extra_forbidden", "unexpected_keyword_argument") and settings_class is not None:
        hint = _hint_of_key(settings_class, details["loc"])
    return f"  - {where}: {details['msg']} (got {details['input']!r}){hint}"


def _hint_of_key(settings_class: type[Settings], place: Sequence[int | str]) -> str:
    """What an unknown key may be meant for: a setting of its name elsewhere, or of a similar name beside it."""
    *parents, key = map(str, place)
    known = list(_setting_names(settings_class))
    if elsewhere := [".".join(names) for names in known if names[-1] == key and "*" not in names]:
        return f". Is it {elsewhere[0]}?"
    beside = [names[-1] for names in known if len(names) == len(place) and _is_at(parents, names[:-1])]
    similar = get_close_matches(key, beside, n=1)
    return f". Is it {similar[0]}?" if similar else ""


def _is_at(parents: Sequence[str], names: Sequence[str]) -> bool:
    return all(name in ("*", parent) for parent, name in zip(parents, names, strict=True))


def _setting_names(kind: Any, parents: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys that lead to every setting, `*` for any key of a map or place in a list."""
    if isinstance(kind, type) and issubclass(kind, Settings):
        for name, field in kind.model_fields.items():
            yield (*parents, name)
            yield from _setting_names(field.annotation, (*parents, name))
    elif isinstance(kind, type) and is_dataclass(kind):
        yield from ((*parents, field.name) for field in fields(kind))
    else:
        inside = (*parents, "*") if get_origin(kind) in (dict, list, tuple) else parents
        for part in get_args(kind):
            yield from _setting_names(part, inside)
