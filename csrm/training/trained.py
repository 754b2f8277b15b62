"""The trained folder: its card, its weights, its scorer."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from csrm.artefacts.manifest import file_digest, verify_manifest
from csrm.errors import BundleError, ConfigError
from csrm.scoring.labels import Label
from csrm.scoring.scorer import PairScorer
from csrm.scoring.template import BUILT_IN_TEMPLATE, PromptTemplate
from csrm.scoring.tokenization import SEEN_TOKENS_NAME, Budgets, PromptTokenizer
from csrm.training.model.base import BaseModel, load_language_model, load_tokenizer
from csrm.training.model.relevance import PackedRelevanceModel, TrainingPrecision, torch_pack_scorer

MODEL_KIND = "model"


@dataclass(frozen=True)
class ModelCard:
    """What `model.json` in a trained folder holds."""

    base_model: dict[str, str | None]
    """What the first stage started from."""
    base_model_files: dict[str, str]
    """File of its folder to sha256; empty for a hub model."""
    tuning: dict[str, Any]
    labels: tuple[Label, ...]
    budgets: Budgets
    pack_tokens: int
    num_packs: int
    """Packs that were trained on."""
    loss: float
    """Mean training loss of the stage's steps, nats."""
    fingerprint: str
    """Digest of all that the folder follows from: packs, start, tuning, labels, budgets and template."""
    versions: dict[str, str]
    template: PromptTemplate = BUILT_IN_TEMPLATE
    """Of its prompts; not written where it is the built-in one."""
    kept_step: int | None = None
    """Step whose weights these are, where dev chose one; not written where it is None: the last step."""

    def to_json(self) -> str:
        """What `model.json` holds."""
        values = asdict(self)
        if self.template == BUILT_IN_TEMPLATE:
            del values["template"]
        if self.kept_step is None:
            del values["kept_step"]
        return json.dumps(values, indent=2) + "\n"


class TrainingLength(NamedTuple):
    """How long a model was trained."""

    num_steps: int
    packs_per_step: int
    num_packs: int
    """Packs of one epoch."""

    @property
    def epochs(self) -> float:
        """Passes over the packs."""
        return self.num_steps * self.packs_per_step / self.num_packs

    def __str__(self) -> str:
        share = f"{self.epochs:.0%} of an epoch" if self.epochs < 1 else f"{self.epochs:.1f} epochs"
        return f"{self.num_steps:,} steps of {self.packs_per_step} packs, {share} ({self.num_packs:,} packs)"


def training_length(model_dir: Path) -> TrainingLength:
    """How long the model of a trained folder was trained in its last stage."""
    card = read_card(model_dir)
    num_steps = int(read_history(model_dir)[-1]["step"])
    return TrainingLength(num_steps, card.tuning["packs_per_step"], card.num_packs)


def read_history(model_dir: Path) -> list[dict[str, float]]:
    """The history of a trained folder; see csrm.training.stage.train_stage."""
    history: list[dict[str, float]] = json.loads((model_dir / "history.json").read_text(encoding="utf-8"))
    return history


def load_trained(model_dir: str | Path) -> tuple[PackedRelevanceModel, PairScorer, ModelCard]:
    """A trained folder as a torch model with its adapters merged in float32, and its scorer.

    Raises:
        BundleError: a file of the folder, or of the base model of its adapters, is missing or changed.
        ConfigError: the base model is not where it was.
    """
    model, tokenizer, card = _load(Path(model_dir))
    scorer = scorer_of(model, tokenizer, card.labels, pack_tokens=card.pack_tokens, precision="fp32")
    return model, scorer, card


def trained_scorer(model_dir: str | Path, precision: TrainingPrecision) -> PairScorer:
    """The scorer of a trained folder, in a precision, on a device as in training.

    Raises:
        BundleError, ConfigError: see load_trained.
    """
    model, tokenizer, card = _load(Path(model_dir))
    if torch.cuda.is_available():
        model.to("cuda")
    return scorer_of(model, tokenizer, card.labels, pack_tokens=card.pack_tokens, precision=precision)


def start_tokenizer_json(start: BaseModel | Path) -> str:
    """The tokenizer of a model to start from, as tokenizer.json."""
    if isinstance(start, Path):
        return (start / "tokenizer.json").read_text(encoding="utf-8")
    text: str = load_tokenizer(start).to_str(pretty=True)
    return text


