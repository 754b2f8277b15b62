"""Train a multilingual language model to judge relevance: translation, judgments of source markets, repaired labels.

On several devices: torchrun --nproc-per-node 2 jobs/train.py ...
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from csrm.cli import job_parser
from csrm.config import load_config
from csrm.errors import InputError
from csrm.evaluation.report import format_evaluation
from csrm.manifest import check_replaceable
from csrm.scoring.scorer import PairScorer
from csrm.scoring.tokenization import PromptTokenizer
from csrm.training.data.judged import Fold, JudgedPairs
from csrm.training.distillation.rounds import Round, check_folds
from csrm.training.model.base import BaseModel
from csrm.training.processes import across_processes
from csrm.training.recipe import (
    _evaluate,
    _scored,
    _train,
    add_unlabelled,
    distill,
    learn_translation,
    read_phrasebook,
    relevance_packs,
    warn_of_unknown_scripts,
)
from csrm.training.settings import TrainConfig
from csrm.training.summary import write_report
from csrm.training.targets import one_hot_targets
from csrm.training.trained import MODEL_KIND, start_tokenizer_json, trained_scorer


@across_processes
def main(argv: Sequence[str] | None = None) -> int:
    args = job_parser(__doc__ or "", "conf/train.yaml").parse_args(argv)
    config = load_config(args.config, TrainConfig, args.overrides)
    model_dir = Path(config.model_dir)
    stages_dir = model_dir.with_name(model_dir.name + ".stages")
    check_replaceable(model_dir, MODEL_KIND)
    with JudgedPairs(config.inputs, config.markets) as pairs:
        splits = pairs.splits()
        needs_dev = config.distillation is not None and config.distillation.choose_by == "dev"
        if missing := [split for split in ("train", config.dev_split)[: 1 + needs_dev] if split not in splits]:
            raise InputError(
                f"judgments: no rows of split {' and '.join(missing)}; splits are {sorted(splits)}."
                + (" The dev split chooses the round: set distillation.choose_by to agreement." if needs_dev else "")
            )
        for split in sorted(set(splits) - {"train"}):
            pairs.check_apart("train", split)
        one_hot_targets(pd.Series(pairs.grades(), dtype=object), config.labels, config.grade_labels)
        if config.distillation is not None:
            true_grades = pd.Series(pairs.true_grades(), dtype=object)
            one_hot_targets(true_grades, config.labels, config.grade_labels, column="true_grade")
            check_folds(config.distillation, pairs, config.tuning.seed)
        add_unlabelled(pairs, config)
        dev_pairs = pairs.read(config.dev_split)
        measured = pairs.measured_queries()
        tokenizer = PromptTokenizer.from_json(start_tokenizer_json(config.base_model), config.budgets)
        warn_of_unknown_scripts(pairs, tokenizer)
        start: BaseModel | Path = config.base_model
        if config.translation is not None:
            start = stages_dir / "translation"
            print(learn_translation(config, config.translation, tokenizer, start), flush=True)

        phrasebook = read_phrasebook(config)

        def train(
            output_dir: Path,
            soft_labels: Path | None = None,
            without: Fold | None = None,
            epochs: float | None = None,
        ) -> PairScorer:
            packs = relevance_packs(pairs, config, tokenizer, soft_labels, without, measured, phrasebook)
            length = {"epochs": epochs, "max_steps": None} if epochs is not None else {}
            return _train(packs, start, config.tuning.model_copy(update=length), config, output_dir)

        rounds: list[Round] = []
        issues = None
        if config.distillation is None:
            scorer = train(model_dir)
        else:
            rounds, issues = distill(config, config.distillation, pairs, dev_pairs, train, stages_dir)
            scorer = trained_scorer(model_dir, config.tuning.precision)
        print(f"trained on {splits['train']} pairs: {config.model_dir}")
    if not dev_pairs.empty:
        print(format_evaluation(_evaluate(_scored(scorer, dev_pairs), config)))
    print(f"report: {write_report(config, scorer, dev_pairs, rounds, issues, stages_dir)}")
    return 0
