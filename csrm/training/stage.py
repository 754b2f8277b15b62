"""One stage of training: packs, a model to start from, and the folder that the stage leaves."""

import dataclasses
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from csrm.config import Settings
from csrm.errors import BundleError, ConfigError, InputError
from csrm.labels import Label
from csrm.manifest import check_replaceable, file_digest, replace_folder, verify_manifest, write_manifest
from csrm.scoring import PairScorer
from csrm.tokenization import Budgets, PromptTokenizer
from csrm.training.base_model import BaseModel, load_language_model, load_tokenizer
from csrm.training.model import PackedRelevanceModel, torch_pack_scorer
from csrm.training.packs import PackFile, TrainingPack, collate, write_packs

KIND = "model"
_WEIGHTS = "changed.safetensors"
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
    """Passes over the packs."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; replaces epochs where given."""
    packs_per_step: int = Field(default=4, ge=1)
    """Packs whose gradients are averaged for one optimiser step."""
    pairs_per_prefix: int = Field(default=8, ge=1)
    """Pairs of one query that share a prefix; more go elsewhere behind the same prefix. Many cost less, but a step then
    sees few queries and learns how often each has relevant products instead of which products are relevant."""
    random_negatives: float = Field(default=0.0, ge=0, le=1)
    """Random products that are learnt as irrelevant, for each judged pair. Judged products were all found by a search
    for their query, so few labels teach little about what a match is; a random product differs from one plainly."""
    drop_all_titles: float = Field(default=0.1, ge=0, le=1)
    """Share of queries that are learnt without their retrieved titles, so that a query that has none still works."""
    drop_title: float = Field(default=0.1, ge=0, le=1)
    """Probability that one retrieved title of another query is left out."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrices are multiplied in bfloat16 where the device can; weights and their updates stay float32."""
    translation_weight: float = Field(default=0.25, gt=0)
    """Factor of the translation loss in steps that also judge relevance: a token of text has a larger loss."""
    checkpoint_steps: int = Field(default=200, ge=1)
    """Steps between checkpoints, from which a training that was stopped goes on."""
    seed: int = 0


@dataclass(frozen=True)
class ModelCard:
    """What `model.json` in a trained folder holds."""

    base_model: dict[str, str | None]
    """What the first stage started from."""
    tuning: dict[str, Any]
    labels: tuple[Label, ...]
    budgets: Budgets
    pack_tokens: int
    num_packs: int
    """Packs that were trained on."""
    loss: float
    """Mean training loss of the stage, nats."""
    fingerprint: str
    """Digest of all that the weights follow from: packs, start and tuning."""
    versions: dict[str, str]


def one_hot_targets(grades: pd.Series, labels: Sequence[Label], grade_labels: Mapping[str, str] | None) -> np.ndarray:
    """A distribution over the labels for each grade, all on its own label: shape (num_pairs, num_labels), float32.

    Args:
        grades: null for a random negative, whose label is the one of least gain.
        grade_labels: grade to label name; None where the labels are named as the grades.

    Raises:
        InputError: a grade has no label.
    """
    number = {label.name: index for index, label in enumerate(labels)}
    names = grades.map(grade_labels) if grade_labels is not None else grades
    least = min(range(len(labels)), key=lambda index: labels[index].gain)
    targets = names.map(number).where(grades.notna(), least)
    unknown = sorted(set(grades[targets.isna()].astype(str)))
    if unknown:
        raise InputError(
            f"judgments: grades {unknown} have no label; labels are {sorted(number)}, grade_labels {grade_labels}. "
            "Name them in the config under grade_labels."
        )
    one_hot: np.ndarray = np.eye(len(labels), dtype=np.float32)[targets.to_numpy(dtype=np.int64)]
    return one_hot


