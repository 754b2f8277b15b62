"""Attention over a pack: its groups read their prefixes, its products read themselves, and both are joined exactly.

Hydragen's decomposition (Juravsky et al. 2024, arXiv 2402.05099): each part's softmax is over its own keys, and the
parts are weighed by the sums of their exponentials. Nothing between two products is computed, no key is copied, and all
of it is matrix products and softmax, which every runtime has.
"""

from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch.nn.functional import dropout as drop
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

HIDDEN = -30_000.0
"""Added to the score of a key that a token may not see: its weight is 0, and float16 holds it."""
_LATER = 1 << 30
"""Position of a key that is padding: after every token."""
_NAME = "csrm_split"


class PackIndex(NamedTuple):
    """Where the tokens of a pack are, see csrm.scoring.packing.Pack."""

    position_ids: torch.Tensor
    group_index: torch.Tensor
    prefix_index: torch.Tensor
    product_index: torch.Tensor
    group_place: torch.Tensor
    product_place: torch.Tensor


class PackAttention:
    """What attention needs to know of a pack; the same for all layers of a kind."""

    def __init__(self, index: PackIndex) -> None:
        self.index = index
        self._biases: dict[int | None, tuple[torch.Tensor, torch.Tensor]] = {}

    def biases(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """What is added to the scores: 0, or HIDDEN.

        Args:
            window: positions that a token of a sliding layer sees, itself among them; None: all before it.

        Returns:
            Of groups to their prefixes, shape (groups, tokens of a group, tokens of a prefix), and of products to
            themselves, shape (products, tokens of a product, tokens of a product).
        """
        if window not in self._biases:
            index = self.index
            self._biases[window] = (
                _bias(index.position_ids, index.group_index, index.prefix_index, window),
                _bias(index.position_ids, index.product_index, index.product_index, window),
            )
        return self._biases[window]


def _bias(
    position_ids: torch.Tensor, query_index: torch.Tensor, key_index: torch.Tensor, window: int | None
) -> torch.Tensor:
    queries = position_ids[query_index][:, :, None]
    keys = torch.where(key_index < 0, _LATER, position_ids[key_index])[:, None, :]
    is_hidden = keys > queries
    if window is not None:
        is_hidden = is_hidden | (queries - keys >= window)
    return torch.where(is_hidden, HIDDEN, 0.0)


def use_split_attention(language_model: Any) -> None:
    """Let a model, which may have adapters, attend by parts where its caller hands it `pack`."""
    AttentionInterface.register(_NAME, split_attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model = language_model.get_base_model() if isinstance(language_model, PeftModel) else language_model
    model.set_attn_implementation(_NAME)


def split_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    pack: PackAttention | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers.

    Args:
        module: attention of a layer.
        query: shape (1, heads, tokens, size).
        key, value: shape (1, key heads, tokens, size); a key head serves as many heads as stand side by side.
        attention_mask: read without `pack` only.
        scaling: of the scores; None: one over the root of the size.
        dropout: share of the weights that are dropped.
        sliding_window: of the layer, see PackAttention.biases.
        pack: without it, this is transformers' own sdpa attention.

    Returns:
        Shape (1, tokens, heads, size).
    """
    if pack is None:
        options |= {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scaled = query[0] * (module.head_dim**-0.5 if scaling is None else scaling)
    heads = _Heads(
        scaled, key[0], value[0], module.config.num_key_value_heads, module.num_key_value_groups, module.head_dim
    )
    index, (prefix_bias, own_bias) = pack.index, pack.biases(sliding_window)
    read, sums = _part(heads, index.group_index, index.prefix_index, prefix_bias, dropout)
    read, sums = read[index.group_place], sums[index.group_place]
    own, own_sums = _part(heads, index.product_index, index.product_index, own_bias, dropout)
    own, own_sums = own[index.product_place], own_sums[index.product_place]
    num_prefix_tokens = index.position_ids.shape[0] - index.product_place.shape[0]
    far = read[num_prefix_tokens:]
    share = torch.sigmoid(own_sums - sums[num_prefix_tokens:])[:, :, None].to(far.dtype)
    return torch.cat([read[:num_prefix_tokens], far + share * (own - far)])[None], None


class _Heads(NamedTuple):
    """What a layer's attention reads. Numbers of heads are constants in a graph, other than sizes of tensors."""

    queries: torch.Tensor
    """Shape (heads, tokens, size), scaled."""
    keys: torch.Tensor
    """Shape (key heads, tokens, size)."""
    values: torch.Tensor
    """Shape (key heads, tokens, size)."""
    key_heads: int
    heads_of_key: int
    """Heads that read a key head."""
    size: int


def _part(
    heads: _Heads, query_index: torch.Tensor, key_index: torch.Tensor, bias: torch.Tensor, dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of rows of tokens to one row of keys each.

    Args:
        heads: of a layer.
        query_index, key_index: places of tokens, shape (rows, queries of a row) and (rows, keys of a row).
        bias: shape (rows, queries of a row, keys of a row).
        dropout: share of the weights that are dropped.

    Returns:
        What each query reads, shape (rows * queries of a row, heads, size), and the logarithms of the sums of its
        exponentiated scores, shape (rows * queries of a row, heads).
    """
    key_heads, heads_of_key, size = heads.key_heads, heads.heads_of_key, heads.size
    (rows, num_queries), num_keys = query_index.shape, key_index.shape[1]
    asked = heads.queries[:, query_index.flatten()].view(key_heads, heads_of_key, rows, num_queries, size)
    asked = asked.transpose(1, 2).reshape(key_heads, rows, -1, size)
    keys, values = (part[:, key_index.flatten()].view(key_heads, rows, num_keys, size) for part in heads[1:3])
    scores = (asked @ keys.transpose(-1, -2)).view(key_heads, rows, heads_of_key, num_queries, num_keys)
    scores = scores + bias[:, None]
    weights = scores.softmax(-1, dtype=torch.float32)
    # The largest weight is exp(largest score) / sum, and at least one over the keys: its logarithm is exact.
    sums = scores.amax(-1) - weights.amax(-1).log()
    weights = weights.to(values.dtype)
    if dropout:
        weights = drop(weights, dropout)
    read = weights.view(key_heads, rows, -1, num_keys) @ values
    read = read.view(key_heads, rows, heads_of_key, num_queries, size).permute(1, 3, 0, 2, 4)
    return read.reshape(-1, key_heads * heads_of_key, size), sums.permute(1, 3, 0, 2).reshape(
        -1, key_heads * heads_of_key
    )
