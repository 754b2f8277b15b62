import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)

from csrm.artefacts.manifest import file_digest, write_manifest
from csrm.errors import BundleError, ConfigError, InputError
from csrm.scoring.labels import BINARY_LABELS, ESCI_LABELS
from csrm.scoring.prompts import Translation
from csrm.scoring.scorer import PairScorer
from csrm.scoring.tokenization import SEEN_TOKENS_NAME, Budgets, PromptTokenizer
from csrm.training import stage, trainer
from csrm.training.data.packs import TrainingPack, judged_packs, translation_packs
from csrm.training.model.base import BaseModel
from csrm.training.targets import one_hot_targets, smoothed_targets
from csrm.training.trained import MODEL_KIND, load_trained, read_seen_tokens, start_tokenizer_json
from csrm.training.tuning import Tuning, with_adapters

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

    same = {"checkpoint_steps": 7, "epochs": 9.0, "label_smoothing": 0.1}  # the packs show what of these is learnt
    again = train_on(pairs, base, tmp_path / "model", max_steps=2, **same).logits(pairs)
    np.testing.assert_allclose(again, first, atol=1e-5)  # adapters are merged when they are loaded
    assert (tmp_path / "model" / "model.json").stat().st_mtime_ns == made
    assert "not trained again" in caplog.text

    train_on(pairs.assign(title=pairs["title"] + "!"), base, tmp_path / "model", max_steps=2)
    changed = (tmp_path / "model" / "model.json").stat().st_mtime_ns
    train_on(pairs.assign(title=pairs["title"] + "!"), base, tmp_path / "model", max_steps=3)
    assert made < changed < (tmp_path / "model" / "model.json").stat().st_mtime_ns

    wider = Budgets(title=Budgets().title + 8)  # which no title of these pairs needs
    changed = (tmp_path / "model" / "model.json").stat().st_mtime_ns
    train_on(pairs.assign(title=pairs["title"] + "!"), base, tmp_path / "model", wider, max_steps=3)
    assert changed < (tmp_path / "model" / "model.json").stat().st_mtime_ns
    assert load_trained(tmp_path / "model")[2].budgets == wider


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_stage_goes_on_from_the_weights_of_the_stage_before(
    method: str, train_on: Train, pairs: pd.DataFrame, base: BaseModel, tmp_path: Path
) -> None:
    first = train_on(pairs, base, tmp_path / "first", method=method, max_steps=3).logits(pairs)
    second = train_on(pairs, tmp_path / "first", tmp_path / "second", method=method, max_steps=1, learning_rate=1e-12)
    np.testing.assert_allclose(second.logits(pairs), first, atol=1e-4)
    _, reloaded, _ = load_trained(tmp_path / "second")
    np.testing.assert_allclose(reloaded.logits(pairs), first, atol=1e-4)


def test_what_a_training_saw_is_unknown_after_a_stage_that_an_older_version_trained(
    train_on: Train, pairs: pd.DataFrame, base: BaseModel, tmp_path: Path
) -> None:
    train_on(pairs, base, tmp_path / "first", max_steps=1)
    train_on(pairs.assign(title="towel"), tmp_path / "first", tmp_path / "second", max_steps=1)
    first, second = (read_seen_tokens(tmp_path / name) for name in ("first", "second"))
    assert first is not None
    assert second is not None
    assert set(np.flatnonzero(np.unpackbits(first))) < set(np.flatnonzero(np.unpackbits(second)))

    (tmp_path / "first" / SEEN_TOKENS_NAME).unlink()
    write_manifest(tmp_path / "first", MODEL_KIND)
    train_on(pairs, tmp_path / "first", tmp_path / "third", max_steps=1)
    assert read_seen_tokens(tmp_path / "third") is None


@pytest.fixture
def mixed_packs(pairs: pd.DataFrame, base: BaseModel) -> list[TrainingPack]:
    """Seven packs of unequal lengths: five of judged pairs, two of translations."""
    tokenizer = PromptTokenizer.from_json(start_tokenizer_json(base), Budgets())
    judged = pairs.assign(group_number=pairs.groupby("query").ngroup(), query_id=pairs["query"], product_id="p")
    judged = judged.assign(target=list(one_hot_targets(judged["grade"], ESCI_LABELS, None)))
    texts = [Translation("ko", "en", "무선 마우스", "wireless mouse"), Translation("en", "ko", "towel", "수건")]
    translations = translation_packs([texts[:1], texts], tokenizer, 512, 16)
    packs = [*judged_packs([judged.sort_values("group_number", kind="stable")], tokenizer, 512)][:5]
    assert len({sum(group.num_tokens for group in pack.groups) for pack in packs}) >= 4
    return [*packs, *translations]


