"""Judged pairs with their texts, streamed from the tables: what the relevance stage learns from."""

import logging
import tempfile
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import duckdb
import pandas as pd
import pyarrow as pa

from csrm.config import InputSpec, Settings
from csrm.errors import InputError
from csrm.schemas import CANDIDATES, CATALOG, JUDGMENTS, QUERIES, RETRIEVAL_TABLE, Table
from csrm.training.data.database import (
    add_table,
    check_markets,
    has_text,
    language_of_query,
    literal,
    open_database,
    problem_list,
    random_number,
    same_text,
)

logger = logging.getLogger(__name__)


_ROWS_AT_ONCE = 8_192


_PAIRS_AT_ONCE = 100_000
"""About so many are joined with their texts at a time, on the right side of each join: within MEMORY_LIMIT."""


_TABLES = """
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
"""Pairs as numbers, and each text once."""


_IS_MEASURED = "coalesce(split, 'train') NOT IN ('train', 'unlabelled')"


_COLUMNS = """
    market, query_id, product_id, grade, split, language, query, retrieved_titles, title, brand, category, attributes
"""


class JudgedInputs(Settings):
    """Tables that hold judged pairs and their texts."""

    catalog: InputSpec
    queries: InputSpec
    judgments: InputSpec
    retrieval_table: InputSpec | None = None
    """Titles that augment the queries; without it, queries are not augmented."""
    labels_from_behaviour: bool = False
    """Grades were made of clicks or purchases. Titles that were retrieved by behaviour must then come from another time
    or source: one of a product that is judged for its query would tell the label, so it is refused."""


class UnlabelledInputs(Settings):
    """Tables that hold pairs that nobody judged, and their texts."""

    catalog: InputSpec
    queries: InputSpec
    candidates: InputSpec
    retrieval_table: InputSpec | None = None
    """Titles that augment the queries; without it, queries are not augmented."""


class MeasuredQueries(NamedTuple):
    """Queries that measure a model: judged in a split other than train, in any market."""

    ids: frozenset[tuple[str, str]] = frozenset()
    """Market and query_id of all of them."""
    texts: frozenset[str] = frozenset()
    """See same_text. Of those whose text is in a table of queries that was read; the texts of others are not known, so
    that the same text in another market is not found."""

    def has(self, market: str, query_id: str, text: str) -> bool:
        return (market, query_id) in self.ids or text in self.texts


class Fold(NamedTuple):
    """One of several parts of the queries; equal texts are in one part, whatever their market, see same_text."""

    number: int
    """From 0."""
    num_folds: int
    seed: int = 0

    def sql(self) -> str:
        """Condition that a row of `pairs` is in this part."""
        return f"{random_number(self.seed, same_text('query'))} % {self.num_folds} = {self.number}"


class JudgedPairs:
    """Judged pairs of some markets with their texts. Use it as a context manager.

    Tables are read once, without Spark, by DuckDB; the pairs and the texts that they need go to a temporary folder.
    """

    def __init__(self, inputs: JudgedInputs, markets: Mapping[str, str]) -> None:
        """Args:
            inputs: where the tables are.
            markets: market to language.

        Raises:
            InputError: inputs cannot be read or have problems (all problems of an input in one message), a market has
                no judgment, judged queries or products are missing, or retrieved titles tell labels.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="csrm-join-")
        self._database = open_database(self._folder.name)
        try:
            self._database.execute(_TABLES)
            with self._database.cursor() as database:
                add_table(database, JUDGMENTS, inputs.judgments, markets)
                check_markets(database, JUDGMENTS, inputs.judgments, markets)
                _add_text_tables(database, inputs, markets)
                database.execute(
                    f"""CREATE TABLE measured_ids AS
                    SELECT DISTINCT market, query_id FROM judgments_of_all_markets WHERE {_IS_MEASURED};
                    CREATE TEMP TABLE added AS FROM judgments"""
                )
                _add_measured_texts(database)
                _add_texts(database, inputs, markets)
                _add_keys(database, JUDGMENTS, inputs.judgments)
                if inputs.labels_from_behaviour and inputs.retrieval_table is not None:
                    _check_titles(database, inputs.retrieval_table)
                database.execute("CREATE TABLE true_grades AS FROM judgments WHERE true_grade IS NOT NULL")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "JudgedPairs":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._database.close()
        self._folder.cleanup()

    def add_unlabelled(
        self, inputs: UnlabelledInputs, markets: Mapping[str, str], pairs_per_query: int, seed: int
    ) -> int:
        """Add candidates that have no judgment, with split unlabelled and grade null; none of measured_queries.

        Args:
            markets: market to language.
            pairs_per_query: at most, drawn at random.

        Returns:
            How many they are.

        Raises:
            InputError: as for judged pairs.
        """
        place = random_number(seed, "market", "query_id", "product_id")
        with self._database.cursor() as database:
            add_table(database, CANDIDATES, inputs.candidates, markets)
            check_markets(database, CANDIDATES, inputs.candidates, markets)
            _add_text_tables(database, inputs, markets)
            _add_measured_texts(database)
            database.execute(
                f"""CREATE TEMP TABLE added AS
                SELECT market, query_id, product_id, NULL::VARCHAR AS grade, 'unlabelled' AS split FROM candidates
                ANTI JOIN pairs USING (market, query_id, product_id)
                ANTI JOIN measured_ids USING (market, query_id)
                ANTI JOIN (
                    FROM queries SEMI JOIN measured_texts ON text = {same_text("query")}
                ) USING (market, query_id)
                QUALIFY row_number() OVER (PARTITION BY market, query_id ORDER BY {place}) <= {pairs_per_query}"""
            )
            _add_texts(database, inputs, markets)
            return _add_keys(database, CANDIDATES, inputs.candidates)

    def splits(self) -> dict[str, int]:
        """Split to its number of pairs; pairs without a split are in train."""
        rows = self._database.execute("SELECT split, count(*) FROM keys GROUP BY split ORDER BY split").fetchall()
        return dict(rows)

    def measured_queries(self) -> MeasuredQueries:
        """Queries that measure a model; no pair without a label is made of them.

        A market that is not learnt from may share texts with one that is.
        """
        ids = self._database.execute("SELECT market, query_id FROM measured_ids").fetchall()
        texts = self._database.execute("SELECT text FROM measured_texts").fetchall()
        return MeasuredQueries(frozenset(ids), frozenset(text for (text,) in texts))

    def grades(self) -> list[str]:
        """Of the judgments, sorted."""
        rows = self._database.execute("SELECT DISTINCT grade FROM keys WHERE grade IS NOT NULL ORDER BY grade")
        return [grade for (grade,) in rows.fetchall()]

    def true_grades(self) -> list[str]:
        """Those that are known of the judgments of split train, sorted."""
        rows = self._database.execute(
            "SELECT DISTINCT true_grade FROM true_grades WHERE coalesce(split, 'train') = 'train' ORDER BY true_grade"
        )
        return [grade for (grade,) in rows.fetchall()]

    def check_apart(self, split: str, other: str) -> None:
        """No query text, see same_text, may be in two splits: a model would be measured by what it was trained on.

        Raises:
            InputError: some are.
        """
        shared = self._database.execute(
            f"""SELECT count(*) OVER (), text FROM (
                SELECT {same_text("query")} AS text
                FROM (SELECT DISTINCT query_number, split FROM keys WHERE split IN ($split, $other))
                JOIN query_texts USING (query_number)
                GROUP BY text HAVING count(DISTINCT split) = 2
            ) ORDER BY text LIMIT 1""",
            {"split": split, "other": other},
        ).fetchall()
        for num_texts, example in shared:
            raise InputError(
                f"judgments: {num_texts} query texts are in split {split} and in split {other}, for example "
                f"{example!r}. Give all judgments of a text one split."
            )

    def read(self, split: str | None = None, num_pairs: int | None = None) -> pd.DataFrame:
        """Pairs with their texts, sorted by key, in memory.

        Args:
            split: only those of this split.
            num_pairs: a random sample of so many, always the same; None: all.

        Returns:
            market, query_id, product_id, grade, split, and csrm.scoring.PAIR_COLUMNS.
        """
        chosen = "SELECT * FROM pairs" + (" WHERE split = $split" if split is not None else "")
        if num_pairs is not None:
            chosen += f" ORDER BY {random_number(0, 'query_number', 'product_number')} LIMIT {num_pairs}"
        query = f"SELECT {_COLUMNS} FROM ({chosen}) ORDER BY market, query_id, product_id"
        result = self._database.sql(query, params={"split": split} if split is not None else None)
        return _as_frame(result.to_arrow_table())

    def with_texts(self, keyed: pd.DataFrame) -> pd.DataFrame:
        """Rows that name a pair (market, query_id, product_id), in their order, with its query and title."""
        self._database.register("keyed", keyed.assign(place=range(len(keyed))))
        rows = self._database.sql(
            """SELECT keyed.*, pairs.query, pairs.title FROM pairs
            JOIN keyed USING (market, query_id, product_id) ORDER BY place"""
        ).to_arrow_table()
        self._database.unregister("keyed")
        frame: pd.DataFrame = rows.drop_columns("place").to_pandas()
        return frame

    def with_true_grades(self, keyed: pd.DataFrame) -> pd.DataFrame:
        """Rows that name a pair (market, query_id, product_id), in their order, with its true_grade, null: unknown."""
        self._database.register("keyed", keyed.assign(place=range(len(keyed))))
        rows = self._database.sql(
            """SELECT keyed.*, true_grades.true_grade FROM keyed
            LEFT JOIN true_grades USING (market, query_id, product_id) ORDER BY place"""
        ).to_arrow_table()
        self._database.unregister("keyed")
        frame: pd.DataFrame = rows.drop_columns("place").to_pandas()
        return frame

    def digest(self) -> str:
        """Of every pair and its texts."""
        sql = "SELECT md5(sum(md5_number_lower(pairs::VARCHAR))::VARCHAR) FROM pairs"
        ((digest,),) = self._database.execute(sql).fetchall()
        return str(digest)

    def num_queries(self, split: str, fold: "Fold | None" = None) -> int:
        """Distinct queries of a split; of one fold, where that is given."""
        inside = "true" if fold is None else fold.sql()
        ((num_queries,),) = self._database.execute(
            f"""SELECT count(DISTINCT query_number) FROM keys JOIN query_texts USING (query_number)
            WHERE split = $split AND {inside}""",
            {"split": split},
        ).fetchall()
        return int(num_queries)

    def batches(self, split: str, fold: "Fold | None" = None) -> Iterator[pd.DataFrame]:
        """Pairs of a split with their texts, by query; of one fold, where that is given. Columns as of `read`."""
        inside = "true" if fold is None else fold.sql()
        query = f"""
            SELECT {_COLUMNS} FROM pairs WHERE split = $split AND {inside} ORDER BY query_number, product_number
        """
        yield from self._stream(query, split)

    def groups(
        self,
        split: str,
        pairs_per_group: int,
        seed: int,
        random_negatives: float = 0.0,
        without: "Fold | None" = None,
        soft_labels: Path | None = None,
    ) -> Iterator[pd.DataFrame]:
        """Pairs of a split with their texts, in groups of one query in random order.

        Args:
            split: which pairs.
            pairs_per_group: pairs of a group at most; which pairs of a query share a group is random.
            seed: of both, and of the negatives.
            random_negatives: for this share of the judged pairs, in [0, 1], the query is also paired with a product
                that was judged for another query of its market; such a pair has no grade.
            without: leave out the queries of this fold.
            soft_labels: Parquet file with market, query_id, product_id, soft_label, a list of numbers, and weight. With
                it, the unlabelled pairs are among those of split train.

        Yields:
            Batches of the columns of `read`, soft_label (null where there is none), weight (1 there) and group_number;
            rows of a group stand side by side.
        """
        outside = "true" if without is None else f"NOT {without.sql()}"
        labels = (
            f"""(
                SELECT market, query_id, product_id, soft_label, weight FROM read_parquet({literal(soft_labels)})
            ) RIGHT JOIN rows USING (market, query_id, product_id)"""
            if soft_labels
            else "rows, (SELECT NULL::FLOAT[] AS soft_label, 1::FLOAT AS weight)"
        )
        pair_order = f"{random_number(seed, 'query_number', 'product_number')}, query_number, product_number"
        with self._database.cursor() as database:
            database.execute(
                f"""CREATE TEMP TABLE chosen AS
                SELECT query_number, product_number, grade, split, market
                FROM keys JOIN query_texts USING (query_number)
                WHERE split IN ($split{", 'unlabelled'" if soft_labels else ""}) AND {outside}""",
                {"split": split},
            )
            if random_negatives:
                database.execute(
                    f"""CREATE TEMP TABLE shuffled AS
                    FROM chosen WHERE grade IS NOT NULL ORDER BY market, {pair_order};
                    INSERT INTO chosen
                    WITH markets AS (
                        SELECT market, min(rowid) AS start, count(*) AS num_pairs FROM shuffled GROUP BY market
                    )
                    SELECT DISTINCT a.query_number, b.product_number, NULL, a.split, a.market
                    FROM (
                        SELECT *, start + (shuffled.rowid - start + 1) % num_pairs AS next
                        FROM shuffled JOIN markets USING (market)
                        WHERE shuffled.rowid - start < {random_negatives} * num_pairs
                    ) AS a JOIN shuffled AS b ON b.rowid = a.next
                    ANTI JOIN keys ON keys.query_number = a.query_number AND keys.product_number = b.product_number"""
                )
            ((num_pairs,),) = database.execute(
                f"""CREATE TEMP TABLE placed AS
                SELECT *, {random_number(seed, "query_number", "part")} AS place
                FROM (
                    SELECT query_number, product_number, grade, split,
                        (row_number() OVER (PARTITION BY query_number ORDER BY {pair_order}) - 1) // {pairs_per_group}
                            AS part
                    FROM chosen
                )"""
            ).fetchall()
            num_ranges = num_pairs // _PAIRS_AT_ONCE + 1
            bounds = [place * 2**64 // num_ranges for place in range(num_ranges + 1)]
            num_groups = 0
            for start, end in pairwise(bounds):
                rows = database.sql(
                    f"""WITH placed_here AS (FROM placed WHERE place >= {start} AND place < {end}),
                    asked AS (FROM query_texts JOIN placed_here USING (query_number)),
                    rows AS (FROM product_texts JOIN asked USING (product_number))
                    SELECT {_COLUMNS}, soft_label, coalesce(weight, 1) AS weight,
                        {num_groups} + dense_rank() OVER (ORDER BY place, query_number, part) AS group_number
                    FROM {labels} ORDER BY group_number, product_number"""
                )
                for frame in _frames(rows):
                    num_groups = int(frame["group_number"].iloc[-1])
                    yield frame

    def _stream(self, query: str, split: str) -> Iterator[pd.DataFrame]:
        with self._database.cursor() as database:
            yield from _frames(database.sql(query, params={"split": split}))


def _check_titles(database: duckdb.DuckDBPyConnection, spec: InputSpec) -> None:
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


def _add_text_tables(
    database: duckdb.DuckDBPyConnection, inputs: JudgedInputs | UnlabelledInputs, markets: Mapping[str, str]
) -> None:
    add_table(database, QUERIES, inputs.queries, markets)
    add_table(database, CATALOG, inputs.catalog, markets)
    if inputs.retrieval_table is not None:
        add_table(database, RETRIEVAL_TABLE, inputs.retrieval_table, markets)


def _add_measured_texts(database: duckdb.DuckDBPyConnection) -> None:
    """Keep the texts that these queries have of those that measure a model."""
    database.execute(
        f"""INSERT INTO measured_texts SELECT DISTINCT {same_text("query")}
        FROM queries_of_all_markets SEMI JOIN measured_ids USING (market, query_id) WHERE {has_text("query")}"""
    )


def _add_texts(
    database: duckdb.DuckDBPyConnection, inputs: JudgedInputs | UnlabelledInputs, markets: Mapping[str, str]
) -> None:
    """Number the queries and products of the pairs in `added`, and keep their texts."""
    titles = "(SELECT NULL::BIGINT AS query_number, NULL::VARCHAR[] AS titles LIMIT 0)"
    if inputs.retrieval_table is not None:
        titles = """(
            SELECT query_number, list(title ORDER BY rank) AS titles
            FROM retrieval_table JOIN added_queries USING (market, query_id) GROUP BY query_number
        )"""
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
            FROM queries JOIN added_queries USING (market, query_id) LEFT JOIN {titles} USING (query_number);
        INSERT INTO product_texts
            SELECT product_number, product_id, title, brand, category, attributes
            FROM catalog JOIN added_products USING (market, product_id);
        """
    )


def _add_keys(database: duckdb.DuckDBPyConnection, table: Table, spec: InputSpec) -> int:
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


def _frames(rows: duckdb.DuckDBPyRelation) -> Iterator[pd.DataFrame]:
    for batch in rows.to_arrow_reader(_ROWS_AT_ONCE):
        yield _as_frame(pa.Table.from_batches([batch]))


def _as_frame(rows: pa.Table) -> pd.DataFrame:
    """Titles as tuples, attributes as lists of (name, value) or None."""
    frame: pd.DataFrame = rows.to_pandas()
    frame["retrieved_titles"] = [tuple(titles) for titles in frame["retrieved_titles"]]
    return frame
