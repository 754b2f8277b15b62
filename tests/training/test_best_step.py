"""Dev chooses the step that is kept: which one, what is kept of it, and after a stop."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from csrm.errors import ConfigError
from csrm.scoring.labels import ESCI_LABELS
from csrm.scoring.tokenization import Budgets, PromptTokenizer
from csrm.training import trainer
from csrm.training.best_step import DEV_SCORES, DevSplit, evaluation_steps, known_scores
from csrm.training.data.packs import TrainingPack, judged_packs
from csrm.training.model.base import BaseModel
from csrm.training.stage import train_stage
from csrm.training.targets import one_hot_targets
from csrm.training.trained import load_trained, read_card, read_history, start_tokenizer_json
from csrm.training.tuning import Tuning

SETTINGS = {"method": "full", "max_steps": 6, "packs_per_step": 2, "learning_rate": 3e-3, "eval_steps": 1}


@pytest.fixture
def base(loud_base_model: Path) -> BaseModel:
    return BaseModel(folder=str(loud_base_model))


@pytest.fixture
def judged(pairs_pdf: pd.DataFrame) -> pd.DataFrame:
    grades = ["ESCI"[(query + product) % 4] for query in range(6) for product in range(5)]
    products = [f"p{number % 5}" for number in range(30)]
    return pairs_pdf.assign(grade=grades, query_id=pairs_pdf["query"], product_id=products)


@pytest.fixture
def packs(judged: pd.DataFrame, base: BaseModel) -> list[TrainingPack]:
    targets = list(one_hot_targets(judged["grade"], ESCI_LABELS, None))
    pairs = judged.assign(group_number=judged.groupby("query", sort=False).ngroup(), target=targets)
    tokenizer = PromptTokenizer.from_json(start_tokenizer_json(base), Budgets())
    return list(judged_packs([pairs], tokenizer, 512))


def dev_of(judged: pd.DataFrame) -> DevSplit:
    gains = {label.name: label.gain for label in ESCI_LABELS}
    return DevSplit(judged, gains, {"E"}, {"I"})


@pytest.fixture
def wrong_dev(judged: pd.DataFrame) -> DevSplit:
    """The same pairs with the opposite grades: the more a model learns, the worse it is."""
    opposite = {"E": "I", "S": "C", "C": "S", "I": "E"}
    return dev_of(judged.assign(grade=judged["grade"].map(opposite)))


def train(packs: list[TrainingPack], base: BaseModel, folder: Path, dev: DevSplit | None, **changes: object) -> None:
    tuning = Tuning(**{**SETTINGS, **changes})
    train_stage(packs, base, tuning, ESCI_LABELS, Budgets(), 512, folder, dev=dev)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = (folder / "weights").glob("*.safetensors")
    return load_file(path)


def assert_equal_weights(folder: Path, other: Path) -> None:
    for name, tensor in weights_of(other).items():
        torch.testing.assert_close(weights_of(folder)[name], tensor, rtol=0, atol=0, msg=name)


def test_the_weights_and_scores_of_the_best_step_are_kept(
    packs: list[TrainingPack], base: BaseModel, wrong_dev: DevSplit, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    train(packs, base, folder, wrong_dev)
    aucs = {entry["step"]: entry["dev_roc_auc"] for entry in read_history(folder)}
    assert list(aucs) == [1, 2, 3, 4, 5, 6]
    kept = read_card(folder).kept_step
    assert kept is not None
    assert aucs[kept] == max(aucs.values()) > aucs[6]
    scores = wrong_dev.scores(load_trained(folder)[1])
    assert wrong_dev.metrics(scores)["roc_auc"] == aucs[kept]
    known = known_scores(folder, wrong_dev.pairs)
    assert known is not None
    np.testing.assert_allclose(known["relevance_score"], scores["relevance_score"], atol=1e-6)
    assert known_scores(folder, wrong_dev.pairs[1:]) is None


def test_being_measured_changes_no_step(
    packs: list[TrainingPack], base: BaseModel, judged: pd.DataFrame, tmp_path: Path
) -> None:
    """The model learns the pairs that measure it, so its last step is the best."""
    changes = {"max_steps": 12, "eval_steps": 6, "learning_rate": 1e-3}
    train(packs, base, tmp_path / "measured", dev_of(judged), **changes)
    train(packs, base, tmp_path / "not", None, **changes)
    assert read_card(tmp_path / "measured").kept_step == 12
    assert read_card(tmp_path / "not").kept_step is None
    assert_equal_weights(tmp_path / "measured", tmp_path / "not")
    assert not (tmp_path / "not" / DEV_SCORES).exists()


def test_of_equal_steps_the_last_is_kept(
    packs: list[TrainingPack], base: BaseModel, judged: pd.DataFrame, tmp_path: Path
) -> None:
    train(packs, base, tmp_path / "model", dev_of(judged), learning_rate=1e-30)
    assert len({entry["dev_roc_auc"] for entry in read_history(tmp_path / "model")}) == 1
    assert read_card(tmp_path / "model").kept_step == 6


@pytest.mark.parametrize("method", ["full", "lora"])
def test_after_a_stop_the_best_step_so_far_is_not_lost(
    method: str,
    packs: list[TrainingPack],
    base: BaseModel,
    wrong_dev: DevSplit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(packs, base, tmp_path / "whole", wrong_dev, method=method)
    kept = read_card(tmp_path / "whole").kept_step
    assert kept is not None
    assert kept < 5

    class Stopped(Exception):
        pass

    save = trainer._StageTrainer._save_checkpoint

    def save_and_stop(self: trainer._StageTrainer, *args: object) -> None:
        save(self, *args)
        if self.state.global_step == 5:
            raise Stopped

    monkeypatch.setattr(trainer._StageTrainer, "_save_checkpoint", save_and_stop)
    with pytest.raises(Stopped):
        train(packs, base, tmp_path / "stopped", wrong_dev, method=method)
    monkeypatch.undo()
    checkpoints = (tmp_path / "stopped.unfinished" / "checkpoints").glob("*/checkpoint-*")
    assert {path.name for path in checkpoints} == {f"checkpoint-{kept}", "checkpoint-5"}

    ended = tmp_path / "ended" / "stopped"  # elsewhere: its checkpoints are found where they are now
    shutil.copytree(tmp_path / "stopped.unfinished", ended.with_name("stopped.unfinished"))
    tuning = Tuning(**{**SETTINGS, "method": method})
    train_stage(packs, base, tuning, ESCI_LABELS, Budgets(), 512, ended, dev=wrong_dev, finish=True)
    assert (read_card(ended).kept_step, read_history(ended)[-1]["step"]) == (kept, 5)

    train(packs, base, tmp_path / "stopped", wrong_dev, method=method)
    assert read_card(tmp_path / "stopped").kept_step == kept
    for folder in (tmp_path / "stopped", ended):
        assert_equal_weights(folder, tmp_path / "whole")
    assert read_history(tmp_path / "stopped") == read_history(tmp_path / "whole")


def test_another_dev_split_is_another_training(
    packs: list[TrainingPack], base: BaseModel, judged: pd.DataFrame, wrong_dev: DevSplit, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    train(packs, base, folder, wrong_dev)
    first = json.loads((folder / "model.json").read_text())
    train(packs, base, folder, wrong_dev)
    assert json.loads((folder / "model.json").read_text()) == first
    train(packs, base, folder, dev_of(judged))
    assert json.loads((folder / "model.json").read_text())["fingerprint"] != first["fingerprint"]


def test_without_a_training_that_was_stopped_there_is_nothing_to_finish(
    packs: list[TrainingPack], base: BaseModel, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"--finish: .* found no checkpoint of one\. Start it without --finish"):
        train_stage(packs, base, Tuning(), ESCI_LABELS, Budgets(), 512, tmp_path / "model", finish=True)


@pytest.mark.parametrize(
    ("num_dev", "wanted", "expected"),
    [
        (1_000, None, 100),  # 333 pairs' time each: six of them
        (3_000, None, 200),  # 1,000 each, of 24,000 pairs: two before the last
        (9_000, None, None),  # 3,000 each: more than a tenth
        (9_000, 250, 250),
        (1_000, 0, None),
    ],
)
def test_evaluations_take_a_small_share_of_a_training(num_dev: int, wanted: int | None, expected: int | None) -> None:
    assert evaluation_steps(600, 40.0, num_dev, wanted) == expected


def test_a_dev_split_of_one_kind_of_pairs_chooses_no_step(judged: pd.DataFrame) -> None:
    from types import SimpleNamespace

    config = SimpleNamespace(labels=ESCI_LABELS, grade_labels=None)
    assert DevSplit.of(judged, config) is not None
    assert DevSplit.of(judged[judged["grade"] == "E"], config) is None
    assert DevSplit.of(judged[judged["grade"] != "E"], config) is None
    assert DevSplit.of(judged[:0], config) is None
