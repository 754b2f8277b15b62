"""The training recipe: translation first, then relevance, then distillation in rounds."""

import logging
import shutil
from functools import partial
from pathlib import Path

import pandas as pd
from tokenizers import Tokenizer

from csrm.artefacts.manifest import check_replaceable, only_writer, replace_folder, verify_manifest
from csrm.artefacts.tracking import tracked_run
from csrm.errors import ConfigError
from csrm.scoring.scorer import PairScorer
from csrm.scoring.tokenization import PromptTokenizer
from csrm.training.best_step import kept_step, known_scores
from csrm.training.checks import TrainingData, check_data, warn_of_unknown_scripts
from csrm.training.data.judged import JudgedPairs
from csrm.training.dev_metrics import dev_metrics, dev_values, evaluate_scored, scored_pairs
from csrm.training.distillation.rounds import DevMetrics, Distillation, RoundSetup, best_round, self_distill
from csrm.training.distillation.soft_labels import TargetsOf, label_issues
from csrm.training.distillation.teacher import TaughtPairs, teach
from csrm.training.model.base import BaseModel
from csrm.training.model.families import check_model
from csrm.training.processes import num_processes
from csrm.training.relevance import RelevanceStage, read_phrasebook
from csrm.training.results import DistillationResult, TrainingResult, TranslationResult
from csrm.training.settings import TrainConfig
from csrm.training.summary import format_taught, format_translation, write_report
from csrm.training.targets import one_hot_targets
from csrm.training.time_limit import TimeLimit
from csrm.training.trained import (
    MODEL_KIND,
    read_card,
    read_history,
    start_tokenizer_json,
    trained_scorer,
    training_length,
)
from csrm.training.translation import learn_translation

TRANSLATION_SHARE = 0.3
"""Of a limit of time, that the translation step may take."""
logger = logging.getLogger(__name__)


def train_relevance(config: TrainConfig, *, finish: bool = False) -> TrainingResult:
    """Train a model to judge relevance, and write its folder and a report.

    Steps that the configuration leaves out are not run. A step that has ended is not run again while its inputs and
    settings stay the same; one that was stopped goes on from its last checkpoint.

    Args:
        config: paths start at the working directory.
        finish: do not train; a training that was stopped ends with its best step so far. With distillation, that is the
            model of the given labels. Without `finish`, the training still goes on.

    Raises:
        InputError: a table cannot be read, has problems, or lacks what a step needs.
        ConfigError: model_dir holds something else, or another process trains into it; the base model is missing or
            broken or of a family that cannot be exported, a loss is not a number, or there is nothing to finish.
        ConfigError, MissingDependencyError: `tracking` cannot be used; said before anything is read.
        StoppedError: SIGINT or SIGTERM stopped the training; a checkpoint is kept.

    Example:
        >>> from csrm.config import load_config
        >>> from csrm.training.recipe import train_relevance
        >>> from csrm.training.settings import TrainConfig
        >>> result = train_relevance(load_config("conf/train.yaml", TrainConfig))  # doctest: +SKIP
        >>> result.evaluation.metrics  # doctest: +SKIP
    """
    config = _on_this_machine(config)
    limit = None if config.max_minutes is None else TimeLimit.begin(config.max_minutes)
    check_replaceable(Path(config.model_dir), MODEL_KIND)
    with only_writer(Path(config.model_dir)):
        model_dir = Path(config.model_dir)
        with tracked_run(config.tracking, model_dir.name, config) as run:
            result = _train(config, limit, finish)
            if run is not None:
                run.log_metrics(model_dir.name, dev_values(result.evaluation))
                files = [result.report_path, model_dir / "model.json", model_dir / "history.json"]
                run.log_training(model_dir, verify_manifest(model_dir, MODEL_KIND), files)
        return result


def _train(config: TrainConfig, limit: TimeLimit | None, finish: bool) -> TrainingResult:
    tokenizer = _checked_tokenizer(config)
    with JudgedPairs(config.inputs, config.markets) as pairs:
        data = check_data(pairs, config)
        warn_of_unknown_scripts(pairs, tokenizer)
        translation = _translation(config, tokenizer, limit, finish)
        start: BaseModel | Path = config.base_model if translation is None else translation.model_dir
        limit = None if limit is None else limit.part(num_measured=len(data.dev_pairs))
        taught = _taught(config, data)
        taught_path = None if taught is None else taught.path
        stage = RelevanceStage(
            config, data, tokenizer, start, read_phrasebook(config), limit, finish=finish, taught=taught_path
        )
        scorer, distillation = _relevance(stage)
    model_dir = Path(config.model_dir)
    scored = known_scores(model_dir, data.dev_pairs)
    if scored is None and distillation is not None:
        scored = distillation.scored
    if scored is None and len(data.dev_pairs):
        logger.info("scoring the %d pairs of split %s", len(data.dev_pairs), config.dev_split)
        scored = scored_pairs(scorer, data.dev_pairs)
    return TrainingResult(
        model_dir,
        num_pairs=data.num_pairs,
        length=training_length(model_dir),
        kept=kept_step(read_history(model_dir), read_card(model_dir).kept_step),
        translation=translation,
        distillation=distillation,
        taught=taught,
        agreement=data.pairs.agreement,
        evaluation=None if scored is None else evaluate_scored(scored, config),
        report_path=write_report(config, scored, translation, distillation, data.pairs.agreement),
    )


