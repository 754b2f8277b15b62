"""Checks of the judged pairs before anything is trained on them."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from csrm.errors import InputError
from csrm.scoring.tokenization import PromptTokenizer
from csrm.training.data.judged import TAUGHT, UNLABELLED, JudgedPairs, MeasuredQueries, UnlabelledInputs
from csrm.training.distillation.rounds import check_folds
from csrm.training.settings import TrainConfig
from csrm.training.targets import one_hot_targets

logger = logging.getLogger(__name__)
NUM_SAMPLED_TITLES = 500
MAX_TOKENS_PER_CHARACTER = 1.0
"""Multilingual tokenizers make 0.2 tokens of a Latin letter and up to 0.8 of a Hangul syllable or a Han character."""


@dataclass(frozen=True)
class TrainingData:
    """Pairs that passed the checks."""

    pairs: JudgedPairs
    """The judged pairs, and the unlabelled ones where these are configured."""
    num_pairs: int
    """Judged pairs of split train."""
    dev_pairs: pd.DataFrame
    """Pairs of the dev split with their texts; may be empty."""
    measured: MeasuredQueries


def check_data(pairs: JudgedPairs, config: TrainConfig) -> TrainingData:
    """Check judged pairs, and add translated and unlabelled ones where these are configured.

    Raises:
        InputError: a split that is needed has no pairs, a query text is in two splits, a grade has no label, a fold has
            no queries, or there are no unlabelled pairs.
    """
    splits = pairs.splits()
    _check_splits(splits, config)
    for split in sorted(set(splits) - {"train"}):
        pairs.check_apart("train", split)
    one_hot_targets(pd.Series(pairs.grades(), dtype=object), config.labels, config.grade_labels)
    if config.distillation is not None:
        true_grades = pd.Series(pairs.true_grades(), dtype=object)
        one_hot_targets(true_grades, config.labels, config.grade_labels, column="true_grade")
        check_folds(config.distillation, pairs, config.tuning.seed)
    if config.translated_rows is not None:
        pairs.add_translated(config.translated_rows, config.inputs.retrieval_table)
    _add_unlabelled(pairs, config)
    return TrainingData(pairs, splits["train"], pairs.read(config.dev_split), pairs.measured_queries())


def _check_splits(splits: Mapping[str, int], config: TrainConfig) -> None:
    needs_dev = config.distillation is not None and config.distillation.choose_by == "dev"
    needed = ("train", config.dev_split) if needs_dev else ("train",)
    if missing := [split for split in needed if split not in splits]:
        raise InputError(
            f"judgments: no rows of split {' and '.join(missing)}; splits are {sorted(splits)}."
            + (" The dev split chooses the round: set distillation.choose_by to agreement." if needs_dev else "")
        )


def _add_unlabelled(pairs: JudgedPairs, config: TrainConfig) -> None:
    """Add the pairs that teachers judge though nobody did, where these are configured."""
    teacher, distillation = config.teacher, config.distillation
    if teacher is not None:
        _add(pairs, config, TAUGHT, teacher.pair_inputs, teacher.markets, teacher.pairs_per_query)
    if distillation is not None and distillation.unlabelled is not None:
        unlabelled = distillation.unlabelled
        _add(pairs, config, UNLABELLED, unlabelled.inputs, unlabelled.markets, unlabelled.pairs_per_query)


def _add(
    pairs: JudgedPairs,
    config: TrainConfig,
    split: str,
    inputs: UnlabelledInputs,
    markets: Mapping[str, str],
    pairs_per_query: int,
) -> None:
    if not pairs.add_unlabelled(inputs, markets, pairs_per_query, config.tuning.seed, split):
        raise InputError(
            f"candidates {inputs.candidates.path!r}: no pairs of {dict(markets)} but judged ones and those of queries "
            "that measure the model."
        )


def warn_of_unknown_scripts(pairs: JudgedPairs, tokenizer: PromptTokenizer) -> None:
    """Log one warning for each language whose text the tokenizer splits into bytes."""
    for language, rows in pairs.read(num_pairs=NUM_SAMPLED_TITLES).groupby("language"):
        rate = tokenizer.tokens_per_character(rows["title"].dropna().tolist())
        if rate > MAX_TOKENS_PER_CHARACTER:
            logger.warning(
                "language %s: the tokenizer makes %.1f tokens of a character, it splits the text into bytes. "
                "Choose a base model that knows this language.",
                language,
                rate,
            )
