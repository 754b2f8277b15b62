"""One stage of training: packs, a model to start from, and the folder that the stage leaves."""

import dataclasses
import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate.utils import gather_object
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch.utils.data import SequentialSampler, Subset
from tqdm import tqdm
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from csrm import __version__
from csrm.config import Settings
from csrm.errors import BundleError, ConfigError, InputError
from csrm.labels import Label
from csrm.manifest import check_replaceable, file_digest, replace_folder, verify_manifest, write_manifest
from csrm.scoring import PairScorer
from csrm.tokenization import Budgets, PromptTokenizer
from csrm.training.attention import use_block_attention
from csrm.training.base_model import BaseModel, load_language_model, load_tokenizer
from csrm.training.model import TASKS, PackedRelevanceModel, Precision, task_totals, torch_pack_scorer
from csrm.training.packs import PackFile, TrainingPack, collate, write_packs
from csrm.training.processes import num_processes, run_everywhere

KIND = "model"
_IN_PACKS = ("pairs_per_prefix", "random_negatives", "drop_all_titles", "drop_title", "label_smoothing")
"""Settings of tuning that change weights through the packs alone."""
_NOT_IN_WEIGHTS = ("checkpoint_steps", "accumulation_steps", "gradient_checkpointing")
_WEIGHTS = "changed.safetensors"
logger = logging.getLogger(__name__)


class Tuning(Settings):
    """How the weights are changed."""

    method: Literal["lora", "rslora", "dora", "full"] = "lora"
    """lora: low-rank adapters on every linear layer of the decoder (Hu et al. 2021). rslora: scaled by
    lora_alpha / sqrt(lora_rank) instead of lora_alpha / lora_rank, so that a high rank still learns (Kalajdzievski
    2023). dora: learns each column's length apart from its direction (Liu et al. 2024); slower, sometimes better at a
    low rank. full: all weights, for tiny models."""
    lora_rank: int = Field(default=16, ge=1)
    """Rank of the adapters' matrices; more learns more, and takes more memory."""
    lora_alpha: int = Field(default=32, ge=1)
    """Scale of the adapters' output; see method."""
    learning_rate: float = Field(default=2.0e-4, gt=0)
    """Peak, after a linear warm-up over the first tenth of the steps; then linear decay to 0."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the packs."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; replaces epochs where given."""
    packs_per_step: int = Field(default=4, ge=1)
    """Packs of one optimiser step, over all processes. A multiple of their number times accumulation_steps."""
    accumulation_steps: int = Field(default=1, ge=1)
    """Parts of a step that a process runs one after the other: the same gradients in less memory."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: the same gradients in much less memory,
    about a third slower."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each given label that is spread evenly over all labels (Szegedy et al. 2016), which makes wrong labels
    count less. Soft labels stay as they are."""
    pairs_per_prefix: int = Field(default=8, ge=1)
    """Pairs of one query that share a prefix; more go elsewhere behind the same prefix. Many cost less, but a step then
    sees few queries and learns how often each has relevant products instead of which products are relevant."""
    random_negatives: float = Field(default=0.0, ge=0, le=1)
    """Random products that are learnt as irrelevant, for each judged pair; pairs without a label get none. Judged
    products were all found by a search for their query, so few labels teach little about what a match is; a random
    product differs from one plainly."""
    drop_all_titles: float = Field(default=0.1, ge=0, le=1)
    """Share of prefixes that are learnt without their retrieved titles, so that a query that has none still works."""
    drop_title: float = Field(default=0.1, ge=0, le=1)
    """Probability of each retrieved title of the other prefixes to be left out."""
    precision: Precision = "fp32"
    """bf16: matrices are multiplied in bfloat16 where the device can; weights and their updates stay float32."""
    translation_weight: float = Field(default=0.25, gt=0)
    """Factor of the translation loss in steps that also judge relevance: a token of text has a larger loss."""
    checkpoint_steps: int = Field(default=200, ge=1)
    """Steps between checkpoints, from which a training that was stopped goes on."""
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True)
class ModelCard:
    """What `model.json` in a trained folder holds."""

    base_model: dict[str, str | None]
    """What the first stage started from."""
    base_model_files: dict[str, str]
    """File of its folder to sha256; empty for a hub model."""
    tuning: dict[str, Any]
    labels: tuple[Label, ...]
    budgets: Budgets
    pack_tokens: int
    num_packs: int
    """Packs that were trained on."""
    loss: float
    """Mean training loss of the stage's steps, nats."""
    fingerprint: str
    """Digest of all that the folder follows from: packs, start, tuning, labels and budgets."""
    versions: dict[str, str]


