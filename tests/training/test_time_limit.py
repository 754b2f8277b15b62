"""Trainings that must end in time. Nothing here depends on how fast the machine is."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from csrm.errors import ConfigError
from csrm.scoring.labels import ESCI_LABELS
from csrm.scoring.scorer import PairScorer
from csrm.scoring.tokenization import Budgets, PromptTokenizer
from csrm.training import trainer
from csrm.training.data.packs import TrainingPack, judged_packs
from csrm.training.model.base import BaseModel, load_language_model
from csrm.training.model.relevance import PackedRelevanceModel, known_precision
from csrm.training.stage import train_stage
from csrm.training.targets import one_hot_targets
from csrm.training.time_limit import Pace, TimeLimit, measure_pace, planned_steps
from csrm.training.trained import load_trained, start_tokenizer_json, training_length
from csrm.training.tuning import Tuning

HOUR = 3600.0


@pytest.fixture
def base(loud_base_model: Path) -> BaseModel:
    return BaseModel(folder=str(loud_base_model))


@pytest.fixture
def packs(pairs_pdf: pd.DataFrame, base: BaseModel) -> list[TrainingPack]:
    """Packs of a query each."""
    grades = ["ESCI"[number % 4] for number in range(len(pairs_pdf))]
    pairs = pairs_pdf.assign(grade=grades, query_id=pairs_pdf["query"], product_id="p")
    pairs = pairs.assign(group_number=pairs.groupby("query").ngroup())
    pairs = pairs.assign(target=list(one_hot_targets(pairs["grade"], ESCI_LABELS, None)))
    tokenizer = PromptTokenizer.from_json(start_tokenizer_json(base), Budgets())
    return list(judged_packs([pairs.sort_values("group_number", kind="stable")], tokenizer, 512))


Train = Callable[[TimeLimit | None], PairScorer]


@pytest.fixture
def train(packs: list[TrainingPack], base: BaseModel, tmp_path: Path) -> Train:
    """Train for 30 steps, or as many as a limit lets."""
    tuning = Tuning(method="full", max_steps=30, packs_per_step=1)
    return lambda limit: train_stage(packs, base, tuning, ESCI_LABELS, Budgets(), 512, tmp_path / "model", limit)


def test_nine_tenths_of_the_time_are_planned_with() -> None:
    assert planned_steps(100.0, step_s=1.0, most=1_000) == 90
    assert planned_steps(100.0, step_s=1.0, most=7) == 7
    assert planned_steps(0.0, step_s=1.0, most=7) == 1


def test_time_to_score_the_measured_pairs_is_kept_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1_000.0)
    limit = TimeLimit(10.0, ends_at=1_600.0, num_measured=600)
    pace = Pace(step_s=3.0, pairs_per_step=10.0)  # a third of 0.3 s a pair: 0.1 s
    assert limit.seconds() == 600.0
    assert pace.reserved_s(limit) == pytest.approx(60.0)
    assert pace.reserved_s(limit.part(num_measured=100_000)) == 300.0
    assert Pace(3.0, pairs_per_step=0.0).reserved_s(limit) == 0.0
    assert limit.part(0.25).seconds() == 150.0


def test_measuring_the_pace_changes_no_weight(packs: list[TrainingPack], base: BaseModel) -> None:
    tokenizer = PromptTokenizer.from_json(start_tokenizer_json(base), Budgets())
    model = PackedRelevanceModel(load_language_model(base), tokenizer.label_ids(ESCI_LABELS))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    pace = measure_pace(model, [packs[:2], packs[2:4]], Tuning(accumulation_steps=2), TimeLimit.begin(60.0))
    assert pace.step_s > 0
    assert pace.pairs_per_step == sum(len(pack.targets) for pack in packs[:4]) / 2
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_limit_that_is_far_away_trains_all_steps_and_says_before_what_that_is(
    train: Train, packs: list[TrainingPack], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    train(TimeLimit(60.0, time.monotonic() + HOUR))
    assert training_length(tmp_path / "model").num_steps == 30
    said = f"training: 30 steps of 1 packs, {30 / len(packs):.1f} epochs ({len(packs)} packs)"
    first_step = next(place for place, message in enumerate(caplog.messages) if message.startswith("step 1 of 30"))
    assert said in caplog.messages[:first_step]


def test_a_training_that_the_time_overtakes_ends_with_a_model_that_loads(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(trainer, "planned_steps", lambda seconds, step_s, most: most)  # as if it had been faster
    train(TimeLimit(60.0, ends_at=time.monotonic() - 1))
    assert "the time is over after 1 of 30 steps" in caplog.messages
    assert training_length(tmp_path / "model").num_steps == 1
    assert [entry["step"] for entry in json.loads((tmp_path / "model" / "history.json").read_text())] == [1]
    _, scorer, _ = load_trained(tmp_path / "model")
    assert scorer.labels == ESCI_LABELS


def test_another_limit_is_another_training(train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    over = time.monotonic() - 1
    train(TimeLimit(5.0, over))
    assert training_length(tmp_path / "model").num_steps == 1
    train(TimeLimit(5.0, over))
    assert caplog.text.count("not trained again") == 1
    train(None)
    assert caplog.text.count("not trained again") == 1
    assert training_length(tmp_path / "model").num_steps == 30


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks the processor")
def test_bf16_without_instructions_is_refused_and_auto_takes_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(ConfigError, match=r"bf16: this processor has no instructions .* tuning\.precision=auto"):
        known_precision("bf16")
    assert (known_precision("auto"), known_precision("fp32")) == ("fp32", "fp32")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert (known_precision("auto"), known_precision("bf16")) == ("bf16", "bf16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks the processor")
def test_a_torch_that_was_built_without_onednn_trains_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for some processors other than x86; it has no operator to ask."""
    monkeypatch.setattr(torch._C, "_has_mkldnn", False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    assert known_precision("auto") == "fp32"


def test_the_time_that_is_left_follows_the_pace_of_the_last_entries(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = trainer._Progress()
    state = SimpleNamespace(global_step=0, max_steps=100, is_world_process_zero=True)
    progress.on_train_begin(None, state, None)
    for step, step_s in ((10, 60.0), (20, 60.0), (30, 1.0), (40, 1.0), (50, 1.0)):  # a load that fell after step 20
        now += 10 * step_s
        state.global_step = step
        progress.on_log(None, state, None, logs={"loss": 1.0, "learning_rate": 1e-4})
    assert caplog.messages[1].endswith("1:20:00 left")
    assert caplog.messages[-1].endswith("00:50 left")
