"""Model families that can be trained and exported: those whose packed graph is proven against plain forward passes."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from csrm.errors import ConfigError
from csrm.training.model.base import BaseModel, language_config
from csrm.training.model.weight_files import tensor_shapes

FAMILIES = {
    "qwen2": "Qwen2 and Qwen2.5",
    "qwen3": "Qwen3",
    "llama": "Llama, SmolLM and SmolLM2",
    "mistral": "Mistral",
    "gemma3_text": "Gemma 3 (text)",
}
"""`model_type` of a configuration to the models that have it."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary scalings that do not depend on how long the input is."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_model(base_model: BaseModel, prompt_tokens: int, *, tokenizer: Tokenizer | None = None) -> None:
    """Refuse a model that would not be exported right, before any weight is read.

    Args:
        base_model: where it is.
        prompt_tokens: most tokens of a prompt.
        tokenizer: the one that it is used with; None: it is not checked.

    Raises:
        ConfigError: another family, or a setting of it that packs do not honour; weights in a pickle only; files of
            weights that are missing or cut off; fewer embeddings than the tokenizer has tokens.
    """
    base_model.source()  # says what is not there
    is_folder = base_model.folder is not None and base_model.gguf_file is None
    if is_folder:
        check_weights(Path(base_model.folder or ""))
    try:
        config = language_config(base_model)
    except Exception as error:  # each kind of broken file has an error of its own
        raise ConfigError(
            f"model {base_model.name!r}: {_supported()} Its configuration cannot be read: {error}"
        ) from error
    check_config(config, prompt_tokens)
    shapes = tensor_shapes(Path(base_model.folder or "")) if is_folder else {}
    embeddings = next((shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight")), None)
    if tokenizer is not None:
        check_tokens(tokenizer, embeddings[0] if embeddings else config.vocab_size, base_model.name)


def check_tokens(tokenizer: Tokenizer, num_embeddings: int, name: str) -> None:
    """Refuse a tokenizer of another model.

    Args:
        tokenizer: the tokenizer.
        num_embeddings: rows of the model's input embeddings.
        name: of the model, for the message.

    Raises:
        ConfigError: a token has no embedding.
    """
    token, largest = max(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    if largest >= num_embeddings:
        raise ConfigError(
            f"model {name!r}: the tokenizer has tokens up to id {largest} ({token!r}), but the model has "
            f"{num_embeddings} embeddings. Is it another model's tokenizer?"
        )


def check_config(config: Any, prompt_tokens: int) -> None:
    """Refuse a configuration of another family, or with a setting that packs do not honour.

    Args:
        config: of transformers.
        prompt_tokens: most tokens of a prompt.

    Raises:
        ConfigError: says what is wrong, and what is supported.
    """
    if config.model_type not in FAMILIES:
        raise ConfigError(f"model of type {config.model_type!r}: {_supported()} Train from one of these.")
    problems = []
    if getattr(config, "quantization_config", None):
        problems.append("its weights are quantized (quantization_config), expected those of 16 or 32 bits")
    if getattr(config, "attn_logit_softcapping", None):
        problems.append(f"attn_logit_softcapping is {config.attn_logit_softcapping}, expected none")
    if getattr(config, "use_bidirectional_attention", False):
        problems.append("use_bidirectional_attention is on: expected a causal model")
    if unknown := sorted(_rope_types(config) - set(ROPE_TYPES)):
        problems.append(f"rotary scaling {', '.join(unknown)}, expected one of {', '.join(ROPE_TYPES)}")
    if prompt_tokens > config.max_position_embeddings:
        problems.append(
            f"a prompt may take {prompt_tokens} tokens, but the model was made for {config.max_position_embeddings}"
        )
    if problems:
        raise ConfigError(f"model of type {config.model_type!r} cannot be trained and exported: {'; '.join(problems)}.")


def check_weights(folder: Path) -> None:
    """Weights are read from safetensors: a pickle can run any code when it is read.

    Raises:
        ConfigError: the folder has pickled weights and no safetensors.
    """
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles and not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"model {str(folder)!r}: expected safetensors, got pickles {pickles}, which can run any code when they are "
            "read. If you trust them, load the model with transformers in a place that holds nothing else, and call "
            "save_pretrained: it writes safetensors."
        )


def _rope_types(config: Any) -> set[str]:
    """Rotary scalings of all layers; transformers 5 has one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    return {str(kind.get("rope_type", kind.get("type", "default"))) for kind in kinds}


def _supported() -> str:
    return "supported are " + ", ".join(f"{names} ({type_})" for type_, names in FAMILIES.items()) + "."