class StagePaths(NamedTuple):
    """Files of a stage while it is trained."""

    packs: Path
    checkpoints: Path
    logs: Path
    """Folder of the TensorBoard files."""
    last_checkpoint: Path | None


def one_hot_targets(
    grades: pd.Series, labels: Sequence[Label], grade_labels: Mapping[str, str] | None, column: str = "grade"
) -> np.ndarray:
    """A distribution over the labels for each grade, all on its own label: shape (num_pairs, num_labels), float32.

    Args:
        grades: null for a random negative, whose label is the one of least gain.
        grade_labels: grade to label name; None where the labels are named as the grades.
        column: of the judgments, where the grades come from; for messages.

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
            f"judgments: {column}s {unknown} have no label; labels are {sorted(number)}, grade_labels {grade_labels}. "
            "Name them in the config under grade_labels."
        )
    one_hot: np.ndarray = np.eye(len(labels), dtype=np.float32)[targets.to_numpy(dtype=np.int64)]
    return one_hot


def smoothed_targets(targets: np.ndarray, label_smoothing: float) -> np.ndarray:
    """Distributions with a share of each spread evenly over the labels; shape (num_pairs, num_labels), as given."""
    smoothed: np.ndarray = (1 - label_smoothing) * targets + label_smoothing / targets.shape[1]
    return smoothed.astype(targets.dtype)


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
    ended is not run again while its packs, start, tuning, labels and budgets stay the same. Under
    csrm.training.processes all processes train, and this one alone writes files.

    The folder has history.json, a list in the order of steps: step, loss, learning_rate, and relevance_loss and
    translation_loss where these were learnt, each the mean over the steps since the entry before.
    `<output_dir>.logs` beside it has the same as TensorBoard files.

    Args:
        packs: see csrm.training.packs; made with the tokenizer that `start` has.
        start: a base model, or the folder of an earlier stage, whose weights or adapters are trained on.
        output_dir: an earlier trained folder there is replaced.

    Returns:
        Scorer of the trained model, in torch.

    Raises:
        ConfigError: the loss is not a number, output_dir holds something else, the start is not where it should be, or
            the packs of a step cannot be shared evenly among the processes.
    """
    check_replaceable(output_dir, KIND)
    num_parts = num_processes() * tuning.accumulation_steps
    if tuning.packs_per_step % num_parts:
        raise ConfigError(
            f"tuning.packs_per_step: expected a multiple of {num_parts}, that is {num_processes()} processes times "
            f"{tuning.accumulation_steps} accumulation_steps, got {tuning.packs_per_step}."
        )
    unfinished = output_dir.with_name(output_dir.name + ".unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    pack_file = unfinished / "packs.arrow"
    num_packs = write_packs(packs, pack_file)
    if not num_packs:
        raise InputError("training: there is nothing to train on.")
    base_model, base_model_files = _origin(start)
    fingerprint = _fingerprint(pack_file, start, base_model_files, tuning, [labels, budgets, pack_tokens])
    if _has_ended(output_dir, fingerprint):
        shutil.rmtree(unfinished)
        logger.info("%s: has ended before with the same inputs and settings, not trained again", output_dir)
        return trained_scorer(output_dir, tuning.precision)
    checkpoints = unfinished / "checkpoints" / fingerprint
    for other in (unfinished / "checkpoints").glob("*"):
        if other != checkpoints:
            shutil.rmtree(other)
    paths = StagePaths(
        packs=pack_file,
        checkpoints=checkpoints,
        logs=output_dir.with_name(output_dir.name + ".logs"),
        last_checkpoint=_last_checkpoint(checkpoints),
    )
    if paths.last_checkpoint is None:
        shutil.rmtree(paths.logs, ignore_errors=True)

    tokenizer_json = start_tokenizer_json(start)
    prompt_tokenizer = PromptTokenizer.from_json(tokenizer_json, budgets)
    label_ids = tuple(prompt_tokenizer.label_ids(labels))
    model, history = run_everywhere(partial(_trained_model, paths, start, tuning, label_ids))

    finished = unfinished / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    finished.mkdir()
    model.language_model.save_pretrained(finished / "weights")  # of an adapted model: the adapter alone
    (finished / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    card = ModelCard(
        base_model=base_model.model_dump(),
        base_model_files=base_model_files,
        tuning=tuning.model_dump(),
        labels=tuple(labels),
        budgets=budgets,
        pack_tokens=pack_tokens,
        num_packs=num_packs,
        loss=_mean_loss(history),
        fingerprint=fingerprint,
        versions={"csrm": __version__, **{name: version(name) for name in ("torch", "transformers", "peft")}},
    )
    (finished / "model.json").write_text(json.dumps(dataclasses.asdict(card), indent=2) + "\n", encoding="utf-8")
    (finished / "history.json").write_text(json.dumps(history, indent=2) + "\n", encoding="utf-8")
    write_manifest(finished, KIND)
    replace_folder(finished, output_dir, KIND)
    shutil.rmtree(unfinished)
    return _scorer(model, prompt_tokenizer, card, tuning.precision)


def load_trained(model_dir: str | Path) -> tuple[PackedRelevanceModel, PairScorer, ModelCard]:
    """A trained folder as a torch model with its adapters merged in float32, and its scorer.

    Raises:
        BundleError: a file of the folder, or of the base model of its adapters, is missing or changed.
        ConfigError: the base model is not where it was.
    """
    model, tokenizer, card = _load(Path(model_dir))
    return model, _scorer(model, tokenizer, card, "fp32"), card


def trained_scorer(model_dir: str | Path, precision: Precision) -> PairScorer:
    """The scorer of a trained folder, in a precision, with attention and on a device as in training.

    Raises:
        BundleError, ConfigError: see load_trained.
    """
    model, tokenizer, card = _load(Path(model_dir))
    if torch.cuda.is_available():
        model.to("cuda")
    else:
        use_block_attention(model.language_model)
    return _scorer(model, tokenizer, card, precision)


def start_tokenizer_json(start: BaseModel | Path) -> str:
    """The tokenizer of a model to start from, as tokenizer.json."""
    if isinstance(start, Path):
        return (start / "tokenizer.json").read_text(encoding="utf-8")
    text: str = load_tokenizer(start).to_str(pretty=True)
    return text


def _trained_model(
    paths: StagePaths, start: BaseModel | Path, tuning: Tuning, label_ids: Sequence[int]
) -> tuple[PackedRelevanceModel, list[dict[str, float]]]:
    """Train, in this process or in all at once; returns the model and its history (see train_stage)."""
    from torch.utils.tensorboard import SummaryWriter

    set_seed(tuning.seed)
    on_cpu = not torch.cuda.is_available()
    if on_cpu and tuning.precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        logger.warning(
            "tuning.precision bf16: this processor has no instructions for it, which can make a step a hundred times "
            "slower than in fp32. Set tuning.precision=fp32, or train on another machine."
        )
    language_model = _load_start(start, tuning)
    if tuning.gradient_checkpointing:
        language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if on_cpu:
        use_block_attention(language_model)
    model = PackedRelevanceModel(language_model, label_ids, tuning.translation_weight)
    packs = PackFile(paths.packs)
    steps = tuning.max_steps or math.ceil(tuning.epochs * len(packs) / tuning.packs_per_step)
    args = TrainingArguments(
        output_dir=str(paths.checkpoints),
        max_steps=steps,
        per_device_train_batch_size=tuning.packs_per_step // (num_processes() * tuning.accumulation_steps),
        gradient_accumulation_steps=tuning.accumulation_steps,
        learning_rate=tuning.learning_rate,
        warmup_steps=steps // 10,
        logging_steps=max(1, steps // 20),
        logging_nan_inf_filter=False,  # it would report a loss that is not a number as 0
        save_strategy="steps",
        save_steps=tuning.checkpoint_steps,
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["targets"],
        seed=tuning.seed,
        use_cpu=on_cpu,
        bf16=tuning.precision == "bf16",
        dataloader_pin_memory=False,
    )
    args._n_gpu = 1  # else a single process would train on all devices, with packs_per_step on each
    order: Any = _pack_order(len(packs), steps * tuning.packs_per_step, tuning.seed)
    trainer = _StageTrainer(
        model=model,
        args=args,
        train_dataset=Subset(packs, order),
        data_collator=partial(collate, num_labels=len(label_ids)),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Progress())
    first_step = int(paths.last_checkpoint.name.partition("-")[2]) if paths.last_checkpoint else 0
    if not trainer.is_world_process_zero():
        trainer.train(resume_from_checkpoint=_text(paths.last_checkpoint))
    else:
        resumed = f", from {paths.last_checkpoint}" if paths.last_checkpoint else ""
        logger.info("training on %d packs, %d steps%s", len(packs), steps, resumed)
        with SummaryWriter(str(paths.logs), purge_step=first_step + 1) as writer:
            trainer.add_callback(TensorBoardCallback(writer))
            trainer.train(resume_from_checkpoint=_text(paths.last_checkpoint))
    names = ("step", "loss", *(f"{task}_loss" for task in TASKS), "learning_rate")
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return model, [{name: entry[name] for name in names if name in entry} for entry in entries]


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _pack_order(num_packs: int, num_drawn: int, seed: int) -> np.ndarray:
    """Numbers of the packs in the order of training, shape (num_drawn,): permutations, one after the other.

    Every step so has the same number of packs, and a step's packs are the same for any number of processes.
    """
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(num_packs) for _ in range(math.ceil(num_drawn / num_packs))])[:num_drawn]


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: trainer_state.json is its last file."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.partition("-")[2]), default=None)


def _mean_loss(history: Sequence[Mapping[str, float]]) -> float:
    """Mean over the steps, of entries that are means over the steps since the one before."""
    steps = [entry["step"] for entry in history]
    return float(np.average([entry["loss"] for entry in history], weights=np.diff(steps, prepend=0)))


class _Progress(TrainerCallback):
    """A line on the console for each log entry; an entry before each checkpoint, so that nothing is lost between."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first_step, self._first_time = state.global_step, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= control.should_save

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        pace = (time.monotonic() - self._first_time) / max(1, state.global_step - self._first_step)
        tasks = "".join(f", {task} {logs[f'{task}_loss']:.4f}" for task in TASKS if f"{task}_loss" in logs)
        logger.info(
            "step %d of %d: loss %.4f%s, learning rate %.2e, %s left",
            state.global_step,
            state.max_steps,
            logs["loss"],
            tasks,
            logs["learning_rate"],
            tqdm.format_interval(pace * (state.max_steps - state.global_step)),
        )


class _StageTrainer(Trainer):
    """The loss is normalised over a whole step, whatever parts and processes it is run in, and logged by task.

    Checkpoints hold the weights that are trained; a loss that is not a number ends the training.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # compute_loss gets the totals, and its parts are summed, not averaged
        self._forget_losses()

    def get_train_dataloader(self) -> Any:
        self._train_batch_size = self.args.train_batch_size  # a checkpoint may be of another number of processes
        return super().get_train_dataloader()

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """A step's batches in this process, and task_totals over all processes."""
        batches, _ = super().get_batch_samples(*args)
        own = torch.stack([task_totals(batch["targets"], batch["is_translation"]) for batch in batches]).sum(0)
        totals = self.accelerator.reduce(own.to(self.args.device), "sum")
        self._num_steps += np.array([1, *(totals > 0).tolist()])
        return batches, totals

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        keys = inputs.pop("keys")
        outputs = model(**inputs, totals=num_items_in_batch)
        own = torch.stack([outputs["loss"], *outputs["losses"]]).detach()
        losses = np.array(self.accelerator.reduce(own, "sum").tolist())
        if not np.isfinite(losses).all():
            keys = gather_object(keys)
            shown = "; ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise ConfigError(
                f"training: the loss is {losses[0]} at step {self.state.global_step}, over {shown}. Checkpoints are "
                f"kept in {self.args.output_dir}. Lower tuning.learning_rate ({self.args.learning_rate})."
            )
        self._losses += losses
        loss = outputs["loss"] * self.args.world_size  # the gradients of processes are averaged
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any) -> None:
        if "loss" in logs:
            for name, loss, count in zip(
                ("loss", *(f"{task}_loss" for task in TASKS)), self._losses, self._num_steps, strict=True
            ):
                if count:
                    logs[name] = float(loss / count)
            self._forget_losses()
        super().log(logs, *args)

    def _forget_losses(self) -> None:
        self._losses = np.zeros(1 + len(TASKS))
        """Sums over the steps since the last log entry: of the loss, and of each task's."""
        self._num_steps = np.zeros(1 + len(TASKS), dtype=np.int64)
        """Number of these steps: all, and those that learnt each task."""

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


