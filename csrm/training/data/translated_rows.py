"""Judged pairs again in other languages, with whole texts that a person or a service translated."""

import logging
from collections.abc import Mapping

import duckdb
from pydantic import Field

from csrm.config import InputSpec, Settings
from csrm.errors import InputError
from csrm.schemas import TRANSLATED_TEXTS
from csrm.training.data.database import add_table, has_text, language_of_market, problem_list
from csrm.training.data.pair_tables import add_retrieval_table

logger = logging.getLogger(__name__)
TRANSLATED = "translated"
"""Split of these pairs."""
TRANSLATED_TABLE = "CREATE TABLE translated_queries (query_number BIGINT, own_number BIGINT)"
"""SQL of the table that names the query of which another one is a translation; one that was not translated is its own.
"""


class TranslatedRows(Settings):
    """Judged pairs of split train, learnt once more in each language that their texts are translated into."""

    texts: InputSpec
    """Translated queries and titles; see csrm.schemas.TRANSLATED_TEXTS."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of such a pair, beside 1 for the pair as it was judged."""


def add_translated_rows(
    database: duckdb.DuckDBPyConnection,
    settings: TranslatedRows,
    retrieval_table: InputSpec | None,
    markets: Mapping[str, str],
) -> int:
    """Add judged pairs with their query, their title and their retrieved titles in other languages, where these are.

    The label stays. A text in the language that its query or market has is left out. A translated title has no brand,
    category or attributes beside it: in their own language they would tell what the product is. A query whose
    translation is the text of one that measures a model is left out.

    Args:
        database: a cursor of its own, for its temporary tables.
        settings: where the texts are.
        retrieval_table: titles that augment the queries.
        markets: market to language.

    Returns:
        How many they are.

    Raises:
        InputError: the table cannot be read or has problems, or no text is of a judged query or product.
    """
    where = f"{TRANSLATED_TEXTS.name} {settings.texts.path!r}"
    add_table(database, TRANSLATED_TEXTS, settings.texts, markets)
    _check_kinds(database, where)
    add_retrieval_table(database, retrieval_table, markets)
    _keep_texts(database, where, markets)
    database.execute(
        """CREATE TEMP TABLE own AS
            SELECT query_number AS own_query, product_number AS own_product, grade, market, query_id, product_id
            FROM keys JOIN (SELECT query_number, market, query_id FROM query_texts) USING (query_number)
            JOIN (SELECT product_number, product_id FROM product_texts) USING (product_number)
            WHERE split = 'train'"""
    )
    _add_queries(database)
    _add_products(database)
    ((num_pairs,),) = database.execute(
        f"""INSERT INTO keys SELECT coalesce(query_number, own_query), coalesce(product_number, own_product), grade,
            '{TRANSLATED}'
        FROM own JOIN (
            SELECT DISTINCT market, language FROM translated_texts
        ) USING (market)
        LEFT JOIN new_queries USING (own_query, language) LEFT JOIN new_products USING (own_product, language)
        WHERE NOT coalesce(is_measured, false) AND (query_number IS NOT NULL OR product_number IS NOT NULL)"""
    ).fetchall()
    if not num_pairs:
        raise InputError(
            f"{where}: no text is of a query or product that is judged in split train, in markets {sorted(markets)}. "
            "Are market, kind and id those of the queries and the catalog, and languages others than theirs?"
        )
    _add_votes(database)
    _log(database, num_pairs)
    return int(num_pairs)


def _check_kinds(database: duckdb.DuckDBPyConnection, where: str) -> None:
    unknown = database.execute(
        "SELECT DISTINCT kind FROM translated_texts WHERE kind NOT IN ('query', 'product') ORDER BY kind LIMIT 5"
    ).fetchall()
    if unknown:
        kinds = [kind for (kind,) in unknown]
        raise InputError(problem_list(where, [f"column 'kind' has {kinds}, expected query or product"]))


