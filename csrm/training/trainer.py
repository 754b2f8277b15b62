"""The training loop of one stage, on Hugging Face's Trainer."""

import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.utils.data import SequentialSampler, Subset
from tqdm import tqdm
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from csrm.errors import ConfigError
from csrm.training.data.packs import PackFile, TrainingPack, collate
from csrm.training.model.base import BaseModel, load_language_model
from csrm.training.model.relevance import TASKS, PackedRelevanceModel, task_totals
from csrm.training.processes import num_processes
from csrm.training.time_limit import EndInTime, TimeLimit, measure_pace, planned_steps
from csrm.training.trained import TrainingLength, load_base, read_card
from csrm.training.tuning import Tuning, with_adapters

logger = logging.getLogger(__name__)

NUM_PACED = 4
"""Log entries, 5 % of the steps apart, whose pace tells the time that is left."""
_TRIED_STEPS = 3
"""Steps by which the pace is told where time is limited."""
_WEIGHTS = "changed.safetensors"


class StagePaths(NamedTuple):
    """Files of a stage while it is trained."""

    packs: Path
    checkpoints: Path
    logs: Path
    """Folder of the TensorBoard files."""
    last_checkpoint: Path | None


def run_training(
    paths: StagePaths,
    start: BaseModel | Path,
    tuning: Tuning,
    label_ids: Sequence[int],
    gains: Sequence[float],
    limit: TimeLimit | None = None,
) -> tuple[PackedRelevanceModel, list[dict[str, float]]]:
    """Train, in this process or in all at once; returns the model and its history (see train_stage)."""
    from torch.utils.tensorboard import SummaryWriter

    set_seed(tuning.seed)
    on_cpu = not torch.cuda.is_available()
    language_model = _load_start(start, tuning)
    if tuning.gradient_checkpointing:
        language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = PackedRelevanceModel(
        language_model, label_ids, tuning.translation_weight, gains=gains, ranking_weight=tuning.ranking_weight
    )
    packs = PackFile(paths.packs)
    steps = tuning.max_steps or math.ceil(tuning.epochs * len(packs) / tuning.packs_per_step)
    ends_at = None
    if limit is not None:
        pace = measure_pace(model, _first_steps(packs, steps, tuning), tuning, limit)
        seconds = limit.seconds() - pace.reserved_s(limit)
        steps, ends_at = planned_steps(seconds, pace.step_s, steps), time.monotonic() + seconds
        logger.info("%.1f minutes are left to train, %.2f s a step", seconds / 60, pace.step_s)
        set_seed(tuning.seed)
    args = TrainingArguments(
        output_dir=str(paths.checkpoints),
        max_steps=steps,
        per_device_train_batch_size=tuning.packs_per_step // (num_processes() * tuning.accumulation_steps),
        gradient_accumulation_steps=tuning.accumulation_steps,
        learning_rate=tuning.learning_rate,
        warmup_steps=steps // 10,
        logging_steps=max(1, steps // 20),
        logging_nan_inf_filter=False,  # it would report a loss that is not a number as 0
        save_strategy="steps" if limit is None else "no",
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
    if ends_at is not None:
        trainer.add_callback(EndInTime(ends_at))
    first_step = int(paths.last_checkpoint.name.partition("-")[2]) if paths.last_checkpoint else 0
    if not trainer.is_world_process_zero():
        trainer.train(resume_from_checkpoint=_text(paths.last_checkpoint))
    else:
        resumed = f", from {paths.last_checkpoint}" if paths.last_checkpoint else ""
        logger.info("training: %s%s", TrainingLength(steps, tuning.packs_per_step, len(packs)), resumed)
        with SummaryWriter(str(paths.logs), purge_step=first_step + 1) as writer:
            trainer.add_callback(TensorBoardCallback(writer))
            trainer.train(resume_from_checkpoint=_text(paths.last_checkpoint))
    if trainer.state.global_step < steps:
        logger.info("the time is over after %d of %d steps", trainer.state.global_step, steps)
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


def _first_steps(packs: PackFile, steps: int, tuning: Tuning) -> list[list[TrainingPack]]:
    """Packs of the first steps."""
    size = tuning.packs_per_step
    order = _pack_order(len(packs), min(steps, _TRIED_STEPS) * size, tuning.seed)
    return [[packs[int(number)] for number in order[start : start + size]] for start in range(0, len(order), size)]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: trainer_state.json is its last file."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.partition("-")[2]), default=None)


def mean_loss(history: Sequence[Mapping[str, float]]) -> float:
    """Mean over the steps, of entries that are means over the steps since the one before."""
    steps = [entry["step"] for entry in history]
    return float(np.average([entry["loss"] for entry in history], weights=np.diff(steps, prepend=0)))


class _Progress(TrainerCallback):
    """A line on the console for each log entry, with the time that is left by the pace of the last ones.

    An entry stands before each checkpoint, so that nothing is lost between, and after the last step.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._passed = deque([(state.global_step, time.monotonic())], maxlen=NUM_PACED)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= control.should_save or state.global_step == state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        self._passed.append((state.global_step, time.monotonic()))
        (first_step, first_time), (last_step, last_time) = self._passed[0], self._passed[-1]
        pace = (last_time - first_time) / max(1, last_step - first_step)
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
        own = torch.stack([task_totals(batch["targets"], batch["translation_index"]) for batch in batches]).sum(0)
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


def _load_start(start: BaseModel | Path, tuning: Tuning) -> PreTrainedModel:
    """The model to train, ready for it."""
    if isinstance(start, BaseModel):
        language_model = load_language_model(start)
        return language_model if tuning.method == "full" else with_adapters(language_model, tuning)
    card = read_card(start)
    shape = ("method",) if tuning.method == "full" else ("method", "lora_rank", "lora_alpha")
    if different := [name for name in shape if card.tuning[name] != getattr(tuning, name)]:
        raise ConfigError(
            f"tuning: expected {different} as in the stage before, {str(start)!r}: "
            f"{[card.tuning[name] for name in different]}, got {[getattr(tuning, name) for name in different]}."
        )
    if tuning.method == "full":
        return load_language_model(BaseModel(folder=str(start / "weights")))
    base = load_base(start, card)
    trainable: Any = PeftModel.from_pretrained(base, str(start / "weights"), is_trainable=True)
    return trainable
