"""The packed relevance graph in ONNX, through Optimum."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import torch
from optimum.exporters.onnx.base import OnnxConfig
from optimum.exporters.onnx.convert import export_pytorch
from optimum.utils import DummyInputGenerator, NormalizedTextConfig
from torch import nn

from csrm.export.graph_files import GraphWriter
from csrm.export.last_tokens import keep_last_tokens
from csrm.export.streamed import decoder_name, empty_language_model
from csrm.scoring.packing import Group, Pack, lay_out
from csrm.training.model.quiet import quiet_libraries
from csrm.training.model.relevance import PackedRelevanceModel

OPSET = 18
_DOMAIN = "csrm"
_ABSENT = f"{_DOMAIN}::Absent"

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


class _Absent(torch.autograd.Function):
    """A matrix that is not there: zeros of its shape in the trace, a node with its name in the graph."""

    @staticmethod
    def forward(ctx: Any, seed: torch.Tensor, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return seed.expand(shape)

    @staticmethod
    def symbolic(g: Any, seed: Any, name: str, shape: tuple[int, ...]) -> Any:
        return g.op(_ABSENT, name_s=name).setType(seed.type().with_sizes(list(shape)))


class _Structure(PackedRelevanceModel):
    """A model with no matrices: its small weights are read, and label rows stand for the LM head."""

    rows: torch.Tensor

    def __init__(self, model: PackedRelevanceModel, weights: Mapping[str, torch.Tensor]) -> None:
        language_model = empty_language_model(model.config)
        super().__init__(language_model, model.label_ids.tolist())
        self.register_buffer("rows", model.label_rows().detach().clone())
        for path, module in language_model.get_decoder().named_modules(prefix=decoder_name(language_model)):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.ndim == 1:
                    setattr(module, name, nn.Parameter(weights[f"{path}.{name}"], requires_grad=False))
                    continue
                delattr(module, name)
                module.seed = nn.Parameter(torch.zeros(1), requires_grad=False)
                module.register_forward_pre_hook(_Fill(name, f"{path}.{name}", tuple(parameter.shape)))

    def label_rows(self) -> torch.Tensor:
        return self.rows


class _Fill(NamedTuple):
    """Gives a module a matrix that is not there, within the trace."""

    attribute: str
    weight: str
    shape: tuple[int, ...]

    def __call__(self, module: Any, inputs: tuple[Any, ...]) -> None:
        setattr(module, self.attribute, _Absent.apply(module.seed, self.weight, self.shape))


def export_packed_graph(model: PackedRelevanceModel, path: Path) -> None:
    """Write the model as an ONNX graph from a Pack to logits, float32.

    The graph is traced without matrices; each one is then read from the model and written, one at a time.

    Args:
        model: adapters merged, float32, on the CPU; or a csrm.export.streamed.StreamedModel.
        path: of the graph; see csrm.export.graph_files.GraphWriter.
    """
    weights = model.weights()
    structure = _Structure(model, weights).eval()
    with quiet_libraries():
        export_pytorch(structure, PackedRelevanceOnnxConfig(model.config, task="feature-extraction"), OPSET, path)
    graph_model = onnx.load(path)
    graph = graph_model.graph
    absent = {node.output[0]: node.attribute[0].s.decode() for node in graph.node if node.domain == _DOMAIN}
    turned = {
        node.output[0]: absent[node.input[0]]
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in absent
    }
    nodes = [node for node in graph.node if node.output[0] not in absent.keys() | turned.keys()]
    for node in nodes:
        node.input[:] = [absent.get(name) or turned.get(name) or name for name in node.input]
    del graph.node[:]
    graph.node.extend(nodes)
    kept = [opset for opset in graph_model.opset_import if opset.domain != _DOMAIN]
    del graph_model.opset_import[:]
    graph_model.opset_import.extend(kept)
    with GraphWriter(path) as writer:
        for name in absent.values():
            weight = weights[name].detach()
            graph.initializer.append(writer.add(name, weight.T if name in turned.values() else weight))
        keep_last_tokens(graph_model)
        writer.save(graph_model)
