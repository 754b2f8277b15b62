import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModel

from csrm.artefacts.manifest import write_manifest
from csrm.cli import setting_arguments
from csrm.commands.export_encoder import main
from csrm.embedding import load_encoder
from csrm.embedding.contents import GoldenTexts
from csrm.errors import BundleError, ConfigError, InputError, ParityError
from csrm.export import encoder as export
from csrm.export.encoder import EncoderExportConfig, encoder_settings, export_encoder
from tests.export.encoder_models import FAMILIES, HIDDEN_SIZE, write_encoder_model, write_json

TITLES = ["캠핑 텐트 4인용", "無線藍牙耳機", "Red running shoe, size 42", "x", "🎁 gift " * 40]
QUERIES = ["tent", "耳機 無線", "빨간 운동화"]
UNREAD = {"catalog": {"path": "unread"}, "queries": {"path": "unread"}}


def config(model_dir: Path, encoder_dir: Path, **settings: object) -> EncoderExportConfig:
    values = {"model_dir": str(model_dir), "encoder_dir": str(encoder_dir), "inputs": UNREAD, **settings}
    return EncoderExportConfig.model_validate(values)


def plain_vector(folder: Path, family: str, text: str) -> np.ndarray:
    """Vector of one text by transformers alone: no batch, no padding, pooled by hand."""
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    if len(ids) > 24:
        ids = [*ids[:23], ids[-1]]
    with torch.inference_mode():
        tokens = AutoModel.from_pretrained(folder).eval()(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
    mean = tokens.mean(axis=0)
    vector = {"bert": mean, "gemma3_text": mean, "xlm-roberta": tokens[0], "qwen3": tokens[-1]}[family]
    for path in sorted(folder.glob("*_Dense/model.safetensors")):
        vector = load_file(path)["linear.weight"].numpy() @ vector
    return np.asarray(vector / np.linalg.norm(vector))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_encoder_gives_the_vectors_of_its_model(family: str, tmp_path: Path) -> None:
    folder = write_encoder_model(tmp_path / "model", family)
    encoder = export_encoder(config(folder, tmp_path / "encoder"), TITLES, QUERIES)
    expected = np.array([plain_vector(folder, family, title) for title in TITLES])
    np.testing.assert_allclose(encoder.embed(TITLES), expected, atol=2e-5)
    of_queries = np.array([plain_vector(folder, family, f"find: {query}") for query in QUERIES])
    np.testing.assert_allclose(encoder.embed(QUERIES, "query"), of_queries, atol=2e-5)
    similarities = expected @ expected.T
    assert similarities[~np.eye(len(TITLES), dtype=bool)].max() < 0.99  # texts can be told apart
    assert encoder.settings.smallest_cosine >= 0.9999
    assert encoder.provider == "CPUExecutionProvider"


def test_linear_layers_that_cannot_be_exported_are_named(tmp_path: Path) -> None:
    folder = write_encoder_model(tmp_path / "model", "gemma3_text")
    values = json.loads((folder / "2_Dense" / "config.json").read_text())
    write_json(
        folder / "2_Dense" / "config.json", {**values, "activation_function": "torch.nn.modules.activation.Tanh"}
    )
    (folder / "3_Dense" / "model.safetensors").unlink()
    write_json(folder / "3_Dense" / "config.json", {**values, "out_features": HIDDEN_SIZE})
    with pytest.raises(ConfigError) as caught:
        encoder_settings(config(folder, tmp_path / "encoder"))
    message = str(caught.value)
    assert "2_Dense: activation 'torch.nn.modules.activation.Tanh'; only Identity is supported" in message
    assert "3_Dense/config.json: expected in_features 96, got {'in_features': 32" in message
    assert "3_Dense: there is no model.safetensors" in message


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder_model(tmp_path_factory.mktemp("encoder") / "model", "bert")


@pytest.fixture(scope="module")
def encoder_dir(model_dir: Path) -> Path:
    export_encoder(config(model_dir, model_dir.parent / "encoder"), TITLES, QUERIES)
    return model_dir.parent / "encoder"


def test_the_manifest_says_what_the_models_folder_says(model_dir: Path, encoder_dir: Path) -> None:
    settings = load_encoder(encoder_dir).settings
    assert (settings.pooling, settings.normalize, settings.dimensions) == ("mean", True, HIDDEN_SIZE)
    assert (settings.query_prefix, settings.passage_prefix, settings.max_tokens) == ("find: ", "", 24)
    assert list(settings.model_files) == ["model.safetensors"]


def test_settings_of_the_export_win_over_those_of_the_folder(model_dir: Path, tmp_path: Path) -> None:
    changes = {"pooling": "cls", "normalize": False, "dimensions": 8, "passage_prefix": "p: ", "max_tokens": 9}
    encoder = export_encoder(config(model_dir, tmp_path / "encoder", **changes), TITLES, QUERIES)
    full = export_encoder(config(model_dir, tmp_path / "full", **changes | {"dimensions": None}), TITLES, QUERIES)
    vectors = encoder.embed(TITLES)
    assert vectors.shape == (len(TITLES), 8)
    np.testing.assert_allclose(vectors, full.embed(TITLES)[:, :8], atol=1e-6)
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).min() > 0.05
    assert max(len(ids) for ids in encoder.tokenizer.token_ids(TITLES, "passage")) == 9


def test_a_vector_does_not_depend_on_other_texts_or_their_order(encoder_dir: Path) -> None:
    encoder = load_encoder(encoder_dir)
    together = encoder.embed(TITLES)
    np.testing.assert_allclose(encoder.embed(TITLES[::-1])[::-1], together, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([encoder.embed([title]) for title in TITLES]), together, atol=1e-6)
    assert encoder.embed([]).shape == (0, HIDDEN_SIZE)
    assert np.isfinite(encoder.embed([""])).all()


