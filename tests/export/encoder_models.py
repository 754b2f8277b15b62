"""Encoders of supported families with random weights, in the layout of sentence-transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, processors
from transformers import (
    BertConfig,
    BertModel,
    Gemma3TextConfig,
    Gemma3TextModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaModel,
)

TOKENIZER = Path(__file__).parents[1] / "golden" / "tokenizer.json"
HIDDEN_SIZE = 32
FAMILIES = ("bert", "xlm-roberta", "qwen3", "gemma3_text")
_POOLING = {
    "bert": "pooling_mode_mean_tokens",
    "xlm-roberta": "pooling_mode_cls_token",
    "qwen3": "pooling_mode_lasttoken",
    "gemma3_text": "pooling_mode_mean_tokens",
}


def write_encoder_model(
    folder: Path, family: str, modules: tuple[str, ...] = ("Transformer", "Pooling", "Normalize")
) -> Path:
    """A random model of a family; its weights are large enough that texts have different vectors."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    start, end = "<|im_start|>", "<|im_end|>"
    ids = [(token, tokenizer.token_to_id(token)) for token in (start, end)]
    template = f"$A {end}" if family == "qwen3" else f"{start} $A {end}"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    model(family, tokenizer.get_vocab_size()).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    if family == "gemma3_text":  # EmbeddingGemma widens its vectors, and narrows them again
        modules = ("Transformer", "Pooling", "Dense", "Dense", "Normalize")
        write_dense(folder / "2_Dense", HIDDEN_SIZE, 3 * HIDDEN_SIZE)
        write_dense(folder / "3_Dense", 3 * HIDDEN_SIZE, HIDDEN_SIZE)
    write_json(
        folder / "modules.json",
        [
            {
                "idx": number,
                "name": str(number),
                "path": "" if name == "Transformer" else f"{number}_{name}",
                "type": f"sentence_transformers.models.{name}",
            }
            for number, name in enumerate(modules)
        ],
    )
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": HIDDEN_SIZE, _POOLING[family]: True})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 24, "do_lower_case": False})
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": {"query": "find: ", "document": ""}, "similarity_fn_name": "cosine"},
    )
    return folder


def write_dense(folder: Path, in_features: int, out_features: int) -> None:
    """A linear layer as sentence-transformers keeps it."""
    folder.mkdir(parents=True)
    layer = torch.nn.Linear(in_features, out_features, bias=False)
    save_file({"linear.weight": layer.weight.detach()}, folder / "model.safetensors")
    activation = "torch.nn.modules.linear.Identity"
    shape = {"in_features": in_features, "out_features": out_features, "bias": False}
    write_json(folder / "config.json", {**shape, "activation_function": activation})


def model(family: str, vocab_size: int) -> PreTrainedModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "initializer_range": 0.25,
    }
    if family == "bert":
        return BertModel(BertConfig(**shape, max_position_embeddings=64))
    if family == "xlm-roberta":
        return XLMRobertaModel(XLMRobertaConfig(**shape, max_position_embeddings=66, pad_token_id=1, type_vocab_size=1))
    if family == "gemma3_text":
        own = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
        gemma = Gemma3TextConfig(**shape, **own, num_key_value_heads=2, use_bidirectional_attention=True)
        gemma.max_position_embeddings = 64
        return Gemma3TextModel(gemma)
    return Qwen3Model(Qwen3Config(**shape, max_position_embeddings=64, num_key_value_heads=2, head_dim=8))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
