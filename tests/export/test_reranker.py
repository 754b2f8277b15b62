"""A reranker as it is: a bundle of a model that nobody trained here gives the answers of plain transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from csrm.artefacts.manifest import load_manifest, write_manifest
from csrm.bundle.card import bundle_card
from csrm.bundle.loading import load_bundle, load_scorer
from csrm.cli import Console, run_job, setting_arguments
from csrm.commands import export_bundle as command
from csrm.errors import BundleError, ConfigError, InputError
from csrm.export.bundle import export_bundle
from csrm.export.pairs import proof_pairs
from csrm.export.settings import ExportConfig
from csrm.export.source import Reranker, open_source
from csrm.night.messages import warn_of_query_languages
from csrm.scoring.prompts import prompt_text
from csrm.scoring.scorer import pair_texts
from csrm.training.model.tiny import train_byte_tokenizer, write_tiny_base_model
from csrm.training.recipe import train_relevance
from csrm.training.settings import TrainConfig
from csrm.training.trained import load_trained

CONF = Path(__file__).parents[2] / "conf" / "export_bundle_reranker.yaml"
SETTINGS: dict[str, Any] = yaml.safe_load(CONF.read_text(encoding="utf-8"))
BUDGETS = {"prefix": 500, "query": 100, "title": 200, "brand": 50, "category": 50, "attributes": 100, "suffix": 500}
"""Room for whole prompts of the tests' pairs, in a tokenizer that knows little text."""


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Reranker:
    """A random model of the shape of Qwen3, whose tokenizer has the tokens of Qwen3-Reranker's template."""
    template, answers = SETTINGS["reranker"]["template"], "yes no\nyes\nno " * 1000
    tokenizer = train_byte_tokenizer([template["opening"], answers], vocab_size=700)
    tokenizer.add_tokens(["<think>", "</think>"])
    folder = tmp_path_factory.mktemp("reranker") / "base"
    write_tiny_base_model(folder, tokenizer, initializer_range=0.25, seed=7)
    base_model = {"base_model": {"folder": str(folder)}, "budgets": BUDGETS}
    return Reranker.model_validate(SETTINGS["reranker"] | base_model)