def _on_this_machine(config: TrainConfig) -> TrainConfig:
    """The configuration with a precision that this machine has.

    Raises:
        ConfigError: it has not what was asked for, or a limit of time is given to several processes.
    """
    if config.max_minutes is not None and num_processes() > 1:
        raise ConfigError(
            f"max_minutes: expected one process, got {num_processes()}, which would end at different steps. Set "
            "tuning.max_steps instead."
        )
    tuning = config.tuning.model_copy(update={"precision": config.tuning.known_precision})
    return config.model_copy(update={"tuning": tuning})


def _checked_tokenizer(config: TrainConfig) -> PromptTokenizer:
    """The tokenizer of the base model, after checks of the base model's files and of the labels.

    Raises:
        ConfigError: the model's files are broken, it could not be exported, a token has no embedding, a label is not
            one token, or the template is another model's.
    """
    tokenizer_json = start_tokenizer_json(config.base_model)
    prompt_tokens = config.budgets.prefix + config.budgets.suffix
    check_model(config.base_model, prompt_tokens, tokenizer=Tokenizer.from_str(tokenizer_json))
    tokenizer = PromptTokenizer.from_json(tokenizer_json, config.budgets, template=config.template)
    tokenizer.label_ids(config.labels)
    return tokenizer


def _translation(
    config: TrainConfig, tokenizer: PromptTokenizer, limit: TimeLimit | None, finish: bool
) -> TranslationResult | None:
    """The translation step, where there is one.

    Raises:
        ConfigError: the training shall be finished, and this step was not ended: no model judges relevance yet.
    """
    if config.translation is None:
        return None
    if finish and not (config.stages_dir / "translation").exists():
        raise ConfigError(
            f"--finish: the training into {config.model_dir!r} was stopped in its translation step, so no model judges "
            "relevance yet. Start it without --finish, or with a smaller translation.max_steps."
        )
    limit = None if limit is None else limit.part(TRANSLATION_SHARE)
    result = learn_translation(config, config.translation, tokenizer, limit)
    logger.info("%s", format_translation(result))
    return result


def _taught(config: TrainConfig, data: TrainingData) -> TaughtPairs | None:
    """What the teacher thinks of pairs that nobody judged, where one is configured."""
    if config.teacher is None:
        return None
    taught = teach(
        config.teacher, data.pairs, config.labels, _targets_of(config), config.stages_dir, seed=config.tuning.seed
    )
    logger.info("%s", format_taught(taught))
    return taught


def _targets_of(config: TrainConfig) -> TargetsOf:
    return partial(one_hot_targets, labels=config.labels, grade_labels=config.grade_labels)


def _relevance(stage: RelevanceStage) -> tuple[PairScorer, DistillationResult | None]:
    """Train the model of the given labels, or the best one of the rounds that repair them."""
    config = stage.config
    if config.distillation is None:
        return stage.train(Path(config.model_dir)), None
    if stage.finish:
        logger.info("distillation is left out: the model of the given labels is kept")
        first = config.stages_dir / "round-0"
        scorer = stage.train(first)
        _keep(first, config)
        return scorer, None
    distillation = distill(stage, config.distillation)
    return trained_scorer(config.model_dir, config.tuning.known_precision), distillation


def distill(stage: RelevanceStage, settings: Distillation) -> DistillationResult:
    """Repair labels in rounds; the model of the best round becomes the trained folder.

    Raises:
        InputError: see self_distill.
    """
    config, data = stage.config, stage.data
    scored: dict[str, pd.DataFrame] = {}

    def measured(scorer: PairScorer) -> DevMetrics:
        scored[scorer.digest] = scored_pairs(scorer, data.dev_pairs)
        return dev_metrics(scored[scorer.digest], config)

    rounds = self_distill(
        RoundSetup(
            pairs=data.pairs,
            settings=settings,
            labels=config.labels,
            train=stage.train_and_load,
            targets_of=_targets_of(config),
            work_dir=config.stages_dir,
            dev_split=None if data.dev_pairs.empty else config.dev_split,
            dev_metrics=measured if settings.choose_by == "dev" else None,
            seed=config.tuning.seed,
        )
    )
    best = best_round(rounds, settings.min_gain)
    assert rounds[-1].soft_labels is not None
    issues = data.pairs.with_texts(label_issues(rounds[-1].soft_labels, [label.name for label in config.labels]))
    issues_path = config.stages_dir / "label_issues.parquet"
    issues.to_parquet(issues_path)
    _keep(best.model_dir, config)
    best_scored = scored.get(verify_manifest(best.model_dir, MODEL_KIND))
    return DistillationResult(rounds, best, issues, issues_path, settings.num_folds == 1, best_scored)


def _keep(round_dir: Path, config: TrainConfig) -> None:
    """Make a copy of a round's model the trained folder, in one piece."""
    copy = config.stages_dir / "best"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(round_dir, copy)
    replace_folder(copy, Path(config.model_dir), MODEL_KIND)
