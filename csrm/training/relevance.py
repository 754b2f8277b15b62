"""One round of training on judged pairs, and the folder that it leaves."""

import dataclasses
import json
import logging
import math
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from csrm.config import Settings
from csrm.errors import ConfigError, InputError
from csrm.labels import Label
from csrm.manifest import check_replaceable, replace_folder, verify_manifest, write_manifest
from csrm.packing import Group, PackBatch, build_packs, merge_packs
from csrm.scoring import PairScorer, pair_groups
from csrm.tokenization import Budgets, PromptTokenizer
from csrm.training.base_model import BaseModel, load_language_model, load_tokenizer
from csrm.training.model import IGNORED_TARGET, PackedRelevanceModel, check_window, torch_pack_scorer

KIND = "model"
logger = logging.getLogger(__name__)


class Tuning(Settings):
    """How the weights are changed."""

    method: Literal["lora", "full"] = "lora"
    """lora: low-rank adapters on every linear layer (Hu et al. 2021); full: all weights, for tiny models."""
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=2.0e-4, gt=0)
    """Peak, after a linear warm-up over the first tenth of the steps; then linear decay to 0."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the pairs."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; replaces epochs where given."""
    packs_per_step: int = Field(default=4, ge=1)
    """Packs whose gradients are averaged for one optimiser step."""
    pairs_per_prefix: int = Field(default=8, ge=1)
    """Pairs of one query that share a prefix; more go elsewhere behind the same prefix. Many cost less, but a step then
    sees few queries and learns how often each has relevant products instead of which products are relevant."""
    seed: int = 0


@dataclass(frozen=True)
class ModelCard:
    """What `model.json` in a trained folder holds."""

    base_model: dict[str, str | None]
    tuning: dict[str, Any]
    labels: tuple[Label, ...]
    budgets: Budgets
    pack_tokens: int
    num_pairs: int
    """Pairs that were trained on."""
    loss: float
    """Mean training loss of the round, nats per pair."""
    versions: dict[str, str]


