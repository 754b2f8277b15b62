"""The model and tokenizer that training starts from: a folder, a GGUF file, or, when named as such, a hub model."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import model_validator
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.convert_slow_tokenizer import generate_merges

from csrm.config import Settings
from csrm.errors import ConfigError
from csrm.training.model.quiet import quiet_libraries

_MOST_REASON = 300
_OF_TEXT_AND_IMAGES = {r"^model\.language_model\.": "model."}
"""How transformers 5 names the weights of a language model in a model of text and images, and their names alone. Before
it, they began with language_model, which from_pretrained itself takes off."""


class BaseModel(Settings):
    """Where the base model is."""

    folder: str | None = None
    """Folder in the format of save_pretrained (safetensors), or folder of gguf_file."""
    gguf_file: str | None = None
    """Name of a GGUF file in the folder; its weights are widened to float32."""
    hub_name: str | None = None
    """Name on the Hugging Face hub; the only setting that downloads."""

    @model_validator(mode="after")
    def _one_place(self) -> "BaseModel":
        if (self.folder is None) == (self.hub_name is None):
            raise ValueError("name either a folder or a hub_name")
        return self

    @property
    def name(self) -> str:
        """What people call it."""
        return self.hub_name or self.gguf_file or Path(self.folder or "").name

    def source(self) -> dict[str, Any]:
        """Arguments of from_pretrained.

        Raises:
            ConfigError: the folder or the file is not there.
        """
        if self.hub_name is not None:
            return {"pretrained_model_name_or_path": self.hub_name}
        folder = Path(self.folder or "")
        needed = folder / (self.gguf_file or "config.json")
        if not needed.is_file():
            raise ConfigError(f"base_model: {str(needed)!r} is not there. Is folder {str(folder)!r} right?")
        source: dict[str, Any] = {"pretrained_model_name_or_path": str(folder), "local_files_only": True}
        return source | ({"gguf_file": self.gguf_file} if self.gguf_file else {})


def model_title(base_model: BaseModel) -> str:
    """Which model it is, for people: a folder's name says little, so its architecture and size stand beside it.

    Example:
        >>> model_title(BaseModel(hub_name="google/gemma-3-270m"))
        'google/gemma-3-270m'
    """
    if base_model.folder is None or base_model.gguf_file is not None:
        return base_model.name
    config = language_config(base_model)
    hub_name = getattr(config, "name_or_path", "")
    came_from = f"{hub_name}, " if hub_name and not Path(hub_name).is_dir() else ""
    size = f"{config.num_hidden_layers} layers of {config.hidden_size}"
    return f"{base_model.name} ({came_from}{config.model_type}, {size})"


def language_config(base_model: BaseModel) -> Any:
    """The configuration of the language model; of a model of text and images (gemma3), that of its language model.

    Raises:
        Exception: transformers cannot read it; each kind of broken file has an error of its own.
    """
    config = AutoConfig.from_pretrained(**base_model.source(), trust_remote_code=False)
    return config.get_text_config() if config.model_type == "gemma3" else config


def weight_name(stored: str) -> str:
    """A weight's name in the causal language model.

    Args:
        stored: its name in the files, where a model may lack its LM head, or be part of a model of text and images.

    Example:
        >>> weight_name("language_model.model.norm.weight"), weight_name("norm.weight"), weight_name("lm_head.weight")
        ('model.norm.weight', 'model.norm.weight', 'lm_head.weight')
    """
    stored = stored.removeprefix("language_model.")
    for pattern, name in _OF_TEXT_AND_IMAGES.items():
        stored = re.sub(pattern, name, stored)
    return stored if stored.startswith(("model.", "lm_head.")) else f"model.{stored}"


def load_language_model(base_model: BaseModel) -> PreTrainedModel:
    """The causal language model in float32, with scaled-dot-product attention.

    Raises:
        ConfigError: its files are missing, broken, or do not hold all weights that its configuration asks for.
    """
    source = base_model.source()
    if base_model.gguf_file is None:
        source |= {"use_safetensors": True, "key_mapping": _OF_TEXT_AND_IMAGES}
    try:
        source["config"] = language_config(base_model)
        with quiet_libraries():
            model, loading = AutoModelForCausalLM.from_pretrained(
                **source, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
            )
    except Exception as error:  # each kind of broken file has an error of its own
        raise ConfigError(
            f"base_model {base_model.name!r}: its weights cannot be read: {_reason(error)}. Copy the model again."
        ) from error
    if absent := sorted(loading["missing_keys"]):  # transformers would make random ones
        raise ConfigError(
            f"base_model {base_model.name!r}: its files lack {len(absent)} weights of the model that its configuration "
            f"describes, such as {absent[0]}. Are config.json and the weights of one model?"
        )
    loaded: PreTrainedModel = model
    return loaded


def load_tokenizer(base_model: BaseModel) -> Tokenizer:
    """The model's fast tokenizer.

    Raises:
        ConfigError: its files are missing or broken, or make none that is fast.
    """
    source = base_model.source()
    try:
        tokenizer = _fast_tokenizer(base_model, source)
    except Exception as error:  # each kind of broken file has an error of its own
        raise ConfigError(
            f"base_model {base_model.name!r}: its tokenizer cannot be read: {_reason(error)}. The folder needs the "
            "model's tokenizer.json, or the files that transformers makes one of. Copy them from the same model."
        ) from error
    if not tokenizer.get_vocab_size():
        raise ConfigError(
            f"base_model {base_model.name!r}: its tokenizer has no tokens. Copy tokenizer.json from the same model."
        )
    return tokenizer


def _fast_tokenizer(base_model: BaseModel, source: dict[str, Any]) -> Tokenizer:
    if base_model.gguf_file is not None:
        rebuilt = _gemma_tokenizer(Path(source["pretrained_model_name_or_path"]) / base_model.gguf_file)
        if rebuilt is not None:
            return rebuilt
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(**source, use_fast=True).backend_tokenizer
    return tokenizer


def _reason(error: Exception) -> str:
    """What an error says, in one line."""
    text = (str(error).strip().splitlines() or [""])[0].strip().rstrip(".:")
    return f"{text[:_MOST_REASON] or 'no reason given'} ({type(error).__name__})"


def _gemma_tokenizer(path: Path) -> Tokenizer | None:
    """The BPE tokenizer of a Gemma GGUF file; None for other models.

    transformers 4.57 reads it as a unigram model with the merge ranks as scores, which splits most words (" yes" into
    two tokens). The file's scores are merge ranks, so byte-pair merges are rebuilt from them.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, decoders, models, normalizers, processors

    fields = GGUFReader(str(path)).fields
    if not str(fields["general.architecture"].contents()).startswith("gemma"):
        return None
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    scores: list[float] = fields["tokenizer.ggml.scores"].contents()
    types = np.array(fields["tokenizer.ggml.token_type"].contents())
    control_type = 3
    vocabulary = {token: id_ for id_, token in enumerate(tokens)}
    normal = [(token, score) for token, score in zip(tokens, scores, strict=True) if score < 0]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=generate_merges(vocabulary, normal),
            unk_token=tokens[int(fields["tokenizer.ggml.unknown_token_id"].contents())],
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(
        [AddedToken(tokens[id_], normalized=False, special=True) for id_ in np.flatnonzero(types == control_type)]
    )
    start_id = int(fields["tokenizer.ggml.bos_token_id"].contents())
    start = tokens[start_id]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, start_id)])
    return tokenizer
