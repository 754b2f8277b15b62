"""The training loop of one stage, on Hugging Face's Trainer."""

import logging
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.utils.data import SequentialSampler, Subset
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback

from csrm.artefacts.tracking import TrackedRun, current_run
from csrm.errors import ConfigError
from csrm.scoring.scorer import PairScorer
from csrm.training.best_step import DEV_SCORES, METRICS, DevSplit, evaluation_steps, joined_history
from csrm.training.data.packs import PackFile, TrainingPack, collate
from csrm.training.model.base import BaseModel, load_language_model
from csrm.training.model.relevance import TASKS, PackedRelevanceModel, task_totals
from csrm.training.processes import num_processes
from csrm.training.stopping import StopOnSignal
from csrm.training.time_limit import EndInTime, TimeLimit, measure_pace, planned_steps
from csrm.training.trained import TrainingLength, load_base, read_card
from csrm.training.tuning import Tuning, with_adapters

logger = logging.getLogger(__name__)

NUM_PACED = 4
"""Log entries, 5 % of the steps apart, whose pace tells the time that is left."""
_TRIED_STEPS = 3
"""Steps by which the pace is told where time is limited."""
_WEIGHTS = "changed.safetensors"
_HISTORY = ("step", "loss", *(f"{task}_loss" for task in TASKS), "learning_rate")
"""What history.json keeps of a log entry."""
_DEV_NAMES = tuple(f"dev_{name}" for name in METRICS)


class StagePaths(NamedTuple):
    """Files of a stage while it is trained."""

    packs: Path
    checkpoints: Path
    logs: Path
    """Folder of the TensorBoard files."""
    last_checkpoint: Path | None


class DevMeasure(NamedTuple):
    """How a model is measured while it is trained."""

    dev: DevSplit
    scorer_of: Callable[[PackedRelevanceModel], PairScorer]
    """Scorer of the model as it is."""


class Trained(NamedTuple):
    """What a training leaves."""

    model: PackedRelevanceModel
    """With the weights that are kept."""
    history: list[dict[str, float]]
    """See csrm.training.stage.train_stage."""
    kept_step: int | None
    """Step of these weights, which dev chose; None: the last one."""
    dev_scores: Path | None
    """File of the scores that the model gives dev; None: it was not measured."""


def run_training(
    paths: StagePaths,
    start: BaseModel | Path,
    tuning: Tuning,
    label_ids: Sequence[int],
    gains: Sequence[float],
    limit: TimeLimit | None = None,
    measure: DevMeasure | None = None,
) -> Trained:
    """Train, in this process or in all at once.

    Raises:
        StoppedError: a signal stopped it.
        ConfigError: a loss is not a number.
    """
    from torch.utils.tensorboard import SummaryWriter

    set_seed(tuning.seed)
    model = _model_to_train(start, tuning, label_ids, gains)
    packs = PackFile(paths.packs)
    plan = _planned(model, packs, tuning, limit, measure)
    steps, eval_steps = plan.steps, plan.eval_steps
    args = _arguments(paths, tuning, plan, goes_on=limit is None)
    order: Any = _pack_order(len(packs), steps * tuning.packs_per_step, tuning.seed)
    trainer = _StageTrainer(
        model=model,
        args=args,
        train_dataset=Subset(packs, order),
        data_collator=partial(collate, num_labels=len(label_ids)),
        eval_dataset=packs if eval_steps else None,  # not read: DevMeasure has what is evaluated
        measure=measure,
    )
    trainer.remove_callback(PrinterCallback)
    if plan.ends_at is not None:
        trainer.add_callback(EndInTime(plan.ends_at))
    if limit is None:
        trainer.add_callback(_Checkpoints(tuning.checkpoint_steps))
    trainer.add_callback(_Progress())
    warnings.filterwarnings("ignore", "mtime may not be reliable")  # of checkpoints, which are then taken by number
    first_step = int(paths.last_checkpoint.name.partition("-")[2]) if paths.last_checkpoint else 0
    if not trainer.is_world_process_zero():
        trainer.train(resume_from_checkpoint=_text(paths.last_checkpoint))
    else:
        resumed = f", from {paths.last_checkpoint}" if paths.last_checkpoint else ""
        logger.info("training: %s%s", TrainingLength(steps, tuning.packs_per_step, len(packs)), resumed)
        if eval_steps:
            logger.info("dev is measured every %d steps and after the last one: the best step is kept", eval_steps)
        elif measure is not None and tuning.eval_steps is None:
            logger.info(
                "dev is not measured on the way: its %d pairs would take more than a tenth of the training. "
                "tuning.eval_steps measures it all the same.",
                len(measure.dev.pairs),
            )
        with SummaryWriter(str(paths.logs), purge_step=first_step + 1) as writer, StopOnSignal(plan.way_on) as stop:
            trainer.add_callback(stop)
            if (run := current_run()) is not None:
                trainer.add_callback(_Tracked(run, paths.logs.stem))
            trainer.add_callback(TensorBoardCallback(writer))
            trainer.train(resume_from_checkpoint=_text(paths.last_checkpoint))
    if trainer.state.global_step < steps:
        logger.info("the time is over after %d of %d steps", trainer.state.global_step, steps)
    return _trained(model, trainer.state, paths.checkpoints)


