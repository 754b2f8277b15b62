"""Packages of optional extras, imported where they are used, with a message that names the extra."""

import importlib
from typing import Any

from csrm.errors import InputError, MissingDependencyError

_WAY_OUT = (
    "Write the table as Parquet with Spark and name that, or take the feature from it: ALTER TABLE ... DROP FEATURE."
)


def import_eval(module: str) -> Any:
    """A module of the eval extra.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"the package of {module!r} is not installed, which evaluation, reports and Delta without Spark need: "
            "pip install 'csrm[eval]'."
        ) from error


def open_delta(path: str, where: str) -> tuple[Any, Any]:
    """A Delta table at its newest version, without Spark.

    deltalake takes no notice of column mapping: a column that was renamed would be null, and one that was dropped and
    added again would have its old values. So such a table is refused.

    Args:
        path: folder or URI of the table.
        where: what messages begin with.

    Returns:
        deltalake's DeltaTable, and pyarrow's dataset of it.

    Raises:
        InputError: there is no such table, it is damaged, or it has features that deltalake does not support.
        MissingDependencyError: deltalake is not installed.
    """
    delta_table, delta_error = import_eval("deltalake").DeltaTable, import_eval("deltalake.exceptions").DeltaError
    try:
        table = delta_table(path)
        mapping = table.metadata().configuration.get("delta.columnMapping.mode", "none")
        if mapping != "none":
            problem = f"it has column mapping, in mode {mapping!r}"
            raise InputError(f"{where}: cannot be read as Delta without Spark: {problem}. {_WAY_OUT}")
        return table, table.to_pyarrow_dataset()
    except delta_error as error:
        raise InputError(
            f"{where}: cannot be read as Delta without Spark: {error}. Is its log complete? Where that names features "
            f"which deltalake does not support, such as deletion vectors: {_WAY_OUT[0].lower()}{_WAY_OUT[1:]}"
        ) from error
