import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import GPT2Config

from csrm.artefacts.manifest import file_digest, write_manifest
from csrm.bundle.loading import load_bundle, load_scorer
from csrm.errors import BundleError, ConfigError, DeviceError, ParityError
from csrm.export import bundle as export_module
from csrm.export.packed_onnx import export_packed_graph
from csrm.export.parity import check_parity
from csrm.export.weights import TrainedWeights
from csrm.scoring.labels import ESCI_LABELS
from csrm.scoring.packing import Pack, build_packs, lay_out
from csrm.scoring.runtime import load_pack_scorer
from csrm.scoring.scorer import PairScorer, pair_groups
from csrm.scoring.tokenization import PromptTokenizer
from csrm.training.model.base import BaseModel, load_language_model
from csrm.training.model.relevance import PackedRelevanceModel, torch_pack_scorer
from csrm.training.trained import load_trained
from tests.training.model.test_relevance import MISTAKES


@pytest.fixture(scope="module")
def graph(loud_model: PackedRelevanceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    export_packed_graph(loud_model, path)
    return path


@pytest.mark.parametrize("pack_tokens", [352, 600, 2000, 100_000])
def test_onnx_equals_torch_for_any_shape(
    graph: Path,
    loud_model: PackedRelevanceModel,
    prompt_tokenizer: PromptTokenizer,
    pairs_pdf: pd.DataFrame,
    pack_tokens: int,
) -> None:
    onnx_scorer, _ = load_pack_scorer(graph, "cpu", threads=1)
    torch_scorer = torch_pack_scorer(loud_model)
    groups, _ = pair_groups(pairs_pdf, prompt_tokenizer)
    for pack in build_packs(groups, pack_tokens):
        expected = torch_scorer(pack)
        np.testing.assert_allclose(onnx_scorer(pack), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_in_the_pack_is_seen_by_the_graph(
    graph: Path,
    loud_model: PackedRelevanceModel,
    prompt_tokenizer: PromptTokenizer,
    pairs_pdf: pd.DataFrame,
    mistake: Callable[[Pack], Pack],
) -> None:
    onnx_scorer, _ = load_pack_scorer(graph, "cpu", threads=1)
    pack = lay_out(pair_groups(pairs_pdf, prompt_tokenizer)[0])
    expected = torch_pack_scorer(loud_model)(pack)
    assert np.abs(onnx_scorer(mistake(pack)) - expected).max() >= 100 * 1e-5 * np.abs(expected).max()


def test_only_the_label_rows_of_an_untied_head_are_exported(
    loud_model: PackedRelevanceModel, pairs_pdf: pd.DataFrame, prompt_tokenizer: PromptTokenizer, tmp_path: Path
) -> None:
    """The embedding (vocabulary x hidden) is there once, for the lookup; the head has one row for each label."""
    untied = copy.deepcopy(loud_model)
    vocabulary, hidden = untied.language_model.get_output_embeddings().weight.shape
    torch.manual_seed(1)
    untied.language_model.set_output_embeddings(torch.nn.Linear(hidden, vocabulary, bias=False))
    export_packed_graph(untied, tmp_path / "model.onnx")
    shapes = [tuple(tensor.dims) for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer]
    assert sum(vocabulary in shape for shape in shapes) == 1
    pack = lay_out(pair_groups(pairs_pdf, prompt_tokenizer)[0])
    expected = torch_pack_scorer(untied)(pack)
    actual = load_pack_scorer(tmp_path / "model.onnx", "cpu", threads=1)[0](pack)
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


def test_parity_is_measured_over_pairs_that_differ(tiny_bundle: Path) -> None:
    parity = load_bundle(tiny_bundle).settings.parity
    assert parity.num_pairs == 30
    assert parity.logit_margin_std >= 1
    assert parity.largest_score_difference <= 1e-5


def test_a_bundle_gives_the_same_scores_at_any_budget(tiny_bundle: Path, pairs_pdf: pd.DataFrame) -> None:
    pairs = pd.concat([pairs_pdf.assign(title=pairs_pdf["title"] + f" {number}") for number in range(4)])
    expected = load_scorer(tiny_bundle, "cpu", threads=1, tokens_per_call=1).score(pairs)["relevance_score"]
    assert expected.std() > 0.1
    for tokens_per_call in (500, 1_024, 16_384):
        scorer = load_scorer(tiny_bundle, "cpu", threads=1, tokens_per_call=tokens_per_call)
        np.testing.assert_allclose(scorer.score(pairs)["relevance_score"], expected, atol=1e-5)


def test_another_model_fails_parity(
    tiny_bundle: Path,
    pairs_pdf: pd.DataFrame,
    loud_model: PackedRelevanceModel,
    prompt_tokenizer: PromptTokenizer,
) -> None:
    """Negative control: the adapters of two training steps are difference enough."""
    bundle = load_scorer(tiny_bundle, "cpu", threads=1)
    untrained = PairScorer(
        prompt_tokenizer, ESCI_LABELS, pack_scorer=torch_pack_scorer(loud_model), tokens_per_call=512, provider="torch"
    )
    with pytest.raises(ParityError, match=r"pair \d+ of 30 .* with torch and .* The bundle was not written"):
        check_parity(pairs_pdf, untrained, bundle, tolerance=1e-4)


def test_a_failed_proof_leaves_no_bundle(
    tiny_bundle: Path, pairs_pdf: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "SCORE_TOLERANCE", -1.0)
    with pytest.raises(ParityError):
        export_module.export_bundle(str(tiny_bundle.parent / "model"), tmp_path / "bundle", pairs_pdf)
    assert list(tmp_path.iterdir()) == []


def test_merged_adapters_score_as_the_adapted_model(tiny_bundle: Path, pairs_pdf: pd.DataFrame) -> None:
    _, merged, card = load_trained(tiny_bundle.parent / "model")
    base = load_language_model(BaseModel(**card.base_model))
    adapted = PeftModel.from_pretrained(base, str(tiny_bundle.parent / "model" / "weights"))
    tokenizer = PromptTokenizer.from_file(tiny_bundle / "tokenizer.json", card.budgets)
    model = PackedRelevanceModel(adapted, tokenizer.label_ids(ESCI_LABELS))
    scorer = PairScorer(tokenizer, ESCI_LABELS, pack_scorer=torch_pack_scorer(model), tokens_per_call=512)
    np.testing.assert_allclose(merged.logits(pairs_pdf), scorer.logits(pairs_pdf), atol=1e-4)


def test_adapters_that_were_not_merged_are_seen(
    tiny_bundle: Path, pairs_pdf: pd.DataFrame, loud_model: PackedRelevanceModel, prompt_tokenizer: PromptTokenizer
) -> None:
    """Negative control: the base model alone, in place of the merged model."""
    model_dir = tiny_bundle.parent / "model"
    _, merged, card = load_trained(model_dir)
    weights = TrainedWeights(model_dir, card)
    export_module.check_merge(weights, prompt_tokenizer, merged, pairs_pdf)
    base = PairScorer(
        prompt_tokenizer, ESCI_LABELS, pack_scorer=torch_pack_scorer(loud_model), tokens_per_call=512, provider="base"
    )
    with pytest.raises(ParityError, match=r"pair \d+ of 30 .* with adapters and .* with base"):
        export_module.check_merge(weights, prompt_tokenizer, base, pairs_pdf)


def changed_model(tiny_bundle: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    """A trained folder that was changed, with a manifest that is right for it."""
    shutil.copytree(tiny_bundle.parent / "model", folder)
    change(folder)
    write_manifest(folder, "model")
    return folder


def pickled_adapters(folder: Path) -> None:
    (folder / "weights" / "adapter_model.safetensors").rename(folder / "weights" / "adapter_model.bin")


def labels_of_several_tokens(folder: Path) -> None:
    card = json.loads((folder / "model.json").read_text())
    card["labels"][0]["token"] = " certainly not"
    (folder / "model.json").write_text(json.dumps(card))


def another_family(folder: Path) -> None:
    base = folder.parent / "gpt2"
    GPT2Config().save_pretrained(base)
    card = json.loads((folder / "model.json").read_text())
    card["base_model"]["folder"] = str(base)
    (folder / "model.json").write_text(json.dumps(card))


def other_tokenizer(folder: Path) -> None:
    """A tokenizer that knows more tokens than the model."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["texttoken"])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pickled_adapters, r"expected safetensors, got pickles \['adapter_model\.bin'\]"),
        (labels_of_several_tokens, r"each must be one token of the tokenizer; ' certainly not' is \d tokens"),
        (another_family, r"model of type 'gpt2': supported are Qwen2"),
        (other_tokenizer, r"the tokenizer has tokens up to id \d+ .*, but the model has \d+ embeddings"),
    ],
)
def test_a_model_that_cannot_be_exported_is_one_clear_error_and_leaves_nothing(
    tiny_bundle: Path, pairs_pdf: pd.DataFrame, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    model_dir = changed_model(tiny_bundle, tmp_path / "model", change)
    with pytest.raises(ConfigError, match=message):
        export_module.export_bundle(model_dir, tmp_path / "out" / "bundle", pairs_pdf)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_a_model_that_gives_all_pairs_one_score_is_not_exported(
    tiny_bundle: Path, pairs_pdf: pd.DataFrame, tmp_path: Path
) -> None:
    """A training that went wrong: its last norm gives zeros, so all logits are zero."""

    def collapse(folder: Path) -> None:
        card = json.loads((folder / "model.json").read_text())
        base = Path(shutil.copytree(card["base_model"]["folder"], tmp_path / "base"))
        weights = load_file(base / "model.safetensors")
        weights["model.norm.weight"].zero_()
        save_file(weights, base / "model.safetensors", {"format": "pt"})
        card["base_model"]["folder"] = str(base)
        card["base_model_files"]["model.safetensors"] = file_digest(base / "model.safetensors")
        (folder / "model.json").write_text(json.dumps(card))

    model_dir = changed_model(tiny_bundle, tmp_path / "model", collapse)
    with pytest.raises(BundleError, match=r"expected scores that tell pairs apart, got 0\.277500 to 0\.277500 \(torch"):
        export_module.export_bundle(str(model_dir), tmp_path / "out" / "bundle", pairs_pdf)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_an_export_for_a_gpu_needs_one(tiny_bundle: Path, pairs_pdf: pd.DataFrame, tmp_path: Path) -> None:
    judged = pairs_pdf.assign(query_id=pairs_pdf["query"], grade=["E", "S", "C", "I", "I"] * 6)
    with pytest.raises(DeviceError, match="device 'cuda': needs CUDAExecutionProvider"):
        export_module.export_bundle(
            str(tiny_bundle.parent / "model"), tmp_path / "bundle", pairs_pdf, judged, precision="auto", device="cuda"
        )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_bundle_is_left_alone(tiny_bundle: Path, pairs_pdf: pd.DataFrame, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.txt").write_text("keep me")
    with pytest.raises(ConfigError, match=r"found something else\. It is left alone"):
        export_module.export_bundle(str(tiny_bundle.parent / "model"), tmp_path / "photos", pairs_pdf)
    assert (tmp_path / "photos" / "holiday.txt").read_text() == "keep me"


def test_grade_costs_go_into_the_bundle_and_change_no_score(
    tiny_bundle: Path, pairs_pdf: pd.DataFrame, tmp_path: Path
) -> None:
    model, names = str(tiny_bundle.parent / "model"), [label.name for label in ESCI_LABELS]
    costs = {name: {grade: 1_000.0 for grade in names if grade not in (name, "S")} for name in names}
    export_module.export_bundle(model, tmp_path / "costly", pairs_pdf, grade_costs=costs)
    found, plain = (
        load_scorer(folder, "cpu", threads=1).score(pairs_pdf) for folder in (tmp_path / "costly", tiny_bundle)
    )
    assert set(found["predicted_grade"]) == {"S"} != set(plain["predicted_grade"])
    np.testing.assert_allclose(found["relevance_score"], plain["relevance_score"], atol=1e-6)
    with pytest.raises(ConfigError, match=r"grade_costs: \['good'\] are no labels of the model"):
        export_module.export_bundle(model, tmp_path / "none", pairs_pdf, grade_costs={"good": {"E": 2.0}})
    assert not (tmp_path / "none").exists()
