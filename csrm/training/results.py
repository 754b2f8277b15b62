"""What a training and its steps give: the values that its report and its printed summary are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from csrm.evaluation.metrics import Evaluation
from csrm.training.best_step import KeptStep
from csrm.training.data.judges import Agreement
from csrm.training.distillation.rounds import Round
from csrm.training.distillation.teacher import TaughtPairs
from csrm.training.trained import TrainingLength
from csrm.training.translation_quality import TranslationQuality


@dataclass(frozen=True)
class TranslationResult:
    """The translation step: the model that it leaves, its texts, and how well it translates."""

    model_dir: Path
    num_texts: int
    """Pairs of texts that were trained on."""
    num_left_out: Mapping[str, int]
    """Reason to pairs of texts that were left out; see csrm.training.data.parallel_text.why_left_out."""
    quality: TranslationQuality | None
    """Quality on the held-out split; None where it was not measured."""
    why_unmeasured: str | None
    """Why there is no quality."""


@dataclass(frozen=True)
class DistillationResult:
    """The distillation step: its rounds, and the given labels that its teachers find wrong."""

    rounds: Sequence[Round]
    best: Round
    """The round whose model was kept."""
    label_issues: pd.DataFrame
    """Given labels that look wrong, the clearest first: columns of csrm.training.distillation.soft_labels.label_issues,
    query and title."""
    issues_path: Path
    """Parquet file of label_issues."""
    teachers_saw_labels: bool
    """Whether the teachers had learnt the labels that they judge."""
    scored: pd.DataFrame | None
    """Pairs of the dev split with the best round's scores; None where it was not measured by them."""


@dataclass(frozen=True)
class TrainingResult:
    """A training: the folder of the trained model, and how it came about."""

    model_dir: Path
    num_pairs: int
    """Judged pairs of split train."""
    length: TrainingLength
    """Steps of the model that was kept, and the share of its packs that they saw."""
    kept: KeptStep | None
    """The step that dev chose; None where it chose none, and the last one is kept."""
    translation: TranslationResult | None
    distillation: DistillationResult | None
    taught: TaughtPairs | None
    agreement: Agreement | None
    """How far judges agree; None where the judgments name none."""
    evaluation: Evaluation | None
    """Metrics on the dev split; None where it has no pairs."""
    report_path: Path
    """HTML page of the training."""
