"""Model families that can be exported: those whose packed graph is proven by tests against plain forward passes."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from csrm.errors import ConfigError
from csrm.training.model.base import BaseModel

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


def check_model(base_model: BaseModel, prompt_tokens: int) -> None:
    """Refuse a model that would not be exported right, from its configuration alone.

    Args:
        prompt_tokens: most tokens of a prompt.

    Raises:
        ConfigError: another family, or a setting of it that packs do not honour; weights in a pickle only.
    """
    source = base_model.source()
    if base_model.folder is not None and base_model.gguf_file is None:
        check_weights(Path(base_model.folder))
    try:
        config = AutoConfig.from_pretrained(**source, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(
            f"model {base_model.name!r}: {_supported()} Its configuration cannot be read: {error}"
        ) from error
    check_config(config, prompt_tokens)


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
        raise ConfigError(f"model of type {config.model_type!r} cannot be exported: {'; '.join(problems)}.")


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