def test_special_tokens_in_a_text_are_text(encoder_dir: Path) -> None:
    encoder = load_encoder(encoder_dir)
    start, *within, end = encoder.tokenizer.token_ids(["a <|im_end|> b"], "passage")[0]
    assert {start, end}.isdisjoint(within)


def test_a_changed_file_another_digest_or_other_vectors_are_refused(encoder_dir: Path, tmp_path: Path) -> None:
    digest = load_encoder(encoder_dir).digest
    with pytest.raises(BundleError, match="expected digest 0000, got"):
        load_encoder(encoder_dir, digest="0000")
    assert load_encoder(encoder_dir, digest=digest[:8]).digest == digest

    def changed(name: str, change: Callable[[dict[str, Any]], None]) -> Path:
        folder = tmp_path / name.partition(".")[0]
        shutil.copytree(encoder_dir, folder)
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))
        if name != "manifest.json":
            about = json.loads((encoder_dir / "manifest.json").read_text())["about"]
            write_manifest(folder, "encoder", about)
        return folder

    def turn(values: dict[str, Any]) -> None:
        values["texts"][0]["vector"] = values["texts"][0]["vector"][::-1]

    with pytest.raises(BundleError, match=r"golden text 'tent': its vector has cosine .* with that of torch"):
        load_encoder(changed("golden.json", turn))
    with pytest.raises(BundleError, match="was edited"):
        load_encoder(changed("manifest.json", lambda values: values["about"].update(pooling="cls")))
    with pytest.raises(BundleError, match=r"golden text .*: expected \d+ tokens"):
        load_encoder(changed("tokenizer.json", lambda values: values.update(post_processor=None)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dimensions": 33}, "dimensions is 33, but the model has 32"),
        ({"max_tokens": 65}, "max_tokens is 65, but the model was made for 64"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(
    model_dir: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        export_encoder(config(model_dir, tmp_path / "encoder", **settings), TITLES, QUERIES)
    assert not (tmp_path / "encoder").exists()


def test_all_problems_of_a_models_folder_come_in_one_message(tmp_path: Path) -> None:
    folder = write_encoder_model(tmp_path / "model", "bert", modules=("Transformer", "Pooling", "LayerNorm"))
    write_json(folder / "1_Pooling" / "config.json", {"pooling_mode_max_tokens": True})
    values = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**values, "model_type": "electra"})
    with pytest.raises(ConfigError) as caught:
        encoder_settings(config(folder, tmp_path / "encoder"))
    message = str(caught.value)
    assert "models of type 'electra' are not supported, only bert, xlm-roberta, qwen3, gemma3_text" in message
    assert "modules.json has LayerNorm; only Transformer, Pooling, Dense, Normalize are supported" in message
    assert "its Pooling/config.json has pooling_mode_max_tokens. Set 'pooling'" in message


def test_a_folder_that_is_no_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json.* is not there"):
        encoder_settings(config(tmp_path, tmp_path / "encoder"))


def test_the_command_proves_the_encoder_on_texts_of_the_tables(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog = [{"market": "us", "product_id": f"p{n}", "title": title} for n, title in enumerate([*TITLES, None, " "])]
    queries = [{"market": "us", "query_id": f"q{n}", "query": query} for n, query in enumerate(QUERIES * 2)]
    for name, rows in (("catalog", catalog), ("queries", queries)):
        (tmp_path / f"{name}.json").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    values = {
        "model_dir": model_dir,
        "encoder_dir": tmp_path / "encoder",
        "query_prefix": None,
        "passage_prefix": None,
        "parity_texts": 4,
        "inputs": {name: {"path": tmp_path / f"{name}.json", "format": "json"} for name in ("catalog", "queries")},
    }
    assert main(setting_arguments(**values)) == 0
    settings = load_encoder(tmp_path / "encoder").settings
    assert settings.query_prefix == "find: "
    golden = GoldenTexts.read(tmp_path / "encoder" / "golden.json")
    assert set(golden.texts) <= {*TITLES, *QUERIES}
    assert (golden.kinds.count("query"), golden.kinds.count("passage")) == (3, 4)
    assert "proven on 7 texts" in capsys.readouterr().out
    (tmp_path / "queries.json").write_text('{"market": "us", "query_id": "q", "query": " "}\n')
    with pytest.raises(InputError, match=r"queries .*expected texts in column query, got none"):
        main(setting_arguments(**values))


def test_nothing_is_written_where_the_vectors_do_not_agree(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "MIN_COSINE", 1.1)  # more than any two vectors have
    with pytest.raises(ParityError, match=r"have cosine [01]\.\d+, expected at least 1\.1\. Nothing was written"):
        export_encoder(config(model_dir, tmp_path / "encoder"), TITLES, QUERIES)
    assert list(tmp_path.iterdir()) == []


def test_the_command_bundle_shows_and_verifies_encoders(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from csrm.commands.bundle import main

    digest = load_encoder(tiny_encoder).digest
    assert main(["show", str(tiny_encoder)]) == 0
    shown = capsys.readouterr().out
    assert f"digest      {digest}\n" in shown
    assert "32 dimensions, mean pooling, length 1" in shown
    assert "at most 24 tokens; prefixes 'find: ' (query), '' (title)" in shown

    monkeypatch.setenv("CSRM_CACHE_DIR", str(tmp_path / "cache"))
    assert main(["verify", tiny_encoder.as_uri()]) == 0
    assert "3 golden texts have their vectors on cpu (CPUExecutionProvider)" in capsys.readouterr().out
