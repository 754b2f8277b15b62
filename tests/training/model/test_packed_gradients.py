"""Adapters learn from packs what they would learn from single prompts: in sliding layers, and across padded packs."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma3ForCausalLM

from csrm.scoring.packing import Group, build_packs
from csrm.training.model.attention import block_bias, use_block_attention, uses_block_attention, visible_keys
from csrm.training.model.relevance import PackedRelevanceModel

LABEL_IDS = [3, 4, 5, 6]


def with_loud_adapters(language_model: Gemma3ForCausalLM) -> PackedRelevanceModel:
    """The model with random adapters on every linear layer."""
    adapters = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return PackedRelevanceModel(get_peft_model(language_model, adapters), LABEL_IDS)


@pytest.mark.parametrize("sliding_window", [16, 64])
@pytest.mark.parametrize("by_blocks", [False, True])
def test_gradients_of_packs_are_those_of_single_prompts(
    gemma: Callable[[int], Gemma3ForCausalLM], by_blocks: bool, sliding_window: int
) -> None:
    ids = np.random.default_rng(0).integers(7, 199, size=(3, 5, 20)).tolist()
    groups = [Group(prefix, [part[: 3 + 4 * n] for n, part in enumerate(parts)]) for prefix, *parts in ids]
    prompts = [torch.tensor([[*prefix, *suffix]]) for prefix, suffixes in groups for suffix in suffixes]
    labels = torch.arange(len(prompts)) % len(LABEL_IDS)
    in_packs = with_loud_adapters(gemma(sliding_window))
    alone = copy.deepcopy(in_packs)
    if by_blocks:
        use_block_attention(in_packs.language_model)
        assert uses_block_attention(in_packs.language_model)

    (batch,) = build_packs(groups, pack_tokens=80, packs_per_batch=10)
    assert len(batch.input_ids) > 2
    assert batch.input_ids.shape[1] > 64
    pair_index = torch.from_numpy(batch.pair_index)
    targets = torch.nn.functional.one_hot(labels[pair_index.clamp(min=0)], len(LABEL_IDS)).float()
    targets *= (pair_index >= 0)[:, :, None]
    inputs = {name: torch.from_numpy(array) for name, array in batch.model_inputs().items()}
    in_packs(**inputs, targets=targets)["loss"].backward()

    rows = [alone.language_model(input_ids=prompt).logits[0, -1, LABEL_IDS] for prompt in prompts]
    torch.nn.functional.cross_entropy(torch.stack(rows), labels).backward()

    ours = {name: parameter.grad for name, parameter in in_packs.named_parameters() if parameter.requires_grad}
    theirs = {name: parameter.grad for name, parameter in alone.named_parameters() if parameter.requires_grad}
    assert len(ours) == 4 * 7 * 2
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_a_block_reads_the_keys_that_one_of_its_tokens_sees_and_few_others() -> None:
    hidden = torch.finfo(torch.float32).min
    bias = torch.full((1, 1, 130, 130), hidden)
    for token in range(130):  # a prefix of 10 tokens, then products of 20
        first = 10 + (token - 10) // 20 * 20
        bias[0, 0, token, : min(token + 1, 10)] = 0
        if token >= 10:
            bias[0, 0, token, first : token + 1] = 0
    index = visible_keys(bias)
    assert index.shape == (1, 3, 10 + 78)  # the second block sees most: the prefix, and tokens 50 to 127
    for block in range(3):
        seen = (bias[0, 0, 64 * block : 64 * block + 64] == 0).any(0).nonzero().flatten()
        assert set(seen.tolist()) <= set(index[0, block].tolist())
    rows = block_bias(bias, index)
    assert rows.shape == (1, 1, 192, 88)
    assert int((rows[0, 0, :130] == 0).sum()) == int((bias == 0).sum())
