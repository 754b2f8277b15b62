import numpy as np
import pytest

from csrm.errors import ConfigError
from csrm.scoring.labels import ESCI_LABELS, cost_matrix, expected_gain, least_cost


def test_expected_gain_of_known_probabilities() -> None:
    probabilities = np.array([[0.5, 0.25, 0.125, 0.125], [0.0001, 0.0001, 0.0001, 0.9997]])
    gains = np.array([label.gain for label in ESCI_LABELS])
    scores = expected_gain(np.log(probabilities), gains)
    assert scores.dtype == np.float32
    # 0.5*0 + 0.25*0.01 + 0.125*0.1 + 0.125*1 and 0.0001*(0 + 0.01 + 0.1) + 0.9997
    np.testing.assert_allclose(scores, [0.14, 0.999711], atol=1e-7)


def test_scores_stay_in_range_for_huge_logits() -> None:
    logits = np.array([[-3e38, 3e38], [3e38, -3e38], [1e4, 1e4]], dtype=np.float32)
    np.testing.assert_array_equal(expected_gain(logits, np.array([0.0, 1.0])), [1.0, 0.0, 0.5])


def test_a_logit_that_is_not_finite_names_its_row() -> None:
    with pytest.raises(ValueError, match="row 1 is not finite"):
        expected_gain(np.array([[0.0, 1.0], [np.nan, 1.0]]), np.array([0.0, 1.0]))


def test_gains_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected shape \(num_pairs, 3\)"):
        expected_gain(np.zeros((2, 2)), np.zeros(3))


def test_the_grade_of_least_expected_cost_is_that_of_a_hand_worked_case() -> None:
    costs = cost_matrix(ESCI_LABELS, {"I": {"E": 10}})
    probabilities = np.array([[0.2, 0.1, 0.1, 0.6], [0.01, 0.09, 0.1, 0.8], [0.7, 0.1, 0.1, 0.1]])
    # As E the first costs 10*0.2 + 0.1 + 0.1 = 2.2, as I 0.8, as C or S 0.9; the second 0.29 as E.
    names = [ESCI_LABELS[place].name for place in least_cost(np.log(probabilities), costs)]
    assert names == ["I", "E", "I"]


def test_equal_costs_give_the_most_probable_label() -> None:
    logits = np.random.default_rng(0).normal(size=(1_000, 4))
    np.testing.assert_array_equal(least_cost(logits, cost_matrix(ESCI_LABELS, {})), logits.argmax(axis=1))


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({"I": {"X": 1}}, r"\['X'\] are no labels of the model; it has \['I', 'C', 'S', 'E'\]"),
        ({"Z": {"E": 1}}, r"\['Z'\] are no labels"),
        ({"I": {"E": -1}}, "I graded as E: expected a number from 0, got -1"),
        ({"I": {"E": float("nan")}}, "I graded as E: expected a number from 0, got nan"),
        ({"I": {"I": 1}}, "I graded as I: expected 0, for the grade is right, got 1"),
    ],
)
def test_costs_that_are_none_are_refused(costs: dict[str, dict[str, float]], message: str) -> None:
    with pytest.raises(ConfigError, match=f"grade_costs: {message}"):
        cost_matrix(ESCI_LABELS, costs)
