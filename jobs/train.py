"""Train a multilingual language model to judge relevance, on the judgments of source markets."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from pydantic import model_validator

from csrm.cli import job_parser, run_job
from csrm.config import Settings, load_config
from csrm.errors import InputError
from csrm.labels import ESCI_LABELS, Label
from csrm.metrics import evaluate_scores, format_evaluation
from csrm.tokenization import Budgets
from csrm.training.base_model import BaseModel
from csrm.training.data import JudgedInputs, judged_pairs
from csrm.training.relevance import Tuning, train_relevance


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
    pairs = judged_pairs(config.inputs, config.markets)
    train_pairs = pairs[pairs["split"].fillna("train") == "train"]
    dev_pairs = pairs[pairs["split"] == config.dev_split]
    if train_pairs.empty:
        raise InputError(f"judgments: no rows of split train; splits are {sorted(pairs['split'].dropna().unique())}.")
    scorer = train_relevance(
        train_pairs,
        config.base_model,
        config.tuning,
        config.labels,
        config.grade_labels,
        config.budgets,
        config.pack_tokens,
        Path(config.model_dir),
    )
    print(f"trained on {len(train_pairs)} pairs: {config.model_dir}")
    if not dev_pairs.empty:
        print(_dev_report(pd.concat([dev_pairs, scorer.score(dev_pairs)], axis=1), config))
    return 0


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
