"""Pages for people: HTML that needs no other file and no network, with plots inside.

What a page shows is foreign text in part: everything is escaped, characters that cannot be seen are written out, and
the page forbids its reader's browser to run or to fetch anything.
"""

import math
from collections.abc import Hashable
from importlib import resources
from typing import Any

import pandas as pd
import regex

from csrm.extras import import_eval

# Zero-width joiner and non-joiner and the two variation selectors of emoji stay: texts are spelled with them.
_UNSEEN = regex.compile(
    r"[[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}\u2800]--[\u200c\u200d\ufe0e\ufe0f]]"
    r"|(?<=\p{M}{8})\p{M}",  # a heap of marks on one letter covers the lines above
    flags=regex.V1,
)


def render(template: str, **values: object) -> str:
    """A page from a template that extends pages/page.html.

    Args:
        template: its file, from the folder csrm, such as operations/report.html.
        values: what the template names; a name that it lacks is an error, None is written as nothing.

    Returns:
        HTML that can be written as UTF-8.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    jinja2 = import_eval("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: resources.files("csrm").joinpath(name).read_text("utf-8")),
        autoescape=True,
        finalize=_finalized,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = number
    page: str = environment.get_template(template).render(values)
    return page


def seen(text: str) -> str:
    """Text whose characters can all be seen, so that what is shown is what is there."""
    shown: str = _UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)
    return shown


def is_known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def number(value: float | None, form: str = ",") -> str:
    """A number in a format, or a dash where it is not known."""
    return format(value, form) if is_known(value) else "–"


def rows(frame: pd.DataFrame) -> list[dict[Hashable, Any]]:
    """A frame's rows; what is missing is None."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def _finalized(value: object) -> object:
    """What a template writes, before it is escaped; markup of our own is as it should be."""
    if value is None:
        return ""
    return seen(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
