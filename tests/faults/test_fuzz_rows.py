"""Generated rows through the whole job: none is lost, whatever is in it."""

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from csrm.commands import score_catalog
from tests.faults.nasty import NASTY, attributes, keys, texts
from tests.faults.night import KEY, KR, TW, Night

NUM_PAIRS = 10_000
NUM_PRODUCTS, NUM_QUERIES = 1_000, 40
"""Of each market."""
_NOTHING = regex.compile(
    r"[\s\p{Z}\p{Cc}\p{Cf}\p{Co}\p{Default_Ignorable_Code_Point}\p{Noncharacter_Code_Point}\u2800]*"
)


def generated(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """So many different values, the same in every run."""
    found: dict[str, Any] = {}

    @settings(max_examples=count, derandomize=True, database=None)
    @given(st.lists(strategy, min_size=10, max_size=20, unique_by=repr))
    def collect(values: list[Any]) -> None:
        if len(found) < count:
            found.update({repr(value): value for value in values})

    collect()
    assert len(found) >= count
    return list(found.values())[:count]


def is_blank(text: object) -> bool:
    """Nothing but white space and invisible characters, or no text at all."""
    return not isinstance(text, str) or _NOTHING.fullmatch(text) is not None


def generate(night: Night) -> None:
    """Ten thousand pairs of generated rows. A query or product of some is nowhere; every nasty text is in one."""
    rng = np.random.default_rng(0)
    product_ids, query_ids = generated(keys, NUM_PRODUCTS), generated(keys, NUM_QUERIES)
    pool = np.array([*generated(texts, NUM_PRODUCTS), None], dtype=object)
    some_attributes = np.array([*generated(attributes, NUM_QUERIES), None], dtype=object)
    num_rows = 2 * NUM_PRODUCTS
    night.catalog = pd.DataFrame(
        {
            "market": [KR] * NUM_PRODUCTS + [TW] * NUM_PRODUCTS,
            "product_id": 2 * product_ids,
            **{name: rng.choice(pool, num_rows) for name in ("title", "brand", "category")},
            "attributes": rng.choice(some_attributes, num_rows),
        }
    )
    night.catalog.loc[: len(NASTY) - 1, "title"] = NASTY
    queries = pd.DataFrame({"market": [KR] * NUM_QUERIES + [TW] * NUM_QUERIES, "query_id": 2 * query_ids})
    night.queries = queries.assign(query=rng.choice(pool[:-1], len(queries)), language=rng.choice(pool, len(queries)))
    night.queries.loc[1, "query"] = " \u200b\u3000"  # whatever is generated, one query is blank
    night.retrieval_table = pd.DataFrame(
        {
            "market": queries["market"].repeat(3),
            "query_id": queries["query_id"].repeat(3),
            "rank": np.tile(np.arange(1, 4, dtype=np.int32), len(queries)),
            "product_id": "any",
            "title": rng.choice(pool[:-1], 3 * len(queries)),
            "similarity": 1.0,
            "source": "lexical",
        }
    )
    every = night.queries[["market", "query_id"]].merge(night.catalog[["market", "product_id"]])
    is_nasty = every["product_id"].isin(product_ids[: len(NASTY)]) & (every["query_id"] == query_ids[0])
    others = every[~is_nasty].sample(NUM_PAIRS - int(is_nasty.sum()), random_state=0)
    night.candidates = pd.concat([every[is_nasty], others], ignore_index=True)
    night.catalog = night.catalog.drop(index=rng.choice(np.arange(len(NASTY), num_rows), 50, replace=False))
    night.queries = night.queries.drop(index=[NUM_QUERIES - 1, 2 * NUM_QUERIES - 1])
    text = pa.string()
    columns = {"market": text, "product_id": text, "title": text, "brand": text, "category": text}
    schema = pa.schema({**columns, "attributes": pa.map_(text, text)})
    as_entries = night.catalog["attributes"].map(lambda values: None if values is None else list(values.items()))
    night.catalog.assign(attributes=as_entries).to_parquet(night.folder / "catalog.parquet", schema=schema, index=False)


def expected_reasons(night: Night) -> pd.Series:
    """Reason of each candidate, null where it has a score; by the rules of the tables, without Spark."""
    pairs = night.candidates.merge(night.queries, how="left", indicator="from_queries")
    pairs = pairs.merge(night.catalog, how="left", on=["market", "product_id"], indicator="from_catalog")
    reasons = [
        (pairs["from_queries"] == "left_only", "no_query"),
        (pairs["from_catalog"] == "left_only", "no_product"),
        (pairs["query"].map(is_blank), "empty_query"),
        (pairs["title"].map(is_blank), "empty_title"),
    ]
    conditions, names = zip(*reasons, strict=True)
    chosen = np.select([condition.to_numpy() for condition in conditions], names, default="")
    return pd.Series(chosen, index=pd.MultiIndex.from_frame(pairs[KEY]))


@pytest.mark.fault("ten thousand generated rows: any text in any column, keys too")
@pytest.mark.spark
@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_of_ten_thousand_generated_rows_none_is_lost(spark: SparkSession, night: Night) -> None:
    generate(night)
    reasons = expected_reasons(night)
    assert len(reasons) == NUM_PAIRS
    assert set(reasons) == {"", "no_query", "no_product", "empty_query", "empty_title"}
    settings = {"bundle": str(night.bundle), "audit": {"rejected_share": 1.0}}

    assert score_catalog.main(night.arguments("night", **settings)) == 0

    rejected = night.table("rejected_pairs").set_index(KEY)["reason"]
    assert rejected.sort_index().to_dict() == reasons[reasons != ""].sort_index().to_dict()
    assert len(rejected) == (reasons != "").sum()
    night.candidates = reasons[reasons == ""].index.to_frame(index=False)
    night.check_scores({"night"})
    night.check_staged_once()