def has_ended(folder: Path, fingerprint: str) -> bool:
    if not (folder / "model.json").exists():
        return False
    try:
        card = read_card(folder)
        if card.fingerprint != fingerprint:
            return False
        check_base(folder, card)
    except BundleError:
        return False
    return True


def read_card(folder: Path) -> ModelCard:
    verify_manifest(folder, MODEL_KIND)
    try:
        values = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        labels = tuple(Label(**label) for label in values.pop("labels"))
        budgets = Budgets(**values.pop("budgets"))
        template = PromptTemplate(**values.pop("template")) if "template" in values else BUILT_IN_TEMPLATE
        return ModelCard(labels=labels, budgets=budgets, template=template, **values)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise BundleError(
            f"model {str(folder)!r}: model.json has other fields than this version reads ({error!r}). Train it again."
        ) from error


def read_seen_tokens(folder: Path) -> np.ndarray | None:
    """Which tokens the training of a folder saw; see csrm.training.data.packs.seen_tokens. None of older folders."""
    path = folder / SEEN_TOKENS_NAME
    return np.frombuffer(path.read_bytes(), np.uint8) if path.exists() else None


def model_origin(start: BaseModel | Path) -> tuple[BaseModel, dict[str, str]]:
    """What the first stage started from, with the digests of its files then."""
    if isinstance(start, BaseModel):
        return start, _base_model_files(start)
    card = read_card(start)
    return BaseModel(**card.base_model), card.base_model_files


def _base_model_files(base_model: BaseModel) -> dict[str, str]:
    """See ModelCard."""
    if base_model.folder is None:
        return {}
    folder = Path(base_model.folder)
    files = [folder / base_model.gguf_file] if base_model.gguf_file else folder.glob("*")
    return {path.name: file_digest(path) for path in sorted(files) if path.is_file()}


def load_base(folder: Path, card: ModelCard) -> PreTrainedModel:
    """The model that a folder's adapters were made for."""
    check_base(folder, card)
    return load_language_model(BaseModel(**card.base_model))


def check_base(folder: Path, card: ModelCard) -> None:
    """Adapters fit the weights that they were made for alone.

    Raises:
        BundleError: a file of the base model is not as it was.
        ConfigError: the base model is not where it was.
    """
    if card.tuning["method"] == "full":
        return
    base_model = BaseModel(**card.base_model)
    way_out = "Bring the base model there, or delete the folder and train it again."
    try:
        base_model.source()
    except ConfigError as error:
        raise ConfigError(f"model {str(folder)!r} holds adapters of a base model. {error} {way_out}") from error
    expected, got = card.base_model_files, _base_model_files(base_model)
    changed = [
        f"{name}: expected {expected.get(name, 'no such file')}, got {got.get(name, 'no such file')}"
        for name in sorted(expected.keys() | got.keys())
        if expected.get(name) != got.get(name)
    ]
    if changed:
        raise BundleError(
            f"model {str(folder)!r} holds adapters of a base model, and {str(base_model.folder)!r} is not as it was "
            f"then (sha256): {'; '.join(changed)}. {way_out}"
        )


def _load(folder: Path) -> tuple[PackedRelevanceModel, PromptTokenizer, ModelCard]:
    """See load_trained."""
    card = read_card(folder)
    if card.tuning["method"] == "full":
        language_model = load_language_model(BaseModel(folder=str(folder / "weights")))
    else:
        base = load_base(folder, card)
        language_model = PeftModel.from_pretrained(base, str(folder / "weights")).merge_and_unload()
    tokenizer = PromptTokenizer.from_file(folder / "tokenizer.json", card.budgets, template=card.template)
    model = PackedRelevanceModel(language_model, tokenizer.label_ids(card.labels)).eval()
    return model, tokenizer, card


def scorer_of(
    model: PackedRelevanceModel,
    tokenizer: PromptTokenizer,
    labels: Sequence[Label],
    *,
    pack_tokens: int,
    precision: TrainingPrecision,
) -> PairScorer:
    """Scorer of a model where its weights are."""
    return PairScorer(
        tokenizer,
        labels,
        pack_scorer=torch_pack_scorer(model, precision),
        tokens_per_call=pack_tokens,
        provider="torch",
    )
