from pathlib import Path

import pandas as pd
import pytest

from csrm.config import InputSpec
from csrm.errors import InputError
from csrm.training.data import judged_pairs

MARKETS = {"us": "en", "kr": "ko"}


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, pd.DataFrame]:
    return {
        "catalog": pd.DataFrame(
            {"market": ["us", "kr", "jp"], "product_id": ["p1", "p1", "p1"], "title": ["Mouse", "마우스", "マウス"]}
        ),
        "queries": pd.DataFrame(
            {
                "market": ["us", "kr"],
                "query_id": ["q1", "q1"],
                "query": ["mouse", "마우스"],
                "language": [None, "ko-KR"],
            }
        ),
        "judgments": pd.DataFrame(
            {"market": ["us", "kr"], "query_id": ["q1", "q1"], "product_id": ["p1", "p1"], "grade": ["E", "I"]}
        ),
        "retrieval_table": pd.DataFrame(
            {
                "market": ["us", "us"],
                "query_id": ["q1", "q1"],
                "rank": [2, 1],
                "product_id": ["p3", "p2"],
                "title": ["second", "first"],
                "similarity": [0.5, 1.0],
                "source": ["lexical", "lexical"],
            }
        ),
    }


def written(tables: dict[str, pd.DataFrame], folder: Path) -> dict[str, InputSpec]:
    specs = {}
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet")
        specs[name] = InputSpec(path=str(folder / f"{name}.parquet"), format="parquet")
    return specs


def test_pairs_carry_their_texts(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    pairs = judged_pairs(written(tables, tmp_path), MARKETS).set_index("market")
    assert pairs["title"].to_dict() == {"kr": "마우스", "us": "Mouse"}
    assert pairs["language"].to_dict() == {"kr": "ko-KR", "us": "en"}
    assert pairs["retrieved_titles"].to_dict() == {"kr": (), "us": ("first", "second")}
    assert pairs["grade"].to_dict() == {"kr": "I", "us": "E"}


def test_a_judged_pair_without_its_product_is_named(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    tables["catalog"] = tables["catalog"].iloc[1:]
    with pytest.raises(InputError, match=r"1 judged ids have no product, for example us p1.*catalog"):
        judged_pairs(written(tables, tmp_path), MARKETS)


def test_a_market_without_judgments_is_named(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no rows for markets \['jp'\]"):
        judged_pairs(written(tables, tmp_path), {**MARKETS, "jp": "ja"})


def test_missing_columns_are_named(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    tables["queries"] = tables["queries"].rename(columns={"query_id": "id"})
    with pytest.raises(InputError, match=r"missing columns \['query_id'\]; it has .*'id'.*Map them"):
        judged_pairs(written(tables, tmp_path), MARKETS)


def test_an_input_that_is_not_there_is_named(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    specs = written(tables, tmp_path)
    with pytest.raises(InputError, match=r"nowhere.*Is the path right"):
        judged_pairs({**specs, "catalog": InputSpec(path="nowhere", format="parquet")}, MARKETS)
    with pytest.raises(InputError, match=r"cannot be read as Delta"):
        judged_pairs({**specs, "catalog": InputSpec(path=str(tmp_path), format="delta")}, MARKETS)