def _fingerprint(
    pack_file: Path,
    start: BaseModel | Path,
    base_model_files: Mapping[str, str],
    tuning: Tuning,
    prompts: Sequence[Any],
) -> str:
    """Digest of all that a trained folder follows from.

    Args:
        base_model_files: see ModelCard.
        prompts: what the folder says of the prompts of its model.
    """
    if isinstance(start, Path):
        origin: dict[str, Any] = {"stage": verify_manifest(start, KIND)}
    else:
        origin = start.model_dump()
        if start.folder is not None:
            origin |= base_model_files
            del origin["folder"]  # the same model elsewhere is the same model
    parts = {
        "packs": file_digest(pack_file),
        "start": origin,
        "tuning": tuning.model_dump(
            exclude={*_NOT_IN_WEIGHTS, *_IN_PACKS, *(["epochs"] if tuning.max_steps is not None else [])}
        ),
        "prompts": prompts,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=dataclasses.asdict).encode()).hexdigest()


def _has_ended(folder: Path, fingerprint: str) -> bool:
    if not (folder / "model.json").exists():
        return False
    try:
        card = _read_card(folder)
        if card.fingerprint != fingerprint:
            return False
        _check_base(folder, card)
    except BundleError:
        return False
    return True


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


def _origin(start: BaseModel | Path) -> tuple[BaseModel, dict[str, str]]:
    """What the first stage started from, with the digests of its files then."""
    if isinstance(start, BaseModel):
        return start, _base_model_files(start)
    card = _read_card(start)
    return BaseModel(**card.base_model), card.base_model_files