def ended_training(
    paths: StagePaths, start: BaseModel | Path, tuning: Tuning, label_ids: Sequence[int], gains: Sequence[float]
) -> Trained:
    """The model of a training that was stopped: that of the step which dev chose so far, else of the last checkpoint.

    Args:
        paths: with a last checkpoint.
    """
    assert paths.last_checkpoint is not None
    model = _model_to_train(start, tuning, label_ids, gains)
    state = TrainerState.load_from_json(str(paths.last_checkpoint / "trainer_state.json"))
    kept = paths.checkpoints / f"checkpoint-{state.best_global_step}" if state.best_global_step else None
    _load_weights(model, kept or paths.last_checkpoint)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return _trained(model, state, paths.checkpoints)


def _trained(model: PackedRelevanceModel, state: TrainerState, checkpoints: Path) -> Trained:
    step = state.best_global_step
    scores = None if step is None else checkpoints / f"checkpoint-{step}" / DEV_SCORES
    return Trained(model, joined_history(state.log_history, _HISTORY), step, scores)


class _Plan(NamedTuple):
    """How long a training is, and how often it is measured."""

    steps: int
    eval_steps: int | None
    """Steps between evaluations; None: it is not measured."""
    ends_at: float | None
    """Moment by time.monotonic; None: when its steps are done."""

    @property
    def way_on(self) -> str:
        """What to do with a training that was stopped."""
        again = "to go on" if self.ends_at is None else "to begin anew, for its time is limited"
        step = "best" if self.eval_steps else "last"
        return f"Start it again {again}, or with --finish to make a model of its {step} step so far."


