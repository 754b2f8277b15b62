"""Pairs that nobody judged, from titles that name their query: relevance to learn in a market without labels.

Sellers name what they sell in many titles ("jeans, bootcut, blue"), and a search finds these. Said without the words of
the query, such a title ("bootcut, blue") is a relevant product that its words do not give away; what other queries'
titles say so ("dutch oven, 5 l") is irrelevant. No person and no click stands behind these labels, so they are as good
in a market without labels as in one whose labels are wrong.
"""

import logging
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import regex
from pydantic import Field

from csrm.config import InputSpec, Markets, Settings
from csrm.errors import InputError
from csrm.schemas import PAIR_KEY, QUERIES, RETRIEVAL_TABLE
from csrm.scoring.labels import Label
from csrm.text import search_terms
from csrm.training.data.database import (
    add_table,
    check_markets,
    language_of_query,
    open_database,
    random_number,
)
from csrm.training.data.judged import Fold, MeasuredQueries

QUERIES_AT_ONCE = 5_000
"""Irrelevant titles are those of queries in the same part: memory does not grow with the queries."""
NEAR_SHARE = 0.6
"""Of the irrelevant titles, those whose query shares a search term with this one, where there are such."""
_SPACED = regex.compile(r"(?V1)[\w--[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]]")
"""Letters whose words end where a space or mark stands; others run together, or have particles behind them."""
_MARKS = " ,;:/|-"
logger = logging.getLogger(__name__)


class TitlePairs(Settings):
    """Titles of the retrieval table as pairs to learn, beside the judged ones."""

    markets: Markets
    """Markets to take, each with the language of its text: those without labels, and those with labels that err."""
    queries: InputSpec
    retrieval_table: InputSpec
    max_queries: int | None = Field(default=None, ge=1)
    """Queries that give a pair, at most; drawn at random."""
    irrelevant_per_query: int = Field(default=5, ge=1)
    """Titles of other queries for the one title of a query, at most."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of such a pair, beside 1 for a given label."""


class _Title(NamedTuple):
    product_id: str
    title: str
    said: str
    """Without the words of its query."""


class _Query(NamedTuple):
    """A query with the titles that name it; `said` of these holds none of its search terms."""

    market: str
    query_id: str
    language: str
    query: str
    text_key: str
    """See csrm.text.text_key."""
    terms: frozenset[str]
    titles: tuple[str, ...]
    """All that were retrieved, best first."""
    named: tuple[_Title, ...]


def title_pairs(
    settings: TitlePairs,
    labels: Sequence[Label],
    seed: int,
    measured: MeasuredQueries,
    without: Fold | None = None,
) -> Iterator[pd.DataFrame]:
    """Groups of one query: one title that names it, which leaves its prompt, and titles of other queries.

    Args:
        labels: a title that names its query gets the one of largest gain, the others that of least gain.
        seed: of the queries and titles.
        measured: queries to leave out, by their text and by their id.
        without: leave out the queries of this fold too: a teacher that judges them must not have seen them.

    Yields:
        Batches as of csrm.training.data.JudgedPairs.groups.

    Raises:
        InputError: a table cannot be read, has problems or has no rows of a market, or no title names its query.
    """
    gains = [label.gain for label in labels]
    distributions = np.eye(len(labels), dtype=np.float32)
    relevant, irrelevant = distributions[int(np.argmax(gains))], distributions[int(np.argmin(gains))]
    num_groups = 0
    most = settings.max_queries
    for part in _parts(settings, seed, without):
        queries = [each for each in part if each.named and not measured.has(each.market, each.query_id, each.text_key)]
        rows = []
        for query, title, others in _groups(queries, settings.irrelevant_per_query, np.random.default_rng([seed, 1])):
            if num_groups == most:
                break
            num_groups += 1
            titles = tuple(each for each in query.titles if each != title.title)
            key = (query.market, query.query_id)
            told = (query.language, query.query, titles)
            for other, soft_label in ((title, relevant), *((other, irrelevant) for other in others)):
                rows.append((*key, other.product_id, *told, other.said, soft_label, settings.weight, num_groups))
        names = [*PAIR_KEY, "language", "query", "retrieved_titles", "title"]
        frame = pd.DataFrame(rows, columns=[*names, "soft_label", "weight", "group_number"])
        yield frame.assign(grade=None, split="train", brand=None, category=None, attributes=None, votes=None)
        if num_groups == most:
            break
    if not num_groups:
        raise InputError(
            f"retrieval_table {settings.retrieval_table.path!r}: no title of markets {sorted(settings.markets)} names "
            "its query, so there are no title pairs. Leave title_pairs out, or bring a larger catalog."
        )
    logger.info("%d queries have a title that names them", num_groups)


