"""Tables of pairs and their texts inside a database: pairs as numbers, and each text once.

A source of pairs is added in this order: add_text_tables, the keys of its pairs as table `added`, add_texts, add_keys.
"""

import logging
from collections.abc import Iterator, Mapping

import duckdb
import pandas as pd
import pyarrow as pa

from csrm.config import InputSpec
from csrm.errors import InputError
from csrm.schemas import CATALOG, QUERIES, RETRIEVAL_TABLE, Table
from csrm.training.data.database import add_table, has_text, language_of_query, problem_list

logger = logging.getLogger(__name__)
PAIR_TABLES = """
    CREATE TABLE query_texts (
        query_number BIGINT, market VARCHAR, query_id VARCHAR, language VARCHAR, query VARCHAR,
        retrieved_titles VARCHAR[]
    );
    CREATE TABLE product_texts (
        product_number BIGINT, product_id VARCHAR, title VARCHAR, brand VARCHAR, category VARCHAR,
        attributes MAP(VARCHAR, VARCHAR)
    );
    CREATE TABLE keys (query_number BIGINT, product_number BIGINT, grade VARCHAR, split VARCHAR);
    CREATE TABLE measured_texts (text VARCHAR);
    CREATE VIEW pairs AS
        SELECT
            market, query_id, product_id, grade, split, language, query, retrieved_titles, title, brand, category,
            attributes, query_number, product_number
        FROM keys JOIN query_texts USING (query_number) JOIN product_texts USING (product_number);
"""
"""SQL that makes the tables, without rows."""
PAIR_COLUMNS_SQL = """
    market, query_id, product_id, grade, split, language, query, retrieved_titles, title, brand, category, attributes
"""
"""Columns of `pairs` that are read, in their order."""
_ROWS_AT_ONCE = 8_192
_NO_TITLES = """
    CREATE TEMP VIEW retrieval_table AS
    SELECT NULL::VARCHAR AS market, NULL::VARCHAR AS query_id, NULL::INT AS rank, NULL::VARCHAR AS product_id,
        NULL::VARCHAR AS title LIMIT 0
"""


def check_titles(database: duckdb.DuckDBPyConnection, spec: InputSpec) -> None:
    """Refuse titles of behaviour that was used as a label; see JudgedInputs.labels_from_behaviour."""
    shared = database.execute(
        """SELECT count(*) OVER (), market, query_id, product_id
        FROM retrieval_table SEMI JOIN judgments USING (market, query_id, product_id) WHERE source = 'behaviour'
        ORDER BY market, query_id, product_id LIMIT 1"""
    ).fetchall()
    for num_titles, *example in shared:
        raise InputError(
            f"retrieval_table {spec.path!r}: {num_titles} titles were retrieved by behaviour for a query that their "
            f"product is judged for, for example {', '.join(example)}. As labels come from behaviour, build it from "
            "behaviour of another time or source, or without behaviour."
        )


def add_text_tables(
    database: duckdb.DuckDBPyConnection,
    markets: Mapping[str, str],
    *,
    queries: InputSpec,
    catalog: InputSpec,
    retrieval_table: InputSpec | None,
) -> None:
    """Make the tables of texts known to a database; without a retrieval table, it is there and has no rows.

    Args:
        markets: market to language.

    Raises:
        InputError: see add_table.
    """
    add_table(database, QUERIES, queries, markets)
    add_table(database, CATALOG, catalog, markets)
    add_retrieval_table(database, retrieval_table, markets)


def add_retrieval_table(
    database: duckdb.DuckDBPyConnection, retrieval_table: InputSpec | None, markets: Mapping[str, str]
) -> None:
    """Make retrieved titles known to a database; where there is no table of them, it is there and has no rows."""
    if retrieval_table is None:
        database.execute(_NO_TITLES)
    else:
        add_table(database, RETRIEVAL_TABLE, retrieval_table, markets)


