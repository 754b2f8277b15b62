import unicodedata
from pathlib import Path

import pandas as pd
import pytest

from csrm.config import InputSpec
from csrm.errors import InputError
from csrm.training.data import database
from csrm.training.data.judged import Fold, JudgedInputs, JudgedPairs, MeasuredQueries, UnlabelledInputs

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


def written(tables: dict[str, pd.DataFrame], folder: Path) -> JudgedInputs:
    specs = {}
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet")
        specs[name] = InputSpec(path=str(folder / f"{name}.parquet"), format="parquet")
    return JudgedInputs(**specs)


def judged_pairs(inputs: JudgedInputs, markets: dict[str, str]) -> pd.DataFrame:
    with JudgedPairs(inputs, markets) as pairs:
        return pairs.read()


def test_pairs_carry_their_texts(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    pairs = judged_pairs(written(tables, tmp_path), MARKETS).set_index("market")
    assert pairs["title"].to_dict() == {"kr": "마우스", "us": "Mouse"}
    assert pairs["language"].to_dict() == {"kr": "ko-KR", "us": "en"}
    assert pairs["retrieved_titles"].to_dict() == {"kr": (), "us": ("first", "second")}
    assert pairs["grade"].to_dict() == {"kr": "I", "us": "E"}


def test_a_judged_pair_without_its_product_is_named(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    tables["catalog"] = tables["catalog"].iloc[1:]
    with pytest.raises(InputError, match=r"1 product ids are not in catalog, for example us p1: add them there"):
        judged_pairs(written(tables, tmp_path), MARKETS)


def test_a_title_that_tells_a_label_is_refused_where_both_come_from_behaviour(
    tables: dict[str, pd.DataFrame], tmp_path: Path
) -> None:
    tables["retrieval_table"] = tables["retrieval_table"].assign(product_id=["p1", "p2"], source="behaviour")
    inputs = written(tables, tmp_path)
    assert len(judged_pairs(inputs, MARKETS)) == 2
    with pytest.raises(InputError, match=r"1 titles were retrieved by behaviour .* example us, q1, p1\. .*build it"):
        judged_pairs(inputs.model_copy(update={"labels_from_behaviour": True}), MARKETS)


def test_a_judged_product_may_be_found_by_its_words(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    tables["retrieval_table"] = tables["retrieval_table"].assign(product_id=["p1", "p2"])
    inputs = written(tables, tmp_path).model_copy(update={"labels_from_behaviour": True})
    assert len(judged_pairs(inputs, MARKETS)) == 2


def test_a_market_without_judgments_is_named(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no rows for markets \['jp'\]"):
        judged_pairs(written(tables, tmp_path), {**MARKETS, "jp": "ja"})


def test_missing_columns_are_named(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    tables["queries"] = tables["queries"].rename(columns={"query_id": "id"})
    with pytest.raises(InputError, match=r"missing column 'query_id' for query_id; it has .*'id'.*Name the right one"):
        judged_pairs(written(tables, tmp_path), MARKETS)


def test_an_input_that_is_not_there_is_named(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    inputs = written(tables, tmp_path)
    for format_, message in (("parquet", r"nowhere.*Is the path right"), ("delta", "cannot be read as Delta")):
        absent = inputs.model_copy(update={"catalog": InputSpec(path=str(tmp_path / "nowhere"), format=format_)})
        with pytest.raises(InputError, match=message):
            judged_pairs(absent, MARKETS)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_columns_that_name_folders_are_read_as_text(
    scheme: str, tables: dict[str, pd.DataFrame], tmp_path: Path
) -> None:
    """As Spark's partitionBy writes them; what lies above the table's own folder is no column of it."""
    for name in ("catalog", "queries", "judgments"):
        tables[name]["market"] = tables[name]["market"].replace("us", "01")
    tables["retrieval_table"]["market"] = "01"
    inputs = written(tables, tmp_path)
    tables["queries"].to_parquet(tmp_path / "query_id=x" / "queries", partition_cols=["market"])
    queries = InputSpec(path=f"{scheme}{tmp_path}/query_id=x/queries", format="parquet")
    partitioned = inputs.model_copy(update={"queries": queries})
    markets = {"01": "en", "kr": "ko"}
    pd.testing.assert_frame_equal(judged_pairs(partitioned, markets), judged_pairs(inputs, markets))
    (file,) = (tmp_path / "query_id=x" / "queries" / "market=kr").iterdir()
    one_file = partitioned.model_copy(update={"queries": queries.model_copy(update={"path": f"{scheme}{file}"})})
    with pytest.raises(
        InputError, match=r"missing column 'market' for market; it has \['query_id', 'query', 'language'\]"
    ):
        judged_pairs(one_file, markets)


def test_a_format_with_options_is_refused(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    inputs = written(tables, tmp_path)
    csv = inputs.model_copy(update={"catalog": InputSpec(path="x.csv", format="csv", options={"sep": ";"})})
    with pytest.raises(InputError, match=r"training reads delta, parquet and json.*'csv'"):
        judged_pairs(csv, MARKETS)


def test_repeated_keys_and_nulls_are_counted(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    tables["catalog"] = pd.concat([tables["catalog"]] * 2)
    with pytest.raises(InputError, match=r"4 rows share their key \(market, product_id\), for example kr, p1"):
        judged_pairs(written(tables, tmp_path), MARKETS)
    tables["queries"].loc[0, "query_id"] = None
    with pytest.raises(InputError, match="column 'query_id' is null in 1 of 2 rows"):
        judged_pairs(written(tables, tmp_path), MARKETS)


def test_ids_keep_their_text(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    for name in ("catalog", "judgments"):
        tables[name]["product_id"] = 7
    assert set(judged_pairs(written(tables, tmp_path), MARKETS)["product_id"]) == {"7"}


def test_a_wrong_type_is_named(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    tables["retrieval_table"]["rank"] = ["first", "second"]
    with pytest.raises(InputError, match=r"column 'rank' for rank: 2 of 2 values are no int, for example 'first'"):
        judged_pairs(written(tables, tmp_path), MARKETS)


def test_a_misspelt_input_is_refused() -> None:
    spec = {"path": "x"}
    with pytest.raises(ValueError, match="retrieval_tabel"):
        JudgedInputs(catalog=spec, queries=spec, judgments=spec, retrieval_tabel=spec)


@pytest.fixture
def many(tmp_path: Path) -> JudgedInputs:
    """Two markets of 20 queries with 7 judged products each."""
    rows = [
        (market, f"q{query}", f"p{query}-{product}")
        for market in MARKETS
        for query in range(20)
        for product in range(7)
    ]
    judgments = pd.DataFrame(rows, columns=["market", "query_id", "product_id"])
    tables = {
        "catalog": judgments[["market", "product_id"]].assign(title=judgments["product_id"]),
        "queries": judgments[["market", "query_id"]].drop_duplicates().assign(query="x"),
        "judgments": judgments.assign(
            grade="E", split=["dev" if query == "q3" else None for query in judgments["query_id"]]
        ),
    }
    return written(tables, tmp_path)


def test_groups_hold_each_pair_once_few_of_a_query_in_random_order(many: JudgedInputs) -> None:
    with JudgedPairs(many, MARKETS) as pairs:
        assert pairs.splits() == {"dev": 14, "train": 266}
        groups = pd.concat(pairs.groups("train", 3, seed=0))
        others = pd.concat(pairs.groups("train", 3, seed=1))
        again = pd.concat(pairs.groups("train", 3, seed=0))
    key = ["market", "query_id", "product_id"]
    assert len(groups) == 266 == len(groups[key].drop_duplicates())
    assert groups["group_number"].is_monotonic_increasing
    by_group = groups.groupby("group_number")
    assert by_group.size().max() == 3
    assert (by_group["query_id"].nunique() == 1).all()
    assert by_group.ngroups == 2 * 19 * 3
    pd.testing.assert_frame_equal(groups, again)
    assert groups[key].to_numpy().tolist() != others[key].to_numpy().tolist()


def test_groups_depend_neither_on_the_order_of_rows_nor_on_threads(
    many: JudgedInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def groups() -> pd.DataFrame:
        with JudgedPairs(many, MARKETS) as pairs:
            return pd.concat(pairs.groups("train", 3, seed=0, random_negatives=0.5))

    expected = groups()
    for path in tmp_path.glob("*.parquet"):
        pd.read_parquet(path).sample(frac=1, random_state=1).to_parquet(path)
    monkeypatch.setattr(database, "_NUM_THREADS", 1)
    pd.testing.assert_frame_equal(groups(), expected)


def test_groups_can_be_read_while_others_are(many: JudgedInputs) -> None:
    with JudgedPairs(many, MARKETS) as pairs:
        first, second = pairs.groups("train", 3, seed=0), pairs.batches("dev")
        assert [len(first_batch) + len(second_batch) for first_batch, second_batch in zip(first, second, strict=True)]
        assert [len(batch) for batch in pairs.batches("dev")] == [14]


def test_random_negatives_are_products_of_other_queries_of_the_market(many: JudgedInputs) -> None:
    with JudgedPairs(many, MARKETS) as pairs:
        groups = pd.concat(pairs.groups("train", 3, seed=0, random_negatives=0.5))
    negatives = groups[groups["grade"].isna()]
    assert 110 <= len(negatives) <= 133  # a product of the same query is no negative
    own = negatives["product_id"].str.split("-").str[0].str[1:] == negatives["query_id"].str[1:]
    assert not own.any()
    assert (negatives["title"] == negatives["product_id"]).all()
    assert "p3" not in set(negatives["product_id"].str.split("-").str[0])  # dev products stay out
    assert set(negatives["market"]) == set(MARKETS)


def test_a_query_text_in_two_splits_is_named(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    tables["queries"]["query"] = ["Mouse", " mouse"]
    tables["judgments"]["split"] = ["train", "dev"]
    with JudgedPairs(written(tables, tmp_path), MARKETS) as pairs:
        pairs.check_apart("train", "test")
        with pytest.raises(InputError, match=r"1 query texts are in split train and in split dev, for example 'mouse'"):
            pairs.check_apart("train", "dev")


def test_queries_of_other_splits_than_train_measure(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    tables["judgments"]["split"] = ["test", None]
    tables["queries"]["query"] = [" Mouse", "마우스"]
    with JudgedPairs(written(tables, tmp_path), MARKETS) as pairs:
        assert pairs.measured_queries() == MeasuredQueries(frozenset({("us", "q1")}), frozenset({"mouse"}))


def test_texts_that_look_alike_are_one_text(tables: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    tables["queries"]["query"] = [unicodedata.normalize("NFD", "무선  마우스"), "무선\u3000마우스 "]
    tables["judgments"]["split"] = ["train", "dev"]
    with JudgedPairs(written(tables, tmp_path), MARKETS) as pairs:
        assert pairs.num_queries("train", Fold(0, 2)) == pairs.num_queries("dev", Fold(0, 2))
        with pytest.raises(InputError, match=r"1 query texts are in split train and in split dev"):
            pairs.check_apart("train", "dev")


def test_queries_that_are_judged_in_other_markets_measure_too_and_are_not_pseudo_labelled(
    tables: dict[str, pd.DataFrame], tmp_path: Path
) -> None:
    tables["judgments"]["split"] = ["train", "test"]
    candidates = pd.DataFrame({"market": "kr", "query_id": ["q1", "q2"], "product_id": "p1"})
    more = pd.DataFrame({"market": "kr", "query_id": ["q2"], "query": ["키보드"], "language": [None]})
    tables["queries"] = pd.concat([tables["queries"], more])
    inputs = written(tables, tmp_path)
    candidates.to_parquet(tmp_path / "candidates.parquet")
    unlabelled = UnlabelledInputs(
        catalog=inputs.catalog,
        queries=inputs.queries,
        candidates=InputSpec(path=str(tmp_path / "candidates.parquet"), format="parquet"),
    )
    with JudgedPairs(inputs, {"us": "en"}) as pairs:
        assert pairs.measured_queries() == MeasuredQueries(frozenset({("kr", "q1")}), frozenset({"마우스"}))
        assert pairs.add_unlabelled(unlabelled, {"kr": "ko"}, 5, seed=0) == 1
        assert pairs.read("unlabelled")["query"].tolist() == ["키보드"]
        assert pairs.grades() == ["E"]
        learnt = tmp_path / "soft.parquet"
        pairs.read("unlabelled").assign(soft_label=[[0.0, 1.0]], weight=0.5).to_parquet(learnt)
        groups = pd.concat(pairs.groups("train", 8, seed=0, random_negatives=1.0, soft_labels=learnt))
    assert len(groups) == 2  # no negatives: there is one judged pair in its market, and the other has no label


def test_a_query_that_measures_is_not_pseudo_labelled_where_only_the_unlabelled_tables_have_its_text(
    tables: dict[str, pd.DataFrame], tmp_path: Path
) -> None:
    """Tables that are kept for each market: the judgments name kr q1, and the judged pairs' queries are of us alone."""
    tables["judgments"]["split"] = ["train", "test"]
    of_kr = pd.DataFrame({"market": "kr", "query_id": ["q1", "q2", "q3"], "query": ["마우스", "키보드", "마우스 "]})
    of_kr.to_parquet(tmp_path / "kr_queries.parquet")
    of_kr.assign(product_id="p1").to_parquet(tmp_path / "candidates.parquet")
    tables["queries"] = tables["queries"].query("market == 'us'")
    inputs = written(tables, tmp_path)
    spec = inputs.queries
    unlabelled = UnlabelledInputs(
        catalog=inputs.catalog,
        queries=spec.model_copy(update={"path": str(tmp_path / "kr_queries.parquet")}),
        candidates=spec.model_copy(update={"path": str(tmp_path / "candidates.parquet")}),
    )
    with JudgedPairs(inputs, {"us": "en"}) as pairs:
        assert pairs.measured_queries() == MeasuredQueries(frozenset({("kr", "q1")}))
        assert pairs.add_unlabelled(unlabelled, {"kr": "ko"}, 5, seed=0) == 1
        assert pairs.read("unlabelled")["query"].tolist() == ["키보드"]
        assert pairs.measured_queries().texts == {"마우스"}


def test_pairs_that_scoring_rejects_are_left_out(
    tables: dict[str, pd.DataFrame], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables["catalog"].loc[0, "title"] = None
    with JudgedPairs(written(tables, tmp_path), MARKETS) as pairs:
        assert pairs.splits() == {"train": 1}
    assert "1 of 2 pairs have an empty query or title and are left out" in caplog.text
    tables["queries"]["query"] = [None, "\u3000\u200b"]
    with JudgedPairs(written(tables, tmp_path), MARKETS) as pairs:
        assert pairs.splits() == {}


def test_a_sample_is_always_the_same(many: JudgedInputs) -> None:
    with JudgedPairs(many, MARKETS) as pairs:
        first, second = pairs.read(num_pairs=9), pairs.read(num_pairs=9)
        assert len(pairs.read("dev")) == 14
    assert len(first) == 9
    pd.testing.assert_frame_equal(first, second)
