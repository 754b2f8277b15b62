"""The markets of the study: where their tables come from, what is learnt and what is measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import ndcg_score

from csrm.market.files import write_tables
from csrm.schemas import CATALOG, JUDGMENTS, QUERIES


@dataclass(frozen=True)
class Leg:
    """One pair of a market with labels and a market to measure."""

    name: str
    learnt: Mapping[str, str]
    """The market with labels, and its language."""
    measured: Mapping[str, str]
    kinds: Mapping[str, str]
    """Language of a measured product to what such pairs are called."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of jobs/train.py, beside those of the row."""


GENERATED = Leg(
    "taxonomy",
    learnt={"kr": "ko"},
    measured={"tw": "zh-TW"},
    kinds={"zh-TW": "Chinese products", "ko": "Korean products"},
)
"""Korean labels; Chinese queries, with products in Chinese and with products that are listed in Korean."""
REAL_NOISE = Leg(
    "esci",
    learnt={"us": "en"},
    measured={"us": "en"},
    kinds={"en": "dev of ESCI"},
    settings={
        "tuning.random_negatives": 1.0,
        "tuning.epochs": 1.0,
        "budgets": {"query": 24, "retrieved_title": 12, "title": 32, "brand": 4, "category": 4, "attributes": 4},
    },
)
"""ESCI in English, E against the rest: wrong labels on real text."""


def write_esci(folder: Path, output: Path) -> None:
    """ESCI with binary grades; its split dev is called test, for it only measures."""
    judged = read_tsv(folder / "judgments.tsv.gz")
    products = pd.read_parquet(folder / "products.parquet")
    judged = judged.assign(
        market="us",
        grade=judged["label"].map(lambda label: "yes" if label == "E" else "no"),
        split=judged["split"].replace("dev", "test"),
    )
    queries = judged.drop_duplicates("query_id").assign(language="en")
    catalog = products[products["title"].notna()].assign(market="us", language="en")[
        ["market", "product_id", "title", "language"]
    ]
    judged = judged[judged["product_id"].isin(catalog["product_id"])]
    tables = {CATALOG: catalog, QUERIES: queries, JUDGMENTS: judged}
    write_tables(
        {
            table: frame.assign(**absent(table.column_names, frame))[table.column_names]
            for table, frame in tables.items()
        },
        output,
    )


def absent(names: list[str], frame: pd.DataFrame) -> dict[str, Any]:
    """Columns that a frame lacks, as nulls."""
    return {name: None for name in names if name not in frame}


def read_english(data: Path, has_titles: bool) -> dict[str, pd.DataFrame]:
    """Human labels in English that no cell learns: data set to its pairs, sorted by query.

    Returns:
        csrm.scoring.PAIR_COLUMNS, query_id, and gain: 1, 0.1, 0.01, 0 for E, S, C, I; for Chorus its rating of 0 to 3.
        With titles, each query has the three of its data set that BM25 finds first.
    """
    judged = read_tsv(data / "esci_us" / "judgments.tsv.gz")
    titles = pd.read_parquet(data / "esci_us" / "products.parquet").set_index("product_id")["title"]
    gains = {"E": 1.0, "S": 0.1, "C": 0.01, "I": 0.0}
    judged = judged.assign(title=judged["product_id"].map(titles), gain=judged["label"].map(gains))
    rated = read_tsv(data / "chorus_icecat" / "judgments.tsv.gz")
    rated = rated.assign(query_id=rated["query"], gain=rated["label"].astype(float))
    return {name: _english_pairs(frame, has_titles) for name, frame in (("ESCI", judged), ("Chorus", rated))}


def read_tsv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t", quoting=3, keep_default_na=False, dtype=str)


def write_english(data: Path, output: Path) -> None:
    """What an English market has before anyone judged: its queries, with the titles that BM25 finds for them.

    Queries are those of the English data sets, and ESCI's category names.
    """
    products = pd.read_parquet(data / "esci_us" / "products.parquet")
    categories = products["category"].dropna().str.split(" > ").str[-1]
    queries, titles = [], []
    for name, judged in read_english(data, has_titles=False).items():
        texts = [*judged["query"].unique(), *(categories.unique() if name == "ESCI" else ())]
        catalog = judged.dropna(subset=["title"]).drop_duplicates("title").set_index("title")["product_id"]
        for query, best in best_titles(texts, catalog.index.tolist()).items():
            key = {"market": "us", "query_id": f"{name} {query}"}
            queries.append(key | {"query": query, "language": "en"})
            titles += [
                key | {"rank": rank, "product_id": catalog[title], "title": title, "similarity": 1.0}
                for rank, title in enumerate(best, start=1)
            ]
    output.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(queries).assign(frequency=0).to_parquet(output / "queries.parquet")
    pd.DataFrame(titles).assign(source="lexical").to_parquet(output / "retrieval_table.parquet")


def best_titles(queries: Sequence[str], titles: list[str]) -> dict[str, tuple[str, ...]]:
    """The three titles that BM25 finds first for each query."""
    import bm25s

    index = bm25s.BM25()
    index.index(bm25s.tokenize(titles, show_progress=False), show_progress=False)
    terms = bm25s.tokenize(list(queries), show_progress=False)
    best, _ = index.retrieve(terms, corpus=titles, k=3, show_progress=False)
    return dict(zip(queries, map(tuple, best), strict=True))


def _english_pairs(judged: pd.DataFrame, has_titles: bool) -> pd.DataFrame:
    judged = judged.sort_values(["query_id", "product_id"], ignore_index=True)
    judged = judged.assign(market="us", language="en", brand=None, category=None, attributes=None)
    found: dict[str, tuple[str, ...]] = dict.fromkeys(judged["query"].unique(), ())
    if has_titles:
        found = best_titles(list(found), judged["title"].dropna().unique().tolist())
    return judged.assign(retrieved_titles=judged["query"].map(found))


def ndcg(judged: pd.DataFrame, scores: np.ndarray) -> list[float]:
    """nDCG@10 of each query that has a product with a gain, in the order of their ids; linear gains."""
    values = []
    for _, rows in judged.assign(score=scores).groupby("query_id"):
        if len(rows) > 1 and rows["gain"].max() > 0:
            values.append(round(float(ndcg_score([rows["gain"]], [rows["score"]], k=10)), 4))
    return values
