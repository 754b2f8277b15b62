from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from csrm.config import InputSpec
from csrm.errors import InputError
from csrm.scoring.labels import ESCI_LABELS
from csrm.text import search_terms
from csrm.training.data.judged import Fold, MeasuredQueries
from csrm.training.data.title_pairs import TitlePairs, title_pairs

TITLES = {
    "jeans": ["Jeans, bootcut blue", "Black jeans slim fit", "Denim jacket"],
    "hiking shoes": ["Ridge hiking shoes 42", "Hiking socks"],
    "running shoes": ["Running shoes for women", "Shoes, running: track"],
    "towel": ["Bath towel"],
    "sofa": ["Corner couch"],
}


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, pd.DataFrame]:
    """Two markets with the same queries and titles."""
    rows = [
        (market, query, rank + 1, f"{query} {rank}", title)
        for market in ("us", "uk")
        for query, titles in TITLES.items()
        for rank, title in enumerate(titles)
    ]
    titles = pd.DataFrame(rows, columns=["market", "query_id", "rank", "product_id", "title"])
    queries = titles[["market", "query_id"]].drop_duplicates()
    return {
        "queries": queries.assign(query=queries["query_id"]),
        "retrieval_table": titles.assign(similarity=1.0, source="lexical"),
    }


def pairs(tables: dict[str, pd.DataFrame], folder: Path, **settings: object) -> pd.DataFrame:
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet")
    specs = {name: InputSpec(path=str(folder / f"{name}.parquet"), format="parquet") for name in tables}
    measured, without = settings.pop("measured", MeasuredQueries()), settings.pop("without", None)
    made = title_pairs(
        TitlePairs.model_validate({"markets": {"us": "en"}, **specs, **settings}), ESCI_LABELS, 0, measured, without
    )
    return pd.concat(made, ignore_index=True).assign(
        is_relevant=lambda rows: [label.argmax() == 3 for label in rows["soft_label"]]
    )


def test_a_title_that_names_its_query_is_relevant_without_the_query(
    tables: dict[str, pd.DataFrame], tmp_path: Path
) -> None:
    made = pairs(tables, tmp_path)
    said = {
        "jeans": {"bootcut blue", "Black slim fit"},
        "hiking shoes": {"Ridge 42"},
        "running shoes": {"for women", "track"},
        "towel": {"Bath"},
    }
    relevant = made[made["is_relevant"]].set_index("query")
    assert set(relevant.index) == set(said)
    assert all(row.title in said[query] for query, row in relevant.iterrows())
    assert set(made["market"]) == {"us"}
    assert set(made["language"]) == {"en"}
    assert made["grade"].isna().all()


@pytest.mark.parametrize(
    ("query", "title", "said"),
    [
        ("의류 액세서리", "하트 의류/액세서리 가발", {"하트 가발"}),
        ("毛巾", "純棉毛巾 大號", {"純棉 大號"}),
        ("pen", "Open air grill", set()),
        ("pen (blue)", "Pen, fine (blue)", {"fine"}),
        ("pop Pop corn", "Pop corn, salted", {"salted"}),
        ("", "Pen  fine", set()),
        (" !! ", "Pen !!  fine", set()),
        (None, "Pen", set()),
    ],
)
def test_words_of_the_query_leave_a_title_wherever_they_stand(
    tables: dict[str, pd.DataFrame], tmp_path: Path, query: str | None, title: str, said: set[str]
) -> None:
    tables["queries"].loc[tables["queries"]["query_id"] == "towel", "query"] = query
    tables["retrieval_table"].loc[tables["retrieval_table"]["query_id"] == "towel", "title"] = title
    made = pairs(tables, tmp_path).query("is_relevant")
    assert set(made.loc[made["query_id"] == "towel", "title"]) == said


