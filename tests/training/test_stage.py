import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from csrm.errors import BundleError, ConfigError, InputError
from csrm.labels import BINARY_LABELS, ESCI_LABELS
from csrm.manifest import write_manifest
from csrm.scoring import PairScorer
from csrm.training.base_model import BaseModel
from csrm.training.stage import KIND, load_trained, one_hot_targets

Train = Callable[..., PairScorer]


@pytest.fixture(scope="module")
def base(loud_base_model: Path) -> BaseModel:
    return BaseModel(folder=str(loud_base_model))


@pytest.fixture
def pairs(pairs_pdf: pd.DataFrame) -> pd.DataFrame:
    """Grades that only a model which reads both texts can tell: the products' order differs from query to query."""
    return pairs_pdf.assign(grade=["ESCI"[(query + product) % 4] for query in range(6) for product in range(5)])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_tiny_model_learns_its_pairs_by_heart_and_reloads_the_same(
    method: str, train_on: Train, pairs: pd.DataFrame, base: BaseModel, tmp_path: Path
) -> None:
    trained = train_on(
        pairs, base, tmp_path / "model", method=method, max_steps=60, learning_rate=3e-3, pairs_per_prefix=2
    )
    scores = trained.score(pairs)
    assert (scores["predicted_grade"] == pairs["grade"]).mean() >= 0.9
    _, reloaded, _ = load_trained(tmp_path / "model")
    np.testing.assert_allclose(reloaded.score(pairs)["relevance_score"], scores["relevance_score"], atol=1e-5)
    assert not (tmp_path / "model.unfinished").exists()


def test_the_same_seed_gives_the_same_model(
    train_on: Train, pairs: pd.DataFrame, base: BaseModel, tmp_path: Path
) -> None:
    first, second, other = (
        train_on(pairs, base, tmp_path / name, max_steps=3, seed=seed).logits(pairs)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - other).max() > 1e-4


def test_what_has_ended_is_trained_again_only_when_something_changed(
    train_on: Train, pairs: pd.DataFrame, base: BaseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    first = train_on(pairs, base, tmp_path / "model", max_steps=2).logits(pairs)
    made = (tmp_path / "model" / "model.json").stat().st_mtime_ns

    again = train_on(pairs, base, tmp_path / "model", max_steps=2, checkpoint_steps=7).logits(pairs)
    np.testing.assert_allclose(again, first, atol=1e-5)  # adapters are merged when they are loaded
    assert (tmp_path / "model" / "model.json").stat().st_mtime_ns == made
    assert "not trained again" in caplog.text

    train_on(pairs.assign(title=pairs["title"] + "!"), base, tmp_path / "model", max_steps=2)
    changed = (tmp_path / "model" / "model.json").stat().st_mtime_ns
    train_on(pairs.assign(title=pairs["title"] + "!"), base, tmp_path / "model", max_steps=3)
    assert made < changed < (tmp_path / "model" / "model.json").stat().st_mtime_ns


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_stage_goes_on_from_the_weights_of_the_stage_before(
    method: str, train_on: Train, pairs: pd.DataFrame, base: BaseModel, tmp_path: Path
) -> None:
    first = train_on(pairs, base, tmp_path / "first", method=method, max_steps=3).logits(pairs)
    second = train_on(pairs, tmp_path / "first", tmp_path / "second", method=method, max_steps=1, learning_rate=1e-12)
    np.testing.assert_allclose(second.logits(pairs), first, atol=1e-4)
    _, reloaded, _ = load_trained(tmp_path / "second")
    np.testing.assert_allclose(reloaded.logits(pairs), first, atol=1e-4)


def test_a_stage_of_another_shape_than_the_one_before_is_refused(
    train_on: Train, pairs: pd.DataFrame, base: BaseModel, tmp_path: Path
) -> None:
    train_on(pairs, base, tmp_path / "first", max_steps=1)
    with pytest.raises(ConfigError, match=r"expected \['lora_rank'\] as in the stage before.*\[16\], got \[4\]"):
        train_on(pairs, tmp_path / "first", tmp_path / "second", max_steps=1, lora_rank=4)


def test_a_changed_trained_folder_is_refused(
    train_on: Train, pairs: pd.DataFrame, base: BaseModel, tmp_path: Path
) -> None:
    train_on(pairs, base, tmp_path / "model", max_steps=1)
    card = json.loads((tmp_path / "model" / "model.json").read_text())
    (tmp_path / "model" / "model.json").write_text(json.dumps({**card, "pack_tokens": 9999}))
    with pytest.raises(BundleError, match=r"model\.json"):
        load_trained(tmp_path / "model")


def test_a_folder_of_another_version_is_refused_and_trained_again(
    train_on: Train, pairs: pd.DataFrame, base: BaseModel, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    train_on(pairs, base, model, max_steps=1)
    card = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps({**card, "num_pairs": 30}))
    write_manifest(model, KIND)
    with pytest.raises(BundleError, match=r"other fields than this version reads .*num_pairs.* Train it again"):
        load_trained(model)
    train_on(pairs, base, model, max_steps=1)
    assert load_trained(model)[2].num_packs > 0


def test_grades_map_to_labels() -> None:
    grades = pd.Series(["E", "I", "S", None])  # None: a random negative
    np.testing.assert_array_equal(one_hot_targets(grades, ESCI_LABELS, None), np.eye(4)[[3, 0, 2, 0]])
    binary = {"E": "yes", "S": "no", "C": "no", "I": "no"}
    np.testing.assert_array_equal(one_hot_targets(grades, BINARY_LABELS, binary), np.eye(2)[[1, 0, 0, 0]])


def test_a_grade_without_a_label_is_named() -> None:
    with pytest.raises(InputError, match=r"grades \['X'\] have no label"):
        one_hot_targets(pd.Series(["E", "X"]), ESCI_LABELS, None)


def test_a_loss_that_is_not_finite_stops_with_its_pairs_and_without_a_model(
    train_on: Train, pairs: pd.DataFrame, base: BaseModel, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"the loss is nan at step \d+, over kr .* more\. .* Lower tuning\.learning"):
        train_on(pairs, base, tmp_path / "model", method="full", max_steps=12, learning_rate=1e38)
    assert not (tmp_path / "model").exists()


def test_nothing_to_train_on_is_an_error(train_on: Train, pairs: pd.DataFrame, base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to train on"):
        train_on(pairs[:0], base, tmp_path / "model")


@pytest.mark.parametrize(
    ("where", "message"),
    [({"folder": "nowhere"}, "is not there"), ({"folder": ".", "gguf_file": "x.gguf"}, r"x\.gguf.* is not there")],
)
def test_a_missing_base_model_is_named(
    where: dict[str, str], message: str, train_on: Train, pairs: pd.DataFrame, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train_on(pairs, BaseModel(**where), tmp_path / "model")


def test_a_base_model_has_one_place() -> None:
    with pytest.raises(ValueError, match="either a folder or a hub_name"):
        BaseModel()
