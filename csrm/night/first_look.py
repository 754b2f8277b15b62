"""A market that a bundle scores for the first time: how far its texts are from those that the bundle was trained on."""

from collections.abc import Sequence

import numpy as np
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from csrm.bundle.loading import Bundle
from csrm.night.audit import FirstLook
from csrm.scoring.prompts import MOST_CHARACTERS, Line, Product, Query, prefix_lines, suffix_lines
from csrm.scoring.tokenization import PromptTokenizer

NUM_TEXTS = 1_000
"""Queries, and titles, of a market that are looked at."""


def look_at_markets(
    bundle: Bundle, markets: Sequence[str], *, queries_df: DataFrame, catalog_df: DataFrame
) -> dict[str, FirstLook]:
    """Market to what a bundle meets there, on a sample of its queries and titles.

    Args:
        bundle: what scores.
        markets: the markets.
        queries_df: market, query_id, query.
        catalog_df: market, product_id, title.
    """
    if not markets:
        return {}
    queries = _sample(queries_df, markets, "query_id", "query")
    titles = _sample(catalog_df, markets, "product_id", "title")
    return {market: look_at_texts(bundle, queries.get(market, []), titles.get(market, [])) for market in markets}


def look_at_texts(bundle: Bundle, queries: Sequence[str], titles: Sequence[str]) -> FirstLook:
    """What a bundle meets in some texts of a market; texts that the tokenizer fails on are left out.

    >>> from csrm.bundle import load_bundle
    >>> look = look_at_texts(load_bundle("conf/demo_bundle"), ["mouse"], ["Silent Wireless Mouse 2.4G"])
    >>> look.num_titles, look.num_cut
    (1, 0)
    """
    tokenizer, template = bundle.prompt_tokenizer(), bundle.settings.template
    query_lines = [line for text in queries for line in prefix_lines(Query("", "", text, ()), template)]
    title_lines = [suffix_lines(Product(title), template)[0] for title in titles]
    ids_of_queries = _uncut_ids(tokenizer, [line for line in query_lines if line.field == "query"])
    ids_of_titles = _uncut_ids(tokenizer, title_lines)
    ids = np.array([id_ for ids in (*ids_of_queries, *ids_of_titles) for id_ in ids], dtype=np.int64)
    seen, vote = bundle.seen_tokens(), bundle.settings.vote
    return FirstLook(
        num_tokens=len(ids),
        num_unseen=None if seen is None else int(len(ids) - seen[ids[ids < len(seen)]].sum()),
        num_titles=len(ids_of_titles),
        num_cut=sum(len(ids) > tokenizer.budgets.title for ids in ids_of_titles),
        golden_median=float(np.median(bundle.golden_pairs().scores)) if vote is None else vote.golden_median,
    )


def _uncut_ids(tokenizer: PromptTokenizer, lines: Sequence[Line]) -> list[list[int]]:
    """Token ids of the lines that the tokenizer does not fail on: the night sets the pairs of the others aside."""
    try:
        return tokenizer.uncut_ids(lines)
    except Exception:  # tokenizers raises Exception itself
        middle = len(lines) // 2
        return _uncut_ids(tokenizer, lines[:middle]) + _uncut_ids(tokenizer, lines[middle:]) if middle else []


def _sample(df: DataFrame, markets: Sequence[str], id_column: str, text_column: str) -> dict[str, list[str]]:
    """Market to some of its texts, always the same."""
    place = F.row_number().over(Window.partitionBy("market").orderBy(F.xxhash64(id_column), id_column))
    text = F.left(text_column, F.lit(MOST_CHARACTERS)).alias("text")
    texts_df = df.where(F.col("market").isin(*markets) & F.col(text_column).isNotNull())
    sample_df = texts_df.select("market", id_column, text).withColumn("place", place).where(F.col("place") <= NUM_TEXTS)
    found: dict[str, list[str]] = {}
    for row in sample_df.select("market", "text").collect():
        found.setdefault(row["market"], []).append(row["text"])
    return found
