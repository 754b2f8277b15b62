"""Judged pairs with their texts, streamed from the tables: what the relevance stage learns from."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import duckdb
import pandas as pd

from csrm.config import InputSpec, Settings
from csrm.errors import InputError
from csrm.schemas import CANDIDATES, JUDGED_LABELS, PAIR_KEY, Table
from csrm.training.data.database import add_table, check_markets, open_database, random_number
from csrm.training.data.groups import read_groups
from csrm.training.data.judges import VOTES_TABLE, add_judged, add_votes, judge_agreement
from csrm.training.data.pair_tables import (
    PAIR_COLUMNS_SQL,
    PAIR_TABLES,
    add_keys,
    add_measured_texts,
    add_text_tables,
    add_texts,
    as_frame,
    check_titles,
    read_frames,
)
from csrm.training.data.translated_rows import TRANSLATED, TRANSLATED_TABLE, TranslatedRows, add_translated_rows

UNLABELLED, TAUGHT = "unlabelled", "taught"
"""Splits of pairs that nobody judged: those for the teachers of distillation, and those for a ranker that exists."""
_IS_MEASURED = "coalesce(split, 'train') NOT IN ('train', 'unlabelled')"


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
    """See csrm.text.text_key. Of those whose text is in a table of queries that was read; the texts of others are not
    known, so that the same text in another market is not found."""

    def has(self, market: str, query_id: str, text: str) -> bool:
        return (market, query_id) in self.ids or text in self.texts


class Fold(NamedTuple):
    """One of several parts of the queries. Equal texts (csrm.text.text_key) are in one part, whatever their market."""

    number: int
    """From 0."""
    num_folds: int
    seed: int = 0

    def sql(self) -> str:
        """Condition that a row of `pairs` is in this part."""
        return f"{random_number(self.seed, 'text_key(query)')} % {self.num_folds} = {self.number}"


def add_tables(
    database: duckdb.DuckDBPyConnection,
    table: Table,
    spec: InputSpec,
    inputs: JudgedInputs | UnlabelledInputs,
    markets: Mapping[str, str],
) -> None:
    """Make a table of pairs, with rows of each market, and the tables of their texts known to a database.

    Args:
        database: where.
        table: of the pairs.
        spec: where that is.
        inputs: where the texts are.
        markets: market to language.

    Raises:
        InputError: see add_table and check_markets.
    """
    add_table(database, table, spec, markets)
    check_markets(database, table, spec, markets)
    add_text_tables(
        database, markets, queries=inputs.queries, catalog=inputs.catalog, retrieval_table=inputs.retrieval_table
    )


class JudgedPairs:
    """Judged pairs of some markets with their texts. Use it as a context manager.

    Tables are read once, without Spark, by DuckDB; the pairs and the texts that they need go to a temporary folder.
    """

    def __init__(self, inputs: JudgedInputs, markets: Mapping[str, str]) -> None:
        """Read the tables.

        Args:
            inputs: where the tables are.
            markets: market to language.

        Raises:
            InputError: inputs cannot be read or have problems (all problems of an input in one message), a market has
                no judgment, judged queries or products are missing, or retrieved titles tell labels.
        """
        self._markets = markets
        self._translated_weight = 1.0
        self._folder = tempfile.TemporaryDirectory(prefix="csrm-join-")
        self._database = open_database(self._folder.name)
        try:
            self._database.execute(PAIR_TABLES + VOTES_TABLE + TRANSLATED_TABLE)
            with self._database.cursor() as database:
                add_tables(database, JUDGED_LABELS, inputs.judgments, inputs, markets)
                database.execute(
                    f"""CREATE TABLE measured_ids AS
                    SELECT DISTINCT market, query_id FROM judgments_of_all_markets WHERE {_IS_MEASURED}"""
                )
                add_judged(database, inputs.judgments)
                self.agreement = judge_agreement(database)
                """How far judges agree; None where the table names no judge."""
                add_measured_texts(database)
                add_texts(database, markets)
                add_keys(database, JUDGED_LABELS, inputs.judgments)
                add_votes(database)
                if inputs.labels_from_behaviour and inputs.retrieval_table is not None:
                    check_titles(database, inputs.retrieval_table)
                database.execute(f"""CREATE TABLE true_grades AS
                    SELECT {", ".join(PAIR_KEY)}, any_value(true_grade) AS true_grade, any_value(split) AS split
                    FROM judgments WHERE true_grade IS NOT NULL GROUP BY ALL""")
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
        self,
        inputs: UnlabelledInputs,
        markets: Mapping[str, str],
        pairs_per_query: int,
        seed: int,
        split: str = UNLABELLED,
    ) -> int:
        """Add candidates that have no judgment, with grade null; none of measured_queries, nor pairs added before.

        Args:
            markets: market to language.
            pairs_per_query: at most, drawn at random.
            split: of the pairs, UNLABELLED or TAUGHT.

        Returns:
            How many they are.

        Raises:
            InputError: as for judged pairs.
        """
        place = random_number(seed, *PAIR_KEY)
        with self._database.cursor() as database:
            add_tables(database, CANDIDATES, inputs.candidates, inputs, markets)
            add_measured_texts(database)
            database.execute(
                f"""CREATE TEMP TABLE added AS
                SELECT market, query_id, product_id, NULL::VARCHAR AS grade, '{split}' AS split FROM candidates
                ANTI JOIN pairs USING (market, query_id, product_id)
                ANTI JOIN measured_ids USING (market, query_id)
                ANTI JOIN (
                    FROM queries SEMI JOIN measured_texts ON text = text_key(query)
                ) USING (market, query_id)
                QUALIFY row_number() OVER (PARTITION BY market, query_id ORDER BY {place}) <= {pairs_per_query}"""
            )
            add_texts(database, markets)
            return add_keys(database, CANDIDATES, inputs.candidates)

    def add_translated(self, settings: TranslatedRows, retrieval_table: InputSpec | None) -> int:
        """Add pairs of split train in other languages, with split TRANSLATED; see add_translated_rows."""
        self._translated_weight = settings.weight
        with self._database.cursor() as database:
            return add_translated_rows(database, settings, retrieval_table, self._markets)

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
        rows = self._database.execute("""SELECT DISTINCT grade FROM (
                SELECT grade FROM keys WHERE grade IS NOT NULL UNION SELECT unnest(map_keys(votes)) FROM votes
            ) ORDER BY grade""")
        return [grade for (grade,) in rows.fetchall()]

    def true_grades(self) -> list[str]:
        """Those that are known of the judgments of split train, sorted."""
        rows = self._database.execute(
            "SELECT DISTINCT true_grade FROM true_grades WHERE coalesce(split, 'train') = 'train' ORDER BY true_grade"
        )
        return [grade for (grade,) in rows.fetchall()]

    def check_apart(self, split: str, other: str) -> None:
        """No query text (csrm.text.text_key) may be in two splits: a model would be measured by what it was trained on.

        Raises:
            InputError: some are.
        """
        shared = self._database.execute(
            """SELECT count(*) OVER (), text FROM (
                SELECT text_key(query) AS text
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
        query = f"SELECT {PAIR_COLUMNS_SQL} FROM ({chosen}) ORDER BY market, query_id, product_id"
        result = self._database.sql(query, params={"split": split} if split is not None else None)
        return as_frame(result.to_arrow_table())

    def with_texts(self, keyed: pd.DataFrame) -> pd.DataFrame:
        """Rows that name a pair (market, query_id, product_id), in their order, with its query and title."""
        return self._joined(
            keyed,
            """SELECT keyed.*, pairs.query, pairs.title FROM pairs
            JOIN keyed USING (market, query_id, product_id) WHERE split <> 'translated' ORDER BY place""",
        )

    def with_true_grades(self, keyed: pd.DataFrame) -> pd.DataFrame:
        """Rows that name a pair (market, query_id, product_id), in their order, with its true_grade, null: unknown."""
        return self._joined(
            keyed,
            """SELECT keyed.*, true_grades.true_grade FROM keyed
            LEFT JOIN true_grades USING (market, query_id, product_id) ORDER BY place""",
        )

    def _joined(self, keyed: pd.DataFrame, query: str) -> pd.DataFrame:
        """The result of a query over table `keyed`, whose column `place` is the order of its rows."""
        self._database.register("keyed", keyed.assign(place=range(len(keyed))))
        rows = self._database.sql(query).to_arrow_table()
        self._database.unregister("keyed")
        frame: pd.DataFrame = rows.drop_columns("place").to_pandas()
        return frame

    def digest(self) -> str:
        """Of every pair, its texts and its votes."""
        sql = """SELECT md5(concat_ws(' ', (SELECT sum(md5_number_lower(pairs::VARCHAR)) FROM pairs),
            (SELECT sum(md5_number_lower(votes::VARCHAR)) FROM votes)))"""
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
            SELECT {PAIR_COLUMNS_SQL} FROM pairs WHERE split = $split AND {inside} ORDER BY query_number, product_number
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
                it, the unlabelled pairs are among those of split train. A pair that nobody judged is left out where it
                has no soft label.

        Yields:
            Batches of the columns of `read`, soft_label (null where there is none), weight (1 there; times that of the
            judges and of translated rows), votes (grade and share, null where judges agree) and group_number; rows of a
            group stand side by side.
        """
        outside = "true" if without is None else f"NOT {without.sql()}"
        if split == TRANSLATED:  # a translation goes where its query goes
            outside = f"""query_number IN (
                SELECT translated_queries.query_number FROM translated_queries
                JOIN query_texts ON query_texts.query_number = own_number WHERE {outside}
            )"""
        with self._database.cursor() as database:
            for batch in read_groups(
                database,
                split,
                pairs_per_group=pairs_per_group,
                seed=seed,
                random_negatives=random_negatives,
                condition=outside,
                soft_labels=soft_labels,
            ):
                yield batch.assign(weight=batch["weight"] * self._translated_weight) if split == TRANSLATED else batch

    def _stream(self, query: str, split: str) -> Iterator[pd.DataFrame]:
        with self._database.cursor() as database:
            yield from read_frames(database.sql(query, params={"split": split}))
