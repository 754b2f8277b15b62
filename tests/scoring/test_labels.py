import numpy as np
import pytest

from csrm.scoring.labels import ESCI_LABELS, expected_gain


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
