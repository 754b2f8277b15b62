"""Adapters learn from packs what they would learn from single prompts: in sliding layers, and across padded packs."""

import copy

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from csrm.packing import Group, build_packs
from csrm.training.model import PackedRelevanceModel

LABEL_IDS = [3, 4, 5, 6]


def adapted_gemma() -> PackedRelevanceModel:
    """Gemma 3 with adapters on every linear layer; half of the layers see 64 tokens."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=200,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=64,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        initializer_range=0.25,
        query_pre_attn_scalar=8,
    )
    adapters = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return PackedRelevanceModel(get_peft_model(Gemma3ForCausalLM(config), adapters), LABEL_IDS)


def test_gradients_of_packs_are_those_of_single_prompts() -> None:
    ids = np.random.default_rng(0).integers(7, 199, size=(3, 5, 20)).tolist()
    groups = [Group(prefix, [part[: 3 + 4 * n] for n, part in enumerate(parts)]) for prefix, *parts in ids]
    prompts = [torch.tensor([[*prefix, *suffix]]) for prefix, suffixes in groups for suffix in suffixes]
    labels = torch.arange(len(prompts)) % len(LABEL_IDS)
    in_packs = adapted_gemma()
    alone = copy.deepcopy(in_packs)

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
