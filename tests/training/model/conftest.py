"""Fixtures that tests of the relevance model share."""

from collections.abc import Callable

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig


@pytest.fixture(scope="session")
def gemma() -> Callable[[int], Gemma3ForCausalLM]:
    """gemma(window): a tiny random Gemma 3 with two rotary bases, sliding and full layers, one key and value head."""

    def build(window: int) -> Gemma3ForCausalLM:
        torch.manual_seed(0)
        config = Gemma3TextConfig(
            vocab_size=200,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=16,
            intermediate_size=128,
            sliding_window=window,
            layer_types=["sliding_attention", "full_attention"] * 2,
            initializer_range=0.25,
            query_pre_attn_scalar=16,
        )
        return Gemma3ForCausalLM(config)

    return build