def test_the_title_to_judge_is_not_in_its_prompt(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    made = pairs(tables, tmp_path).query("is_relevant").set_index("query")
    assert made["retrieved_titles"]["towel"] == ()
    assert made["retrieved_titles"]["hiking shoes"] == ("Hiking socks",)
    left_out = {"bootcut blue": "Jeans, bootcut blue", "Black slim fit": "Black jeans slim fit"}[made["title"]["jeans"]]
    assert made["retrieved_titles"]["jeans"] == tuple(title for title in TITLES["jeans"] if title != left_out)


def test_titles_of_other_queries_are_irrelevant_and_share_no_term_with_the_query(
    tables: dict[str, pd.DataFrame], tmp_path: Path
) -> None:
    made = pairs(tables, tmp_path, irrelevant_per_query=2, weight=0.5)
    irrelevant = made[~made["is_relevant"]]
    assert irrelevant.groupby("query").size().between(1, 2).all()
    assert all(
        set(search_terms(row.query)).isdisjoint(search_terms(row.title)) for row in irrelevant.itertuples(index=False)
    )
    assert (made["weight"] == 0.5).all()
    assert [np.flatnonzero(label).tolist() for label in irrelevant["soft_label"]] == [[0]] * len(irrelevant)


def test_titles_that_name_a_query_or_were_found_for_it_are_not_irrelevant(
    tables: dict[str, pd.DataFrame], tmp_path: Path
) -> None:
    tables["queries"]["query"] = tables["queries"]["query"].replace("sofa", "towel rail")
    titles = tables["retrieval_table"]
    titles.loc[titles["query_id"] == "sofa", "title"] = "Towel rail, chrome"  # names the query towel
    titles.loc[titles["title"] == "Hiking socks", "title"] = "Running shoes for women"
    made = pairs(tables, tmp_path, irrelevant_per_query=10).query("not is_relevant").groupby("query")["title"].agg(set)
    assert "chrome" not in made["towel"]
    assert "for women" not in made["hiking shoes"]
    assert "chrome" in made["hiking shoes"] | made["running shoes"] | made["jeans"]


def test_queries_of_a_fold_are_left_out(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    parts = [set(pairs(tables, tmp_path, without=Fold(number, 2))["query"]) for number in range(2)]
    assert parts[0] | parts[1] == set(pairs(tables, tmp_path)["query"])
    assert parts[0].isdisjoint(parts[1])


def test_groups_stand_side_by_side_and_are_always_the_same(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    made = pairs(tables, tmp_path, markets={"us": "en", "uk": "en"})
    assert made["group_number"].is_monotonic_increasing
    assert made.groupby("group_number")["is_relevant"].sum().tolist() == [1] * 8
    assert (made.groupby("group_number")[["market", "query_id"]].nunique() == 1).all(axis=None)
    tables = {name: table.sample(frac=1, random_state=1) for name, table in tables.items()}
    pd.testing.assert_frame_equal(made, pairs(tables, tmp_path, markets={"us": "en", "uk": "en"}))


def test_as_many_queries_as_asked_and_none_that_measures(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    assert pairs(tables, tmp_path, max_queries=2)["query"].nunique() == 2
    towel = MeasuredQueries(texts=frozenset({"towel"}))
    assert "towel" not in set(pairs(tables, tmp_path, measured=towel)["query"])
    tables["queries"]["query"] = tables["queries"]["query"].replace("towel", " TOWEL\u3000")
    assert " TOWEL\u3000" in set(pairs(tables, tmp_path)["query"])
    assert " TOWEL\u3000" not in set(pairs(tables, tmp_path, measured=towel)["query"])


def test_a_query_that_measures_gives_no_pair_where_only_its_id_is_known(
    tables: dict[str, pd.DataFrame], tmp_path: Path
) -> None:
    measured = MeasuredQueries(ids=frozenset({("us", "towel"), ("uk", "jeans")}))
    made = pairs(tables, tmp_path, measured=measured)
    assert set(made["query"]) == {"jeans", "hiking shoes", "running shoes"}
    assert "Bath" not in set(made["title"])  # nor as an irrelevant title


@pytest.mark.parametrize("name", ["queries", "retrieval_table"])
def test_a_market_without_queries_or_titles_is_named(
    name: str, tables: dict[str, pd.DataFrame], tmp_path: Path
) -> None:
    tables[name] = tables[name].query("market == 'us'")
    with pytest.raises(InputError, match=rf"{name} .*: no rows for markets \['uk'\]"):
        pairs(tables, tmp_path, markets={"us": "en", "uk": "en"})


def test_titles_that_name_no_query_are_refused(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    tables["retrieval_table"]["title"] = "Couch"
    with pytest.raises(InputError, match=r"no title of markets \['us'\] names its query.*Leave title_pairs out"):
        pairs(tables, tmp_path)
