"""Adapters learn from packs what they would learn from single prompts, in sliding layers too."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma3ForCausalLM

from csrm.scoring.packing import Group, lay_out
from csrm.training.model.relevance import PackedRelevanceModel

LABEL_IDS = [3, 4, 5, 6]
GAINS = [0.0, 0.01, 0.1, 1.0]


def with_loud_adapters(language_model: Gemma3ForCausalLM, ranking_weight: float) -> PackedRelevanceModel:
    """The model with random adapters on every linear layer."""
    adapters = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(language_model, adapters)
    return PackedRelevanceModel(adapted, LABEL_IDS, gains=GAINS, ranking_weight=ranking_weight)


@pytest.mark.parametrize(("sliding_window", "ranking_weight"), [(16, 0.0), (64, 0.0), (64, 2.0)])
def test_gradients_of_packs_are_those_of_single_prompts(
    gemma: Callable[[int], Gemma3ForCausalLM], sliding_window: int, ranking_weight: float
) -> None:
    ids = np.random.default_rng(0).integers(7, 199, size=(3, 5, 20)).tolist()
    groups = [Group(prefix, [part[: 3 + 4 * n] for n, part in enumerate(parts)]) for prefix, *parts in ids]
    prompts = [torch.tensor([[*prefix, *suffix]]) for prefix, suffixes in groups for suffix in suffixes]
    labels = torch.arange(len(prompts)) % len(LABEL_IDS)
    in_packs = with_loud_adapters(gemma(sliding_window), ranking_weight)
    alone = copy.deepcopy(in_packs)
    targets = torch.nn.functional.one_hot(labels, len(LABEL_IDS)).float()
    inputs = {name: torch.from_numpy(array) for name, array in lay_out(groups)._asdict().items()}
    in_packs(**inputs, targets=targets)["loss"].backward()

    rows = [alone.language_model(input_ids=prompt).logits[0, -1, LABEL_IDS] for prompt in prompts]
    loss = torch.nn.functional.cross_entropy(torch.stack(rows), labels)
    if ranking_weight:
        scores = torch.stack(rows).softmax(-1) @ torch.tensor(GAINS)
        gains = torch.tensor(GAINS)[labels]
        for group in range(len(groups)):
            of_group = slice(4 * group, 4 * group + 4)
            wanted = gains[of_group] / gains[of_group].sum()
            ranking = -(wanted * (scores[of_group] / scores[of_group].sum()).log()).sum()
            loss = loss + ranking_weight * ranking * 4 / len(prompts)
    loss.backward()

    ours = {name: parameter.grad for name, parameter in in_packs.named_parameters() if parameter.requires_grad}
    theirs = {name: parameter.grad for name, parameter in alone.named_parameters() if parameter.requires_grad}
    assert len(ours) == 4 * 7 * 2
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
