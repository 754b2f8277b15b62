"""Labels of several judges: one label a pair with all votes beside it, and how far judges agree."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import duckdb

from csrm.config import InputSpec
from csrm.errors import InputError
from csrm.schemas import PAIR_KEY
from csrm.training.data.database import problem_list

MOST_SHOWN_JUDGES = 20
_KEY = ", ".join(PAIR_KEY)
logger = logging.getLogger(__name__)
VOTES_TABLE = """
    CREATE TABLE votes (
        query_number BIGINT, product_number BIGINT, judge_weight FLOAT, votes MAP(VARCHAR, DOUBLE)
    );
"""
"""SQL of the pairs that have a weight other than 1, or grades that differ: each grade with its share of the weights."""


@dataclass(frozen=True)
class Judge:
    """One judge beside the others."""

    name: str | None
    """Name in the table; None: rows without one."""
    num_labels: int
    mean_weight: float
    agreement: float | None
    """Share of the other judges' labels of its pairs that are the same; None where it shares no pair."""


@dataclass(frozen=True)
class Agreement:
    """How far judges agree on the pairs that several of them labelled."""

    num_pairs: int
    """Pairs with a label."""
    num_shared: int
    """Pairs with labels of several judges."""
    agreement: float | None
    """Mean share of two judges of a pair who gave the same grade; None where no pair is shared."""
    kappa: float | None
    """Fleiss' kappa (1971): agreement beyond that of judges who draw grades at random, 1 where all agree, 0 for chance.
    None where no pair is shared, or all have one grade."""
    judges: Sequence[Judge]
    """Judges, those of the most labels first."""

    @property
    def shown_judges(self) -> Sequence[Judge]:
        """Judges that people read of; a crowd has thousands."""
        return self.judges[:MOST_SHOWN_JUDGES]


def add_judged(database: duckdb.DuckDBPyConnection, spec: InputSpec) -> None:
    """Make table `added` of the rows of `judgments`: one row a pair, with the grade of the largest weight, and votes.

    Of grades with equal weights, the first one by name is taken. A pair counts as much as its most trusted judge.
    Weights that are not all 1 are logged, for a column of this name may mean something else.

    Raises:
        InputError: a weight is not above 0, or the judges' rows of a pair are in different splits.
    """
    problems = []
    for num_rows, *example in database.execute(
        f"""SELECT count(*) OVER (), {_KEY}, weight FROM judgments WHERE weight <= 0 OR NOT isfinite(weight)
        ORDER BY {_KEY} LIMIT 1"""
    ).fetchall():
        problems.append(
            f"{num_rows} weights are not above 0 and finite, for example {', '.join(map(str, example))}. "
            "Leave rows out that are not to count, or set columns to {weight: null} where it means something else"
        )
    for num_pairs, *example in database.execute(
        f"""SELECT count(*) OVER (), * FROM (
            SELECT {_KEY} FROM judgments GROUP BY ALL HAVING count(DISTINCT coalesce(split, 'train')) > 1
        ) ORDER BY {_KEY} LIMIT 1"""
    ).fetchall():
        problems.append(f"{num_pairs} pairs have judges' rows in different splits, for example {', '.join(example)}")
    if problems:
        raise InputError(problem_list(f"judgments {spec.path!r}", problems))
    ((num_rows, num_weighted, least, most),) = database.execute(
        "SELECT count(*), count(*) FILTER (weight <> 1), min(weight), max(weight) FROM judgments"
    ).fetchall()
    if num_weighted:
        logger.info(
            "judgments %r: column %r weighs %d of %d labels, by %g to %g. columns: {weight: null} reads no weights",
            spec.path,
            spec.name_there("weight"),
            num_weighted,
            num_rows,
            least,
            most,
        )
    database.execute(
        f"""CREATE TEMP TABLE added AS
        SELECT {_KEY}, first(grade ORDER BY weight DESC, grade) AS grade, max(split) AS split,
            max(judge_weight)::FLOAT AS judge_weight,
            CASE WHEN count(*) > 1
                THEN map(list(grade ORDER BY grade), list(weight / total ORDER BY grade)) END AS votes
        FROM (
            SELECT *, sum(weight) OVER (PARTITION BY {_KEY}) AS total FROM (
                SELECT {_KEY}, grade, max(split) AS split, sum(coalesce(weight, 1)) AS weight,
                    max(coalesce(weight, 1)) AS judge_weight
                FROM judgments GROUP BY {_KEY}, grade
            )
        ) GROUP BY {_KEY}"""
    )


def add_votes(database: duckdb.DuckDBPyConnection) -> None:
    """Keep what `added` knows of judges, after its texts."""
    database.execute(
        """INSERT INTO votes SELECT query_number, product_number, judge_weight, votes
        FROM added JOIN added_queries USING (market, query_id) JOIN added_products USING (market, product_id)
        WHERE judge_weight <> 1 OR votes IS NOT NULL"""
    )


def judge_agreement(database: duckdb.DuckDBPyConnection) -> Agreement | None:
    """How far the judges of `judgments` agree; None where the table names no judge."""
    judges = database.execute(
        f"""WITH counted AS (
            SELECT judge, coalesce(weight, 1) AS weight,
                count(*) OVER (PARTITION BY {_KEY}) AS num_judges,
                count(*) OVER (PARTITION BY {_KEY}, grade) AS num_same
            FROM judgments
        )
        SELECT judge, count(*), avg(weight), avg((num_same - 1) / (num_judges - 1)) FILTER (num_judges > 1)
        FROM counted GROUP BY judge ORDER BY count(*) DESC, judge NULLS LAST"""
    ).fetchall()
    if all(name is None for name, *_ in judges):
        return None
    ((num_pairs, num_shared, agreement, chance),) = database.execute(
        f"""WITH of_grade AS (SELECT {_KEY}, grade, count(*) AS num FROM judgments GROUP BY ALL),
        of_pair AS (SELECT {_KEY}, sum(num) AS num_judges, sum(num * num) AS num_same FROM of_grade GROUP BY {_KEY}),
        shared AS (FROM of_pair WHERE num_judges > 1),
        shares AS (
            SELECT sum(num) / sum(sum(num)) OVER () AS share FROM of_grade SEMI JOIN shared USING ({_KEY})
            GROUP BY grade
        )
        SELECT (SELECT count(*) FROM of_pair), (SELECT count(*) FROM shared),
            (SELECT avg((num_same - num_judges) / (num_judges * (num_judges - 1))) FROM shared),
            (SELECT sum(share * share) FROM shares)"""
    ).fetchall()
    kappa = None if agreement is None or chance >= 1 else (agreement - chance) / (1 - chance)
    return Agreement(num_pairs, num_shared, agreement, kappa, [Judge(*row) for row in judges])
