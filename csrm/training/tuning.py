"""How the weights are changed, and the adapters that this needs."""

from typing import Any, Literal

from peft import LoraConfig, get_peft_model
from pydantic import Field
from transformers import PreTrainedModel

from csrm.config import Settings
from csrm.training.model.relevance import TrainingPrecision, known_precision


class Tuning(Settings):
    """How the weights are changed."""

    method: Literal["lora", "rslora", "dora", "full"] = "lora"
    """lora: low-rank adapters on every linear layer of the decoder (Hu et al. 2021). rslora: scaled by
    lora_alpha / sqrt(lora_rank) instead of lora_alpha / lora_rank, so that a high rank still learns (Kalajdzievski
    2023). dora: learns each column's length apart from its direction (Liu et al. 2024); slower, sometimes better at a
    low rank. full: all weights, for tiny models."""
    lora_rank: int = Field(default=16, ge=1)
    """Rank of the adapters' matrices; more learns more, and takes more memory."""
    lora_alpha: int = Field(default=32, ge=1)
    """Scale of the adapters' output; see method."""
    learning_rate: float = Field(default=2.0e-4, gt=0)
    """Peak, after a linear warm-up over the first tenth of the steps; then linear decay to 0."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the packs."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; replaces epochs where given."""
    packs_per_step: int = Field(default=4, ge=1)
    """Packs of one optimiser step, over all processes. A multiple of their number times accumulation_steps."""
    accumulation_steps: int = Field(default=1, ge=1)
    """Parts of a step that a process runs one after the other: the same gradients in less memory."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: the same gradients in much less memory,
    about a third slower."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each given label that is spread evenly over all labels (Szegedy et al. 2016), which makes wrong labels
    count less. Soft labels stay as they are."""
    ranking_weight: float = Field(default=0.0, ge=0)
    """Factor of a loss that compares the products of a prefix with each other, beside the one that judges each by
    itself; see csrm.training.model.relevance.ranking_losses."""
    pairs_per_prefix: int = Field(default=8, ge=1)
    """Pairs of one query that share a prefix; more go elsewhere behind the same prefix. Many cost less, but a step then
    sees few queries and learns how often each has relevant products instead of which products are relevant."""
    random_negatives: float = Field(default=0.0, ge=0, le=1)
    """Random products that are learnt as irrelevant, for each judged pair; pairs without a label get none. Judged
    products were all found by a search for their query, so few labels teach little about what a match is; a random
    product differs from one plainly."""
    drop_all_titles: float = Field(default=0.1, ge=0, le=1)
    """Share of prefixes that are learnt without their retrieved titles, so that a query that has none still works.
    Other prefixes lose each of their titles with TITLE_DROP_PROBABILITY of csrm.training.relevance."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """bf16: matrices are multiplied in bfloat16; weights and their updates stay float32. A device without instructions
    for it is refused. auto: bf16 where the device has them, else fp32."""
    translation_weight: float = Field(default=0.25, gt=0)
    """Factor of the translation loss in steps that also judge relevance: a token of text has a larger loss."""
    eval_steps: int | None = Field(default=None, ge=0)
    """Steps between evaluations on the dev split; the step of the largest ROC-AUC is kept. None: so many that there are
    six, the last one after the last step, or fewer, so that those before it take no more than about a tenth of the
    training's time. 0: none but the one that measures the trained model, whose last step is then kept. Distillation
    has none: there, dev chooses the round."""
    checkpoint_steps: int = Field(default=200, ge=1)
    """Steps between checkpoints, from which a training that was stopped goes on."""
    seed: int = Field(default=0, ge=0)

    @property
    def known_precision(self) -> TrainingPrecision:
        """The precision on this machine; see csrm.training.model.relevance.known_precision."""
        return known_precision(self.precision)


def with_adapters(language_model: PreTrainedModel, tuning: Tuning) -> PreTrainedModel:
    """The model with adapters, which alone are trained, on each linear layer but the output embeddings."""
    config = LoraConfig(
        r=tuning.lora_rank,
        lora_alpha=tuning.lora_alpha,
        use_rslora=tuning.method == "rslora",
        use_dora=tuning.method == "dora",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    adapted: Any = get_peft_model(language_model, config)
    return adapted
