"""Pairs in groups of one query, in random order, as the relevance stage learns them.

keys -> chosen    pairs of a split, and random negatives, where they are asked for
     -> placed    each pair in a part of its query, each part at a random place in [0, 2^64)
     -> frames    parts with texts and soft labels, by place, some at a time
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import duckdb
import pandas as pd

from csrm.training.data.database import literal, random_number
from csrm.training.data.pair_tables import PAIR_COLUMNS_SQL, read_frames
from csrm.training.data.translated_rows import TRANSLATED

_PAIRS_AT_ONCE = 100_000
"""Pairs that are joined with their texts at a time, about: on the right side of each join, within MEMORY_LIMIT."""
_NO_SOFT_LABELS = "rows, (SELECT NULL::FLOAT[] AS soft_label, 1::FLOAT AS weight)"


def read_groups(
    database: duckdb.DuckDBPyConnection,
    split: str,
    *,
    pairs_per_group: int,
    seed: int,
    random_negatives: float,
    condition: str,
    soft_labels: Path | None,
) -> Iterator[pd.DataFrame]:
    """Groups of the tables of csrm.training.data.pair_tables; see JudgedPairs.groups.

    Args:
        database: a cursor of its own, for its temporary tables.
        condition: SQL that a query of `query_texts` fulfils.
    """
    pair_order = f"{random_number(seed, 'query_number', 'product_number')}, query_number, product_number"
    _choose_pairs(database, split, condition, has_unlabelled=soft_labels is not None and split == "train")
    if random_negatives:
        _add_random_negatives(database, random_negatives, pair_order)
        if split == TRANSLATED:
            _drop_judged_negatives(database)
    num_pairs = _place_pairs(database, pairs_per_group, seed, pair_order)
    num_ranges = num_pairs // _PAIRS_AT_ONCE + 1
    bounds = [number * 2**64 // num_ranges for number in range(num_ranges + 1)]
    num_groups = 0
    for start, end in pairwise(bounds):
        for frame in read_frames(_groups_between(database, start, end, soft_labels, num_groups)):
            num_groups = int(frame["group_number"].iloc[-1])
            yield frame


def _choose_pairs(database: duckdb.DuckDBPyConnection, split: str, condition: str, has_unlabelled: bool) -> None:
    """Make table `chosen`: the pairs of a split, and the unlabelled ones; random negatives are of their pool."""
    more = ", 'unlabelled'" if has_unlabelled else ""
    pool = "concat_ws(' ', market, language)" if split == TRANSLATED else "market"
    database.execute(
        f"""CREATE TEMP TABLE chosen AS
        SELECT query_number, product_number, grade, split, {pool} AS pool
        FROM keys JOIN query_texts USING (query_number)
        WHERE split IN ($split{more}) AND {condition}""",
        {"split": split},
    )


def _add_random_negatives(database: duckdb.DuckDBPyConnection, share: float, pair_order: str) -> None:
    """Add pairs of a judged pair's query with the product of the pair that follows it at random in its pool."""
    database.execute(
        f"""CREATE TEMP TABLE shuffled AS
        FROM chosen WHERE grade IS NOT NULL ORDER BY pool, {pair_order};
        INSERT INTO chosen
        WITH pools AS (
            SELECT pool, min(rowid) AS start, count(*) AS num_pairs FROM shuffled GROUP BY pool
        )
        SELECT DISTINCT a.query_number, b.product_number, NULL, a.split, a.pool
        FROM (
            SELECT *, start + (shuffled.rowid - start + 1) % num_pairs AS next
            FROM shuffled JOIN pools USING (pool)
            WHERE shuffled.rowid - start < {share} * num_pairs
        ) AS a JOIN shuffled AS b ON b.rowid = a.next
        ANTI JOIN keys ON keys.query_number = a.query_number AND keys.product_number = b.product_number"""
    )


def _drop_judged_negatives(database: duckdb.DuckDBPyConnection) -> None:
    """Drop random negatives that were judged in another language: there, query and product have other numbers."""
    database.execute(
        """DELETE FROM chosen WHERE grade IS NULL AND (query_number, product_number) IN (
            SELECT (query_number, product_number)
            FROM (FROM chosen WHERE grade IS NULL)
            JOIN query_texts USING (query_number) JOIN product_texts USING (product_number)
            SEMI JOIN (FROM pairs WHERE grade IS NOT NULL) AS judged USING (market, query_id, product_id)
        )"""
    )


def _place_pairs(database: duckdb.DuckDBPyConnection, pairs_per_group: int, seed: int, pair_order: str) -> int:
    """Make table `placed`: pairs with their part of the query, and the part's place. Returns the number of pairs."""
    ((num_pairs,),) = database.execute(
        f"""CREATE TEMP TABLE placed AS
        SELECT *, {random_number(seed, "query_number", "part")} AS place
        FROM (
            SELECT query_number, product_number, grade, split,
                (row_number() OVER (PARTITION BY query_number ORDER BY {pair_order}) - 1) // {pairs_per_group} AS part
            FROM chosen
        )"""
    ).fetchall()
    return int(num_pairs)


def _groups_between(
    database: duckdb.DuckDBPyConnection, start: int, end: int, soft_labels: Path | None, num_before: int
) -> duckdb.DuckDBPyRelation:
    """Pairs whose part lies in a range of places, with their texts, soft labels and group_number.

    Args:
        num_before: groups of the ranges before.
    """
    return database.sql(
        f"""WITH placed_here AS (FROM placed WHERE place >= {start} AND place < {end}),
        asked AS (FROM query_texts JOIN placed_here USING (query_number)),
        rows AS (FROM product_texts JOIN asked USING (product_number))
        SELECT {PAIR_COLUMNS_SQL}, soft_label, coalesce(weight, 1) * coalesce(judge_weight, 1) AS weight, votes,
            {num_before} + dense_rank() OVER (ORDER BY place, query_number, part) AS group_number
        FROM (FROM {_with_soft_labels(soft_labels)}) LEFT JOIN votes USING (query_number, product_number)
        WHERE soft_label IS NOT NULL OR split NOT IN ('unlabelled', 'taught') ORDER BY group_number, product_number"""
    )


def _with_soft_labels(soft_labels: Path | None) -> str:
    """SQL of `rows` with soft_label and weight."""
    if soft_labels is None:
        return _NO_SOFT_LABELS
    return f"""(
        SELECT market, query_id, product_id, soft_label, weight FROM read_parquet({literal(soft_labels)})
    ) RIGHT JOIN rows USING (market, query_id, product_id)"""
