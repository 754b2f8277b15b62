"""Tiny base models, made on the spot: for the demo's bundle and for tests. Real classes and files, random weights."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from csrm.scoring.labels import BINARY_LABELS, ESCI_LABELS
from csrm.scoring.prompts import Product, Query, prompt_text
from csrm.training.model.matching import HEAD_SIZE, ROPE_THETA, start_as_word_matcher

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def train_byte_tokenizer(texts: Iterable[str], vocab_size: int, folds: bool = False) -> Tokenizer:
    """Byte-level BPE, so that no text is unknown to it; knows the template and has one token for each label.

    Args:
        texts: what it should be good at.
        vocab_size: tokens, with the 256 bytes.
        folds: whether case is ignored, and Han and kana are read by character, without the space before them: a model
            that has seen little text then knows a word wherever it stands in a field.
    """
    template = prompt_text(Query("m", "l", "q", ("a", "b")), Product("t", "b", "c", {"n": "v"}))
    labels = "".join(label.token for label in (*BINARY_LABELS, *ESCI_LABELS))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if folds:
        character = r"[\p{Han}\p{Hiragana}\p{Katakana}]"
        by_character = pre_tokenizers.Split(Regex(character), behavior="isolated")
        without_space = normalizers.Replace(Regex(f" (?={character})"), "")
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), without_space])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([by_character, tokenizer.pre_tokenizer])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*[template, labels] * 1000, *texts], trainer)
    return tokenizer


def write_tiny_base_model(
    folder: Path,
    tokenizer: Tokenizer,
    hidden_size: int = 64,
    num_layers: int = 2,
    initializer_range: float = 0.02,
    seed: int = 0,
    matches_words: bool = False,
) -> Path:
    """A random Qwen3 model with grouped-query attention and tied embeddings, in the format of save_pretrained.

    Args:
        hidden_size: a multiple of 8.
        initializer_range: standard deviation of the weights; 0.02 trains well, but scores every pair alike.
        num_layers: at least csrm.training.model.matching.NUM_LAYERS where the model matches words.
        matches_words: whether the model scores a product by the words that its query has too, before anything is
            learnt: see csrm.training.model.matching, which also sets the size of heads and the rotary base.

    Returns:
        The folder.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_SIZE if matches_words else hidden_size // 4,
        rope_theta=ROPE_THETA if matches_words else 10_000.0,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=initializer_range,
    )
    model = Qwen3ForCausalLM(config)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    if matches_words:
        start_as_word_matcher(model, fast, ESCI_LABELS)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write_base_model_of_market(
    inputs: Path, folder: Path, vocab_size: int = 4000, hidden_size: int = 96, num_layers: int = 3
) -> Path:
    """A tiny model for the texts of a market that jobs/generate_market.py made; see write_tiny_base_model.

    Args:
        inputs: folder with catalog.parquet and queries.parquet.
    """
    titles = pd.read_parquet(inputs / "catalog.parquet", columns=["title"])["title"].dropna()
    queries = pd.read_parquet(inputs / "queries.parquet", columns=["query"])["query"]
    tokenizer = train_byte_tokenizer([*titles, *queries], vocab_size, folds=True)
    return write_tiny_base_model(folder, tokenizer, hidden_size, num_layers, matches_words=True)
