"""The packed relevance model: a causal language model that answers with label logits for every pair of a pack."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from csrm.scoring.packing import PackBatch
from csrm.scoring.scorer import PackScorer
from csrm.training.model.attention import by_blocks, uses_block_attention
from csrm.training.model.base import sliding_window

TrainingPrecision = Literal["fp32", "bf16"]
TASKS = ("relevance", "translation")
"""What a step can learn; losses and their totals come in this order."""


class PackedRelevanceModel(nn.Module):
    """Logits of the label tokens at each pair's last token, for packs (see csrm.scoring.packing)."""

    label_ids: torch.Tensor

    def __init__(
        self, language_model: PreTrainedModel, label_ids: Sequence[int], translation_weight: float = 1.0
    ) -> None:
        """Wrap a language model.

        Args:
            language_model: its decoder and output embeddings are used, not copied; adapters in them stay active.
            label_ids: token id of each label; relevance uses only these rows of the output embeddings.
            translation_weight: factor of the translation loss where a batch also has a relevance loss.
        """
        super().__init__()
        self.translation_weight = translation_weight
        self.config: Any = language_model.config
        self.language_model = language_model
        self.register_buffer("label_ids", torch.tensor(list(label_ids)), persistent=False)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        group_ids: torch.Tensor,
        segment_ids: torch.Tensor,
        last_index: torch.Tensor,
        targets: torch.Tensor | None = None,
        is_translation: torch.Tensor | None = None,
        totals: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Label logits, and the loss where targets are given.

        Args:
            input_ids, position_ids, group_ids, segment_ids: shape (packs, tokens), int64.
            last_index: shape (packs, pairs), int64.
            targets: each pair's distribution over the labels times its weight, shape (packs, pairs, labels), float; 0
                for absent pairs.
            is_translation: whether a token is to be learnt as text, shape (packs, tokens), bool.
            totals: task_totals of the whole step where this batch is one part of it: the losses of the parts then sum
                up to that of the step.

        Returns:
            logits, shape (packs, pairs, labels); losses, of each task, shape (tasks,): cross-entropy, the weighted mean
            over the pairs, and the mean over the translation's tokens; loss, a scalar: their sum, translation times
            translation_weight.
        """
        attention: dict[str, Any] = {"attention_mask": self._attention_biases(position_ids, group_ids, segment_ids)}
        if uses_block_attention(self.language_model):
            attention = by_blocks(attention["attention_mask"])
        hidden = self.language_model.get_decoder()(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, **attention
        ).last_hidden_state
        last_hidden = torch.gather(hidden, 1, last_index[:, :, None].expand(-1, -1, hidden.shape[-1]))
        with torch.autocast(hidden.device.type, enabled=False):  # two logits of bf16 are often equal
            logits = self._soft_capped(last_hidden.float() @ self.label_rows().float().T)
        if targets is None:
            return {"logits": logits}
        if is_translation is None:
            is_translation = torch.zeros_like(input_ids, dtype=torch.bool)
        if totals is None:
            totals = task_totals(targets, is_translation)
        relevance = -(targets * logits.log_softmax(-1)).sum()
        translation = self._translation_loss(hidden, input_ids, is_translation)
        losses = torch.stack([relevance, translation]) / totals.clamp(min=torch.finfo(totals.dtype).tiny)
        loss = losses[0] + torch.where(totals[0] > 0, self.translation_weight, 1.0) * losses[1]
        return {"loss": loss, "losses": losses, "logits": logits}

    def _attention_biases(
        self, position_ids: torch.Tensor, group_ids: torch.Tensor, segment_ids: torch.Tensor
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """The bias that all layers share, or one for each kind of layer where some layers slide."""
        bias = attention_bias(group_ids, segment_ids, self.language_model.dtype)
        window = sliding_window(self.config)
        if window is None:
            return bias
        sliding_bias = within_window(bias, position_ids, window)
        if getattr(self.config, "layer_types", None) is None:
            return sliding_bias
        return {"full_attention": bias, "sliding_attention": sliding_bias}

    def _translation_loss(
        self, hidden: torch.Tensor, input_ids: torch.Tensor, is_translation: torch.Tensor
    ) -> torch.Tensor:
        """Summed cross-entropy of the marked tokens, each from the token before it."""
        if not bool(is_translation.any()):
            return torch.zeros((), device=hidden.device)
        before = hidden[:, :-1][is_translation[:, 1:]]
        logits = self._soft_capped(self.language_model.get_output_embeddings()(before).float())
        return nn.functional.cross_entropy(logits, input_ids[:, 1:][is_translation[:, 1:]], reduction="sum")

    def _soft_capped(self, logits: torch.Tensor) -> torch.Tensor:
        soft_cap = getattr(self.config, "final_logit_softcapping", None)
        return soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits

    def label_rows(self) -> torch.Tensor:
        """Rows of the output embeddings that belong to the labels, shape (labels, hidden)."""
        rows: torch.Tensor = self.language_model.get_output_embeddings().weight[self.label_ids]
        return rows


def task_totals(targets: torch.Tensor, is_translation: torch.Tensor) -> torch.Tensor:
    """What the tasks' losses are divided by, shape (tasks,): weight of all pairs, number of translated tokens."""
    return torch.stack([targets.sum(), is_translation.sum().to(targets.dtype)])


def attention_bias(group_ids: torch.Tensor, segment_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What each token attends to: 0 for itself and for earlier tokens of its prefix and product, else the least number.

    Args:
        group_ids, segment_ids: shape (packs, tokens), int64; see csrm.scoring.packing.

    Returns:
        Shape (packs, 1, tokens, tokens): pack, all heads, attending token, attended token.
    """
    place = torch.arange(group_ids.shape[1], device=group_ids.device)
    earlier = place[:, None] >= place[None, :]
    same_group = group_ids[:, :, None] == group_ids[:, None, :]
    visible_segment = (segment_ids[:, None, :] == 0) | (segment_ids[:, :, None] == segment_ids[:, None, :])
    allowed = earlier & same_group & visible_segment
    return torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


def within_window(bias: torch.Tensor, position_ids: torch.Tensor, window: int) -> torch.Tensor:
    """The bias of sliding layers: a token sees the last `window` positions of its own prompt, itself among them.

    Args:
        bias: see attention_bias.
        position_ids: shape (packs, tokens), int64; restart after the prefix for each product.
        window: as transformers counts it.
    """
    distance = position_ids[:, None, :, None] - position_ids[:, None, None, :]
    return bias.masked_fill(distance >= window, torch.finfo(bias.dtype).min)


def torch_pack_scorer(model: PackedRelevanceModel, precision: TrainingPrecision = "fp32") -> PackScorer:
    """Pack scorer that runs the torch model where its weights are; bf16: as in training, by autocast."""
    device = next(model.parameters()).device

    def score(batch: PackBatch) -> np.ndarray:
        inputs = {name: torch.from_numpy(array).to(device) for name, array in batch.model_inputs().items()}
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits: np.ndarray = model(**inputs)["logits"].cpu().numpy()
        return logits

    model.eval()
    return score
