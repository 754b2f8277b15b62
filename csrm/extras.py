"""Packages of optional extras, imported where they are used, with a message that names the extra."""

import importlib
from typing import Any

from csrm.errors import MissingDependencyError


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