def _base_model_files(base_model: BaseModel) -> dict[str, str]:
    """See ModelCard."""
    if base_model.folder is None:
        return {}
    folder = Path(base_model.folder)
    files = [folder / base_model.gguf_file] if base_model.gguf_file else folder.glob("*")
    return {path.name: file_digest(path) for path in sorted(files) if path.is_file()}


def _load_start(start: BaseModel | Path, tuning: Tuning) -> PreTrainedModel:
    """The model to train, ready for it."""
    if isinstance(start, BaseModel):
        language_model = load_language_model(start)
        return language_model if tuning.method == "full" else with_adapters(language_model, tuning)
    card = _read_card(start)
    shape = ("method",) if tuning.method == "full" else ("method", "lora_rank", "lora_alpha")
    if different := [name for name in shape if card.tuning[name] != getattr(tuning, name)]:
        raise ConfigError(
            f"tuning: expected {different} as in the stage before, {str(start)!r}: "
            f"{[card.tuning[name] for name in different]}, got {[getattr(tuning, name) for name in different]}."
        )
    if tuning.method == "full":
        return load_language_model(BaseModel(folder=str(start / "weights")))
    base = _load_base(start, card)
    trainable: Any = PeftModel.from_pretrained(base, str(start / "weights"), is_trainable=True)
    return trainable


