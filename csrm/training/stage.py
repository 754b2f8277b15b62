"""One stage of training: packs, a model to start from, and the folder that the stage leaves."""

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from csrm import __version__
from csrm.artefacts.manifest import check_replaceable, file_digest, replace_folder, verify_manifest, write_manifest
from csrm.errors import ConfigError, InputError
from csrm.scoring.labels import Label
from csrm.scoring.scorer import PairScorer
from csrm.scoring.template import BUILT_IN_TEMPLATE, PromptTemplate
from csrm.scoring.tokenization import SEEN_TOKENS_NAME, Budgets, PromptTokenizer
from csrm.training.best_step import DEV_SCORES, DevSplit, mean_loss
from csrm.training.data.packs import PackFile, TrainingPack, seen_tokens, write_packs
from csrm.training.model.base import BaseModel
from csrm.training.model.quiet import quiet_libraries
from csrm.training.processes import num_processes, run_everywhere
from csrm.training.time_limit import TimeLimit
from csrm.training.trained import (
    MODEL_KIND,
    ModelCard,
    has_ended,
    model_origin,
    read_seen_tokens,
    scorer_of,
    start_tokenizer_json,
    trained_scorer,
)
from csrm.training.trainer import DevMeasure, StagePaths, Trained, ended_training, last_checkpoint, run_training
from csrm.training.tuning import Tuning

_IN_PACKS = ("pairs_per_prefix", "random_negatives", "drop_all_titles", "label_smoothing")
"""Settings of tuning that change weights through the packs alone."""
_NOT_IN_WEIGHTS = ("checkpoint_steps", "accumulation_steps", "gradient_checkpointing", "eval_steps")
logger = logging.getLogger(__name__)


def train_stage(
    packs: Iterable[TrainingPack],
    start: BaseModel | Path,
    tuning: Tuning,
    labels: Sequence[Label],
    budgets: Budgets,
    pack_tokens: int,
    output_dir: Path,
    limit: TimeLimit | None = None,
    *,
    template: PromptTemplate = BUILT_IN_TEMPLATE,
    dev: DevSplit | None = None,
    finish: bool = False,
) -> PairScorer:
    """Train on packs and write the trained folder, in one piece, when all is done.

    A training that was stopped goes on from its last checkpoint, to the weights that it would have had. One that has
    ended is not run again while its packs, start, tuning, labels, budgets, template and dev split stay the same. Under
    csrm.training.processes all processes train, and this one alone writes files.

    The folder has history.json, a list in the order of steps: step, loss, learning_rate, and relevance_loss and
    translation_loss where these were learnt, each the mean over the steps since the entry before; dev_roc_auc and
    dev_ndcg_at_10 where dev was measured after that step. `<output_dir>.logs` beside it has the same as TensorBoard
    files. Where dev was measured on the way, dev_scores.parquet has the scores of the kept step.

    Args:
        packs: see csrm.training.data.packs; made with the tokenizer that `start` has.
        start: a base model, or the folder of an earlier stage, whose weights or adapters are trained on.
        output_dir: an earlier trained folder there is replaced.
        limit: when the training must end: as many steps are planned as fit, those of `tuning` at most, and none is kept
            to go on from. None: when its steps are done.
        template: of the packs' prompts.
        dev: what measures the model while it is trained, see Tuning.eval_steps; the weights of the best step are kept.
            None: those of the last step.
        finish: do not train; a training that was stopped ends with its best step so far. Without `finish`, it still
            goes on.

    Returns:
        Scorer of the trained model, in torch.

    Raises:
        ConfigError: the loss is not a number, output_dir holds something else, the start is not where it should be, the
            packs of a step cannot be shared evenly among the processes, or there is nothing to finish.
        StoppedError: a signal stopped the training; a checkpoint is kept.
    """
    tuning = tuning.model_copy(update={"precision": tuning.known_precision})
    check_replaceable(output_dir, MODEL_KIND)
    _check_packs_per_step(tuning)
    work = _StageWork.begin(packs, output_dir)
    base_model, base_model_files = model_origin(start)
    prompts = [labels, budgets, pack_tokens]
    if template != BUILT_IN_TEMPLATE:
        prompts.append(template)
    if limit is not None:
        prompts.append({"max_minutes": limit.minutes})
    if dev is not None and tuning.eval_steps != 0:
        prompts.append({"dev": dev.digest(), "eval_steps": tuning.eval_steps})
    fingerprint = _fingerprint(work.pack_file, start, base_model_files, tuning, prompts)
    if has_ended(output_dir, fingerprint):
        shutil.rmtree(work.folder)
        logger.info("%s: has ended before with the same inputs and settings, not trained again", output_dir)
        return trained_scorer(output_dir, tuning.known_precision)

    tokenizer_json = start_tokenizer_json(start)
    prompt_tokenizer = PromptTokenizer.from_json(tokenizer_json, budgets, template=template)
    label_ids = tuple(prompt_tokenizer.label_ids(labels))
    paths = work.paths(fingerprint, logs=output_dir.with_name(output_dir.name + ".logs"))
    gains = tuple(label.gain for label in labels)
    scorer_of_stage = partial(
        scorer_of,
        tokenizer=prompt_tokenizer,
        labels=tuple(labels),
        pack_tokens=pack_tokens,
        precision=tuning.known_precision,
    )
    if finish:
        if paths.last_checkpoint is None:
            raise ConfigError(
                f"--finish: expected a training into {str(output_dir)!r} with these inputs and settings that was "
                "stopped, found no checkpoint of one. Start it without --finish."
            )
        trained = ended_training(paths, start, tuning, label_ids, gains)
        fingerprint = f"{fingerprint} after step {trained.history[-1]['step']}"
    else:
        paths = work.paths_to_train(paths, goes_on=limit is None)
        measure = DevMeasure(dev, scorer_of_stage) if dev is not None else None
        training = partial(run_training, paths, start, tuning, label_ids, gains, limit, measure)
        trained = run_everywhere(training)

    card = ModelCard(
        base_model=base_model.model_dump(),
        base_model_files=base_model_files,
        tuning=tuning.model_dump(),
        labels=tuple(labels),
        budgets=budgets,
        pack_tokens=pack_tokens,
        num_packs=work.num_packs,
        loss=mean_loss(trained.history),
        fingerprint=fingerprint,
        versions={"csrm": __version__, **{name: version(name) for name in ("torch", "transformers", "peft")}},
        template=template,
        kept_step=trained.kept_step,
    )
    finished = work.folder / "finished"
    earlier = read_seen_tokens(start) if isinstance(start, Path) else None
    is_known = earlier is not None or isinstance(start, BaseModel)  # an older CSRM did not note what a stage saw
    seen = seen_tokens(PackFile(work.pack_file), earlier) if is_known else None
    _write_folder(finished, trained, tokenizer_json, card, seen)
    replace_folder(finished, output_dir, MODEL_KIND)
    if not finish:
        shutil.rmtree(work.folder)
    return scorer_of_stage(trained.model)


