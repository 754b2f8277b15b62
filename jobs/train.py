"""Train a multilingual language model to judge relevance, on the judgments of source markets."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from pydantic import model_validator

from csrm.cli import job_parser, run_job
from csrm.config import Settings, load_config
from csrm.errors import InputError
from csrm.labels import ESCI_LABELS, Label
from csrm.metrics import evaluate_scores, format_evaluation
from csrm.tokenization import Budgets, PromptTokenizer
from csrm.training.base_model import BaseModel
from csrm.training.data import JudgedInputs, JudgedPairs
from csrm.training.packs import judged_packs
from csrm.training.stage import Tuning, one_hot_targets, start_tokenizer_json, train_stage


class TrainConfig(Settings):
    """Settings of a training."""

    markets: dict[str, str]
    """Source markets, each with the language of its text."""
    inputs: JudgedInputs
    base_model: BaseModel
    tuning: Tuning = Tuning()
    labels: tuple[Label, ...] = ESCI_LABELS
    """Answers of the model, least relevant first."""
    grade_labels: dict[str, str] | None = None
    """Grade of a judgment to the name of its label; without it, labels are named as the grades."""
    budgets: Budgets = Budgets()
    pack_tokens: int = 512
    """Most tokens of a pack, in training and scoring."""
    dev_split: str = "dev"
    """Judgments of this split measure the model; those without a split, and of split train, train it."""
    model_dir: str
    """Where the trained folder goes; replaced when the training has ended."""

    @model_validator(mode="after")
    def _a_prompt_fits_a_pack(self) -> "TrainConfig":
        longest = self.budgets.prefix + self.budgets.suffix
        if self.pack_tokens < longest:
            raise ValueError(
                f"pack_tokens is {self.pack_tokens}, but a prefix with one suffix may take {longest} tokens"
            )
        return self


def main(argv: Sequence[str] | None = None) -> int:
    args = job_parser(__doc__ or "", "conf/train.yaml").parse_args(argv)
    config = load_config(args.config, TrainConfig, args.overrides)
    with JudgedPairs(config.inputs, config.markets) as pairs:
        splits = pairs.splits()
        if "train" not in splits:
            raise InputError(f"judgments: no rows of split train; splits are {sorted(splits)}.")
        tokenizer = PromptTokenizer.from_json(start_tokenizer_json(config.base_model), config.budgets)
        scorer = train_stage(
            judged_packs(_training_batches(pairs, config), tokenizer, config.pack_tokens),
            config.base_model,
            config.tuning,
            config.labels,
            config.budgets,
            config.pack_tokens,
            Path(config.model_dir),
        )
        print(f"trained on {splits['train']} pairs: {config.model_dir}")
        dev_pairs = pairs.read(config.dev_split)
    if not dev_pairs.empty:
        print(_dev_report(pd.concat([dev_pairs, scorer.score(dev_pairs)], axis=1), config))
    return 0


def _training_batches(pairs: JudgedPairs, config: TrainConfig) -> Iterator[pd.DataFrame]:
    """Training pairs, in groups, with their targets."""
    tuning = config.tuning
    for batch in pairs.groups("train", tuning.pairs_per_prefix, tuning.seed, tuning.random_negatives):
        yield batch.assign(target=list(one_hot_targets(batch["grade"], config.labels, config.grade_labels)))


def _dev_report(dev_pairs: pd.DataFrame, config: TrainConfig) -> str:
    label_gains = {label.name: label.gain for label in config.labels}
    gains = (
        {grade: label_gains[name] for grade, name in config.grade_labels.items()}
        if config.grade_labels
        else label_gains
    )
    evaluation = evaluate_scores(
        dev_pairs,
        ["relevance_score"],
        gains,
        relevant_grades={grade for grade, gain in gains.items() if gain == max(gains.values())},
        irrelevant_grades={grade for grade, gain in gains.items() if gain == min(gains.values())},
    )
    return format_evaluation(evaluation)


if __name__ == "__main__":
    sys.exit(run_job(main))
