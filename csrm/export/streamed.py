"""A model of any size in torch: each layer's weights are read when it runs, and let go after it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import no_init_weights

from csrm.training.model.relevance import PackedRelevanceModel


def empty_language_model(config: Any) -> PreTrainedModel:
    """The causal language model of a configuration, with shapes instead of weights; rotary tables are there."""
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa"
        )
    model.tie_weights()  # making it apart from its weights took its two names of one apart
    return model.eval()


def decoder_name(language_model: Any) -> str:
    """Name of the decoder in the model, which begins the names of its weights."""
    decoder = language_model.get_decoder()
    return next(name for name, module in language_model.named_modules() if module is decoder)


class StreamedModel(PackedRelevanceModel):
    """A packed relevance model without weights of its own: each module of the decoder reads them when it runs.

    At most one layer or the embedding is in memory. Score many pairs a call: each call reads all weights once.
    """

    rows: torch.Tensor

    def __init__(
        self, language_model: Any, weights: Mapping[str, torch.Tensor], rows: torch.Tensor, label_ids: Sequence[int]
    ) -> None:
        """Wrap a language model.

        Args:
            language_model: of empty_language_model; adapters may be around it.
            weights: of all parameters of the decoder, float32; read each time that a module runs.
            rows: of the LM head that belong to the labels, shape (labels, hidden).
            label_ids: see PackedRelevanceModel.
        """
        super().__init__(language_model, label_ids)
        self._weights = weights
        self.register_buffer("rows", rows, persistent=False)
        decoder, prefix = language_model.get_decoder(), decoder_name(language_model)
        for name, module in decoder.named_modules(prefix=prefix):
            if module in (decoder.embed_tokens, decoder.norm, *decoder.layers):
                held = _Held(weights, module, name)
                module.register_forward_pre_hook(held.read)
                module.register_forward_hook(held.let_go)

    def label_rows(self) -> torch.Tensor:
        return self.rows

    def weights(self) -> Mapping[str, torch.Tensor]:
        return self._weights


class _Place(NamedTuple):
    """Where a weight belongs."""

    module: nn.Module
    attribute: str
    name: str
    """Of the weight in the whole model."""
    empty: nn.Parameter


class _Held:
    """The weights of one module, while it runs."""

    def __init__(self, weights: Mapping[str, torch.Tensor], module: nn.Module, name: str) -> None:
        self._weights = weights
        self._places = [
            _Place(part, attribute, f"{path}.{attribute}", empty)
            for path, part in module.named_modules(prefix=name)
            for attribute, empty in part.named_parameters(recurse=False)
        ]

    def read(self, *_: Any) -> None:
        for place in self._places:
            weight = nn.Parameter(self._weights[place.name], requires_grad=False)
            setattr(place.module, place.attribute, weight)

    def let_go(self, *_: Any) -> None:
        for place in self._places:
            setattr(place.module, place.attribute, place.empty)
