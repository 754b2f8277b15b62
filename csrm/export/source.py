"""What an export starts from: a trained folder, or a model that others trained to judge, as it is."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import field_validator
from tokenizers import Tokenizer

from csrm.artefacts.manifest import file_digest, verify_manifest
from csrm.bundle.contents import Origin
from csrm.config import Settings
from csrm.errors import ConfigError
from csrm.export.weights import ModelWeights, TrainedWeights
from csrm.scoring.labels import Label, check_labels
from csrm.scoring.template import PromptTemplate
from csrm.scoring.tokenization import Budgets, PromptTokenizer
from csrm.training.model.base import BaseModel, model_title
from csrm.training.model.families import check_model, check_tokens, check_weights
from csrm.training.trained import MODEL_KIND, model_origin, read_card, read_seen_tokens, start_tokenizer_json


class Reranker(Settings):
    """A model that others trained to judge relevance, and the prompt that it was trained on."""

    base_model: BaseModel
    template: PromptTemplate
    """Text of its prompts around their fields, to the letter: with another one its scores are near random."""
    labels: tuple[Label, ...]
    """Its answers, least relevant first."""
    budgets: Budgets = Budgets()

    @field_validator("labels")
    @classmethod
    def _labels_tell_pairs_apart(cls, labels: tuple[Label, ...]) -> tuple[Label, ...]:
        check_labels(labels)
        return labels


@dataclass(frozen=True)
class ExportSource:
    """A model with all that its bundle says of it."""

    weights: ModelWeights
    tokenizer_json: str
    labels: tuple[Label, ...]
    budgets: Budgets
    template: PromptTemplate
    origin: Origin
    seen_tokens: bytes | None = None
    """See csrm.scoring.tokenization.SEEN_TOKENS_NAME; None: nobody knows."""

    def prompt_tokenizer(self) -> PromptTokenizer:
        """Tokenizer of its prompts."""
        return PromptTokenizer.from_json(self.tokenizer_json, self.budgets, template=self.template)


def open_source(model: str | Path | Reranker) -> ExportSource:
    """Check a model before any of its weights is read.

    Args:
        model: a trained folder, or a reranker.

    Raises:
        BundleError: the trained folder is incomplete or was changed.
        ConfigError: the model is not supported, is not where it should be, or its tokenizer does not fit its weights,
            labels or template.
    """
    source = _reranker(model) if isinstance(model, Reranker) else _trained(Path(model))
    source.prompt_tokenizer().label_ids(source.labels)
    return source


def _trained(model_dir: Path) -> ExportSource:
    digest = verify_manifest(model_dir, MODEL_KIND)
    check_weights(model_dir / "weights")
    card = read_card(model_dir)
    base_model = BaseModel(**card.base_model)
    is_full = card.tuning["method"] == "full"
    check_model(BaseModel(folder=str(model_dir / "weights")) if is_full else base_model, card.budgets.prompt)
    weights = TrainedWeights(model_dir, card)
    tokenizer_json = start_tokenizer_json(model_dir)
    check_tokens(Tokenizer.from_str(tokenizer_json), weights.config.vocab_size, base_model.name)
    adapter = model_dir / "weights" / "adapter_model.safetensors"
    origin = Origin(
        base_model=model_title(base_model),
        base_model_files=_weight_files(card.base_model_files),
        adapter=file_digest(adapter) if adapter.exists() else None,
        trained_model=digest,
        training_run=card.fingerprint,
    )
    seen = read_seen_tokens(model_dir)
    return ExportSource(
        weights,
        tokenizer_json,
        card.labels,
        card.budgets,
        card.template,
        origin,
        None if seen is None else seen.tobytes(),
    )


def _reranker(reranker: Reranker) -> ExportSource:
    base_model, files = model_origin(reranker.base_model)
    tokenizer_json = start_tokenizer_json(base_model)
    check_model(base_model, reranker.budgets.prompt, tokenizer=Tokenizer.from_str(tokenizer_json))
    weights = ModelWeights(base_model)
    if heads := [name for name in weights.config.architectures or () if name.endswith("ForSequenceClassification")]:
        raise ConfigError(
            f"reranker {base_model.name!r}: expected a model that answers with a token, got {heads[0]}, whose head "
            "gives a number. Take the causal language model that it was made of."
        )
    origin = Origin(base_model=model_title(base_model), base_model_files=_weight_files(files))
    return ExportSource(weights, tokenizer_json, reranker.labels, reranker.budgets, reranker.template, origin)


def _weight_files(files: dict[str, str]) -> dict[str, str]:
    return {name: sha256 for name, sha256 in files.items() if name.endswith((".gguf", ".safetensors"))}
