"""The packed relevance graph in ONNX, through Optimum."""

from pathlib import Path
from typing import Any

import torch
from optimum.exporters.onnx import export
from optimum.exporters.onnx.base import OnnxConfig
from optimum.utils import DummyInputGenerator, NormalizedTextConfig

from csrm.scoring.packing import Group, Pack, lay_out
from csrm.training.model.relevance import PackedRelevanceModel

OPSET = 18


_DIMENSIONS: dict[str, tuple[str, ...]] = {
    "input_ids": ("tokens",),
    "position_ids": ("tokens",),
    "group_index": ("groups", "group_tokens"),
    "prefix_index": ("groups", "prefix_tokens"),
    "product_index": ("products", "product_tokens"),
    "group_place": ("tokens",),
    "product_place": ("tokens_of_products",),
    "last_index": ("products",),
}
"""Names of the dimensions of each field of Pack."""


def example_pack() -> Pack:
    """Prefixes and products of several lengths, also of one token: every kind of token that a graph meets."""
    return lay_out([Group([1, 2, 3], [[4, 5], [6]]), Group([7, 8], [[9, 10, 11]]), Group([2], [[3], [1, 5, 9, 7]])])


class _ExampleInputs(DummyInputGenerator):
    SUPPORTED_INPUT_NAMES = Pack._fields

    def __init__(self, task: str, normalized_config: Any, **kwargs: Any) -> None:
        self._inputs = example_pack()._asdict()

    def generate(self, input_name: str, **kwargs: Any) -> torch.Tensor:
        return torch.from_numpy(self._inputs[input_name])


class PackedRelevanceOnnxConfig(OnnxConfig):
    """Inputs and outputs of the packed graph, for Optimum."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (_ExampleInputs,)
    DEFAULT_ONNX_OPSET = OPSET

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return {name: dict(enumerate(dimensions)) for name, dimensions in _DIMENSIONS.items()}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return {"logits": {0: "products"}}


class _ExportedModel(PackedRelevanceModel):
    """The model with its label rows as a weight of their own, so that no other row of the LM head is exported."""

    rows: torch.Tensor

    def __init__(self, model: PackedRelevanceModel) -> None:
        super().__init__(model.language_model, model.label_ids.tolist())
        self.register_buffer("rows", model.label_rows().detach().clone())

    def label_rows(self) -> torch.Tensor:
        return self.rows


def export_packed_graph(model: PackedRelevanceModel, path: Path) -> None:
    """Write the model as an ONNX graph from a Pack to logits, float32.

    Args:
        model: adapters merged, float32, on the CPU.
        path: of the graph; weights over 2 GB go beside it.
    """
    export(_ExportedModel(model).eval(), PackedRelevanceOnnxConfig(model.config, task="feature-extraction"), path)