def train_mixed(packs: list[TrainingPack], base: BaseModel, model_dir: Path, **settings: object) -> PairScorer:
    return stage.train_stage(packs, base, Tuning(**settings), ESCI_LABELS, Budgets(), 512, model_dir)


def weights_of(model_dir: Path) -> dict[str, torch.Tensor]:
    (path,) = (model_dir / "weights").glob("*.safetensors")
    return load_file(path)


def history_of(model_dir: Path) -> pd.DataFrame:
    return pd.DataFrame(json.loads((model_dir / "history.json").read_text()))


def test_losses_by_task_are_kept_shown_and_written_for_tensorboard(
    mixed_packs: list[TrainingPack], base: BaseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    settings = {"max_steps": 4, "packs_per_step": 7, "learning_rate": 1e-4, "translation_weight": 0.25}
    train_mixed(mixed_packs, base, tmp_path / "model", **settings)
    history = history_of(tmp_path / "model")
    assert history.columns.to_list() == ["step", "loss", "relevance_loss", "translation_loss", "learning_rate"]
    assert history["step"].to_list() == [1, 2, 3, 4]
    np.testing.assert_allclose(history["loss"], history["relevance_loss"] + 0.25 * history["translation_loss"])
    assert load_trained(tmp_path / "model")[2].loss == pytest.approx(history["loss"].mean())
    assert "step 3 of 4: loss " in caplog.text
    assert ", translation " in caplog.text
    assert "left" in caplog.text
    events = EventAccumulator(str(tmp_path / "model.logs")).Reload()
    written = [event.value for event in events.Scalars("train/translation_loss")]
    np.testing.assert_allclose(written, history["translation_loss"], rtol=1e-6)


def test_only_what_was_learnt_has_a_loss(train_on: Train, pairs: pd.DataFrame, base: BaseModel, tmp_path: Path) -> None:
    train_on(pairs, base, tmp_path / "model", max_steps=1)
    assert "translation_loss" not in history_of(tmp_path / "model")


@pytest.mark.parametrize("change", [{"accumulation_steps": 3}, {"gradient_checkpointing": True}], ids=str)
def test_a_step_in_less_memory_is_the_same_step(
    change: dict[str, object], mixed_packs: list[TrainingPack], base: BaseModel, tmp_path: Path
) -> None:
    settings = {"method": "full", "max_steps": 3, "packs_per_step": 3, "learning_rate": 1e-4}
    train_mixed(mixed_packs, base, tmp_path / "whole", **settings)
    train_mixed(mixed_packs, base, tmp_path / "parts", **settings, **change)
    pd.testing.assert_frame_equal(history_of(tmp_path / "parts"), history_of(tmp_path / "whole"), rtol=1e-5)
    for name, tensor in weights_of(tmp_path / "whole").items():
        torch.testing.assert_close(weights_of(tmp_path / "parts")[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [{"method": "rslora"}, {"method": "dora"}, {"gradient_checkpointing": True}, {"accumulation_steps": 2}],
    ids=str,
)
def test_a_training_that_was_stopped_goes_on_to_the_same_weights_and_history(
    change: dict[str, object],
    mixed_packs: list[TrainingPack],
    base: BaseModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a step is run in parts, it goes on with whole steps: a checkpoint fits another number of parts."""
    settings = {"max_steps": 4, "packs_per_step": 2, "checkpoint_steps": 2, "learning_rate": 1e-4, **change}
    train_mixed(mixed_packs, base, tmp_path / "whole", **settings)

    class Stopped(Exception):
        pass

    save = trainer._StageTrainer._save_checkpoint

    def save_and_stop(*args: object) -> None:
        save(*args)
        raise Stopped

    monkeypatch.setattr(trainer._StageTrainer, "_save_checkpoint", save_and_stop)
    with pytest.raises(Stopped):
        train_mixed(mixed_packs, base, tmp_path / "stopped", **settings)
    monkeypatch.undo()
    (checkpoint,) = (tmp_path / "stopped.unfinished" / "checkpoints").glob("*/checkpoint-*")
    assert checkpoint.name == "checkpoint-2"
    checkpoint.with_name("checkpoint-3").mkdir()  # one that was not written to its end
    train_mixed(mixed_packs, base, tmp_path / "stopped", **{**settings, "accumulation_steps": 1})
    exact = change != {"accumulation_steps": 2}
    pd.testing.assert_frame_equal(
        history_of(tmp_path / "stopped"), history_of(tmp_path / "whole"), check_exact=exact, rtol=1e-5
    )
    for name, tensor in weights_of(tmp_path / "whole").items():
        atol = 0.0 if exact else 1e-5
        torch.testing.assert_close(weights_of(tmp_path / "stopped")[name], tensor, rtol=0, atol=atol)


@pytest.mark.parametrize("method", ["rslora", "dora"])
def test_every_kind_of_adapter_learns_and_reloads_the_same(
    method: str, train_on: Train, pairs: pd.DataFrame, base: BaseModel, tmp_path: Path
) -> None:
    trained = train_on(pairs, base, tmp_path / "model", method=method, max_steps=3, learning_rate=1e-3)
    plain = train_on(pairs, base, tmp_path / "plain", method="lora", max_steps=3, learning_rate=1e-3)
    logits = trained.logits(pairs)
    assert np.abs(logits - plain.logits(pairs)).max() > 1e-4
    np.testing.assert_allclose(load_trained(tmp_path / "model")[1].logits(pairs), logits, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("config_class", [Qwen2Config, LlamaConfig, Gemma3TextConfig])
def test_adapters_are_on_all_linear_layers_but_the_output_embeddings(
    config_class: type[PretrainedConfig], tied: bool
) -> None:
    config = config_class(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    model = with_adapters(AutoModelForCausalLM.from_config(config), Tuning())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-4] for name in trained} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert all("lora_" in name for name in trained)


def test_smoothed_labels_keep_their_order_and_sum() -> None:
    smoothed = smoothed_targets(np.eye(4, dtype=np.float32)[[0, 3]], 0.2)
    np.testing.assert_allclose(smoothed, [[0.85, 0.05, 0.05, 0.05], [0.05, 0.05, 0.05, 0.85]], rtol=1e-6)
    assert smoothed.dtype == np.float32


def test_a_step_that_cannot_be_shared_is_refused(
    train_on: Train, pairs: pd.DataFrame, base: BaseModel, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"expected a multiple of 3, that is 1 processes times 3 .*, got 4"):
        train_on(pairs, base, tmp_path / "model", packs_per_step=4, accumulation_steps=3)


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
    write_manifest(model, MODEL_KIND)
    with pytest.raises(BundleError, match=r"other fields than this version reads .*num_pairs.* Train it again"):
        load_trained(model)
    train_on(pairs, base, model, max_steps=1)
    assert load_trained(model)[2].num_packs > 0


def test_adapters_are_not_merged_into_another_base_model_than_they_were_made_for(
    train_on: Train, pairs: pd.DataFrame, base: BaseModel, tmp_path: Path
) -> None:
    original = Path(str(base.folder))
    here = BaseModel(folder=str(shutil.copytree(original, tmp_path / "base")))
    train_on(pairs, here, tmp_path / "first", max_steps=1)
    second = train_on(pairs, tmp_path / "first", tmp_path / "second", max_steps=1).logits(pairs)
    weights = tmp_path / "base" / "model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    before, after = (file_digest(folder / "model.safetensors") for folder in (original, tmp_path / "base"))
    message = rf"base' is not as it was then .*: model\.safetensors: expected {before}, got {after}\. Bring"
    for name in ("first", "second"):
        with pytest.raises(BundleError, match=message):
            load_trained(tmp_path / name)
    with pytest.raises(BundleError, match=message):
        train_on(pairs, tmp_path / "first", tmp_path / "second", max_steps=1)  # which has ended before

    again = train_on(pairs, base, tmp_path / "first", max_steps=1)  # the same weights elsewhere
    assert load_trained(tmp_path / "first")[2].base_model["folder"] == base.folder
    np.testing.assert_allclose(load_trained(tmp_path / "first")[1].logits(pairs), again.logits(pairs), atol=1e-4)
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"model\.safetensors: expected \w{64}, got no such file"):
        load_trained(tmp_path / "second")
    shutil.rmtree(tmp_path / "base")
    shutil.copytree(original, tmp_path / "base")
    np.testing.assert_allclose(load_trained(tmp_path / "second")[1].logits(pairs), second, atol=1e-4)


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
    with pytest.raises(ConfigError, match=r"the loss is nan at step \d+, over \w\w .* more\. .* Lower tuning\.l"):
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
