"""Configuration files: one YAML file a job, checked against the settings class that the job declares."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from csrm.errors import ConfigError


class Settings(BaseModel):
    """Base of all settings: immutable, unknown keys refused, every field described by its docstring."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class InputSpec(Settings):
    """Where one input table is, and how its columns are called there."""

    path: str
    """Folder or file, any URI that Spark reads; relative paths start at the working directory."""
    format: str = "delta"
    """Spark data source: delta, parquet, csv, json, ..."""
    columns: dict[str, str] = {}
    """CSRM's column name to the name used there; columns of the same name need no entry."""
    options: dict[str, str] = {}
    """Options of the data source, such as header and sep for csv."""


SettingsT = TypeVar("SettingsT", bound=Settings)


def load_config(path: str | Path, settings_class: type[SettingsT], overrides: Sequence[str] = ()) -> SettingsT:
    """Settings from a YAML file.

    Args:
        path: the file.
        settings_class: what the file must hold.
        overrides: `dotted.key=value` strings that replace or add values; the value is read as YAML.

    Raises:
        ConfigError: no such file, not YAML, or any problem with its values; all problems in one message.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"config {str(path)!r}: cannot be read ({error.strerror}). Is the path right? `csrm init conf` writes the "
            "configuration files of all commands into a folder conf."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {str(path)!r}: is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config {str(path)!r}: expected a mapping of settings, got {type(values).__name__}.")
    for override in overrides:
        _apply_override(values, override)
    try:
        return settings_class.model_validate(values)
    except ValidationError as error:
        problems = [_describe(details) for details in error.errors()]
        raise ConfigError(
            f"config {str(path)!r}: {len(problems)} problem{'s' * (len(problems) > 1)}:\n" + "\n".join(problems)
        ) from error


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
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from error


def _describe(details: Any) -> str:
    where = ".".join(str(part) for part in details["loc"]) or "(whole file)"
    hint = ""
    if details["type"] == "string_type" and not isinstance(details["input"], (dict, list)):
        hint = "; put it in quotes in YAML"
    return f"  - {where}: {details['msg']} (got {details['input']!r}){hint}"