def train_stage(
    packs: Iterable[TrainingPack],
    start: BaseModel | Path,
    tuning: Tuning,
    labels: Sequence[Label],
    budgets: Budgets,
    pack_tokens: int,
    output_dir: Path,
) -> PairScorer:
    """Train on packs and write the trained folder, in one piece, when all is done.

    A training that was stopped goes on from its last checkpoint, to the weights that it would have had. One that has
    ended is not run again while its packs, start and tuning stay the same.

    Args:
        packs: see csrm.training.packs; made with the tokenizer that `start` has.
        start: a base model, or the folder of an earlier stage, whose weights or adapters are trained on.
        output_dir: an earlier trained folder there is replaced.

    Returns:
        Scorer of the trained model, in torch.

    Raises:
        ConfigError: the loss is not a number, output_dir holds something else, or the start is not where it should be.
    """
    check_replaceable(output_dir, KIND)
    unfinished = output_dir.with_name(output_dir.name + ".unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    pack_file = unfinished / "packs.arrow"
    num_packs = write_packs(packs, pack_file)
    if not num_packs:
        raise InputError("training: there is nothing to train on.")
    fingerprint = _fingerprint(pack_file, start, tuning, labels)
    if _has_ended(output_dir, fingerprint):
        shutil.rmtree(unfinished)
        logger.info("%s: has ended before with the same inputs and settings, not trained again", output_dir)
        return load_trained(output_dir)[1]
    checkpoints = unfinished / "checkpoints" / fingerprint
    for other in (unfinished / "checkpoints").glob("*"):
        if other != checkpoints:
            shutil.rmtree(other)

    set_seed(tuning.seed)
    tokenizer_json = start_tokenizer_json(start)
    prompt_tokenizer = PromptTokenizer.from_json(tokenizer_json, budgets)
    language_model, base_model = _load_start(start, tuning)
    model = PackedRelevanceModel(language_model, prompt_tokenizer.label_ids(labels), tuning.translation_weight)
    steps = tuning.max_steps or math.ceil(tuning.epochs * num_packs / tuning.packs_per_step)
    last_checkpoint = get_last_checkpoint(str(checkpoints)) if checkpoints.exists() else None
    logger.info(
        "training on %d packs, %d steps%s", num_packs, steps, f", from {last_checkpoint}" if last_checkpoint else ""
    )
    trainer = _StageTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=steps,
            per_device_train_batch_size=tuning.packs_per_step,
            learning_rate=tuning.learning_rate,
            warmup_steps=steps // 10,
            logging_steps=max(1, steps // 20),
            logging_nan_inf_filter=False,  # it would report a loss that is not a number as 0
            save_strategy="steps",
            save_steps=tuning.checkpoint_steps,
            save_total_limit=1,
            report_to=[],
            remove_unused_columns=False,
            label_names=["targets"],
            seed=tuning.seed,
            use_cpu=not torch.cuda.is_available(),
            bf16=tuning.precision == "bf16",
            dataloader_pin_memory=False,
        ),
        train_dataset=PackFile(pack_file),
        data_collator=partial(collate, num_labels=len(labels)),
    )
    loss = trainer.train(resume_from_checkpoint=last_checkpoint).training_loss

    finished = unfinished / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    finished.mkdir()
    model.language_model.save_pretrained(finished / "weights")  # of an adapted model: the adapter alone
    (finished / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    card = ModelCard(
        base_model=base_model.model_dump(),
        tuning=tuning.model_dump(),
        labels=tuple(labels),
        budgets=budgets,
        pack_tokens=pack_tokens,
        num_packs=num_packs,
        loss=loss,
        fingerprint=fingerprint,
        versions={package: version(package) for package in ("csrm", "torch", "transformers", "peft")},
    )
    (finished / "model.json").write_text(json.dumps(dataclasses.asdict(card), indent=2) + "\n", encoding="utf-8")
    write_manifest(finished, KIND)
    replace_folder(finished, output_dir, KIND)
    shutil.rmtree(unfinished)
    return _scorer(model, prompt_tokenizer, card)


def load_trained(model_dir: str | Path) -> tuple[PackedRelevanceModel, PairScorer, ModelCard]:
    """A trained folder as a torch model with its adapters merged in float32, and its scorer.

    Raises:
        BundleError: a file of the folder is missing or changed.
        ConfigError: the base model is not where it was.
    """
    folder = Path(model_dir)
    card = _read_card(folder)
    labels = card.labels
    if card.tuning["method"] == "full":
        language_model = load_language_model(BaseModel(folder=str(folder / "weights")))
    else:
        base = load_language_model(BaseModel(**card.base_model))
        language_model = PeftModel.from_pretrained(base, str(folder / "weights")).merge_and_unload()
    prompt_tokenizer = PromptTokenizer.from_file(folder / "tokenizer.json", card.budgets)
    model = PackedRelevanceModel(language_model, prompt_tokenizer.label_ids(labels)).eval()
    return model, _scorer(model, prompt_tokenizer, card), card


def start_tokenizer_json(start: BaseModel | Path) -> str:
    """The tokenizer of a model to start from, as tokenizer.json."""
    if isinstance(start, Path):
        return (start / "tokenizer.json").read_text(encoding="utf-8")
    text: str = load_tokenizer(start).to_str(pretty=True)
    return text


class _StageTrainer(Trainer):
    """Checkpoints hold the weights that are trained; a loss that is not a number ends the training."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        keys = inputs.pop("keys")
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if not torch.isfinite(loss):
            shown = "; ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise ConfigError(
                f"training: the loss is {loss.item()} at step {self.state.global_step}, over {shown}. Checkpoints are "
                f"kept in {self.args.output_dir}. Lower tuning.learning_rate ({self.args.learning_rate})."
            )
        return result

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_trained_parameters(self.model), folder / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / _WEIGHTS)
        parameters = _trained_parameters(model or self.model)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])


def _trained_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _fingerprint(pack_file: Path, start: BaseModel | Path, tuning: Tuning, labels: Sequence[Label]) -> str:
    """Digest of all that trained weights follow from."""
    if isinstance(start, Path):
        origin: dict[str, Any] = {"stage": verify_manifest(start, KIND)}
    else:
        origin = start.model_dump()
        if start.folder is not None:
            files = [Path(start.folder) / start.gguf_file] if start.gguf_file else Path(start.folder).glob("*")
            origin |= {path.name: file_digest(path) for path in sorted(files) if path.is_file()}
            del origin["folder"]  # the same model elsewhere is the same model
    parts = {
        "packs": file_digest(pack_file),
        "start": origin,
        "tuning": tuning.model_dump(exclude={"checkpoint_steps"}),
        "labels": [dataclasses.asdict(label) for label in labels],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _has_ended(folder: Path, fingerprint: str) -> bool:
    if not (folder / "model.json").exists():
        return False
    try:
        return _read_card(folder).fingerprint == fingerprint
    except BundleError:
        return False


def _read_card(folder: Path) -> ModelCard:
    verify_manifest(folder, KIND)
    values = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    try:
        labels = tuple(Label(**label) for label in values.pop("labels"))
        return ModelCard(labels=labels, budgets=Budgets(**values.pop("budgets")), **values)
    except (KeyError, TypeError) as error:
        raise BundleError(
            f"model {str(folder)!r}: model.json has other fields than this version reads ({error}). Train it again."
        ) from error


def _load_start(start: BaseModel | Path, tuning: Tuning) -> tuple[PreTrainedModel, BaseModel]:
    """The model to train, ready for it, and the base model that it goes back to."""
    if isinstance(start, BaseModel):
        language_model = load_language_model(start)
        if tuning.method == "full":
            return language_model, start
        config = LoraConfig(
            r=tuning.lora_rank, lora_alpha=tuning.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        adapted: Any = get_peft_model(language_model, config)
        return adapted, start
    card = _read_card(start)
    base_model = BaseModel(**card.base_model)
    shape = ("method", "lora_rank", "lora_alpha") if tuning.method == "lora" else ("method",)
    if different := [name for name in shape if card.tuning[name] != getattr(tuning, name)]:
        raise ConfigError(
            f"tuning: expected {different} as in the stage before, {str(start)!r}: "
            f"{[card.tuning[name] for name in different]}, got {[getattr(tuning, name) for name in different]}."
        )
    if tuning.method == "full":
        return load_language_model(BaseModel(folder=str(start / "weights"))), base_model
    trainable: Any = PeftModel.from_pretrained(
        load_language_model(base_model), str(start / "weights"), is_trainable=True
    )
    return trainable, base_model


def _scorer(model: PackedRelevanceModel, tokenizer: PromptTokenizer, card: ModelCard) -> PairScorer:
    return PairScorer(tokenizer, card.labels, torch_pack_scorer(model), card.pack_tokens, provider="torch")
