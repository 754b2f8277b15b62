from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from csrm.config import InputSpec
from csrm.errors import InputError
from csrm.training.data.judged import JudgedInputs, JudgedPairs
from csrm.training.data.judges import Agreement
from csrm.training.report import report_html
from csrm.training.summary import format_agreement

# Fleiss 1971, as his method is usually shown: 10 subjects, 14 raters, 5 grades; kappa 0.210
FLEISS = [
    (0, 0, 0, 0, 14),
    (0, 2, 6, 4, 2),
    (0, 0, 3, 5, 6),
    (0, 3, 9, 2, 0),
    (2, 2, 8, 1, 1),
    (7, 7, 0, 0, 0),
    (3, 2, 6, 3, 0),
    (2, 5, 3, 2, 2),
    (6, 5, 2, 1, 0),
    (0, 2, 2, 3, 7),
]


def opened(folder: Path, rows: list[tuple[str, str, Any, str]], **columns: Any) -> JudgedPairs:
    """Judged pairs of one query: product, grade, weight and judge."""
    judgments = pd.DataFrame(rows, columns=["product_id", "grade", "weight", "judge"])
    judgments = judgments.assign(market="kr", query_id="q", **columns)
    products = judgments[["market", "product_id"]].drop_duplicates()
    tables = {
        "catalog": products.assign(title=products["product_id"]),
        "queries": pd.DataFrame({"market": ["kr"], "query_id": ["q"], "query": ["a"]}),
        "judgments": judgments,
    }
    specs = {}
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet")
        specs[name] = InputSpec(path=str(folder / f"{name}.parquet"), format="parquet")
    return JudgedPairs(JudgedInputs(**specs), {"kr": "ko"})


def agreement(folder: Path, rows: list[tuple[str, str, Any, str]]) -> Agreement:
    with opened(folder, rows) as pairs:
        assert pairs.agreement is not None
        return pairs.agreement


def test_kappa_is_that_of_a_published_example(tmp_path: Path) -> None:
    rows = []
    for subject, counts in enumerate(FLEISS):
        grades = [f"g{grade}" for grade, count in enumerate(counts) for _ in range(count)]
        rows += [(f"p{subject}", grade, None, f"judge {judge:02}") for judge, grade in enumerate(grades)]
    found = agreement(tmp_path, rows)
    assert (found.num_pairs, found.num_shared, len(found.judges)) == (10, 10, 14)
    assert found.agreement == pytest.approx(0.378, abs=5e-4)
    assert found.kappa == pytest.approx(0.210, abs=5e-4)


def test_pairs_may_have_different_numbers_of_judges(tmp_path: Path) -> None:
    rows = [("p1", "E", 1.0, "a"), ("p1", "E", 2.0, "b"), ("p1", "I", 1.0, "c")]
    rows += [("p2", "E", 1.0, "a"), ("p2", "E", 4.0, "b"), ("p3", "I", 1.0, "c")]
    found = agreement(tmp_path, rows)
    assert (found.num_pairs, found.num_shared) == (3, 2)
    assert found.agreement == pytest.approx((1 / 3 + 1) / 2)
    chance = 0.8**2 + 0.2**2
    assert found.kappa == pytest.approx((2 / 3 - chance) / (1 - chance))
    assert [(judge.name, judge.num_labels, judge.mean_weight) for judge in found.judges] == [
        ("a", 2, 1),
        ("b", 2, 3),
        ("c", 2, 1),
    ]
    assert [judge.agreement for judge in found.judges] == [0.75, 0.75, 0]


def test_judges_who_share_no_pair_or_know_one_grade_have_no_kappa(tmp_path: Path) -> None:
    apart = agreement(tmp_path, [("p1", "E", None, "a"), ("p2", "I", None, "b")])
    assert (apart.num_shared, apart.agreement, apart.kappa) == (0, None, None)
    assert apart.judges[0].agreement is None
    same = agreement(tmp_path, [("p1", "E", None, "a"), ("p1", "E", None, "b")])
    assert (same.agreement, same.kappa) == (1, None)


