"""Encoders at other precisions: a smaller graph is written where it loses little recall on judged pairs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest

from csrm.cli import run_job, setting_arguments
from csrm.commands.export_encoder import main, read_judged
from csrm.embedding import load_encoder
from csrm.embedding.contents import Recall
from csrm.errors import ConfigError, InputError, ParityError
from csrm.export.encoder import EncoderExportConfig, export_encoder
from csrm.export.encoder_precision import JudgedTexts, recall, write_gated
from tests.export.encoder_models import write_encoder_model

TITLES = [
    f"{colour} {thing} {size}" for colour in ("red", "blue", "검정") for thing in ("shoe", "텐트") for size in "SML"
]
QUERIES = ["red shoe", "텐트 M", "검정 shoe", "blue 텐트 L"]


def judged_texts() -> JudgedTexts:
    relevant = [
        {place for place, title in enumerate(TITLES) if set(query.split()) <= {*title.split()}} for query in QUERIES
    ]
    return JudgedTexts([("us", query) for query in QUERIES], [("us", title) for title in TITLES], relevant)


def config(model_dir: Path, encoder_dir: Path, **settings: Any) -> EncoderExportConfig:
    inputs = {name: {"path": "unread"} for name in ("catalog", "queries", "judgments")}
    values = {"model_dir": str(model_dir), "encoder_dir": str(encoder_dir), "inputs": inputs, **settings}
    return EncoderExportConfig.model_validate(values)


def test_recall_is_the_share_of_the_relevant_titles_among_the_first_ten_of_the_market() -> None:
    """Twelve titles of us, farther and farther from the query; one of kr, which is nearest but in another market."""
    angles = np.linspace(0.1, 1.2, 12)
    titles = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.arange(1, 13)[:, None]  # lengths do not count
    judged = JudgedTexts(
        [("us", "a"), ("us", "b")],
        [*(("us", str(place)) for place in range(12)), ("kr", "k")],
        [{0, 9, 10, 12}, {1}],
    )
    queries = np.array([[1.0, 0.0], [2.0, 0.0]])
    assert recall(queries, np.concatenate([titles, [[1.0, 0.0]]]), judged) == (2 / 4 + 1) / 2
    assert recall(queries, np.zeros((13, 2)), judged) == (2 / 4 + 1) / 2  # all alike: the first ones


@pytest.mark.parametrize("family", ["bert", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_a_precision_gives_nearly_the_vectors_of_the_model_in_a_smaller_file(
    family: str, precision: str, tmp_path: Path
) -> None:
    folder = write_encoder_model(tmp_path / "model", family)
    whole = export_encoder(config(folder, tmp_path / "fp32"), TITLES, QUERIES)
    encoder = export_encoder(
        config(folder, tmp_path / precision, precision=precision, max_recall_loss=0.2), TITLES, QUERIES, judged_texts()
    )
    settings = encoder.settings
    assert settings.precision == precision
    assert settings.recall is not None
    assert settings.recall.value >= settings.recall.of_torch - 0.2
    assert settings.recall.num_queries == len(QUERIES)
    vectors, expected = encoder.embed(TITLES), whole.embed(TITLES)
    cosines = (vectors * expected).sum(axis=1)
    assert 0.98 < cosines.min() < 1.0
    assert np.abs(vectors - expected).max() > 1e-5  # it is another graph
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).glob("model.onnx*")) for name in ("fp32", precision)]
    assert sizes[1] < 0.85 * sizes[0]
    assert sorted(file.name for file in (tmp_path / precision).iterdir()) == [
        *("golden.json", "manifest.json", "model.onnx", "tokenizer.json")
    ]
    assert load_encoder(tmp_path / precision).digest != whole.digest


@pytest.mark.parametrize(("family", "precision"), [("xlm-roberta", "int8"), ("xlm-roberta", "fp16"), ("qwen3", "fp16")])
def test_weights_beside_the_graph_as_above_2_gb_give_the_same_vectors(
    family: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_encoder_model(tmp_path / "model", family)
    settings = {"precision": precision, "max_recall_loss": 1.0}
    inside = export_encoder(config(folder, tmp_path / "inside", **settings), TITLES, QUERIES, judged_texts())
    monkeypatch.setenv("FORCE_ONNX_EXTERNAL_DATA", "1")  # Optimum writes a small model as a large one
    beside = export_encoder(config(folder, tmp_path / "beside", **settings), TITLES, QUERIES, judged_texts())
    np.testing.assert_array_equal(beside.embed(TITLES), inside.embed(TITLES))


def test_sums_over_tokens_and_lengths_stay_in_float32(tmp_path: Path) -> None:
    folder = write_encoder_model(tmp_path / "model", "bert")
    export_encoder(
        config(folder, tmp_path / "fp16", precision="fp16", max_recall_loss=1), TITLES, QUERIES, judged_texts()
    )
    graph = onnx.load(tmp_path / "fp16" / "model.onnx").graph
    halves = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
    halves |= {
        node.output[0]
        for node in graph.node
        if node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.FLOAT16
    }
    assert len(halves) > 10
    sums = [node for node in graph.node if node.op_type in ("ReduceSum", "ReduceL2")]
    assert sums
    assert not any(name in halves for node in sums for name in node.input)
    (output,) = graph.output
    assert output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_the_fastest_recipe_that_passes_is_taken_and_where_none_does_each_is_named(tmp_path: Path) -> None:
    folder = write_encoder_model(tmp_path / "model", "bert")
    export_encoder(config(folder, tmp_path / "fp32"), TITLES, QUERIES)

    def gated(*measured: float) -> Recall:
        found = iter(measured)
        return write_gated(
            tmp_path / "fp32" / "model.onnx",
            "int8",
            tmp_path / "int8" / "model.onnx",
            measure=lambda path: next(found),
            recall_of_torch=0.5,
            max_loss=0.01,
            num_queries=7,
        )

    assert gated(0.495).recipe == "8-bit weights by column, 8-bit activations by token"
    assert gated(0.4, 0.48, 0.4, 0.49).recipe == "8-bit weights in blocks of 32, float32 activations"
    with pytest.raises(ParityError, match=r"expected recall@10 of 0\.4900 or more on 7 judged queries .*blocks of 128"):
        gated(0.4, 0.48, 0.4, 0.4899)


def test_a_precision_that_loses_too_much_leaves_the_earlier_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from csrm.export import encoder as export

    folder = write_encoder_model(tmp_path / "model", "bert")
    digest = export_encoder(config(folder, tmp_path / "encoder"), TITLES, QUERIES).digest
    shares = iter([1.0, 0.5, 0.5, 0.5, 0.5])
    monkeypatch.setattr(export, "recall", lambda *_: next(shares))
    with pytest.raises(ParityError, match="Nothing was written"):
        export_encoder(config(folder, tmp_path / "encoder", precision="int8"), TITLES, QUERIES, judged_texts())
    assert load_encoder(tmp_path / "encoder").digest == digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "model"]


def test_another_precision_needs_judged_pairs(tmp_path: Path) -> None:
    inputs = {name: {"path": "unread"} for name in ("catalog", "queries")}
    with pytest.raises(ConfigError, match=r"precision int8: expected inputs\.judgments"):
        main(setting_arguments(model_dir=str(tmp_path), precision="int8", inputs=inputs))


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, dict[str, str]]:
    frames = {
        "catalog": [("us", f"p{place}", title) for place, title in enumerate(TITLES)] + [("kr", "p0", "텐트")],
        "queries": [("us", f"q{place}", query) for place, query in enumerate(QUERIES)] + [("us", "q9", " ")],
        "judgments": [
            *[("us", "q0", "p0", "E"), ("us", "q0", "p1", "E"), ("us", "q0", "p9", "I")],
            *[("us", "q1", "p4", "S"), ("us", "q9", "p4", "E"), ("us", "gone", "p4", "E"), ("us", "q2", "gone", "E")],
        ],
    }
    names = {"catalog": "product_id title", "queries": "query_id query", "judgments": "query_id product_id grade"}
    for name, rows in frames.items():
        pd.DataFrame(rows, columns=["market", *names[name].split()]).to_parquet(tmp_path / f"{name}.parquet")
    return {name: {"path": str(tmp_path / f"{name}.parquet"), "format": "parquet"} for name in frames}


def test_judged_texts_are_queries_with_relevant_titles_and_other_titles_of_their_markets(
    inputs: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    judged = read_judged(config(tmp_path, tmp_path, inputs=inputs, relevant_grades=("E", "S"), judged_titles=10))
    assert {
        query: {judged.titles[place][1] for place in relevant}
        for (_, query), relevant in zip(judged.queries, judged.relevant, strict=True)
    } == {QUERIES[0]: {TITLES[0], TITLES[1]}, QUERIES[1]: {TITLES[4]}}
    assert len(judged.titles) == len(set(judged.titles)) == 10
    assert {market for market, _ in judged.titles} == {"us"}
    with pytest.raises(InputError, match=r"expected pairs of the grades \['yes'\]"):
        read_judged(config(tmp_path, tmp_path, inputs=inputs, relevant_grades=("yes",)))


def test_the_command_exports_a_precision_and_its_card_says_what_it_lost(
    inputs: dict[str, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_dir = write_encoder_model(tmp_path / "model", "bert")
    words = setting_arguments(
        model_dir=str(model_dir),
        encoder_dir=str(tmp_path / "encoder"),
        inputs=inputs,
        precision="int8",
        max_recall_loss=1,
    )
    assert run_job(main, words) == 0
    about = json.loads((tmp_path / "encoder" / "manifest.json").read_text())["about"]["recall"]
    shown = capsys.readouterr().out
    assert f"recall@10 {about['value']:.4f} on 1 judged queries, {about['of_torch']:.4f} in torch" in shown