def _groups(
    queries: Sequence[_Query], num_others: int, rng: np.random.Generator
) -> Iterator[tuple[_Query, _Title, list[_Title]]]:
    """Each query with one title that names it, and titles of other queries of its market that share no term with it."""
    of_market: dict[str, list[int]] = defaultdict(list)
    of_term: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, query in enumerate(queries):
        of_market[query.market].append(place)
        for term in query.terms:
            of_term[query.market, term].append(place)
    for place, query in enumerate(queries):
        near = sorted({other for term in query.terms for other in of_term[query.market, term]} - {place})
        num_near = min(len(near), round(NEAR_SHARE * num_others))
        drawn = [*rng.permutation(near)[:num_near], *rng.choice(of_market[query.market], 2 * num_others)]
        others: dict[str, _Title] = {}
        for other in drawn:
            named = queries[other].named
            title = named[rng.integers(len(named))]
            if len(others) < num_others and _is_irrelevant(title, query):
                others[title.said] = title
        if others:
            yield query, query.named[rng.integers(len(query.named))], list(others.values())


def _is_irrelevant(title: _Title, query: _Query) -> bool:
    """Whether nothing says that another query's title fits.

    It was not found for this query and does not name it. What is said of it shares no term with the query, and is not
    what is said of a relevant title.
    """
    if title.title in query.titles or query.terms <= set(search_terms(title.title)):
        return False
    return query.terms.isdisjoint(search_terms(title.said)) and all(title.said != own.said for own in query.named)


def _parts(settings: TitlePairs, seed: int, without: Fold | None) -> Iterator[list[_Query]]:
    """The queries that have titles, without those of a fold, in random order, some at a time."""
    outside = "true" if without is None else f"NOT {without.sql()}"
    with tempfile.TemporaryDirectory(prefix="csrm-join-") as folder, open_database(folder) as database:
        add_table(database, QUERIES, settings.queries, settings.markets)
        add_table(database, RETRIEVAL_TABLE, settings.retrieval_table, settings.markets)
        check_markets(database, QUERIES, settings.queries, settings.markets)
        check_markets(database, RETRIEVAL_TABLE, settings.retrieval_table, settings.markets)
        found = database.sql(
            f"""FROM (
                SELECT market, query_id, {language_of_query(settings.markets)} AS language, query,
                    text_key(query) AS text_key,
                    list(product_id ORDER BY rank) AS product_ids, list(title ORDER BY rank) AS titles
                FROM retrieval_table JOIN queries USING (market, query_id) WHERE query IS NOT NULL AND {outside}
                GROUP BY market, query_id, language, query
            ) ORDER BY {random_number(seed, "market", "query_id")}, market, query_id"""
        )
        for batch in found.to_arrow_reader(QUERIES_AT_ONCE):
            yield [_query(**row) for row in pa.Table.from_batches([batch]).to_pylist()]


def _query(
    market: str, query_id: str, language: str, query: str, text_key: str, product_ids: list[str], titles: list[str]
) -> _Query:
    terms = frozenset(search_terms(query))
    said = [_without(title, query) for title in titles]
    named = [
        _Title(product_id, title, words)
        for product_id, title, words in zip(product_ids, titles, said, strict=True)
        if terms and words != title and (rest := search_terms(words)) and terms.isdisjoint(rest)
    ]
    return _Query(market, query_id, language, query, text_key, terms, tuple(titles), tuple(named))


def _without(title: str, query: str) -> str:
    """The title without the query's words, and the marks between them; as it was where it does not have all of them."""
    shorter = title
    for word in {word.casefold(): word for word in query.split()}.values():
        start, end = (r"\b" if _SPACED.match(letter) else "" for letter in (word[0], word[-1]))
        said = shorter
        shorter = regex.sub(start + regex.escape(word, literal_spaces=True) + end, " ", said, flags=regex.IGNORECASE)
        if shorter == said:
            return title
    return " ".join(regex.sub(r"(?<=\s|^)[\p{P}\s]+(?=\s|$)", " ", shorter).split()).strip(_MARKS)