def _load_base(folder: Path, card: ModelCard) -> PreTrainedModel:
    """The model that a folder's adapters were made for."""
    _check_base(folder, card)
    return load_language_model(BaseModel(**card.base_model))


def _check_base(folder: Path, card: ModelCard) -> None:
    """Adapters fit the weights that they were made for alone.

    Raises:
        BundleError: a file of the base model is not as it was.
        ConfigError: the base model is not where it was.
    """
    if card.tuning["method"] == "full":
        return
    base_model = BaseModel(**card.base_model)
    way_out = "Bring the base model there, or delete the folder and train it again."
    try:
        base_model.source()
    except ConfigError as error:
        raise ConfigError(f"model {str(folder)!r} holds adapters of a base model. {error} {way_out}") from error
    expected, got = card.base_model_files, _base_model_files(base_model)
    changed = [
        f"{name}: expected {expected.get(name, 'no such file')}, got {got.get(name, 'no such file')}"
        for name in sorted(expected.keys() | got.keys())
        if expected.get(name) != got.get(name)
    ]
    if changed:
        raise BundleError(
            f"model {str(folder)!r} holds adapters of a base model, and {str(base_model.folder)!r} is not as it was "
            f"then (sha256): {'; '.join(changed)}. {way_out}"
        )


def with_adapters(language_model: PreTrainedModel, tuning: Tuning) -> PreTrainedModel:
    """The model with adapters, which alone are trained, on each linear layer but the output embeddings."""
    config = LoraConfig(
        r=tuning.lora_rank,
        lora_alpha=tuning.lora_alpha,
        use_rslora=tuning.method == "rslora",
        use_dora=tuning.method == "dora",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    adapted: Any = get_peft_model(language_model, config)
    return adapted


def _load(folder: Path) -> tuple[PackedRelevanceModel, PromptTokenizer, ModelCard]:
    """See load_trained."""
    card = _read_card(folder)
    if card.tuning["method"] == "full":
        language_model = load_language_model(BaseModel(folder=str(folder / "weights")))
    else:
        base = _load_base(folder, card)
        language_model = PeftModel.from_pretrained(base, str(folder / "weights")).merge_and_unload()
    tokenizer = PromptTokenizer.from_file(folder / "tokenizer.json", card.budgets)
    model = PackedRelevanceModel(language_model, tokenizer.label_ids(card.labels)).eval()
    return model, tokenizer, card


def _scorer(
    model: PackedRelevanceModel, tokenizer: PromptTokenizer, card: ModelCard, precision: Precision
) -> PairScorer:
    return PairScorer(tokenizer, card.labels, torch_pack_scorer(model, precision), card.pack_tokens, provider="torch")
