import numpy as np
import pytest

from csrm.training.distillation.label_quality import Bin, calibration, count_flips, fold_agreement


def test_calibration_by_hand() -> None:
    probabilities = np.array([[0.95, 0.05], [0.07, 0.93], [0.96, 0.04], [0.4, 0.6]])
    given = np.array([[1, 0], [0, 1], [0, 1], [0, 1]])
    found = calibration(probabilities, given)
    assert found.num_pairs == 4
    assert [(bin_.num_pairs, bin_.accuracy) for bin_ in found.bins] == [(1, 1.0), (3, pytest.approx(2 / 3))]
    assert [bin_.confidence for bin_ in found.bins] == pytest.approx([0.6, (0.95 + 0.93 + 0.96) / 3])
    assert found.expected_error == pytest.approx((0.4 + 3 * (0.94667 - 2 / 3)) / 4, abs=1e-4)


def test_certainty_that_is_right_is_perfectly_calibrated() -> None:
    one_hot = np.eye(3)
    assert calibration(one_hot, one_hot).expected_error == 0
    assert calibration(one_hot, one_hot).bins == (Bin(3, 1.0, 1.0),)


def test_flips_by_hand() -> None:
    given = np.eye(3)[[0, 0, 1, 2, 2]]
    soft = np.array([[0.6, 0.4, 0], [0.1, 0.9, 0], [0, 1, 0], [0.5, 0.1, 0.4], [0.3, 0.6, 0.1]])
    flips = count_flips(given, soft)
    assert (flips.num_pairs, flips.num_flipped, flips.share) == (5, 3, 0.6)
    assert flips.transitions == ((1, 1, 0), (0, 1, 0), (1, 1, 0))
    assert flips.precision is flips.repaired is None
    # Given 0 0 1 2 2, soft 0 1 1 0 1: the third truth is unknown, the fifth label was wrong and stays so.
    known = count_flips(given, soft, np.array([0, 1, -1, 2, 0]))
    assert known.precision == pytest.approx(2 / 3)
    assert known.repaired == pytest.approx(1 / 2)


def test_scores_of_different_folds_are_not_compared() -> None:
    scores = [np.array([0.1, 0.2]), np.array([0.8, 0.9]), np.array([0.5])]
    relevant = [np.array([False, True]), np.array([False, True]), np.array([True])]
    queries = [np.array(["a", "a"]), np.array(["b", "b"]), np.array(["c"])]
    assert (fold_agreement(scores, relevant, queries) == 1).all()
    assert np.isnan(fold_agreement(scores[2:], relevant[2:], queries[2:])).all()


def test_noise_that_does_not_depend_on_the_text_orders_models_alike() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(20_000) < 0.3
    noisy = np.where(rng.random(20_000) < 0.3, ~truth, truth)
    good, bad = (truth + rng.normal(0, spread, 20_000) for spread in (1.0, 1.5))
    queries = np.arange(20_000) // 10
    clean = [fold_agreement([scores], [truth], [queries])[0] for scores in (good, bad)]
    noisy_agreements = [fold_agreement([scores], [noisy], [queries]) for scores in (good, bad)]
    against_noise = [agreement[0] for agreement in noisy_agreements]
    assert clean[0] > against_noise[0] > against_noise[1] > 0.5
    # 0.5 plus one constant times the clean advantage
    ratios = [(noise - 0.5) / (true - 0.5) for noise, true in zip(against_noise, clean, strict=True)]
    assert ratios[0] == pytest.approx(ratios[1], abs=0.03)
    # Hanley and McNeil 1982, "The Meaning and Use of the Area under a ROC Curve", give 0.004 for both.
    assert [agreement[1:].std() for agreement in noisy_agreements] == pytest.approx([0.004, 0.004], rel=0.2)
    # The same resamples in each call: models that judge nearly alike are told apart by less.
    alike = fold_agreement([good + rng.normal(0, 0.01, 20_000)], [noisy], [queries])
    assert (alike - noisy_agreements[0]).std() < 0.0004