def test_a_table_without_judges_is_as_before(tmp_path: Path) -> None:
    with opened(tmp_path, [("p1", "E", None, None), ("p2", "I", None, None)]) as pairs:
        assert pairs.agreement is None
        (groups,) = pairs.groups("train", 8, 0)
    assert groups["weight"].tolist() == [1, 1]
    assert groups["votes"].isna().all()


def test_a_pair_has_the_grade_of_the_largest_weight_and_the_weight_of_its_most_trusted_judge(tmp_path: Path) -> None:
    rows = [("p1", "I", 1.0, "a"), ("p1", "E", 0.75, "b"), ("p1", "E", 0.75, "c")]
    rows += [("p2", "I", None, "a"), ("p2", "E", 1.0, "b"), ("p3", "S", 0.25, "a")]
    with opened(tmp_path, rows) as pairs:
        assert pairs.grades() == ["E", "I", "S"]
        assert pairs.read()["grade"].tolist() == ["E", "E", "S"]  # p2: of equal weights, the first by name
        (groups,) = pairs.groups("train", 8, 0)
    found = groups.set_index("product_id")
    assert found["weight"].to_dict() == {"p1": 1.0, "p2": 1.0, "p3": 0.25}
    assert dict(found["votes"]["p1"]) == pytest.approx({"E": 0.6, "I": 0.4})
    assert dict(found["votes"]["p2"]) == {"E": 0.5, "I": 0.5}
    assert found["votes"]["p3"] is None


def test_weights_are_told_for_the_column_may_mean_something_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    opened(tmp_path, [("p1", "E", 1.0, None), ("p2", "I", None, None)]).close()
    assert "weigh" not in caplog.text
    opened(tmp_path, [("p1", "E", 250.0, None), ("p2", "I", 0.5, None), ("p3", "I", 1.0, None)]).close()
    assert (
        "column 'weight' weighs 2 of 3 labels, by 0.5 to 250. columns: {weight: null} reads no weights" in caplog.text
    )


def test_of_a_crowd_those_with_the_most_labels_are_shown(tmp_path: Path) -> None:
    rows = [(f"p{product}", "E", None, "zoe") for product in range(3)]
    rows += [("p0", "I", None, f"worker {number:02}") for number in range(30)]
    found = agreement(tmp_path, rows)
    assert len(found.judges) == 31
    lines = format_agreement(found).splitlines()
    assert len(lines) == 1 + 20 + 1
    assert lines[1].startswith("  zoe: 3 labels")
    assert lines[-1] == "  and 11 more with fewer labels"
    page = report_html("Training", agreement=found)
    assert "The 20 of 31 judges with the most labels." in page
    assert page.count("worker ") == 19
    assert "Fleiss' kappa is -" in page
    assert "kappa" not in report_html("Training", agreement=replace(found, kappa=None))


def test_votes_are_in_the_digest(tmp_path: Path) -> None:
    digests = set()
    for weight in (0.5, 0.75):
        with opened(tmp_path, [("p1", "E", 1.0, "a"), ("p1", "I", weight, "b")]) as pairs:
            digests.add(pairs.digest())
    assert len(digests) == 2


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf")])
def test_a_weight_is_a_number_above_0(weight: float, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"1 weights are not above 0 and finite, for example kr, q, p2, {weight}\."):
        opened(tmp_path, [("p1", "E", 1.0, "a"), ("p2", "I", weight, "a")])


def test_a_judge_labels_a_pair_once_and_in_one_split(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"2 rows share their key \(market, query_id, product_id, judge\)"):
        opened(tmp_path, [("p1", "E", 1.0, "a"), ("p1", "I", 1.0, "a")])
    with pytest.raises(InputError, match=r"2 rows share their key \(market, query_id, product_id, judge\)"):
        opened(tmp_path, [("p1", "E", None, None), ("p1", "I", None, None)])
    with pytest.raises(InputError, match=r"1 pairs have judges' rows in different splits, for example kr, q, p1"):
        opened(tmp_path, [("p1", "E", 1.0, "a"), ("p1", "I", 1.0, "b")], split=["train", "dev"])
