"""The comparison of two tables of scores, on real tables; expected values are worked by hand."""

from math import isnan
from pathlib import Path

import pandas as pd
import pytest
from pyspark.sql import SparkSession

from csrm.commands.compare import main
from csrm.config import load_config
from csrm.errors import InputError
from csrm.operations.comparison import ComparisonConfig, ScoreComparison, compare_scores

pytestmark = pytest.mark.spark

CONF = Path(__file__).parents[2] / "conf" / "compare.yaml"
COLUMNS = ["market", "query_id", "product_id", "score", "grade"]
LETTERS = "abcdefghijkl"

# kr q1: twelve products in the order of the alphabet. kr q2: two of one score, and a third.
BEFORE = [("kr", "q1", letter, 12.0 - place, "E") for place, letter in enumerate(LETTERS)]
BEFORE += [("kr", "q2", "a", 0.5, "E"), ("kr", "q2", "b", 0.5, "S"), ("kr", "q2", "c", 0.1, "I")]
BEFORE += [("kr", "gone", "a", 0.5, "E"), ("tw", "q1", "x", 0.5, "E"), ("us", "q1", "z", 0.5, "E")]
BEFORE += [("kr", "q2", "unscored", None, None)]
# kr q1: a goes from the first place to the last, so that k enters the first ten. kr q2: c is new among the best.
AFTER = [("kr", "q1", letter, 12.0 - place, "E") for place, letter in enumerate("bcdefghijkla")]
AFTER += [
    ("kr", "q2", "a", 0.5, "I"),
    ("kr", "q2", "b", 0.4, None),
    ("kr", "q2", "c", 0.9, "E"),
    ("kr", "q2", "d", 0.2, "S"),
]
AFTER += [("kr", "new", "a", 0.5, "E"), ("tw", "q1", "x", 0.6, "E")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    for name, rows in (("before", BEFORE), ("after", AFTER)):
        pd.DataFrame(rows, columns=COLUMNS).to_parquet(folder / f"{name}.parquet")
    products = [("kr", letter, f"title {letter}") for letter in LETTERS] + [("tw", "x", "雨傘")]
    pd.DataFrame(products, columns=["market", "product_id", "title"]).to_parquet(folder / "catalog.parquet")
    queries = [("kr", "q1", "신발"), ("kr", "q2", "장갑"), ("tw", "q1", "雨傘")]
    pd.DataFrame(queries, columns=["market", "query_id", "query"]).to_parquet(folder / "queries.parquet")
    return folder


def overrides(folder: Path, *settings: str) -> list[str]:
    inputs = [f"inputs.{name}.path={folder}/{name}.parquet" for name in ("catalog", "queries")]
    sides = [f"{name}={{path: '{folder}/{name}.parquet', format: parquet}}" for name in ("before", "after")]
    return [*inputs, *sides, f"output={folder}/output", "markets={kr: ko, tw: zh-TW}", *settings]


@pytest.fixture(scope="module")
def comparison(spark: SparkSession, folder: Path) -> ScoreComparison:
    return compare_scores(spark, load_config(CONF, ComparisonConfig, overrides(folder)))


def test_each_query_has_its_rank_correlation_and_its_first_ten(comparison: ScoreComparison) -> None:
    queries = comparison.queries.set_index(["market", "query_id"])
    assert queries.index.tolist() == [("kr", "gone"), ("kr", "new"), ("kr", "q1"), ("kr", "q2"), ("tw", "q1")]
    first = queries.loc[("kr", "q1")]
    # eleven products rise by one place, one falls by eleven: 1 - 6 (11 + 121) / (12 (144 - 1))
    assert first["rank_correlation"] == pytest.approx(1 - 6 * 132 / (12 * 143))
    assert first[["num_shared", "num_top_before", "num_top_after", "num_kept"]].tolist() == [12, 10, 10, 9]
    assert not first["is_first_same"]
    second = queries.loc[("kr", "q2")]
    # places before 1.5, 1.5, 3 and after 2, 3, 1: covariance -1.5, sums of squares 1.5 and 2
    assert second["rank_correlation"] == pytest.approx(-1.5 / (1.5 * 2) ** 0.5)
    assert second[["num_before", "num_after", "num_shared", "num_kept"]].tolist() == [3, 4, 3, 3]
    assert second[["num_graded", "num_regraded"]].tolist() == [2, 2]  # b has no grade after
    assert second["query"] == "장갑"
    assert isnan(queries.loc[("tw", "q1"), "rank_correlation"])  # of one pair
    assert queries.loc[("tw", "q1"), "is_first_same"]


def test_markets_are_summed_up_over_the_queries_that_both_have(comparison: ScoreComparison) -> None:
    summary = comparison.summary.set_index("market")
    assert summary.index.tolist() == ["kr", "tw", "all markets"]
    kr = summary.loc["kr"]
    assert kr[["num_queries", "num_queries_before", "num_queries_after"]].tolist() == [2, 1, 1]
    assert kr[["num_pairs", "num_pairs_before", "num_pairs_after"]].tolist() == [15, 1, 2]
    assert kr["kept"] == pytest.approx((9 / 10 + 3 / 4) / 2)
    assert (kr["changed_top"], kr["changed_first"]) == (1.0, 1.0)
    assert kr["regraded"] == pytest.approx(2 / 14)
    assert summary.loc["all markets", "changed_top"] == pytest.approx(2 / 3)


def test_examples_name_what_leaves_and_enters_and_what_is_graded_anew(comparison: ScoreComparison) -> None:
    assert comparison.most_changed["query_id"].tolist() == ["q1", "q2"]  # two products changed, then one
    changes = comparison.changes.set_index("product_id")
    assert sorted(changes.index) == ["a", "d", "k"]
    assert changes.loc["a", ["before_rank", "after_rank"]].tolist() == [1, 12]
    assert changes.loc["k", ["before_rank", "after_rank"]].tolist() == [11, 10]
    assert isnan(changes.loc["d", "before_rank"])
    assert comparison.regraded["product_id"].tolist() == ["c", "a"]  # moved by 0.8 and by nothing
    assert comparison.regraded["before_rank"].tolist() == [3, 1]
    counts = comparison.grades.set_index(["market", "before_grade", "after_grade"])["num_pairs"].to_dict()
    expected = {("kr", "E", "E"): 12, ("kr", "E", "I"): 1, ("kr", "I", "E"): 1, ("tw", "E", "E"): 1}
    assert counts == expected
    assert comparison.query_texts[("kr", "q1")].beginning == "신발"
    assert comparison.product_texts[("kr", "d")].beginning == "title d"


def test_the_job_writes_a_page_and_a_table_of_queries(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [part for override in overrides(folder) for part in ("--set", override)]
    assert main(["--config", str(CONF), *argv]) == 0
    printed = capsys.readouterr().out
    assert "kr: 2 queries and 15 pairs are in both; 1 pairs before alone, 2 after alone" in printed
    assert "the first 10 change in 66.7% of queries" in printed
    page = (folder / "output" / "comparison.html").read_text(encoding="utf-8")
    assert "The first 10 products change in 66.7% of 3 queries" in page
    assert len(pd.read_parquet(folder / "output" / "queries.parquet")) == 5


def test_tables_without_a_pair_in_common_are_an_error(spark: SparkSession, folder: Path) -> None:
    pd.DataFrame([("kr", "Q1", "a", 1.0)], columns=COLUMNS[:4]).to_parquet(folder / "other.parquet")
    config = load_config(
        CONF, ComparisonConfig, overrides(folder, f"after={{path: '{folder}/other.parquet', format: parquet}}")
    )
    with pytest.raises(InputError, match="expected pairs that both have, found none in the markets"):
        compare_scores(spark, config)


def test_a_table_beside_itself_has_no_change(spark: SparkSession, folder: Path) -> None:
    same = f"after={{path: '{folder}/before.parquet', format: parquet}}"
    comparison = compare_scores(spark, load_config(CONF, ComparisonConfig, overrides(folder, same)))
    whole = comparison.summary.set_index("market").loc["all markets"]
    assert (whole["changed_top"], whole["changed_first"], whole["kept"], whole["regraded"]) == (0.0, 0.0, 1.0, 0.0)
    assert whole["rank_correlation"] == pytest.approx(1.0)
    assert comparison.most_changed.empty
    assert comparison.regraded.empty


def test_a_query_whose_products_have_one_score_has_no_rank_correlation(spark: SparkSession, folder: Path) -> None:
    rows = [(*key, 0.5, grade) for *key, _, grade in BEFORE]
    pd.DataFrame(rows, columns=COLUMNS).to_parquet(folder / "equal.parquet")
    same = f"after={{path: '{folder}/equal.parquet', format: parquet}}"
    comparison = compare_scores(spark, load_config(CONF, ComparisonConfig, overrides(folder, same)))
    queries = comparison.queries.set_index(["market", "query_id"])
    assert queries["rank_correlation"].isna().all()
    assert queries.loc[("kr", "q1"), ["num_shared", "num_kept"]].tolist() == [12, 10]
