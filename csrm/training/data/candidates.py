"""A sample of candidates with their texts: real pairs where nobody judged any."""

import tempfile
from collections.abc import Mapping
from contextlib import closing

import pandas as pd

from csrm.errors import InputError
from csrm.schemas import CANDIDATES, PAIR_KEY
from csrm.training.data.database import open_database, random_number
from csrm.training.data.judged import UnlabelledInputs, add_tables
from csrm.training.data.pair_tables import (
    PAIR_COLUMNS_SQL,
    PAIR_TABLES,
    add_keys,
    add_texts,
    as_frame,
)


def candidate_pairs(inputs: UnlabelledInputs, markets: Mapping[str, str], num_pairs: int) -> pd.DataFrame:
    """A random sample of candidates, always the same.

    Args:
        inputs: where the tables are.
        markets: market to language.
        num_pairs: how many, from 1; fewer where there are fewer, or some have an empty query or title.

    Returns:
        market, query_id, product_id, and csrm.scoring.PAIR_COLUMNS, sorted by the first three.

    Raises:
        InputError: inputs cannot be read or have problems, a market has no candidates, queries or products are missing,
            or no pair has a text.
    """
    with tempfile.TemporaryDirectory(prefix="csrm-join-") as folder, closing(open_database(folder)) as database:
        database.execute(PAIR_TABLES)
        add_tables(database, CANDIDATES, inputs.candidates, inputs, markets)
        database.execute(
            f"""CREATE TEMP TABLE added AS
            SELECT market, query_id, product_id, NULL::VARCHAR AS grade, NULL::VARCHAR AS split FROM candidates
            ORDER BY {random_number(0, *PAIR_KEY)} LIMIT {num_pairs}"""
        )
        add_texts(database, markets)
        if not add_keys(database, CANDIDATES, inputs.candidates):
            raise InputError(
                f"{CANDIDATES.name} {inputs.candidates.path!r}: expected pairs with a query and a title, got none in "
                f"{num_pairs} of them. Raise parity_pairs, or look at the catalog and the queries."
            )
        sql = f"SELECT {PAIR_COLUMNS_SQL} FROM pairs ORDER BY {', '.join(PAIR_KEY)}"
        return as_frame(database.sql(sql).to_arrow_table()).drop(columns=["grade", "split"])
