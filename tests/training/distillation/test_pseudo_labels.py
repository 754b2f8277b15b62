from typing import Any

import numpy as np
import pytest

from csrm.config import InputSpec
from csrm.training.data.judged import UnlabelledInputs
from csrm.training.distillation.pseudo_labels import UnlabelledPairs, pseudo_label_weights

NOWHERE = InputSpec(path="nowhere")
INPUTS = UnlabelledInputs(catalog=NOWHERE, queries=NOWHERE, candidates=NOWHERE)
SURE_HALF_NOT_AT_ALL = np.array([[1, 0], [0.75, 0.25], [0.5, 0.5]])


def weights(probabilities: np.ndarray, shares: list[float], **settings: Any) -> np.ndarray:
    options = UnlabelledPairs(inputs=INPUTS, markets={"tw": "zh-TW"}, **settings)
    return pseudo_label_weights(np.asarray(probabilities, dtype=np.float32), np.array(shares), options)


@pytest.mark.parametrize(
    ("confidence", "expected"),
    [("entropy", [1, 1 - 0.8113, 0]), ("max_probability", [1, 0.5, 0]), ("none", [1, 1, 1])],
)
def test_a_pair_weighs_less_the_more_teachers_doubt(confidence: str, expected: list[float]) -> None:
    found = weights(SURE_HALF_NOT_AT_ALL, [0.5, 0.5], confidence=confidence, class_balanced=False, weight=0.4)
    np.testing.assert_allclose(found, 0.4 * np.array(expected), atol=1e-4)


def test_each_label_weighs_as_much_as_its_share_of_the_given_ones() -> None:
    certain = np.eye(2)[[0] * 6 + [1] * 2]  # three quarters are label 0, half of the given labels are
    found = weights(certain, [0.5, 0.5], weight=1.0)
    np.testing.assert_allclose(found, [4 / 6] * 6 + [2] * 2, rtol=1e-6)
    assert found.sum() == pytest.approx(8)


def test_a_label_that_is_rare_among_the_pseudo_labels_is_not_blown_up() -> None:
    certain = np.eye(3)[[0] * 99 + [1]]  # no pair has label 2
    found = weights(certain, [0.4, 0.4, 0.2], weight=1.0, max_class_weight=3.0)
    assert found[-1] == 3
    np.testing.assert_allclose(found[:-1], 40 / 99, rtol=1e-6)


def test_without_any_confidence_all_weights_are_zero() -> None:
    assert (weights(np.full((3, 4), 0.25), [0.25] * 4) == 0).all()
