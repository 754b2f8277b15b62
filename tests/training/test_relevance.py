import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from csrm.errors import BundleError, ConfigError, InputError
from csrm.labels import BINARY_LABELS, ESCI_LABELS
from csrm.tokenization import Budgets
from csrm.training.base_model import BaseModel
from csrm.training.relevance import Tuning, load_trained, targets_of, train_relevance


def judged(pairs_pdf: pd.DataFrame) -> pd.DataFrame:
    """Grades that only a model which reads both texts can tell: the products' order differs from query to query."""
    return pairs_pdf.assign(grade=["ESCI"[(query + product) % 4] for query in range(6) for product in range(5)])


def train(pairs: pd.DataFrame, base: Path, output: Path, **tuning: object) -> object:
    return train_relevance(
        pairs, BaseModel(folder=str(base)), Tuning(**tuning), ESCI_LABELS, None, Budgets(), 512, output
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_tiny_model_learns_its_pairs_by_heart_and_reloads_the_same(
    method: str, pairs_pdf: pd.DataFrame, loud_base_model: Path, tmp_path: Path
) -> None:
    pairs = judged(pairs_pdf)
    trained = train(
        pairs, loud_base_model, tmp_path / "model", method=method, max_steps=60, learning_rate=3e-3, pairs_per_prefix=2
    )
    scores = trained.score(pairs)
    assert (scores["predicted_grade"] == pairs["grade"]).mean() >= 0.9
    _, reloaded, card = load_trained(tmp_path / "model")
    np.testing.assert_allclose(reloaded.score(pairs)["relevance_score"], scores["relevance_score"], atol=1e-5)
    assert card.num_pairs == 30
    assert not (tmp_path / "model.unfinished").exists()


def test_the_same_seed_gives_the_same_model(pairs_pdf: pd.DataFrame, loud_base_model: Path, tmp_path: Path) -> None:
    pairs = judged(pairs_pdf)
    first, second, other = (
        train(pairs, loud_base_model, tmp_path / name, max_steps=3, seed=seed).logits(pairs)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - other).max() > 1e-4


def test_a_changed_trained_folder_is_refused(pairs_pdf: pd.DataFrame, loud_base_model: Path, tmp_path: Path) -> None:
    train(judged(pairs_pdf), loud_base_model, tmp_path / "model", max_steps=1)
    card = json.loads((tmp_path / "model" / "model.json").read_text())
    (tmp_path / "model" / "model.json").write_text(json.dumps({**card, "pack_tokens": 9999}))
    with pytest.raises(BundleError, match=r"model\.json"):
        load_trained(tmp_path / "model")


def test_grades_map_to_labels() -> None:
    grades = pd.Series(["E", "I", "S"])
    np.testing.assert_array_equal(targets_of(grades, ESCI_LABELS, None), [3, 0, 2])
    binary = {"E": "yes", "S": "no", "C": "no", "I": "no"}
    np.testing.assert_array_equal(targets_of(grades, BINARY_LABELS, binary), [1, 0, 0])


def test_a_grade_without_a_label_is_named() -> None:
    with pytest.raises(InputError, match=r"grades \['X'\] have no label"):
        targets_of(pd.Series(["E", "X"]), ESCI_LABELS, None)


def test_a_loss_that_is_not_finite_stops_without_a_model(
    pairs_pdf: pd.DataFrame, loud_base_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"the loss is .* Lower tuning\.learning_rate"):
        train(judged(pairs_pdf), loud_base_model, tmp_path / "model", method="full", max_steps=12, learning_rate=1e38)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("base", "message"),
    [({"folder": "nowhere"}, "is not there"), ({"folder": ".", "gguf_file": "x.gguf"}, r"x\.gguf.* is not there")],
)
def test_a_missing_base_model_is_named(
    base: dict[str, str], message: str, pairs_pdf: pd.DataFrame, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train_relevance(
            judged(pairs_pdf), BaseModel(**base), Tuning(), ESCI_LABELS, None, Budgets(), 512, tmp_path / "model"
        )


def test_a_base_model_has_one_place() -> None:
    with pytest.raises(ValueError, match="either a folder or a hub_name"):
        BaseModel()
