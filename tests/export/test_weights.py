"""Weights go from a trained folder to a graph one at a time: the same numbers, and never the whole model in memory."""

import functools
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from csrm.artefacts.manifest import write_manifest
from csrm.errors import BundleError, ConfigError
from csrm.export import graph_files as graph_files_module
from csrm.export.bundle import check_merge, torch_scorer
from csrm.export.graph_files import graph_files
from csrm.export.half import fuse_norms
from csrm.export.packed_onnx import export_packed_graph
from csrm.export.precision import Recipe, write_precision
from csrm.export.streamed import StreamedModel, empty_language_model
from csrm.export.weights import FileWeights, TrainedWeights, Weights
from csrm.scoring.labels import ESCI_LABELS
from csrm.scoring.packing import Group, build_packs
from csrm.scoring.runtime import load_pack_scorer
from csrm.scoring.tokenization import PromptTokenizer
from csrm.training.model.base import BaseModel, load_language_model
from csrm.training.model.families import check_model
from csrm.training.model.relevance import PackedRelevanceModel, torch_pack_scorer
from csrm.training.trained import load_trained, read_card
from tests.export.test_families import FAMILIES, LABEL_IDS, SMALL, random_groups, tiny_model

METHODS = ("lora", "rslora", "dora", "full")


@pytest.fixture(scope="module")
def trained_by(
    train_on: Callable, pairs_pdf: pd.DataFrame, loud_base_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Trained folder of a method."""

    @functools.cache
    def train(method: str) -> Path:
        folder = tmp_path_factory.mktemp(method) / "model"
        graded = pairs_pdf.assign(grade=["E", "S", "C", "I", "I"] * 6)
        base = BaseModel(folder=str(loud_base_model))
        train_on(graded, base, folder, method=method, max_steps=3, learning_rate=1e-2, pairs_per_prefix=2)
        return folder

    return train


@pytest.mark.parametrize("method", METHODS)
def test_merged_weights_are_those_of_peft(
    method: str, trained_by: Callable[[str], Path], loud_base_model: Path
) -> None:
    trained = trained_by(method)
    card = read_card(trained)
    streamed = TrainedWeights(trained, card).merged_model([1, 2]).weights()
    expected = load_trained(trained)[0].language_model.state_dict()
    base = load_file(loud_base_model / "model.safetensors")
    changed = [name for name in base if not torch.equal(base[name].float(), expected[name])]
    assert len(changed) >= 14  # seven products in each of two layers
    for name in base:
        torch.testing.assert_close(streamed[name], expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS[:-1])
def test_adapters_beside_the_weights_score_as_peft_computes_them(
    method: str, trained_by: Callable[[str], Path], pairs_pdf: pd.DataFrame, prompt_tokenizer: PromptTokenizer
) -> None:
    trained = trained_by(method)
    card = read_card(trained)
    weights = TrainedWeights(trained, card)
    label_ids = prompt_tokenizer.label_ids(ESCI_LABELS)
    assert weights.has_adapters
    base = load_language_model(BaseModel(**card.base_model))
    whole = PackedRelevanceModel(PeftModel.from_pretrained(base, str(trained / "weights")), label_ids).eval()
    streamed = torch_pack_scorer(weights.adapted_model(label_ids))
    expected = torch_pack_scorer(whole)
    for pack in build_packs(random_groups(), 500):
        np.testing.assert_allclose(streamed(pack), expected(pack), atol=1e-4 * np.abs(expected(pack)).max())
    merged = torch_scorer(weights.merged_model(label_ids), prompt_tokenizer, ESCI_LABELS, "torch")
    check_merge(weights, prompt_tokenizer, merged, pairs_pdf)


class Watched(Weights):
    """Weights that know how many of their numbers are in memory at once."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        super().__init__(model.state_dict())
        self.now = self.most = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = super().__getitem__(name).clone()
        self.now += weight.numel()
        self.most = max(self.most, self.now)
        weakref.finalize(weight.untyped_storage(), self._forget, weight.numel())
        return weight

    def _forget(self, num: int) -> None:
        self.now -= num


@pytest.mark.parametrize("name", FAMILIES)
def test_a_streamed_model_has_the_logits_and_the_graph_of_the_whole_one(name: str, tmp_path: Path) -> None:
    plain = tiny_model(name)
    whole = PackedRelevanceModel(tiny_model(name), LABEL_IDS).eval()
    language_model = empty_language_model(plain.config)
    streamed = StreamedModel(language_model, Weights(plain.state_dict()), whole.label_rows().detach(), LABEL_IDS)
    for pack in build_packs(random_groups(), 60):
        np.testing.assert_array_equal(torch_pack_scorer(streamed)(pack), torch_pack_scorer(whole)(pack))
    assert {parameter.device.type for parameter in language_model.parameters()} == {"meta"}
    export_packed_graph(streamed, tmp_path / "streamed.onnx")
    export_packed_graph(whole, tmp_path / "whole.onnx")
    assert (tmp_path / "streamed.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    plain = tiny_model("gemma3")
    watched = Watched(plain)
    rows = plain.get_output_embeddings().weight[list(LABEL_IDS)].detach()
    streamed = StreamedModel(empty_language_model(plain.config), watched, rows, LABEL_IDS)
    torch_pack_scorer(streamed)(next(build_packs(random_groups(), 500)))
    layer = sum(weight.numel() for weight in plain.model.layers[0].parameters())
    embedding = plain.model.embed_tokens.weight.numel()
    assert watched.now == 0
    assert watched.most == max(layer, embedding) < 0.5 * plain.num_parameters()


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every graph has its weights beside it, as that of a large model."""
    monkeypatch.setattr(graph_files_module, "_INLINE_BYTES", 0)


def write_all(model: PackedRelevanceModel, folder: Path) -> dict[str, Path]:
    """A graph of each kind."""
    folder.mkdir()
    export_packed_graph(model, folder / "fp32.onnx")
    fuse_norms(folder / "fp32.onnx", folder / "fused.onnx")
    paths = {name: folder / f"{name}.onnx" for name in ("fp32", "fused", "fp16", "int8", "int4")}
    write_precision(paths["fused"], Recipe("fp16", bits=16), paths["fp16"])
    write_precision(paths["fp32"], Recipe("int8", bits=8), paths["int8"])
    write_precision(paths["fp32"], Recipe("int4", bits=4, float_layers=("o_proj",)), paths["int4"])
    return paths


@pytest.mark.parametrize("name", ["qwen2 untied, sliding", "qwen3", "gemma3"])
def test_a_graph_with_its_weights_beside_it_computes_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = PackedRelevanceModel(tiny_model(name), LABEL_IDS).eval()
    inside = write_all(model, tmp_path / "inside")
    monkeypatch.setattr(graph_files_module, "_INLINE_BYTES", 0)
    outside = write_all(model, tmp_path / "outside")
    pack = next(build_packs(random_groups(), 500))
    for kind, path in outside.items():
        assert [len(graph_files(paths[kind])) for paths in (inside, outside)] == [1, 1 if kind == "fused" else 2]
        expected, found = (load_pack_scorer(paths[kind], "cpu", threads=1)[0](pack) for paths in (inside, outside))
        np.testing.assert_array_equal(found, expected)
        assert path.stat().st_size < 400_000


@pytest.mark.usefixtures("beside")
def test_fusing_norms_reads_no_matrix(tmp_path: Path) -> None:
    export_packed_graph(PackedRelevanceModel(tiny_model("qwen3"), LABEL_IDS).eval(), tmp_path / "fp32.onnx")
    (tmp_path / "fp32.onnx_data").unlink()
    fuse_norms(tmp_path / "fp32.onnx", tmp_path / "fused.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp32.onnx", "fused.onnx"]


def test_weights_of_two_bytes_in_several_files_are_read_as_transformers_reads_them(
    loud_base_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(loud_base_model, tmp_path / "base"))
    halves = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    places = {name: f"part-{number % 3}.safetensors" for number, name in enumerate(halves)}
    for file in set(places.values()):
        part = {name: halves[name] for name, place in places.items() if place == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    found, expected = FileWeights(folder), load_language_model(BaseModel(folder=str(folder))).state_dict()
    assert set(found) == expected.keys() - {"lm_head.weight"}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def of_text_and_images(folder: Path) -> transformers.PreTrainedModel:
    """A seeded Gemma 3 of the kind that 4 billion weights and more come as."""
    family = FAMILIES["gemma3"][1]
    config = transformers.Gemma3Config(
        text_config={**SMALL, **family, "pad_token_id": 0},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        image_token_index=158,
        boi_token_index=157,
        eoi_token_index=156,
    )
    torch.manual_seed(0)
    model: transformers.PreTrainedModel = transformers.Gemma3ForConditionalGeneration(config)
    model.save_pretrained(folder)
    return model.eval()


def as_transformers_5_names_it(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    renamed = {
        name.replace("language_model.model.", "model.language_model."): tensor for name, tensor in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("rename", [lambda folder: None, as_transformers_5_names_it], ids=["4", "5"])
def test_the_language_model_is_taken_out_of_a_model_of_text_and_images(
    rename: Callable[[Path], None], tmp_path: Path
) -> None:
    whole = of_text_and_images(tmp_path / "gemma")
    rename(tmp_path / "gemma")
    base = BaseModel(folder=str(tmp_path / "gemma"))
    check_model(base, 352)
    loaded = load_language_model(base)
    assert loaded.config.model_type == "gemma3_text"
    weights = FileWeights(tmp_path / "gemma")
    assert all(torch.equal(weights[name], weight) for name, weight in loaded.named_parameters())
    ids = torch.tensor([[5, 9, 30, 7, 21]])
    with torch.inference_mode():
        expected = whole(input_ids=ids).logits[0, -1, list(LABEL_IDS)].numpy()
    assert np.ptp(expected) > 0.1
    rows = loaded.get_output_embeddings().weight[list(LABEL_IDS)].detach()
    streamed = StreamedModel(empty_language_model(loaded.config), weights, rows, LABEL_IDS)
    export_packed_graph(streamed, tmp_path / "model.onnx")
    (pack,) = build_packs([Group([5, 9, 30], [[7, 21]])], 500)
    found = load_pack_scorer(tmp_path / "model.onnx", "cpu", threads=1)[0](pack)[0]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.ptp(expected))


def without_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def wider(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 64)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_weight, r"its files lack 1 weights .* such as model\.layers\.1\.mlp\.up_proj\.weight"),
        (wider, r"1 weights have other shapes .*up_proj\.weight: expected \(128, 64\), got \(3, 64\)"),
    ],
)
def test_weights_of_another_configuration_are_refused_before_any_is_used(
    trained_by: Callable[[str], Path], tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    folder = Path(shutil.copytree(trained_by("full"), tmp_path / "model"))
    change(folder / "weights")
    write_manifest(folder, "model")
    with pytest.raises(ConfigError, match=message):
        TrainedWeights(folder, read_card(folder))


def test_adapters_of_another_model_are_refused(trained_by: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained_by("lora"), tmp_path / "model"))
    path = folder / "weights" / "adapter_model.safetensors"
    save_file({name.replace("layers.1.", "layers.7."): tensor for name, tensor in load_file(path).items()}, path)
    write_manifest(folder, "model")
    message = r"change 7 layers that base model .* does not have, such as model\.layers\.7"
    with pytest.raises(BundleError, match=message):
        TrainedWeights(folder, read_card(folder))
