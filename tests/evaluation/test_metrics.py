"""Metrics against values worked by hand, scikit-learn and counting."""

import itertools
import sys
from math import log2

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from csrm.errors import InputError, MissingDependencyError
from csrm.evaluation.metrics import (
    METRICS,
    OVERALL,
    QUERY_COLUMNS,
    RANDOM,
    Evaluation,
    evaluate_scores,
    resampled_pair_metrics,
)
from csrm.evaluation.report import format_evaluation

ESCI_GAINS = {"E": 1.0, "S": 0.1, "C": 0.01, "I": 0.0}


def judged_pairs(*rows: tuple[str, str, str, str, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["market", "query_id", "product_id", "grade", "model"])


def evaluate(judged: pd.DataFrame, score_columns: tuple[str, ...] = ("model",), **arguments: object) -> Evaluation:
    return evaluate_scores(
        judged, score_columns, gains=ESCI_GAINS, relevant_grades=["E"], irrelevant_grades=["I"], **arguments
    )  # type: ignore[arg-type]


def value(evaluation: Evaluation, metric: str, market: str = "kr", ranking: str = "model") -> float:
    rows = evaluation.metrics.set_index(["market", "ranking", "metric"])
    return float(rows.loc[(market, ranking, metric), "value"])


def many_pairs(num_queries: int = 30, num_products: int = 14, seed: int = 3) -> pd.DataFrame:
    """Graded pairs whose scores carry signal, noise and ties."""
    rng = np.random.default_rng(seed)
    rows = []
    for query, product in itertools.product(range(num_queries), range(num_products)):
        grade = str(rng.choice(list("ESCI")))
        score = round(float(ESCI_GAINS[grade] + rng.normal()), 1)
        rows.append(("kr", f"q{query}", f"p{product}", grade, score))
    return judged_pairs(*rows)


def test_query_metrics_equal_values_worked_by_hand() -> None:
    evaluation = evaluate(
        judged_pairs(
            # ranked I, E, S: gains 0, 1, 0.1
            ("kr", "q1", "a", "S", 0.1),
            ("kr", "q1", "b", "I", 0.9),
            ("kr", "q1", "c", "E", 0.5),
            # ranked E, I: perfect
            ("kr", "q2", "a", "I", 0.2),
            ("kr", "q2", "b", "E", 0.3),
        )
    )
    ndcg_of_q1 = (1 / log2(3) + 0.1 / log2(4)) / (1 + 0.1 / log2(3))
    assert value(evaluation, "nDCG@10") == pytest.approx((ndcg_of_q1 + 1) / 2, abs=1e-9)
    assert value(evaluation, "MRR@10") == pytest.approx((1 / 2 + 1) / 2)
    assert value(evaluation, "defect rate@10") == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_only_the_first_ten_products_of_a_query_count() -> None:
    rows = [("kr", "q", f"p{place}", "C" if place % 2 else "I", 1.0 - place / 100) for place in range(10)]
    evaluation = evaluate(judged_pairs(*rows, ("kr", "q", "last", "E", 0.0), ("kr", "q", "after", "I", -1.0)))
    ideal = 1 + sum(0.01 / log2(place + 1) for place in range(2, 7))
    assert value(evaluation, "MRR@10") == 0.0
    assert value(evaluation, "defect rate@10") == 0.5
    assert value(evaluation, "nDCG@10") == pytest.approx(
        sum(0.01 / log2(place + 1) for place in (2, 4, 6, 8, 10)) / ideal, abs=1e-9
    )


def test_pair_metrics_equal_a_count_over_all_pairs() -> None:
    judged = many_pairs()
    evaluation = evaluate(judged)
    relevant = judged.loc[judged.grade == "E", "model"]
    rest = judged.loc[judged.grade != "E", "model"]
    wins = sum(1.0 if high > low else 0.5 if high == low else 0.0 for high, low in itertools.product(relevant, rest))
    assert value(evaluation, "ROC-AUC") == pytest.approx(wins / (len(relevant) * len(rest)))
    above = [(judged.model >= score) for score in relevant]
    precision = [float((judged.grade == "E")[chosen].mean()) for chosen in above]
    assert value(evaluation, "average precision") == pytest.approx(np.mean(precision))


def test_resampled_pair_metrics_equal_scikit_learn_with_sample_weights() -> None:
    judged = many_pairs(num_queries=6)
    relevant = (judged.grade == "E").to_numpy()
    query_of_pair = judged["query_id"].str[1:].astype(int).to_numpy()
    weights = np.array([[1, 1, 1, 1, 1, 1], [0, 2, 1, 3, 0, 0], [6, 0, 0, 0, 0, 0]])
    resampled = resampled_pair_metrics(relevant, judged["model"].to_numpy(), query_of_pair, weights)
    for row, query_weights in zip(resampled, weights, strict=True):
        sample_weight = query_weights[query_of_pair]
        assert row[0] == pytest.approx(roc_auc_score(relevant, judged["model"], sample_weight=sample_weight))
        assert row[1] == pytest.approx(average_precision_score(relevant, judged["model"], sample_weight=sample_weight))


def test_intervals_contain_the_value_and_shrink_with_more_queries() -> None:
    few, many = evaluate(many_pairs(num_queries=15)).metrics, evaluate(many_pairs(num_queries=240)).metrics
    for metrics in (few, many):
        assert (metrics["low"] <= metrics["value"]).all()
        assert (metrics["value"] <= metrics["high"]).all()
    ratio = ((few["high"] - few["low"]) / (many["high"] - many["low"])).median()
    assert 3 < ratio < 5  # sixteen times the queries: a fourth of the width


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation() -> None:
    # 100 queries, each with one product: half of them irrelevant. Standard error of the defect rate: 0.05.
    judged = judged_pairs(*(("kr", f"q{query}", "p", "EI"[query % 2], 0.5) for query in range(100)))
    row = evaluate(judged, num_resamples=4000).metrics.set_index("metric").loc["defect rate@10"].iloc[0]
    assert row["low"] == pytest.approx(0.5 - 1.96 * 0.05, abs=0.015)
    assert row["high"] == pytest.approx(0.5 + 1.96 * 0.05, abs=0.015)


def test_the_result_depends_on_the_seed_and_not_on_the_order_of_rows() -> None:
    judged = many_pairs()
    expected = evaluate(judged, seed=5).metrics
    pd.testing.assert_frame_equal(evaluate(judged.sample(frac=1.0, random_state=1), seed=5).metrics, expected)
    assert not evaluate(judged, seed=6).metrics.equals(expected)


def test_equal_scores_are_ranked_like_a_random_order_and_not_by_id() -> None:
    rows = []
    for query in range(400):
        rows.append(("kr", f"q{query}", "a", "E", 0.5))  # first in the file and by id: such a rule would give MRR 1
        rows.append(("kr", f"q{query}", "b", "I", 0.5))
    evaluation = evaluate(judged_pairs(*rows))
    assert value(evaluation, "MRR@10") == pytest.approx(0.75, abs=0.05)
    assert value(evaluation, "MRR@10", ranking=RANDOM) == pytest.approx(0.75, abs=0.05)
    assert value(evaluation, "ROC-AUC") == 0.5


def test_a_random_order_has_an_auc_of_one_half() -> None:
    assert value(evaluate(many_pairs(num_queries=200)), "ROC-AUC", ranking=RANDOM) == pytest.approx(0.5, abs=0.03)


def test_a_baseline_column_is_measured_on_the_same_pairs() -> None:
    judged = many_pairs()
    judged["bm25"] = -judged["model"]
    judged.loc[0, "bm25"] = np.nan
    evaluation = evaluate(judged, ("model", "bm25"))
    assert evaluation.counts["num_pairs"].tolist() == [len(judged) - 1]
    assert value(evaluation, "ROC-AUC", ranking="bm25") == pytest.approx(1 - value(evaluation, "ROC-AUC"))


def test_markets_are_measured_apart_and_overall_over_all_queries() -> None:
    evaluation = evaluate(
        judged_pairs(
            ("kr", "q1", "a", "E", 0.9),
            ("kr", "q1", "b", "I", 0.1),
            ("tw", "q1", "a", "E", 0.1),
            ("tw", "q1", "b", "I", 0.9),
            ("tw", "q2", "a", "E", 0.1),
            ("tw", "q2", "b", "I", 0.9),
        )
    )
    assert value(evaluation, "MRR@10", "kr") == 1.0
    assert value(evaluation, "MRR@10", "tw") == 0.5
    assert value(evaluation, "MRR@10", OVERALL) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert evaluation.counts.set_index("market")["num_queries"].to_dict() == {"kr": 1, "tw": 2, OVERALL: 3}


def test_a_query_without_relevant_products_is_left_out_with_a_note() -> None:
    evaluation = evaluate(
        judged_pairs(
            ("kr", "q1", "a", "E", 0.9),
            ("kr", "q1", "b", "I", 0.1),
            ("kr", "q2", "a", "S", 0.9),
            ("kr", "q3", "a", "I", 0.9),
        )
    )
    assert value(evaluation, "MRR@10") == 1.0
    assert value(evaluation, "nDCG@10") == 1.0
    assert value(evaluation, "defect rate@10") == pytest.approx((1 / 2 + 0 + 1) / 3)
    used = evaluation.metrics.set_index(["market", "ranking", "metric"])["num_queries"]
    assert used[("kr", "model", "MRR@10")] == 1
    assert used[("kr", "model", "nDCG@10")] == 2
    assert "kr: 2 of 3 queries have no relevant product and are left out of MRR@10." in evaluation.notes


def test_a_market_of_one_class_has_no_auc_and_a_note() -> None:
    evaluation = evaluate(judged_pairs(("kr", "q1", "a", "I", 0.9), ("kr", "q1", "b", "I", 0.1)))
    for metric in ("ROC-AUC", "average precision", "nDCG@10", "MRR@10"):
        assert np.isnan(value(evaluation, metric))
    assert value(evaluation, "defect rate@10") == 1.0
    assert "kr: ROC-AUC and average precision are undefined. None of the pairs are relevant." in evaluation.notes
    assert "kr: one query gives no interval." in evaluation.notes
    assert "undefined" in format_evaluation(evaluation)


def test_pairs_without_scores_are_left_out_and_counted() -> None:
    judged = judged_pairs(
        ("kr", "q1", "a", "E", 0.9),
        ("kr", "q1", "b", "I", 0.1),
        ("kr", "q2", "a", "E", np.nan),
        ("tw", "q1", "a", "E", np.nan),
    )
    evaluation = evaluate(judged)
    assert evaluation.counts.set_index("market").loc["kr"].tolist() == [3, 2, 2, 1]
    assert evaluation.counts.set_index("market").loc["tw"].tolist() == [1, 0, 1, 0]
    text = format_evaluation(evaluation)
    assert "kr: 1 of 2 judged queries, 2 of 3 judged pairs have a score" in text
    assert "tw: 0 of 1 judged queries, 0 of 1 judged pairs have a score" in text


def test_the_table_names_every_metric_and_ranking() -> None:
    text = format_evaluation(evaluate(many_pairs()))
    assert all(metric in text for metric in METRICS)
    assert "model" in text
    assert RANDOM in text
    assert OVERALL not in text


def test_binary_grades_and_any_gains_are_taken() -> None:
    judged = judged_pairs(("kr", "q1", "a", "yes", 0.1), ("kr", "q1", "b", "no", 0.9))
    evaluation = evaluate_scores(
        judged, ["model"], gains={"yes": 1, "no": 0}, relevant_grades=["yes"], irrelevant_grades=["no"]
    )
    assert value(evaluation, "nDCG@10") == pytest.approx(1 / log2(3))


@pytest.mark.parametrize("gains", [{}, {"E": -1.0}, {"E": 1 / 3, "I": 0.0}, {"E": float("inf")}, {"E": float("nan")}])
def test_gains_that_have_no_exact_integer_form_are_refused(gains: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"gains \{.*expected gains of at least 0.*Round them"):
        evaluate_scores(
            judged_pairs(("kr", "q", "p", "E", 1.0)),
            ["model"],
            gains=gains,
            relevant_grades=["E"],
            irrelevant_grades=["I"],
        )


def test_all_problems_of_the_judged_pairs_come_in_one_message() -> None:
    judged = judged_pairs(("kr", "q", "a", "E", np.inf), ("kr", "q", "a", "good", 0.1))
    with pytest.raises(InputError) as caught:
        evaluate(judged)
    assert "grades without a gain: ['good']" in str(caught.value)
    assert "1 rows repeat the key" in str(caught.value)
    assert "1 values of 'model' are infinite" in str(caught.value)


def test_grades_that_are_numbers_are_not_those_of_the_gains() -> None:
    judged = judged_pairs(("kr", "q", "a", 1, 0.2), ("kr", "q", "b", 0, 0.1))
    with pytest.raises(InputError, match=r"grades without a gain: \[0, 1\], gains are given for \['0', '1'\]"):
        evaluate_scores(judged, ["model"], gains={"1": 1, "0": 0}, relevant_grades=["1"], irrelevant_grades=["0"])


def test_a_relevant_grade_that_has_no_gain_is_an_error() -> None:
    with pytest.raises(InputError, match=r"relevant or irrelevant grades without a gain: \['exact'\]"):
        evaluate_scores(many_pairs(), ["model"], gains=ESCI_GAINS, relevant_grades=["exact"], irrelevant_grades=["I"])


def test_missing_columns_and_missing_scores_are_errors() -> None:
    with pytest.raises(InputError, match=r"missing columns \['bm25'\]"):
        evaluate(many_pairs(), ("model", "bm25"))
    with pytest.raises(InputError, match="none of 1 has a score"):
        evaluate(judged_pairs(("kr", "q", "a", "E", np.nan)))


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    with pytest.raises(MissingDependencyError, match=r"csrm\[eval\]"):
        evaluate(many_pairs())


def test_differences_are_paired_within_each_resample() -> None:
    judged = many_pairs(num_queries=40)
    judged["shifted"] = judged["model"] * 3 + 7  # the same order, so no resample tells them apart
    judged["worse"] = -judged["model"]
    evaluation = evaluate(judged, ("model", "shifted", "worse"))
    assert set(evaluation.differences["ranking"]) == {"shifted", "worse"}
    same = evaluation.differences.query("ranking == 'shifted'")
    assert same["metric"].tolist() == list(METRICS)
    assert (same[["difference", "low", "high"]] == 0).all(axis=None)
    worse = evaluation.differences.query("ranking == 'worse'").set_index("metric")
    for metric in METRICS:
        expected = value(evaluation, metric) - value(evaluation, metric, ranking="worse")
        assert worse.loc[metric, "difference"] == pytest.approx(expected)
        assert worse.loc[metric, "low"] < expected < worse.loc[metric, "high"]
    text = format_evaluation(evaluation)
    assert "  model less\n                    shifted" in text
    assert "  nDCG@10           +0.000 [+0.000, +0.000]" in text


def test_the_interval_of_a_difference_is_narrower_than_that_of_two_values_apart() -> None:
    judged = many_pairs(num_queries=200)
    judged["alike"] = judged["model"] + np.random.default_rng(0).normal(0, 0.1, len(judged))
    evaluation = evaluate(judged, ("model", "alike"))
    apart = evaluation.metrics.query("ranking == 'model'").set_index("metric").loc["nDCG@10"]
    paired = evaluation.differences.set_index("metric").loc["nDCG@10"]
    assert paired["high"] - paired["low"] < (apart["high"] - apart["low"]) / 2


def test_each_query_has_its_values_whose_means_are_the_metrics() -> None:
    evaluation = evaluate(many_pairs())
    own = evaluation.queries[evaluation.queries["ranking"] == "model"]
    assert own[["num_pairs", "num_relevant"]].sum().tolist() == [
        len(many_pairs()),
        int((many_pairs()["grade"] == "E").sum()),
    ]
    for metric, column in zip(METRICS, QUERY_COLUMNS, strict=False):
        assert own[column].mean() == pytest.approx(value(evaluation, metric))


def test_a_score_may_be_called_as_a_column_of_the_evaluation_itself() -> None:
    judged = many_pairs().assign(gain=lambda pairs: pairs["model"])
    evaluation = evaluate(judged, ("model", "gain"))
    assert value(evaluation, "ROC-AUC", ranking="gain") == value(evaluation, "ROC-AUC")