class _Packs(torch.utils.data.Dataset[tuple[PackBatch, np.ndarray]]):
    """Packs of judged pairs with targets, shuffled in small groups; Trainer shuffles the packs each epoch."""

    def __init__(
        self, pairs: pd.DataFrame, targets: np.ndarray, tokenizer: PromptTokenizer, pack_tokens: int, tuning: Tuning
    ) -> None:
        groups, rows = pair_groups(pairs, tokenizer)
        targets_left = iter(targets[rows])
        parts = []
        for group in groups:
            for start in range(0, len(group.suffixes), tuning.pairs_per_prefix):
                suffixes = group.suffixes[start : start + tuning.pairs_per_prefix]
                parts.append((Group(group.prefix_ids, suffixes), [next(targets_left) for _ in suffixes]))
        random.Random(tuning.seed).shuffle(parts)
        self._packs = list(build_packs([group for group, _ in parts], pack_tokens))
        self._targets = np.array([target for _, part in parts for target in part], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> tuple[PackBatch, np.ndarray]:
        pack = self._packs[index]
        return pack, self._targets[pack.pair_index]


def _collate(examples: Sequence[tuple[PackBatch, np.ndarray]]) -> dict[str, torch.Tensor]:
    batch = merge_packs([pack for pack, _ in examples])
    targets = np.full(batch.pair_index.shape, IGNORED_TARGET, dtype=np.int64)
    for row, (_, pack_targets) in enumerate(examples):
        targets[row, : pack_targets.shape[1]] = pack_targets
    arrays = {**batch.model_inputs(), "targets": targets}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def targets_of(grades: pd.Series, labels: Sequence[Label], grade_labels: Mapping[str, str] | None) -> np.ndarray:
    """Number of each grade's label, shape (num_pairs,), int64.

    Args:
        grade_labels: grade to label name; None where the labels are named as the grades.

    Raises:
        InputError: a grade has no label.
    """
    number = {label.name: index for index, label in enumerate(labels)}
    names = grades.map(grade_labels) if grade_labels is not None else grades
    targets = names.map(number)
    unknown = sorted(set(grades[targets.isna()].astype(str)))
    if unknown:
        raise InputError(
            f"judgments: grades {unknown} have no label; labels are {sorted(number)}, grade_labels {grade_labels}. "
            "Name them in the config under grade_labels."
        )
    return targets.to_numpy(dtype=np.int64)


def train_relevance(
    pairs: pd.DataFrame,
    base_model: BaseModel,
    tuning: Tuning,
    labels: Sequence[Label],
    grade_labels: Mapping[str, str] | None,
    budgets: Budgets,
    pack_tokens: int,
    output_dir: Path,
) -> PairScorer:
    """Train on judged pairs and write the trained folder, in one piece, when all is done.

    Args:
        pairs: see csrm.training.data.judged_pairs.
        output_dir: an earlier trained folder there is replaced.

    Returns:
        Scorer of the trained model, in torch.
    """
    check_replaceable(output_dir, KIND)
    set_seed(tuning.seed)
    tokenizer = load_tokenizer(base_model)
    tokenizer_json = tokenizer.to_str(pretty=True)
    prompt_tokenizer = PromptTokenizer(tokenizer, budgets)
    label_ids = prompt_tokenizer.label_ids(labels)
    shuffled = pairs.sample(frac=1.0, random_state=tuning.seed)
    packs = _Packs(shuffled, targets_of(shuffled["grade"], labels, grade_labels), prompt_tokenizer, pack_tokens, tuning)
    language_model = load_language_model(base_model)
    check_window(language_model.config, budgets)
    model = PackedRelevanceModel(_tuned(language_model, tuning), label_ids)
    steps = tuning.max_steps or math.ceil(tuning.epochs * len(packs) / tuning.packs_per_step)
    logger.info("training on %d pairs in %d packs, %d steps", len(pairs), len(packs), steps)
    unfinished = output_dir.with_name(output_dir.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(unfinished / "checkpoints"),
            max_steps=steps,
            per_device_train_batch_size=tuning.packs_per_step,
            learning_rate=tuning.learning_rate,
            warmup_steps=steps // 10,
            logging_steps=max(1, steps // 20),
            logging_nan_inf_filter=False,  # it would report a loss that is not a number as 0
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            label_names=["targets"],
            seed=tuning.seed,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
        ),
        train_dataset=packs,
        data_collator=_collate,
    )
    loss = trainer.train().training_loss
    if not math.isfinite(loss):
        raise ConfigError(f"training: the loss is {loss}. Lower tuning.learning_rate ({tuning.learning_rate}).")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    model.language_model.save_pretrained(unfinished / "weights")  # of an adapted model: the adapter alone
    (unfinished / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    card = ModelCard(
        base_model=base_model.model_dump(),
        tuning=tuning.model_dump(),
        labels=tuple(labels),
        budgets=budgets,
        pack_tokens=pack_tokens,
        num_pairs=len(pairs),
        loss=loss,
        versions={package: version(package) for package in ("csrm", "torch", "transformers", "peft")},
    )
    (unfinished / "model.json").write_text(json.dumps(dataclasses.asdict(card), indent=2) + "\n", encoding="utf-8")
    write_manifest(unfinished, KIND)
    replace_folder(unfinished, output_dir, KIND)
    return _scorer(model, prompt_tokenizer, card)


def load_trained(model_dir: str | Path) -> tuple[PackedRelevanceModel, PairScorer, ModelCard]:
    """A trained folder as a torch model with its adapters merged in float32, and its scorer.

    Raises:
        BundleError: a file of the folder is missing or changed.
        ConfigError: the base model is not where it was.
    """
    folder = Path(model_dir)
    verify_manifest(folder, KIND)
    values = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    labels = tuple(Label(**label) for label in values.pop("labels"))
    card = ModelCard(labels=labels, budgets=Budgets(**values.pop("budgets")), **values)
    if card.tuning["method"] == "full":
        language_model = load_language_model(BaseModel(folder=str(folder / "weights")))
    else:
        base = load_language_model(BaseModel(**card.base_model))
        language_model = PeftModel.from_pretrained(base, str(folder / "weights")).merge_and_unload()
    prompt_tokenizer = PromptTokenizer.from_file(folder / "tokenizer.json", card.budgets)
    model = PackedRelevanceModel(language_model, prompt_tokenizer.label_ids(labels)).eval()
    return model, _scorer(model, prompt_tokenizer, card), card


def _tuned(language_model: PreTrainedModel, tuning: Tuning) -> PreTrainedModel:
    if tuning.method == "full":
        return language_model
    config = LoraConfig(
        r=tuning.lora_rank, lora_alpha=tuning.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted: Any = get_peft_model(language_model, config)
    return adapted


def _scorer(model: PackedRelevanceModel, tokenizer: PromptTokenizer, card: ModelCard) -> PairScorer:
    return PairScorer(tokenizer, card.labels, torch_pack_scorer(model), card.pack_tokens, provider="torch")