def _check_packs_per_step(tuning: Tuning) -> None:
    """Refuse a number of packs that processes and their parts of a step cannot share evenly."""
    num_parts = num_processes() * tuning.accumulation_steps
    if tuning.packs_per_step % num_parts:
        raise ConfigError(
            f"tuning.packs_per_step: expected a multiple of {num_parts}, that is {num_processes()} processes times "
            f"{tuning.accumulation_steps} accumulation_steps, got {tuning.packs_per_step}."
        )


class _StageWork(NamedTuple):
    """What lies beside the trained folder while a stage is not finished."""

    folder: Path
    pack_file: Path
    num_packs: int

    @classmethod
    def begin(cls, packs: Iterable[TrainingPack], output_dir: Path) -> "_StageWork":
        """Write the packs of a stage, whose folder may hold checkpoints of a training that was stopped.

        Raises:
            InputError: there are no packs.
        """
        folder = output_dir.with_name(output_dir.name + ".unfinished")
        folder.mkdir(parents=True, exist_ok=True)
        pack_file = folder / "packs.arrow"
        num_packs = write_packs(packs, pack_file)
        if not num_packs:
            raise InputError("training: there is nothing to train on.")
        return cls(folder, pack_file, num_packs)

    def paths(self, fingerprint: str, logs: Path) -> StagePaths:
        """Files of the training."""
        checkpoints = self.folder / "checkpoints" / fingerprint
        return StagePaths(self.pack_file, checkpoints, logs, last_checkpoint(checkpoints))

    def paths_to_train(self, paths: StagePaths, *, goes_on: bool) -> StagePaths:
        """The same, once checkpoints of other inputs or settings are removed, and what does not go on."""
        for folder in (self.folder / "checkpoints").glob("*"):
            if folder != paths.checkpoints or not goes_on:
                shutil.rmtree(folder)
        paths = paths if goes_on else paths._replace(last_checkpoint=None)
        if paths.last_checkpoint is None:
            shutil.rmtree(paths.logs, ignore_errors=True)
        return paths


def _write_folder(
    folder: Path,
    trained: Trained,
    tokenizer_json: str,
    card: ModelCard,
    seen: np.ndarray | None,
) -> None:
    """Write a trained folder with its manifest; what an attempt that was stopped left there is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with quiet_libraries():
        trained.model.language_model.save_pretrained(folder / "weights")  # of an adapted model: the adapter alone
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    (folder / "model.json").write_text(card.to_json(), encoding="utf-8")
    if seen is not None:
        (folder / SEEN_TOKENS_NAME).write_bytes(seen.tobytes())
    (folder / "history.json").write_text(json.dumps(trained.history, indent=2) + "\n", encoding="utf-8")
    if trained.dev_scores is not None:
        shutil.copyfile(trained.dev_scores, folder / DEV_SCORES)
    write_manifest(folder, MODEL_KIND)


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
        prompts: what the folder says of the prompts of its model, and its limit of time.
    """
    if isinstance(start, Path):
        origin: dict[str, Any] = {"stage": verify_manifest(start, MODEL_KIND)}
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