@pytest.fixture(scope="module")
def bundle_dir(reranker: Reranker, pairs_pdf: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reranked") / "bundle"
    export_bundle(reranker, folder, pairs_pdf)
    return folder


def plain_scores(reranker: Reranker, pairs: pd.DataFrame) -> np.ndarray:
    """P(yes) of each pair by transformers alone: the whole prompt as one text, the logits after its last token."""
    folder = str(reranker.base_model.folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    answers = tokenizer.convert_tokens_to_ids(["no", "yes"])
    scores = []
    for query, product in pair_texts(pairs):
        ids = tokenizer(prompt_text(query, product, reranker.template), return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            logits = model(**ids).logits[0, -1, answers]
        scores.append(float(logits.softmax(-1)[1]))
    return np.array(scores)


def test_packs_and_onnx_give_the_answers_of_plain_transformers(
    reranker: Reranker, bundle_dir: Path, pairs_pdf: pd.DataFrame
) -> None:
    expected = plain_scores(reranker, pairs_pdf)
    assert expected.std() > 0.05
    scores = load_scorer(bundle_dir, "cpu", threads=1).score(pairs_pdf)
    np.testing.assert_allclose(scores["relevance_score"], expected, atol=1e-5)
    assert scores["predicted_grade"].tolist() == np.where(expected > 0.5, "yes", "no").tolist()


def test_another_template_gives_other_answers(reranker: Reranker, pairs_pdf: pd.DataFrame) -> None:
    """Negative control of the test above: without the think block, no tolerance would hide it."""
    template = {**SETTINGS["reranker"]["template"], "cue": "<|im_end|>\n<|im_start|>assistant\n"}
    other = Reranker.model_validate({**reranker.model_dump(), "template": template})
    differences = np.abs(plain_scores(other, pairs_pdf) - plain_scores(reranker, pairs_pdf))
    assert np.median(differences) > 1e-2


def test_a_bundle_with_another_template_fails_its_golden_pairs(bundle_dir: Path, tmp_path: Path) -> None:
    bundle_dir = Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))
    about = load_manifest(bundle_dir, "bundle").about
    about["template"]["cue"] = "<|im_end|>\n<|im_start|>assistant\n"
    write_manifest(bundle_dir, "bundle", about)
    message = r"golden pair 0 .*: expected \d+ tokens .* The tokenizer is another model's, .* or the template is\."
    with pytest.raises(BundleError, match=message):
        load_scorer(bundle_dir, "cpu", threads=1)


def test_the_bundle_says_what_it_is(reranker: Reranker, bundle_dir: Path) -> None:
    bundle = load_bundle(bundle_dir)
    assert bundle.settings.template == reranker.template
    assert bundle.settings.origin.trained_model is None
    assert "model.safetensors" in bundle.settings.origin.base_model_files
    card = bundle_card(bundle)
    assert ", as it is\n" in card
    assert r"own template, cue '<|im_end|>\n<|im_start|>assistant\n<think>" in card


def test_a_language_that_no_prompt_shows_is_no_reason_for_a_warning(
    bundle_dir: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_of_query_languages(load_bundle(bundle_dir), {"ko-KR": 2}, markets={"kr": "ko"}, console=Console())
    assert capsys.readouterr().out == ""
    warn_of_query_languages(load_bundle(tiny_bundle), {"ko-KR": 2}, markets={"kr": "ko"}, console=Console())
    assert "such as 'ko-KR' (2)" in capsys.readouterr().out


def written(pairs: pd.DataFrame, folder: Path, **columns: list[str]) -> dict[str, dict[str, str]]:
    """Tables of these pairs as inputs of a job: queries, catalog, and one with these columns beside the pairs' keys."""
    pairs = pairs.assign(query_id=pairs["query"], product_id=pairs["title"].str[:5])
    tables = {
        "queries": ["market", "query_id", "query"],
        "catalog": ["market", "product_id", "title", "brand"],
        **{name: ["market", "query_id", "product_id", *more] for name, more in columns.items()},
    }
    for name, columns_there in tables.items():
        pairs[columns_there].drop_duplicates().to_parquet(folder / f"{name}.parquet")
    return {name: {"path": str(folder / f"{name}.parquet"), "format": "parquet"} for name in tables}


def test_a_reranker_needs_no_judgments(
    reranker: Reranker, bundle_dir: Path, pairs_pdf: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "reranker": reranker.model_dump(mode="json"),
        "inputs": written(pairs_pdf, tmp_path, candidates=[]),
        "bundle_dir": str(tmp_path / "bundle"),
        "parity_pairs": 20,
    }
    assert run_job(command.main, ["--config", str(CONF), *setting_arguments(**settings)]) == 0
    assert "on 20 pairs" in capsys.readouterr().out
    sample = pairs_pdf[["market", "language", "query", "title"]].head(5)
    scores = [load_scorer(folder, "cpu").score(sample) for folder in (tmp_path / "bundle", bundle_dir)]
    np.testing.assert_allclose(scores[0]["relevance_score"], scores[1]["relevance_score"], atol=1e-5)


def test_pairs_without_a_text_prove_nothing(pairs_pdf: pd.DataFrame, tmp_path: Path) -> None:
    inputs = written(pairs_pdf.assign(query=""), tmp_path, candidates=[])
    config = ExportConfig.model_validate(SETTINGS | {"inputs": inputs})
    with pytest.raises(InputError, match=r"candidates .* expected pairs with a query and a title, got none in 256"):
        proof_pairs(config)


def test_a_reranker_can_be_trained_on_with_its_own_prompt(
    reranker: Reranker, bundle_dir: Path, pairs_pdf: pd.DataFrame, tmp_path: Path
) -> None:
    """A step that changes nothing, over all pairs: its loss is that of the reranker's answers, which stay."""
    judged = pairs_pdf[["market", "language", "query", "title", "brand"]].assign(grade=["yes", "no"] * 15)
    settings = {
        **reranker.model_dump(mode="json"),
        "markets": SETTINGS["markets"],
        "inputs": written(judged, tmp_path, judgments=["grade"]),
        "tuning": {"max_steps": 1, "packs_per_step": 1, "learning_rate": 1e-12, "method": "full"},
        "pack_tokens": 10_000,
        "model_dir": str(tmp_path / "model"),
    }
    train_relevance(TrainConfig.model_validate(settings))
    _, scorer, card = load_trained(tmp_path / "model")
    assert card.template == open_source(tmp_path / "model").template == reranker.template
    assert card.num_packs == 1
    expected = load_scorer(bundle_dir, "cpu", threads=1).score(judged)["relevance_score"]
    np.testing.assert_allclose(scorer.score(judged)["relevance_score"], expected, atol=1e-5)
    ((step,),) = [json.loads((tmp_path / "model" / "history.json").read_text(encoding="utf-8"))]
    answered = np.where(judged["grade"] == "yes", expected, 1 - expected)
    np.testing.assert_allclose(step["loss"], -np.log(answered).mean(), rtol=1e-3)


def test_what_is_trained_with_the_built_in_template_is_written_as_before(tiny_bundle: Path) -> None:
    assert "template" not in json.loads((tiny_bundle.parent / "model" / "model.json").read_text(encoding="utf-8"))
    assert "template" not in load_manifest(tiny_bundle, "bundle").about


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_dir": "model"}, "name one of model_dir, a trained folder, reranker, a model as it is, and ensemble"),
        ({"reranker": None}, "name one of model_dir, a trained folder, reranker, a model as it is, and ensemble"),
        ({"inputs": {name: {"path": name} for name in ("catalog", "queries")}}, "name judgments, or candidates"),
    ],
)
def test_an_export_without_one_model_or_pairs_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ExportConfig.model_validate(SETTINGS | changes)


