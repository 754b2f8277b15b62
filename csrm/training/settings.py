"""Settings of a training."""

from pathlib import Path

from pydantic import Field, field_validator, model_validator

from csrm.artefacts.tracking import Tracker
from csrm.config import InputSpec, Markets, Settings
from csrm.scoring.labels import ESCI_LABELS, Label, check_labels
from csrm.scoring.template import BUILT_IN_TEMPLATE, PromptTemplate
from csrm.scoring.tokenization import Budgets
from csrm.training.data.judged import TAUGHT, UNLABELLED, JudgedInputs
from csrm.training.data.title_pairs import TitlePairs
from csrm.training.data.translated_rows import TRANSLATED, TranslatedRows
from csrm.training.distillation.rounds import Distillation
from csrm.training.distillation.teacher import Teacher
from csrm.training.model.base import BaseModel
from csrm.training.tuning import Tuning

TRANSLATION_TEMPLATE_TOKENS = 64
"""Room in a pack for what stands around a text and its translation."""


class TranslationSettings(Settings):
    """The translation stage, which activates what the model knows of both languages before it judges relevance."""

    parallel_text: InputSpec
    """Texts with their translations; splits train and held_out_split."""
    max_steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    learning_rate: float | None = Field(default=None, gt=0)
    """These three replace those of `tuning` where given; epochs replace max_steps too, also the one given here."""
    text_tokens: int = Field(default=48, ge=1)
    """Most tokens of each text."""
    mixed_share: float = Field(default=0.2, ge=0)
    """Translation packs for each pack of the relevance stage, so that translation is not forgotten."""
    switched_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the prefixes of the relevance stage, those of title pairs and pairs without labels too, that are put
    into another language of the parallel text, phrase by phrase, half of them with their products; see
    csrm.training.data.phrasebook."""
    held_out_split: str = "dev"
    num_held_out: int = Field(default=100, ge=1, le=1_000)
    """Texts of held_out_split that measure how well is translated, those that split train has too left out; without
    such texts it is not measured."""

    @field_validator("held_out_split")
    @classmethod
    def _is_held_out(cls, split: str) -> str:
        if split == "train":
            raise ValueError("is what is learnt: name a split that is not")
        return split

    def tuning(self, tuning: Tuning) -> Tuning:
        """The tuning of this stage."""
        changes = {"max_steps": self.max_steps, "epochs": self.epochs, "learning_rate": self.learning_rate}
        given = {name: value for name, value in changes.items() if value is not None}
        return tuning.model_copy(update=given | ({"max_steps": None} if self.epochs is not None else {}))


class TrainConfig(Settings):
    """Settings of a training."""

    markets: Markets
    """Source markets, each with the language of its text."""
    inputs: JudgedInputs
    base_model: BaseModel
    tuning: Tuning = Tuning()
    labels: tuple[Label, ...] = ESCI_LABELS
    """Answers of the model, least relevant first."""
    grade_labels: dict[str, str] | None = None
    """Grade of a judgment to the name of its label; without it, labels are named as the grades."""
    template: PromptTemplate = BUILT_IN_TEMPLATE
    """Text of the prompts around their fields: that of a reranker, where one is trained on."""
    budgets: Budgets = Budgets()
    pack_tokens: int = 512
    """Most tokens of a pack, in training and scoring."""
    dev_split: str = "dev"
    """Judgments of this split measure the model; those without a split, and of split train, train it."""
    translation: TranslationSettings | None = None
    """Learn to translate first; without it, this stage is left out."""
    translated_rows: TranslatedRows | None = None
    """Learn the judged pairs in other languages too, from whole translations; without it, only as they were judged."""
    title_pairs: TitlePairs | None = None
    """Learn from titles that name their query too, in markets that have no labels; without it, only judged pairs."""
    teacher: Teacher | None = None
    """Learn what a ranker that exists thinks of pairs that nobody judged; without it, there are none."""
    distillation: Distillation | None = None
    """Repair the labels in rounds; without it, the given labels are learnt once."""
    max_minutes: float | None = Field(default=None, gt=0)
    """Minutes that the training may take, from its start to its metrics on dev. As many steps are planned as fit, those
    of `tuning` at most, and the last one ends in time. Such a training has no checkpoints. It is for one process, and
    without distillation, which trains many models."""
    tracking: Tracker | None = None
    """mlflow: settings, losses, dev metrics and the report go to MLflow too, which its environment names; see
    csrm.artefacts.tracking. Each start is a run."""
    model_dir: str
    """Where the trained folder goes; replaced when the training has ended. Stages and rounds lie beside it, in
    <model_dir>.stages: what has ended there is not run again while its inputs and settings stay the same."""

    @property
    def stages_dir(self) -> Path:
        """Folder of the stages and rounds, beside model_dir."""
        model_dir = Path(self.model_dir)
        return model_dir.with_name(model_dir.name + ".stages")

    @model_validator(mode="after")
    def _a_prompt_fits_a_pack(self) -> "TrainConfig":
        longest = self.budgets.prompt
        if self.pack_tokens < longest:
            raise ValueError(
                f"pack_tokens is {self.pack_tokens}, but a prefix with one suffix may take {longest} tokens"
            )
        most = (self.pack_tokens - TRANSLATION_TEMPLATE_TOKENS) // 2
        if self.translation is not None and self.translation.text_tokens > most:
            raise ValueError(
                f"translation.text_tokens is {self.translation.text_tokens}, but two texts fit a pack of "
                f"{self.pack_tokens} tokens, pack_tokens, with at most {most} each"
            )
        return self

    @model_validator(mode="after")
    def _a_limit_is_of_one_model(self) -> "TrainConfig":
        if self.max_minutes is not None and self.distillation is not None:
            raise ValueError("max_minutes and distillation: rounds train many models; give one of the two")
        return self

    @model_validator(mode="after")
    def _labels_can_be_learnt(self) -> "TrainConfig":
        check_labels(self.labels)
        names = [label.name for label in self.labels]
        if unknown := sorted(set((self.grade_labels or {}).values()) - set(names)):
            raise ValueError(f"grade_labels name {unknown}; labels are {names}")
        if self.dev_split in ("train", UNLABELLED, TAUGHT, TRANSLATED):
            raise ValueError(f"dev_split is {self.dev_split!r}, what is learnt: name a split that is not")
        return self


def grade_gains(config: TrainConfig) -> tuple[dict[str, float], set[str], set[str]]:
    """Gain of each grade, and the grades that have the largest and the least one."""
    label_gains = {label.name: label.gain for label in config.labels}
    gains = (
        {grade: label_gains[name] for grade, name in config.grade_labels.items()}
        if config.grade_labels
        else label_gains
    )
    most, least = (
        {grade for grade, gain in gains.items() if gain == end} for end in (max(gains.values()), min(gains.values()))
    )
    return gains, most, least
