"""What a score means: curves that are known by construction, thresholds counted by hand, and what has no answer."""

import numpy as np
import pandas as pd
import pytest

from csrm.evaluation import calibrated_probability, calibration, threshold_metrics
from csrm.evaluation.calibration import expected_calibration_error, reliability

pytest.importorskip("sklearn")


def drawn(market: str, slope: float, intercept: float, num_queries: int = 400, seed: int = 0) -> pd.DataFrame:
    """Judged pairs, ten a query, whose probability of E is the given curve of their score."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0.02, 0.98, 10 * num_queries)
    probabilities = calibrated_probability(scores, slope=slope, intercept=intercept)
    return pd.DataFrame(
        {
            "market": market,
            "query_id": np.repeat([f"q{number:04}" for number in range(num_queries)], 10),
            "score": scores,
            "grade": np.where(rng.random(len(scores)) < probabilities, "E", "I"),
        }
    )


def test_the_curve_that_made_the_grades_is_found_for_each_market() -> None:
    judged = pd.concat([drawn("kr", 2.0, -1.0), drawn("us", 0.5, 0.5, seed=1)])
    curves = calibration(judged, "score", relevant_grades=["E"]).set_index("market")
    assert list(curves.index) == ["kr", "us", "all markets"]
    assert curves.loc["kr", "slope"] == pytest.approx(2.0, abs=0.2)
    assert curves.loc["kr", "intercept"] == pytest.approx(-1.0, abs=0.2)
    assert curves.loc["us", "slope"] == pytest.approx(0.5, abs=0.1)
    assert curves.loc["us", "intercept"] == pytest.approx(0.5, abs=0.1)
    assert (curves.loc[["kr", "us"], "error"] > 0.05).all()
    assert (curves.loc[["kr", "us"], "calibrated_error"] < 0.03).all()


def test_scores_that_are_probabilities_need_no_curve() -> None:
    (row,) = calibration(drawn("us", 1.0, 0.0), "score", relevant_grades=["E"]).to_dict("records")
    assert row["slope"] == pytest.approx(1.0, abs=0.1)
    assert row["intercept"] == pytest.approx(0.0, abs=0.1)
    assert row["error"] < 0.03


def test_the_error_of_the_curve_is_of_queries_that_it_has_not_seen() -> None:
    # Grades follow the query, not the score: on queries of its own a curve could only look right by chance.
    judged = drawn("us", 1.0, 0.0, num_queries=10).assign(
        grade=lambda pairs: np.where(pairs.query_id < "q0005", "E", "I")
    )
    (row,) = calibration(judged, "score", relevant_grades=["E"]).to_dict("records")
    assert row["calibrated_error"] > 0.1


def test_thresholds_by_hand() -> None:
    judged = pd.DataFrame(
        [("a", 0.95, "E"), ("a", 0.5, "S"), ("b", 0.5, "E"), ("b", 0.45, "E"), ("b", np.nan, "E")],
        columns=["query_id", "score", "grade"],
    ).assign(market="us")
    table = threshold_metrics(judged, "score", relevant_grades=["E"]).set_index("threshold")
    assert table.loc[0.5, ["share_kept", "precision", "recall"]].tolist() == pytest.approx([3 / 4, 2 / 3, 2 / 3])
    assert table.loc[0.9, ["share_kept", "precision", "recall"]].tolist() == pytest.approx([1 / 4, 1, 1 / 3])
    # Two queries: a resample has a twice, b twice, or both.
    assert table.loc[0.5, ["precision_low", "precision_high"]].tolist() == pytest.approx([1 / 2, 1])
    assert table.loc[0.5, ["recall_low", "recall_high"]].tolist() == pytest.approx([1 / 2, 1])


@pytest.mark.parametrize("grades", ["E", "I"])
def test_a_market_of_one_kind_has_no_curve(grades: str) -> None:
    (row,) = calibration(
        drawn("us", 1.0, 0.0, num_queries=6).assign(grade=grades), "score", relevant_grades=["E"]
    ).to_dict("records")
    assert np.isnan([row["slope"], row["intercept"], row["calibrated_error"]]).all()
    assert 0 < row["error"] < 1


def test_scores_that_tell_all_pairs_apart_have_a_finite_curve() -> None:
    judged = drawn("us", 1.0, 0.0, num_queries=20)
    judged["grade"] = np.where(judged["score"] > 0.5, "E", "I")
    (row,) = calibration(judged, "score", relevant_grades=["E"]).to_dict("records")
    assert 5 < row["slope"] < 100
    assert row["calibrated_error"] < 0.05


def test_few_queries_have_a_curve_but_no_error_of_it() -> None:
    (row,) = calibration(drawn("us", 1.0, 0.0, num_queries=4), "score", relevant_grades=["E"]).to_dict("records")
    assert row["slope"] > 0
    assert np.isnan(row["calibrated_error"])


def test_scores_of_0_and_1_have_finite_curves() -> None:
    judged = drawn("us", 1.0, 0.0, num_queries=20)
    judged["score"] = (judged["score"] > 0.5).astype(float)
    (row,) = calibration(judged, "score", relevant_grades=["E"]).to_dict("records")
    assert np.isfinite([row["slope"], row["intercept"], row["calibrated_error"]]).all()


def test_no_pair_with_a_score_gives_no_row() -> None:
    judged = drawn("us", 1.0, 0.0, num_queries=2).assign(score=np.nan)
    assert calibration(judged, "score", relevant_grades=["E"]).empty
    assert threshold_metrics(judged, "score", relevant_grades=["E"]).empty


def test_equal_scores_are_in_one_bin_in_any_order() -> None:
    scores, relevant = np.repeat([0.3, 0.6], [30, 70]), np.arange(100) % 3 == 0
    order = np.random.default_rng(0).permutation(100)
    np.testing.assert_allclose(reliability(scores, relevant), [(0.3, 1 / 3, 30), (0.6, 24 / 70, 70)])
    np.testing.assert_allclose(reliability(scores[order], relevant[order]), reliability(scores, relevant))


def test_bins_have_equal_size_and_every_pair() -> None:
    rng = np.random.default_rng(0)
    scores, relevant = rng.random(104), rng.random(104) < 0.3
    bins = reliability(scores, relevant)
    assert [size for *_, size in bins] == [11, 10, 11, 10, 10, 11, 10, 11, 10, 10]
    assert sum(mean * size for mean, _, size in bins) == pytest.approx(scores.sum())
    assert sum(share * size for _, share, size in bins) == pytest.approx(relevant.sum())


def test_the_error_by_hand() -> None:
    probabilities = np.repeat([0.2, 0.9], 50)
    relevant = np.repeat([True, False, True], [20, 30, 50])
    assert expected_calibration_error(probabilities, relevant) == pytest.approx((0.2 + 0.1) / 2)


def test_one_query_gives_no_interval() -> None:
    judged = pd.DataFrame({"market": "us", "query_id": "a", "grade": ["E", "I"], "score": [0.9, 0.6]})
    row = threshold_metrics(judged, "score", relevant_grades=["E"]).set_index("threshold").loc[0.5]
    assert (row["precision"], row["recall"]) == (0.5, 1.0)
    assert row[["precision_low", "precision_high", "recall_low", "recall_high"]].isna().all()