def _keep_texts(database: duckdb.DuckDBPyConnection, where: str, markets: Mapping[str, str]) -> None:
    """Make tables `said_queries` and `said_titles`, without texts in the language that the query or market has.

    Those would be a pair's own language once more; they are counted in a warning.
    """
    own_language = f"coalesce(query_texts.language, {language_of_market(markets, 'translated_texts.market')})"
    ((num_own,),) = database.execute(
        f"""CREATE TEMP TABLE said AS
            SELECT translated_texts.*, lower(translated_texts.language) = lower({own_language}) AS is_own
            FROM translated_texts LEFT JOIN query_texts
            ON kind = 'query' AND query_texts.market = translated_texts.market AND query_texts.query_id = id
            WHERE {has_text("text")};
        CREATE TEMP TABLE said_queries AS
            SELECT market, id AS query_id, language, text FROM said WHERE kind = 'query' AND NOT is_own;
        CREATE TEMP TABLE said_titles AS
            SELECT market, id AS product_id, language, text FROM said WHERE kind = 'product' AND NOT is_own;
        SELECT count(*) FROM said WHERE is_own"""
    ).fetchall()
    if num_own:
        logger.warning(
            "%s: %d texts are in the language that their query or market has, and are left out", where, num_own
        )


def _add_queries(database: duckdb.DuckDBPyConnection) -> None:
    """Make table `new_queries`, each with its number unless it measures a model, and keep their texts."""
    database.execute(
        """CREATE TEMP TABLE new_queries AS
            SELECT own_query, language, is_measured, CASE WHEN NOT is_measured THEN row_number() OVER (
                PARTITION BY is_measured ORDER BY own_query, language
            ) + (SELECT count(*) FROM query_texts) END AS query_number
            FROM (
                SELECT own_query, language, text_key(text) IN (SELECT text FROM measured_texts) AS is_measured
                FROM (SELECT DISTINCT own_query, market, query_id FROM own) JOIN said_queries USING (market, query_id)
            );
        INSERT INTO query_texts
            SELECT query_number, market, query_id, language, text, coalesce(titles, [])
            FROM said_queries JOIN (
                SELECT DISTINCT query_number, own_query, language, market, query_id
                FROM new_queries JOIN own USING (own_query) WHERE NOT is_measured
            ) USING (market, query_id, language) LEFT JOIN (
                SELECT query_number, list(coalesce(text, title) ORDER BY rank) AS titles
                FROM retrieval_table JOIN (
                    SELECT DISTINCT query_number, language, market, query_id
                    FROM new_queries JOIN own USING (own_query) WHERE NOT is_measured
                ) USING (market, query_id) LEFT JOIN said_titles USING (market, product_id, language)
                GROUP BY query_number
            ) USING (query_number);
        INSERT INTO translated_queries SELECT query_number, own_query FROM new_queries WHERE NOT is_measured;
        INSERT INTO translated_queries SELECT DISTINCT own_query, own_query FROM own"""
    )


def _add_products(database: duckdb.DuckDBPyConnection) -> None:
    """Make table `new_products`, each with its number, and keep their titles."""
    database.execute(
        """CREATE TEMP TABLE new_products AS
            SELECT own_product, language,
                row_number() OVER (ORDER BY own_product, language) + (SELECT count(*) FROM product_texts)
                AS product_number
            FROM (SELECT DISTINCT own_product, market, product_id FROM own)
            JOIN said_titles USING (market, product_id);
        INSERT INTO product_texts
            SELECT product_number, product_id, text, NULL, NULL, NULL
            FROM said_titles JOIN (
                SELECT DISTINCT product_number, language, market, product_id
                FROM new_products JOIN own USING (own_product)
            ) USING (market, product_id, language)"""
    )


def _add_votes(database: duckdb.DuckDBPyConnection) -> None:
    """Keep the judges' weights and votes of the pairs."""
    database.execute(
        f"""INSERT INTO votes
        SELECT keys.query_number, keys.product_number, judge_weight, votes.votes
        FROM keys JOIN translated_queries USING (query_number)
        LEFT JOIN new_products ON new_products.product_number = keys.product_number
        JOIN votes ON votes.query_number = own_number
            AND votes.product_number = coalesce(own_product, keys.product_number)
        WHERE split = '{TRANSLATED}'"""
    )


def _log(database: duckdb.DuckDBPyConnection, num_pairs: int) -> None:
    languages, num_measured = database.execute(
        """SELECT list(DISTINCT language ORDER BY language), (SELECT count(*) FROM new_queries WHERE is_measured)
        FROM (SELECT language FROM new_queries UNION ALL SELECT language FROM new_products)"""
    ).fetchall()[0]
    left_out = f"; {num_measured} queries left out, whose translation measures the model" if num_measured else ""
    logger.info("%d judged pairs are learnt in other languages too: %s%s", num_pairs, ", ".join(languages), left_out)
