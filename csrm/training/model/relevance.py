"""The packed relevance model: a causal language model that answers with label logits for every pair of a pack."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from csrm.errors import ConfigError
from csrm.scoring.packing import Pack
from csrm.scoring.scorer import PackScorer
from csrm.training.model.attention import PackAttention, PackIndex, use_split_attention

TrainingPrecision = Literal["fp32", "bf16"]
TASKS = ("relevance", "translation")
"""What a step can learn; losses and their totals come in this order."""


def known_precision(precision: Literal["auto", "fp32", "bf16"]) -> TrainingPrecision:
    """The precision that this machine trains in; auto is bf16 where the device has instructions for it, else fp32.

    Raises:
        ConfigError: bf16 was asked for, and the device has none: a step could take a hundred times as long.
    """
    if precision == "fp32":
        return "fp32"
    if torch.cuda.is_available():
        device, has_bf16 = "this GPU", torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        device = "this processor"
        has_bf16 = torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if precision == "bf16" and not has_bf16:
        raise ConfigError(
            f"tuning.precision bf16: {device} has no instructions for it, which can make a step a hundred times slower "
            "than in fp32. Set tuning.precision=auto, which takes fp32 here, or train on another machine."
        )
    return "bf16" if has_bf16 else "fp32"


class PackedRelevanceModel(nn.Module):
    """Logits of the label tokens at each pair's last token, for packs (see csrm.scoring.packing)."""

    label_ids: torch.Tensor
    gains: torch.Tensor

    def __init__(
        self,
        language_model: PreTrainedModel,
        label_ids: Sequence[int],
        translation_weight: float = 1.0,
        *,
        gains: Sequence[float] = (),
        ranking_weight: float = 0.0,
    ) -> None:
        """Wrap a language model.

        Args:
            language_model: its decoder and output embeddings are used, not copied; adapters in them stay active. From
                now on it attends by csrm.training.model.attention, which is transformers' own attention but for packs.
            label_ids: token id of each label; relevance uses only these rows of the output embeddings.
            translation_weight: factor of the translation loss where a batch also has a relevance loss.
            gains: gain of each label, for the ranking loss.
            ranking_weight: factor of the ranking loss beside the cross-entropy of the labels; see ranking_losses.
        """
        super().__init__()
        self.translation_weight = translation_weight
        self.ranking_weight = ranking_weight
        self.config: Any = language_model.config
        self.language_model = language_model
        use_split_attention(language_model)
        self.register_buffer("label_ids", torch.tensor(list(label_ids)), persistent=False)
        self.register_buffer("gains", torch.tensor(list(gains)), persistent=False)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        group_index: torch.Tensor,
        prefix_index: torch.Tensor,
        product_index: torch.Tensor,
        group_place: torch.Tensor,
        product_place: torch.Tensor,
        last_index: torch.Tensor,
        targets: torch.Tensor | None = None,
        translation_index: torch.Tensor | None = None,
        totals: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Label logits, and the loss where targets are given.

        Args:
            input_ids, position_ids, group_index, prefix_index, product_index, group_place, product_place, last_index:
                see csrm.scoring.packing.Pack.
            targets: each pair's distribution over the labels times its weight, shape (pairs, labels), float.
            translation_index: places of tokens that are to be learnt as text, and of those before them, shape
                (2, learnt tokens), int64; None: there are none.
            totals: task_totals of the whole step where this pack is one part of it: the losses of the parts then sum up
                to that of the step.

        Returns:
            logits, shape (pairs, labels); losses, of each task, shape (tasks,): cross-entropy, and ranking_weight times
            the ranking loss, the weighted mean over the pairs, and the mean over the translation's tokens; loss, a
            scalar: their sum, translation times translation_weight.
        """
        index = PackIndex(position_ids, group_index, prefix_index, product_index, group_place, product_place)
        hidden = self.language_model.get_decoder()(
            input_ids=input_ids[None],
            position_ids=position_ids[None],
            attention_mask=torch.zeros(1, 1, 1, 1, device=input_ids.device),  # else transformers makes one
            use_cache=False,
            pack=PackAttention(index),
        ).last_hidden_state[0]
        last_hidden = hidden[last_index]
        with torch.autocast(hidden.device.type, enabled=False):  # two logits of bf16 are often equal
            logits = self._soft_capped(last_hidden.float() @ self.label_rows().float().T)
        if targets is None:
            return {"logits": logits}
        if translation_index is None:
            translation_index = last_index.new_empty((2, 0))
        if totals is None:
            totals = task_totals(targets, translation_index)
        relevance = -(targets * logits.log_softmax(-1)).sum()
        if self.ranking_weight:
            pair_groups = _pair_groups(group_index, last_index, len(input_ids))
            relevance += self.ranking_weight * ranking_losses(logits, targets, self.gains, pair_groups).sum()
        translation = self._translation_loss(hidden, input_ids, translation_index)
        losses = torch.stack([relevance, translation]) / totals.clamp(min=torch.finfo(totals.dtype).tiny)
        loss = losses[0] + torch.where(totals[0] > 0, self.translation_weight, 1.0) * losses[1]
        return {"loss": loss, "losses": losses, "logits": logits}

    def _translation_loss(
        self, hidden: torch.Tensor, input_ids: torch.Tensor, translation_index: torch.Tensor
    ) -> torch.Tensor:
        """Summed cross-entropy of the tokens to learn, each from the token before it."""
        if not translation_index.shape[1]:
            return torch.zeros((), device=hidden.device)
        learnt, before = translation_index
        logits = self._soft_capped(self.language_model.get_output_embeddings()(hidden[before]).float())
        return nn.functional.cross_entropy(logits, input_ids[learnt], reduction="sum")

    def _soft_capped(self, logits: torch.Tensor) -> torch.Tensor:
        soft_cap = getattr(self.config, "final_logit_softcapping", None)
        return soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits

    def label_rows(self) -> torch.Tensor:
        """Rows of the output embeddings that belong to the labels, shape (labels, hidden)."""
        rows: torch.Tensor = self.language_model.get_output_embeddings().weight[self.label_ids]
        return rows

    def weights(self) -> Mapping[str, torch.Tensor]:
        """The language model's weights by their names in it, adapters merged."""
        weights: Mapping[str, torch.Tensor] = self.language_model.state_dict()
        return weights