def test_a_reranker_that_would_answer_at_random_is_refused(
    reranker: Reranker, pairs_pdf: pd.DataFrame, tmp_path: Path
) -> None:
    template = {**SETTINGS["reranker"]["template"], "cue": "<|eot_id|>"}
    with_head = Path(shutil.copytree(str(reranker.base_model.folder), tmp_path / "with head"))
    config = json.loads((with_head / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = ["Qwen3ForSequenceClassification"]
    (with_head / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for change, message in (
        ({"template": template}, r"got <\|eot_id\|>, which it does not have"),
        (
            {"labels": [{"name": name, "token": f"{name} way", "gain": name == "b"} for name in ("a", "b")]},
            "one token of the",
        ),
        ({"base_model": {"folder": str(tmp_path)}}, "is not there"),
        ({"base_model": {"folder": str(with_head)}}, "answers with a token, got Qwen3ForSequenceClassification"),
    ):
        other = Reranker.model_validate({**reranker.model_dump(), **change})
        with pytest.raises(ConfigError, match=message):
            export_bundle(other, tmp_path / "bundle", pairs_pdf)
    assert list(tmp_path.iterdir()) == [with_head]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([("no", 0.0), ("yes", 0.0)], "all have the gain 0, so every pair would have this score"),
        ([("yes", 0.0), ("yes", 1.0)], "expected at least two of different names"),
        ([("yes", 1.0)], "expected at least two of different names"),
    ],
)
def test_answers_that_cannot_tell_pairs_apart_are_refused(labels: list[tuple[str, float]], message: str) -> None:
    answers = [{"name": name, "token": f"{name}{number}", "gain": gain} for number, (name, gain) in enumerate(labels)]
    with pytest.raises(ValidationError, match=message):
        Reranker.model_validate({**SETTINGS["reranker"], "labels": answers})
