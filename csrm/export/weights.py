"""The weights of a trained folder, read from its files one at a time, with adapters merged in."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file

from csrm.errors import BundleError, ConfigError
from csrm.export.streamed import StreamedModel, empty_language_model
from csrm.training.model.base import BaseModel, language_config, load_language_model, weight_name
from csrm.training.model.weight_files import tensor_files, tensor_shapes
from csrm.training.trained import ModelCard, check_base

_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ADAPTER_PREFIX = "base_model.model."


class Weights(Mapping[str, torch.Tensor]):
    """Weights of a language model by name, float32, in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes())

    def __len__(self) -> int:
        return len(self.shapes())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of each weight to its shape; none is read."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}


class FileWeights(Weights):
    """Weights in a folder in the format of save_pretrained. Nothing is kept: each look-up reads a file.

    Args:
        folder: with safetensors of any float type.

    Raises:
        ConfigError: see csrm.training.model.weight_files.tensor_files.

    Example:
        >>> FileWeights(Path("Qwen3-0.6B"))["model.norm.weight"].dtype                  # doctest: +SKIP
        torch.float32
    """

    def __init__(self, folder: Path) -> None:
        super().__init__({})
        shapes = tensor_shapes(folder)
        self._shapes = {weight_name(name): shape for name, shape in shapes.items()}
        self._places = {weight_name(name): (path, name) for name, path in tensor_files(folder).items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        path, stored = self._places[name]
        with safe_open(path, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(stored)
        return tensor.float()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes


class Adapters:
    """Low-rank adapters (Hu et al. 2021), which fit in memory, and what they make of a weight.

    Args:
        folder: that peft wrote.
    """

    def __init__(self, folder: Path) -> None:
        self.config: LoraConfig = LoraConfig.from_pretrained(str(folder))
        tensors = load_file(folder / "adapter_model.safetensors")
        self.tensors = {name.removeprefix(_ADAPTER_PREFIX): tensor.float() for name, tensor in tensors.items()}
        rank: float = self.config.r
        self._scale = self.config.lora_alpha / (rank**0.5 if self.config.use_rslora else rank)

    def check(self, base: Weights, name: str) -> None:
        """Refuse adapters of another model.

        Raises:
            BundleError: they change layers that it does not have.
        """
        modules = {key.partition(".lora_")[0] for key in self.tensors}
        if unknown := sorted(module for module in modules if f"{module}.weight" not in base.shapes()):
            raise BundleError(
                f"model: its adapters change {len(unknown)} layers that base model {name!r} does not have, such as "
                f"{unknown[0]}. Were they trained on another model?"
            )

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A weight with its adapter: W + scale * B A; with DoRA (Liu et al. 2024), its rows get their lengths."""
        module = name.removesuffix(".weight")
        if (left := self.tensors.get(f"{module}.lora_B.weight")) is None:
            return weight
        changed = torch.addmm(weight, left, self.tensors[f"{module}.lora_A.weight"], alpha=self._scale)
        if self.config.use_dora:
            changed *= (self.tensors[f"{module}.lora_magnitude_vector"] / changed.norm(dim=1))[:, None]
        return changed


class MergedWeights(Weights):
    """Weights of a base model with adapters merged, each when it is looked up."""

    def __init__(self, base: Weights, adapters: Adapters) -> None:
        super().__init__(base)
        self._adapters = adapters

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._adapters.merged(name, self._tensors[name])


class _AdaptedWeights(Weights):
    """Weights of a base model and of the adapters beside them, by the names that peft gives them."""

    def __init__(self, base: Weights, adapters: Adapters) -> None:
        super().__init__(base)
        self._adapters = adapters

    def __getitem__(self, name: str) -> torch.Tensor:
        own = name.removeprefix(_ADAPTER_PREFIX)
        if ".lora_" not in own:
            return self._tensors[own.replace(".base_layer.", ".")]
        stored = own.replace(".default", "")
        is_length = "lora_magnitude_vector" in stored
        return self._adapters.tensors[stored.removesuffix(".weight") if is_length else stored]


class ModelWeights:
    """What an export reads of a model.

    Args:
        base: the model.
        adapters: folder of the adapters that are merged into it; None: there are none.

    Raises:
        BundleError: the adapters are those of another model.
        ConfigError: the base model's files are not those of its configuration.
    """

    def __init__(self, base: BaseModel, adapters: Path | None = None) -> None:
        self.config: Any = language_config(base)
        self._base = _base_weights(base)
        self._adapters = None if adapters is None else Adapters(adapters)
        language_model = empty_language_model(self.config)
        check_shapes({name: weight.shape for name, weight in language_model.named_parameters()}, self._base, base.name)
        if self._adapters is not None:
            self._adapters.check(self._base, base.name)

    @property
    def has_adapters(self) -> bool:
        return self._adapters is not None

    def merged_model(self, label_ids: Sequence[int]) -> StreamedModel:
        """The model as it is exported."""
        weights = self._base if self._adapters is None else MergedWeights(self._base, self._adapters)
        return StreamedModel(empty_language_model(self.config), weights, self._rows(label_ids), label_ids)

    def adapted_model(self, label_ids: Sequence[int]) -> StreamedModel:
        """The model with adapters beside its weights, as peft computes it."""
        assert self._adapters is not None
        adapted = get_peft_model(empty_language_model(self.config), self._adapters.config)
        weights = _AdaptedWeights(self._base, self._adapters)
        return StreamedModel(adapted.eval(), weights, self._rows(label_ids), label_ids)

    def _rows(self, label_ids: Sequence[int]) -> torch.Tensor:
        return self._base[_EMBEDDINGS if self.config.tie_word_embeddings else _HEAD][list(label_ids)].clone()


class TrainedWeights(ModelWeights):
    """What an export reads of a trained folder.

    Args:
        folder: that training wrote; its digests were checked.
        card: of the folder.

    Raises:
        BundleError: a file of the base model of its adapters changed, or its adapters are those of another model.
        ConfigError: the base model is not where it was, or its files are not those of its configuration.
    """

    def __init__(self, folder: Path, card: ModelCard) -> None:
        check_base(folder, card)
        weights = folder / "weights"
        if card.tuning["method"] == "full":
            super().__init__(BaseModel(folder=str(weights)))
        else:
            super().__init__(BaseModel(**card.base_model), weights)


def check_shapes(expected: Mapping[str, torch.Size], weights: Weights, name: str) -> None:
    """Refuse files that are not those of a configuration.

    Raises:
        ConfigError: weights are missing, or have other shapes.
    """
    found = weights.shapes()
    if absent := sorted(expected.keys() - found.keys()):
        raise ConfigError(
            f"base_model {name!r}: its files lack {len(absent)} weights of the model that its configuration "
            f"describes, such as {absent[0]}. Are config.json and the weights of one model?"
        )
    if other := sorted(key for key, shape in expected.items() if found[key] != tuple(shape)):
        raise ConfigError(
            f"base_model {name!r}: {len(other)} weights have other shapes than its configuration asks for, such as "
            f"{other[0]}: expected {tuple(expected[other[0]])}, got {found[other[0]]}. Are config.json and the weights "
            "of one model?"
        )


def _base_weights(base: BaseModel) -> Weights:
    """Weights of a base model; those of a GGUF file, which transformers widens as a whole, are in memory."""
    if base.gguf_file is not None:
        return Weights(load_language_model(base).state_dict())
    if base.hub_name is not None:
        return FileWeights(Path(snapshot_download(base.hub_name, allow_patterns=["*.json", "*.safetensors"])))
    return FileWeights(Path(base.folder or ""))
