"""A start for tiny models: before it learns anything, the model scores a product by the words that its query has too.

A random model must find out that equal tokens matter, and stays on a plateau until it does: thousands of steps. Equal
queries and keys of attention alone (Trockman and Kolter 2023, "Mimetic Initialization of Self-Attention Layers") do not
help: the token that is most like a token is that token itself. Here three layers work together:

    first     a token that stands after the product's line start learns so, by attending to that line start
    second    a token attends to its equals at other places, and reads whether they stand outside the product
    last      each token of the product averages over the product what the second layer has read

and the embeddings of the labels read that average. All of it are weights, which training changes like others.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from csrm.scoring.labels import Label
from csrm.scoring.prompts import ANSWER_CUE, Product, Query, prefix_lines, suffix_lines

NUM_LAYERS = 3
"""Layers that a word matcher needs, at least."""
HEAD_SIZE = 48
"""Size of its heads: in smaller ones, tokens that differ look alike too often."""
ROPE_THETA = 1.0e6
"""Base of its rotary frequencies: with it, most of them hardly turn over the length of a prompt."""
_CONSTANT, _IS_MARKER, _IS_CONTENT, _IN_PRODUCT, _IS_FOUND, _SHARE_FOUND = range(6)
"""Places of the hidden state that the word matcher uses."""
_RESERVED = 8
"""Places that hold nothing else at the start."""
_SCALE = 0.05
"""Standard deviation of the embeddings."""
_FAST_SHARE = 0.17
"""Share of the rotary frequencies, the fastest, that tell a token's own place from others."""
_SHARPNESS = 1.5
"""Factor of the queries and keys that find equal tokens."""
_BASELINE = 10.0
"""What the second layer reads where nothing is found, relative to the constant, is about minus this."""


def start_as_word_matcher(model: Any, tokenizer: PreTrainedTokenizerFast, labels: Sequence[Label]) -> None:
    """Replace random weights of a model by those of a word matcher.

    Args:
        model: random Qwen3ForCausalLM with tied embeddings, at least NUM_LAYERS layers, heads of HEAD_SIZE and
            ROPE_THETA.
        tokenizer: of the model.
        labels: answers of the model, least relevant first.

    Example: see csrm.training.model.tiny.write_tiny_base_model.
    """
    with torch.no_grad():
        _write_embeddings(model, tokenizer, labels)
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight *= 0.3  # what is random drowns out the words otherwise
                projection.weight[:_RESERVED] = 0
        first, second, last = (model.model.layers[place].self_attn for place in (0, 1, -1))
        _attend_to(first, _IS_MARKER)
        _pass_on(first, reads={_IS_MARKER: 1.0}, writes=_IN_PRODUCT, weight=_SCALE)
        _attend_to_equals(second)
        _pass_on(
            second,
            reads={_IS_CONTENT: 0.5, _IN_PRODUCT: -0.5},
            writes=_IS_FOUND,
            weight=4 * _SCALE,
            num_key_heads=model.config.num_key_value_heads,
        )
        _attend_to(last, _IN_PRODUCT)
        _pass_on(last, reads={_IS_FOUND: 1.0, _CONSTANT: _BASELINE}, writes=_SHARE_FOUND, weight=0.6)


def _write_embeddings(model: Any, tokenizer: PreTrainedTokenizerFast, labels: Sequence[Label]) -> None:
    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    query, product = Query("m", "l", "q", ("a", "b")), Product("t", "b", "c", {"n": "v"})
    lines = [*prefix_lines(query), *suffix_lines(product)]
    template = {token for text in [*(line.start for line in lines), ANSWER_CUE] for token in ids(text)}
    marker = max(ids(suffix_lines(product)[0].start), key=lambda token: len(tokenizer.decode([token])))
    words = [any(map(str.isalnum, tokenizer.decode([token]))) for token in range(len(tokenizer))]
    embeddings = model.model.embed_tokens.weight
    embeddings.normal_(0, _SCALE)
    embeddings[:, :_RESERVED] = 0
    embeddings[:, _CONSTANT] = 3 * _SCALE
    embeddings[:, _IS_CONTENT] = 4 * _SCALE * torch.tensor(words)
    embeddings[sorted(template), _IS_CONTENT] = 0
    embeddings[marker, _IS_MARKER] = 8 * _SCALE
    answers = [token for label in labels for token in ids(label.token)]
    embeddings[answers, _SHARE_FOUND] = 6 * _SCALE * torch.linspace(-1, 1, len(answers))


def _attend_to(attention: Any, place: int) -> None:
    """Let the heads of the first key head attend to tokens that have something at a place of the hidden state."""
    slowest = attention.head_dim // 2 - 1
    keys, queries = attention.k_proj.weight, attention.q_proj.weight
    keys[: attention.head_dim] = 0
    keys[slowest, place] = 1
    for head in range(attention.num_key_value_groups):
        start = head * attention.head_dim
        queries[start : start + attention.head_dim] = 0
        queries[start + slowest, _CONSTANT] = 1


def _attend_to_equals(attention: Any) -> None:
    """Let a token attend to its equals, and not to itself.

    Queries are keys, but the fastest rotary frequencies have the other sign: at distance 0 they count against what all
    others count for, at other distances they average out.
    """
    attention.q_norm.weight.fill_(_SHARPNESS)
    attention.k_norm.weight.fill_(_SHARPNESS)
    keys = attention.k_proj.weight
    keys[:, :_RESERVED] = 0
    half = attention.head_dim // 2
    num_fast = int(_FAST_SHARE * half)
    signs = torch.ones(attention.head_dim)
    signs[:num_fast] = signs[half : half + num_fast] = -1
    queries = keys.unflatten(0, (-1, attention.head_dim)).repeat_interleave(attention.num_key_value_groups, dim=0)
    attention.q_proj.weight.copy_((queries * signs[:, None]).flatten(0, 1))


def _pass_on(attention: Any, reads: dict[int, float], writes: int, weight: float, num_key_heads: int = 1) -> None:
    """Let heads write what they read to a place of the hidden state, by the first element of each value.

    Args:
        reads: place of the hidden state to its factor.
        weight: of what is written, the same for each head.
        num_key_heads: key heads whose heads do so, the first ones.
    """
    size = attention.head_dim
    for start in range(0, num_key_heads * size, size):
        attention.v_proj.weight[start] = 0
        for place, factor in reads.items():
            attention.v_proj.weight[start, place] = factor
    for head in range(num_key_heads * attention.num_key_value_groups):
        attention.o_proj.weight[:, head * size] = 0
        attention.o_proj.weight[writes, head * size] = weight