def _planned(
    model: PackedRelevanceModel, packs: PackFile, tuning: Tuning, limit: TimeLimit | None, measure: DevMeasure | None
) -> _Plan:
    """Plan a training. What a limit of time plans depends on the machine; all else depends on the inputs alone."""
    steps = tuning.max_steps or math.ceil(tuning.epochs * len(packs) / tuning.packs_per_step)
    first_steps = _first_steps(packs, steps, tuning)
    num_dev = 0 if measure is None else len(measure.dev.pairs)
    pairs_per_step = sum(len(pack.targets) for step in first_steps for pack in step) / len(first_steps)

    def interval() -> int | None:
        return evaluation_steps(steps, pairs_per_step, num_dev, tuning.eval_steps) if num_dev else None

    if limit is None:
        eval_steps, ends_at = interval(), None
    else:
        pace = measure_pace(model, first_steps, tuning, limit)
        dev_s = pace.reserved_s(limit)
        seconds = limit.seconds() - dev_s
        steps = planned_steps(seconds, pace.step_s, steps)
        if eval_steps := interval():
            steps = planned_steps(seconds - (steps - 1) // eval_steps * dev_s, pace.step_s, steps)
        ends_at = time.monotonic() + seconds
        logger.info("%.1f minutes are left to train, %.2f s a step", seconds / 60, pace.step_s)
        set_seed(tuning.seed)
    return _Plan(steps, eval_steps, ends_at)


def _arguments(paths: StagePaths, tuning: Tuning, plan: _Plan, *, goes_on: bool) -> TrainingArguments:
    """Settings of the Trainer.

    Args:
        goes_on: whether a training that was stopped goes on from its checkpoint.
    """
    args = TrainingArguments(
        output_dir=str(paths.checkpoints),
        max_steps=plan.steps,
        per_device_train_batch_size=tuning.packs_per_step // (num_processes() * tuning.accumulation_steps),
        gradient_accumulation_steps=tuning.accumulation_steps,
        learning_rate=tuning.learning_rate,
        warmup_steps=plan.steps // 10,
        logging_steps=max(1, plan.steps // 20),
        logging_nan_inf_filter=False,  # it would report a loss that is not a number as 0
        eval_strategy="steps" if plan.eval_steps else "no",
        eval_steps=plan.eval_steps,
        load_best_model_at_end=plan.eval_steps is not None,
        metric_for_best_model=next(iter(METRICS)),
        greater_is_better=True,
        save_strategy="steps" if plan.eval_steps or goes_on else "no",
        save_steps=plan.eval_steps or tuning.checkpoint_steps,
        save_only_model=not goes_on,
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["targets"],
        seed=tuning.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=tuning.precision == "bf16",
        dataloader_pin_memory=False,
    )
    args._n_gpu = 1  # else a single process would train on all devices, with packs_per_step on each
    return args


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


class _Checkpoints(TrainerCallback):
    """Checkpoints at their own steps too, where each evaluation has one."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= state.global_step % self._steps == 0


class _Progress(TrainerCallback):
    """A line on the console for each log entry, with the time that is left by the pace of the last ones.

    An entry stands before each checkpoint, so that nothing is lost between, and after the last step; there, a training
    that is measured is measured too.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._passed = deque([(state.global_step, time.monotonic())], maxlen=NUM_PACED)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_last = control.should_training_stop or state.global_step == state.max_steps
        if args.load_best_model_at_end and is_last:
            control.should_evaluate = control.should_save = True
        control.should_log |= control.should_save or is_last

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            shown = ", ".join(f"{METRICS[name]} {metrics[f'eval_{name}']:.4f}" for name in METRICS)
            logger.info("step %d of %d: on dev %s", state.global_step, state.max_steps, shown)

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


class _Tracked(TrainerCallback):
    """The log entries of a stage, in the run of its training."""

    def __init__(self, run: TrackedRun, stage: str) -> None:
        self._run, self._stage = run, stage

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        values = {name.replace("eval_", "dev_"): value for name, value in (logs or {}).items()}
        shown = {name: value for name, value in values.items() if name in (*_HISTORY[1:], *_DEV_NAMES)}
        if shown:
            self._run.log_metrics(self._stage, shown, state.global_step)


class _StageTrainer(Trainer):
    """The loss is normalised over a whole step, whatever parts and processes it is run in, and logged by task.

    Checkpoints hold the weights that are trained; a loss that is not a number ends the training.
    """

    def __init__(self, *args: Any, measure: DevMeasure | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._measure = measure
        self._dev_scores: tuple[int, pd.DataFrame] | None = None
        """Step of the last evaluation, and its scores."""
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

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """METRICS on dev. Training goes on as if nobody had looked: scoring draws no random number."""
        assert self._measure is not None
        scores = self._measure.dev.scores(self._measure.scorer_of(self.model))
        self._dev_scores = self.state.global_step, scores
        metrics = {f"eval_{name}": value for name, value in self._measure.dev.metrics(scores).items()}
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Of two equal steps the later one is the best: it has learnt more."""
        if metrics[f"eval_{self.args.metric_for_best_model}"] == self.state.best_metric:
            self.state.best_global_step = self.state.global_step
            return True
        is_best: bool = super()._determine_best_metric(metrics, trial)
        return is_best

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
        if self._dev_scores is not None and self._dev_scores[0] == self.state.global_step:
            assert self._measure is not None
            self._measure.dev.write_scores(folder / DEV_SCORES, self._dev_scores[1])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        _load_weights(model or self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        _load_weights(self.model, Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}")


def _load_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    saved = load_file(checkpoint / _WEIGHTS)
    with torch.no_grad():
        for name, parameter in _trained_parameters(model).items():
            parameter.copy_(saved[name])


def _trained_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _model_to_train(
    start: BaseModel | Path, tuning: Tuning, label_ids: Sequence[int], gains: Sequence[float]
) -> PackedRelevanceModel:
    language_model = _load_start(start, tuning)
    if tuning.gradient_checkpointing:
        language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return PackedRelevanceModel(
        language_model, label_ids, tuning.translation_weight, gains=gains, ranking_weight=tuning.ranking_weight
    )


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