def ranking_losses(
    logits: torch.Tensor, targets: torch.Tensor, gains: torch.Tensor, pair_groups: torch.Tensor
) -> torch.Tensor:
    """Softmax cross-entropy over the products of a prefix: each should have its share of the gain of all of them.

    ListNet's loss (Cao et al. 2007), which RankT5 (Zhuang et al. 2022, arXiv 2210.10634) found best for rerankers. The
    value of a product is the logarithm of its expected gain, so that calibrated scores have the least loss. A prefix
    whose products have no gain adds nothing.

    Args:
        logits: of the labels, shape (pairs, labels).
        targets: each pair's distribution over the labels times its weight, shape (pairs, labels).
        gains: of the labels, in [0, 1], shape (labels,).
        pair_groups: number of each pair's prefix, shape (pairs,), int64.

    Returns:
        Each pair's part of the loss, times the weight of the pairs of its prefix; shape (pairs,).

    >>> relevant_first, same = torch.tensor([[-9.0, 9.0], [9.0, -9.0]]), torch.zeros(2, 2)
    >>> targets, gains, groups = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0.0, 1.0]), torch.tensor([0, 0])
    >>> [round(ranking_losses(each, targets, gains, groups).sum().item(), 2) for each in (relevant_first, same)]
    [0.0, 1.39]
    """
    if not len(targets):
        return targets.new_zeros(0)
    num_groups = int(pair_groups.max()) + 1

    def of_group(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(num_groups).index_add(0, pair_groups, values)[pair_groups]

    least = torch.finfo(targets.dtype).tiny
    log_gains = gains.clamp(min=least).log()
    values = (logits.log_softmax(-1) + log_gains).logsumexp(-1)
    log_shares = values - of_group(values.exp()).clamp(min=least).log()
    wanted = targets @ gains
    shares = wanted / of_group(wanted).clamp(min=least)
    return -shares * log_shares * of_group(targets.sum(-1))


def _pair_groups(group_index: torch.Tensor, last_index: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Number of the group of each pair, shape (pairs,), from the places of the groups' tokens."""
    is_token = group_index >= 0
    group_of_token = last_index.new_zeros(num_tokens)
    group_of_token[group_index[is_token]] = is_token.nonzero()[:, 0]
    return group_of_token[last_index]


def task_totals(targets: torch.Tensor, translation_index: torch.Tensor) -> torch.Tensor:
    """What the tasks' losses are divided by, shape (tasks,): weight of all pairs, number of translated tokens."""
    return torch.stack([targets.sum(), targets.new_tensor(translation_index.shape[1])])


def torch_pack_scorer(model: PackedRelevanceModel, precision: TrainingPrecision = "fp32") -> PackScorer:
    """Pack scorer that runs the torch model where its weights are; bf16: as in training, by autocast."""
    device = model.label_ids.device

    def score(pack: Pack) -> np.ndarray:
        inputs = {name: torch.from_numpy(array).to(device) for name, array in pack._asdict().items()}
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits: np.ndarray = model(**inputs)["logits"].cpu().numpy()
        return logits

    model.eval()
    return score