def add_measured_texts(database: duckdb.DuckDBPyConnection) -> None:
    """Keep the texts that these queries have of those that measure a model."""
    database.execute(
        f"""INSERT INTO measured_texts SELECT DISTINCT text_key(query)
        FROM queries_of_all_markets SEMI JOIN measured_ids USING (market, query_id) WHERE {has_text("query")}"""
    )


def add_texts(database: duckdb.DuckDBPyConnection, markets: Mapping[str, str]) -> None:
    """Number the queries and products of the pairs in `added`, and keep their texts.

    Args:
        markets: market to language.
    """
    database.execute(
        f"""
        CREATE TEMP TABLE added_queries AS
            SELECT *, row_number() OVER (ORDER BY market, query_id) + (SELECT count(*) FROM query_texts) AS query_number
            FROM (SELECT DISTINCT market, query_id FROM added);
        CREATE TEMP TABLE added_products AS
            SELECT *, row_number() OVER (ORDER BY market, product_id) + (SELECT count(*) FROM product_texts)
                AS product_number
            FROM (SELECT DISTINCT market, product_id FROM added);
        INSERT INTO query_texts
            SELECT query_number, market, query_id, {language_of_query(markets)}, query,
                coalesce(titles, [])
            FROM queries JOIN added_queries USING (market, query_id) LEFT JOIN (
                SELECT query_number, list(title ORDER BY rank) AS titles
                FROM retrieval_table JOIN added_queries USING (market, query_id) GROUP BY query_number
            ) USING (query_number);
        INSERT INTO product_texts
            SELECT product_number, product_id, title, brand, category, attributes
            FROM catalog JOIN added_products USING (market, product_id);
        """
    )


def add_keys(database: duckdb.DuckDBPyConnection, table: Table, spec: InputSpec) -> int:
    """Keep the pairs of `added`, which are of this table, but those that scoring rejects: a text is empty.

    Returns:
        How many are kept.

    Raises:
        InputError: a query or a product has no text.
    """
    problems = []
    for side, texts in (("query", "queries"), ("product", "catalog")):
        numbers = "added_queries" if side == "query" else "added_products"
        orphans = database.execute(
            f"""SELECT count(*) OVER (), market, {side}_id FROM {numbers} ANTI JOIN {side}_texts USING ({side}_number)
            ORDER BY market, {side}_id LIMIT 1"""
        ).fetchall()
        for num_ids, market, id_ in orphans:
            problems.append(
                f"{num_ids} {side} ids are not in {texts}, for example {market} {id_}: add them there or drop them here"
            )
    if problems:
        raise InputError(problem_list(f"{table.name} {spec.path!r}", problems))
    ((num_kept,),) = database.execute(
        f"""INSERT INTO keys SELECT query_number, product_number, grade, coalesce(split, 'train')
        FROM added
        JOIN (FROM added_queries SEMI JOIN (FROM query_texts WHERE {has_text("query")}) USING (query_number))
            USING (market, query_id)
        JOIN (FROM added_products SEMI JOIN (FROM product_texts WHERE {has_text("title")}) USING (product_number))
            USING (market, product_id)"""
    ).fetchall()
    ((num_added,),) = database.execute("SELECT count(*) FROM added").fetchall()
    if num_kept < num_added:
        logger.warning(
            "%s %r: %d of %d pairs have an empty query or title and are left out, as in scoring",
            table.name,
            spec.path,
            num_added - num_kept,
            num_added,
        )
    return int(num_kept)


def read_frames(rows: duckdb.DuckDBPyRelation) -> Iterator[pd.DataFrame]:
    """Rows with PAIR_COLUMNS_SQL in batches; see as_frame."""
    for batch in rows.to_arrow_reader(_ROWS_AT_ONCE):
        yield as_frame(pa.Table.from_batches([batch]))


def as_frame(rows: pa.Table) -> pd.DataFrame:
    """Titles as tuples, attributes as lists of (name, value) or None."""
    frame: pd.DataFrame = rows.to_pandas()
    frame["retrieved_titles"] = [tuple(titles) for titles in frame["retrieved_titles"]]
    return frame
