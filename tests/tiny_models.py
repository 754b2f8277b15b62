"""Tiny seeded models and tokenizers for tests: real classes, real files, random weights."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from csrm.prompts import ANSWER_CUE, Product, Query, prefix_lines, suffix_lines

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LABEL_TOKENS = [" no", " goes", " similar", " yes"]


def byte_tokenizer(texts: Iterable[str] = (), vocab_size: int = 600) -> Tokenizer:
    """Byte-level BPE over the template, the label tokens and some texts; no text is unknown to it."""
    template = [ANSWER_CUE, *LABEL_TOKENS] * 50
    template += [line.start for line in prefix_lines(Query("", "", "", ("a", "b"))) + suffix_lines(Product("t", "b", "c", {"n": "v"}))] * 50
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*template, *texts], trainer)
    return tokenizer


def write_base_model(folder: Path, tokenizer: Tokenizer, hidden_size: int = 64, num_layers: int = 2, seed: int = 0) -> Path:
    """A random Qwen3 model with grouped-query attention and tied embeddings, in the format of save_pretrained."""
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder
