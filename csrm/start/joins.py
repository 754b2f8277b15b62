"""Whether ids of one table are those of another: ids that do not meet tell that a column was taken for another."""

from collections.abc import Mapping

from csrm.errors import InputError
from csrm.start.tables import FoundTable

_REFERENCES = (
    ("judgments", "query_id", "queries"),
    ("judgments", "product_id", "catalog"),
    ("candidates", "query_id", "queries"),
    ("candidates", "product_id", "catalog"),
    ("behaviour", "product_id", "catalog"),
)
"""A table, its column, and the table that has the ids."""
MOST_MISSING = 0.5
"""Share of the ids that are looked at; where more are not there, the column is another one."""


def check_references(tables: Mapping[str, tuple[FoundTable, Mapping[str, str]]]) -> list[str]:
    """Look up some ids of each market in the table that they refer to.

    Args:
        tables: each table, and CSRM's name of a column to the name there.

    Returns:
        Notes: a few ids are not there.

    Raises:
        InputError: most are not; all such columns in one message, which names the option that says another column.
    """
    problems, notes = [], []
    for name, column, referred in _REFERENCES:
        if name not in tables or referred not in tables:
            continue
        (found, there), (owner, of_owner) = tables[name], tables[referred]
        known = owner.counts(of_owner["market"])
        ids = {
            (market, id_)
            for market, values in found.sample(there["market"], there[column]).items()
            for id_ in values
            if market in known
        }
        missing = sorted(ids - owner.present(of_owner["market"], of_owner[column], ids))
        if not missing:
            continue
        text = (
            f"{name}: {len(missing)} of {len(ids)} ids that were looked at in column {there[column]!r}, taken for "
            f"{column}, are not in column {of_owner[column]!r} of {referred}, for example {missing[0][1]!r} of market "
            f"{missing[0][0]!r}."
        )
        if len(missing) > MOST_MISSING * len(ids):
            problems.append(
                f"{text} Say which column it is: --column {name}.{column}=NAME, or --column {referred}.{column}=NAME"
            )
        else:
            notes.append(f"{text} Nights reject such pairs, and training refuses them: add the ids there or drop them.")
    if problems:
        raise InputError("ids that do not meet:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return notes
