from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from csrm.config import InputSpec
from csrm.errors import InputError
from csrm.scoring.labels import BINARY_LABELS, ESCI_LABELS, expected_gain
from csrm.training.data.judged import JudgedInputs, JudgedPairs
from csrm.training.distillation.teacher_scores import label_probabilities, teacher_scores

PAIRS = pd.DataFrame(
    {"market": "kr", "query_id": ["q1", "q1", "q2"], "product_id": ["p1", "p2", "p1"], "grade": ["yes", "no", "no"]}
)


def test_a_score_of_two_labels_is_the_models_own_answer() -> None:
    logits = np.array([[0.3, 1.2], [2.0, -1.0]])
    scores = expected_gain(logits, np.array([0.0, 1.0]))
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(label_probabilities(scores, BINARY_LABELS), softmax, atol=1e-6)


def test_a_score_of_four_labels_mixes_the_two_around_it() -> None:
    # I 0, C 0.01, S 0.1, E 1
    found = label_probabilities(np.array([0.0, 0.005, 0.01, 0.055, 0.55, 1.0]), ESCI_LABELS)
    expected = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 1, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0.5, 0.5], [0, 0, 0, 1]]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_the_expected_gain_is_kept_whatever_the_order_of_the_labels() -> None:
    scores = np.linspace(0, 1, 101)
    for labels in (ESCI_LABELS, ESCI_LABELS[::-1]):
        found = label_probabilities(scores, labels)
        np.testing.assert_allclose(found @ [label.gain for label in labels], scores, atol=1e-9)
        np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-9)


@pytest.fixture
def inputs(tmp_path: Path) -> JudgedInputs:
    tables = {
        "catalog": pd.DataFrame({"market": "kr", "product_id": ["p1", "p2"], "title": ["a", "b"]}),
        "queries": pd.DataFrame({"market": "kr", "query_id": ["q1", "q2"], "query": ["x", "y"]}),
        "judgments": PAIRS,
    }
    for name, table in tables.items():
        table.to_parquet(tmp_path / f"{name}.parquet")
    return JudgedInputs(**{name: spec(tmp_path / f"{name}.parquet") for name in tables})


def spec(path: Path) -> InputSpec:
    return InputSpec(path=str(path), format="parquet")


def test_every_pair_gets_its_own_score(inputs: JudgedInputs, tmp_path: Path) -> None:
    scores = PAIRS[["market", "query_id", "product_id"]].assign(relevance_score=[0.9, 0.2, 0.4], bundle_digest="d")
    scores.iloc[::-1].to_parquet(tmp_path / "scores.parquet")
    with JudgedPairs(inputs, {"kr": "ko"}) as pairs:
        ((frame, found),) = teacher_scores(spec(tmp_path / "scores.parquet"), pairs, ["train"], BINARY_LABELS)
    by_pair = dict(zip(zip(frame["query_id"], frame["product_id"], strict=True), found[:, 1], strict=True))
    assert by_pair == pytest.approx({("q1", "p1"): 0.9, ("q1", "p2"): 0.2, ("q2", "p1"): 0.4})
    assert set(frame["grade"]) == {"yes", "no"}


@pytest.mark.parametrize(
    ("rows", "digests", "message"),
    [
        (3, ["one", "one", "two"], "expected scores of one bundle, got 2: \\['one', 'two'\\]"),
        (2, ["one", "one"], "have no score, for example kr q2 p1"),
    ],
)
def test_scores_of_two_models_or_of_a_part_are_refused(
    inputs: JudgedInputs, tmp_path: Path, rows: int, digests: list[str], message: str
) -> None:
    scores = PAIRS[["market", "query_id", "product_id"]][:rows].assign(relevance_score=0.5, bundle_digest=digests)
    scores.to_parquet(tmp_path / "scores.parquet")
    with JudgedPairs(inputs, {"kr": "ko"}) as pairs, pytest.raises(InputError, match=message):
        list(teacher_scores(spec(tmp_path / "scores.parquet"), pairs, ["train"], BINARY_LABELS))
