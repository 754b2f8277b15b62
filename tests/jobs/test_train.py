"""Training and export as their users start them, on generated markets."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from csrm.artefacts.manifest import verify_manifest
from csrm.bundle.loading import load_scorer
from csrm.cli import run_job, setting_arguments
from csrm.commands import export_bundle, train
from csrm.training.model.tiny import train_byte_tokenizer, write_tiny_base_model
from csrm.training.settings import TranslationSettings
from csrm.training.tuning import Tuning

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def settings(market_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a small training on a generated market."""
    return {
        **market_settings,
        "translation": None,
        "tuning": {"method": "full", "max_steps": 3, "learning_rate": 1e-3},
        "distillation": None,
        "model_dir": str(tmp_path_factory.mktemp("train") / "model"),
    }


KILLED = """
import os, runpy, sys
from transformers import Trainer

folder, step, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
training_step = Trainer.training_step

def killed_at_its_step(trainer, *args):
    if folder in trainer.args.output_dir and trainer.state.global_step == step:
        os.kill(os.getpid(), number)
    return training_step(trainer, *args)

Trainer.training_step = killed_at_its_step
sys.argv[:] = sys.argv[4:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def signal_training(
    arguments: list[str], folder: str, step: int, number: signal.Signals
) -> subprocess.CompletedProcess[str]:
    """Run a training that gets a signal in the step after `step` of the stage whose checkpoints are in `folder`."""
    job = [str(ROOT / "jobs" / "train.py"), *arguments]
    command = [sys.executable, "-c", KILLED, folder, str(step), str(int(number)), *job]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def kill_training(arguments: list[str], folder: str, step: int) -> None:
    """Run a training that is killed after `step` steps of the stage whose checkpoints are in `folder`."""
    killed = signal_training(arguments, folder, step, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def test_a_trained_model_becomes_a_bundle_that_scores(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], pairs_pdf: pd.DataFrame
) -> None:
    assert run_job(train.main, setting_arguments(**settings)) == 0
    printed = capsys.readouterr().out
    assert "trained on" in printed
    assert "nDCG@10" in printed  # of the dev split
    export_settings = {"inputs": settings["inputs"], "model_dir": settings["model_dir"], "parity_pairs": 40}
    bundle = tmp_path / "bundle"
    assert run_job(export_bundle.main, setting_arguments(**export_settings, bundle_dir=str(bundle))) == 0
    assert "of the trained model on 40 pairs" in capsys.readouterr().out
    assert load_scorer(bundle, "cpu", threads=1).score(pairs_pdf)["relevance_score"].between(0, 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_cold_start_runs_all_stages_and_nothing_twice(
    method: str,
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    texts = [("ko", "en", f"수건 {number}", f"towel {number}x", "train") for number in range(20)]
    texts += [("ko", "en", "담요", "blanket", "dev"), ("ko", "en", "usb", "usb", "train")]
    names = ["source_language", "target_language", "source_text", "target_text", "split"]
    pd.DataFrame(texts, columns=names).to_parquet(tmp_path / "parallel.parquet")
    translation = {"parallel_text": {"path": str(tmp_path / "parallel.parquet"), "format": "parquet"}, "max_steps": 2}
    texts_of_us = {name: settings["inputs"][name] for name in ("catalog", "queries")}
    candidates = {"path": settings["inputs"]["judgments"]["path"], "format": "parquet"}  # the pairs, not the grades
    unlabelled = {"inputs": {**texts_of_us, "candidates": candidates}, "markets": {"us": "en"}, "pairs_per_query": 4}
    queries = pd.read_parquet(settings["inputs"]["queries"]["path"])
    titles = queries["query"] + " of " + queries["query_id"]
    named = queries.assign(rank=1, product_id="t", title=titles, similarity=1.0, source="lexical")
    named.to_parquet(tmp_path / "titles.parquet")
    title_pairs = {
        "markets": {"us": "en"},
        "queries": settings["inputs"]["queries"],
        "retrieval_table": {"path": str(tmp_path / "titles.parquet"), "format": "parquet"},
        "max_queries": 3,
    }
    judged = pd.read_parquet(settings["inputs"]["judgments"]["path"])
    judged.assign(score=judged["grade"].map({"E": 9, "S": 7, "C": 3, "I": 1})).to_parquet(tmp_path / "scores.parquet")
    scores = {"path": str(tmp_path / "scores.parquet"), "format": "parquet"}
    teacher = {"inputs": {**texts_of_us, "scores": scores}, "markets": {"us": "en"}, "pairs_per_query": 2}
    said = queries[queries["market"] == "kr"].rename(columns={"query_id": "id"})
    said = said.assign(kind="query", language="en", text="said " + said["id"])
    said[["market", "kind", "id", "language", "text"]].to_parquet(tmp_path / "said.parquet")
    changes = {
        "translation": translation,
        "title_pairs": title_pairs,
        "teacher": teacher,
        "translated_rows": {"texts": {"path": str(tmp_path / "said.parquet"), "format": "parquet"}},
        "distillation": {"rounds": 1, "num_folds": 2, "control": True, "unlabelled": unlabelled},
        "markets": {"kr": "ko", "tw": "zh-TW"},
        "tuning": {"method": method, "max_steps": 2, "random_negatives": 0.5},
        "model_dir": str(tmp_path / "model"),
    }
    arguments = setting_arguments(**{**settings, **changes})
    assert run_job(train.main, arguments) == 0
    printed = capsys.readouterr().out
    assert "translation: 20 pairs of texts to learn from, left out: 1 copy; 2 held-out texts: loss " in printed
    assert "given labels look wrong, the clearest first: " in printed
    assert "  kept\n" in printed
    assert "3 queries have a title that names them" in caplog.text
    assert "judged pairs are learnt in other languages too: en" in caplog.text
    learnt = judged[(judged["market"] == "us") & (judged["split"] == "train")]["query_id"].nunique()
    assert f"teacher: {2 * learnt} pairs without a label to learn; label probabilities by " in printed
    assert "scoring the" not in caplog.text  # dev again, after it chose the round
    stages = tmp_path / "model.stages"
    assert {path.name for path in stages.iterdir() if path.suffix != ".logs"} == {
        *("translation", "round-0", "round-1-teacher-0", "round-1-teacher-1", "round-1", "round-1-control"),
        *("round-1-teacher-0-beliefs.parquet", "round-1-teacher-1-beliefs.parquet", "round-1-soft_labels.parquet"),
        *("round-1-control_labels.parquet", "rounds.json", "label_issues.parquet", "report.html"),
        *("translation_quality.json", "teacher_labels.parquet"),
    }
    assert len(list(stages.glob("*.logs/events.out.tfevents.*"))) == 6
    page = (stages / "report.html").read_text(encoding="utf-8")
    assert all(
        word in page
        for word in ("translation", "round-1", "Calibration on the dev split", "Given labels that look wrong")
    )
    rounds = json.loads((stages / "rounds.json").read_text())
    best = rounds[rounds[1]["dev_auc"] - rounds[0]["dev_auc"] > max(0.005, rounds[1]["gain_error"])]
    assert 0 < rounds[1]["num_unlabelled"] == 4 * learnt < 4 * 12
    assert all(0 < round_["dev_auc"] < 1 for round_ in rounds)
    assert rounds[1]["flips"]["num_pairs"] == rounds[1]["calibration"]["num_pairs"]
    assert rounds[1]["control_auc"] is not None
    assert verify_manifest(tmp_path / "model", "model") == verify_manifest(best["model_dir"], "model")
    issues = pd.read_parquet(stages / "label_issues.parquet")
    assert {"query", "title", "grade", "suggested_label", "given_probability"} <= set(issues.columns)

    def made() -> dict[Path, int]:
        return {
            path: path.stat().st_mtime_ns for path in (*stages.glob("*/model.json"), *stages.glob("*-beliefs.parquet"))
        }

    before = made()
    assert len(before) == 6 + 2
    assert run_job(train.main, arguments) == 0
    assert made() == before
    assert caplog.text.count("not trained again") == 6


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_training_that_was_killed_goes_on_to_the_same_weights(
    method: str, settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    tuning = {"method": method, "max_steps": 30, "packs_per_step": 1, "checkpoint_steps": 3, "learning_rate": 1e-3}
    whole, killed = (
        setting_arguments(**{**settings, "tuning": tuning, "model_dir": str(tmp_path / name)})
        for name in ("whole", "killed")
    )
    assert run_job(train.main, whole) == 0

    kill_training(killed, "killed.unfinished", 7)
    assert not (tmp_path / "killed").exists()

    assert run_job(train.main, killed) == 0
    assert re.search(r" 30 steps of .*, from .*/checkpoint-6\n", caplog.text)
    weights = [load_file(next((tmp_path / name / "weights").glob("*.safetensors"))) for name in ("whole", "killed")]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=0, msg=name)
    assert not (tmp_path / "killed.unfinished").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_that_a_signal_stops_goes_on_or_becomes_a_model(
    number: signal.Signals, settings: dict[str, Any], tmp_path: Path
) -> None:
    tuning = {"method": "lora", "max_steps": 12, "packs_per_step": 1, "learning_rate": 1e-3, "eval_steps": 3}
    whole, stopped = (
        setting_arguments(**{**settings, "tuning": tuning, "model_dir": str(tmp_path / name)})
        for name in ("whole", "stopped")
    )
    assert run_job(train.main, whole) == 0
    got = signal_training(stopped, "stopped.unfinished", 7, number)
    assert got.returncode == 128 + number, got.stderr
    message = f"error: training: {number.name} stopped it after step 8 of 12; a checkpoint is kept in "
    assert message in got.stderr
    assert "Start it again to go on, or with --finish to make a model of its best step so far." in got.stderr
    assert "Traceback" not in got.stderr
    assert not (tmp_path / "stopped").exists()

    assert run_job(train.main, [*stopped, "--finish"]) == 0
    card = json.loads((tmp_path / "stopped" / "model.json").read_text())
    assert card["kept_step"] in (3, 6)
    assert json.loads((tmp_path / "stopped" / "history.json").read_text())[-1]["step"] == 8
    export = {"inputs": settings["inputs"], "model_dir": str(tmp_path / "stopped"), "parity_pairs": 40}
    bundle = tmp_path / "bundle"
    assert run_job(export_bundle.main, setting_arguments(**export, bundle_dir=str(bundle))) == 0

    assert run_job(train.main, stopped) == 0
    weights = [load_file(next((tmp_path / name / "weights").glob("*.safetensors"))) for name in ("whole", "stopped")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=0, msg=name)
    assert not (tmp_path / "stopped.unfinished").exists()


@pytest.mark.slow
def test_a_training_of_limited_time_that_a_signal_stops_becomes_a_model(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuning = {"method": "full", "max_steps": 12, "packs_per_step": 1, "learning_rate": 1e-3, "eval_steps": 0}
    changes = {"tuning": tuning, "max_minutes": 30, "model_dir": str(tmp_path / "model")}
    arguments = setting_arguments(**{**settings, **changes})
    got = signal_training(arguments, "model.unfinished", 4, signal.SIGTERM)
    assert got.returncode == 128 + signal.SIGTERM, got.stderr
    assert "Start it again to begin anew, for its time is limited, or with --finish" in got.stderr
    assert run_job(train.main, [*arguments, "--finish"]) == 0
    assert "5 steps of 1 packs" in capsys.readouterr().out
    assert verify_manifest(tmp_path / "model", "model")
    assert run_job(train.main, arguments) == 0  # and begun anew
    assert "12 steps of 1 packs" in capsys.readouterr().out


@pytest.mark.slow
def test_a_distillation_that_was_killed_goes_on_at_its_teacher(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    changes = {
        "distillation": {"rounds": 1, "choose_by": "agreement"},
        "tuning": {"method": "lora", "max_steps": 20, "packs_per_step": 1, "checkpoint_steps": 3},
    }
    whole, killed = (
        setting_arguments(**{**settings, **changes, "model_dir": str(tmp_path / name)}) for name in ("whole", "killed")
    )
    assert run_job(train.main, whole) == 0

    stages = tmp_path / "killed.stages"
    kill_training(killed, "round-1-teacher-1.unfinished", 4)
    assert (stages / "round-1-teacher-0" / "manifest.json").exists()
    assert not (tmp_path / "killed").exists()

    caplog.clear()
    assert run_job(train.main, killed) == 0
    assert "round-1-teacher-0: has ended before" in caplog.text
    assert re.search(r" 20 steps of .*, from .*round-1-teacher-1.*/checkpoint-3\n", caplog.text)
    for path in (tmp_path / "whole.stages").rglob("*"):
        if path.name.endswith(("_labels.parquet", "adapter_model.safetensors")):
            other = stages / path.relative_to(tmp_path / "whole.stages")
            assert path.read_bytes() == other.read_bytes(), path
    rounds = [json.loads((folder / "rounds.json").read_text()) for folder in (tmp_path / "whole.stages", stages)]
    assert [round_["agreement"] for round_ in rounds[0]] == [round_["agreement"] for round_ in rounds[1]]


@pytest.mark.slow
def test_parallel_text_without_splits_whose_languages_have_other_names(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    texts = [("ko-KR", "en", f"수건 {number}", f"towel {number}x") for number in range(40)]
    names = ["source_language", "target_language", "source_text", "target_text"]
    pd.DataFrame(texts, columns=names).to_parquet(tmp_path / "parallel.parquet")
    parallel = {"path": str(tmp_path / "parallel.parquet"), "format": "parquet"}
    changes = {"translation": {"parallel_text": parallel, "epochs": 0.01}, "model_dir": str(tmp_path / "model")}
    assert run_job(train.main, setting_arguments(**{**settings, **changes})) == 0
    assert "40 pairs of texts to learn from, left out: none; not measured, for no text is of split dev" in (
        capsys.readouterr().out
    )
    assert "no text of languages ['ko', 'zh-TW']" in caplog.text
    assert " 1 steps" in caplog.text  # of translation: its epochs replace max_steps


@pytest.mark.parametrize(
    ("given", "max_steps", "epochs"),
    [
        ({}, 5, 1.0),
        ({"max_steps": 800}, 800, 1.0),
        ({"epochs": 2.0}, None, 2.0),
        ({"max_steps": 800, "epochs": 2.0}, None, 2.0),
    ],
)
def test_epochs_of_the_translation_replace_every_number_of_steps(
    given: dict[str, Any], max_steps: int | None, epochs: float
) -> None:
    translation = TranslationSettings.model_validate({"parallel_text": {"path": "x"}, **given})
    tuning = translation.tuning(Tuning(max_steps=5))
    assert (tuning.max_steps, tuning.epochs) == (max_steps, epochs)


def test_judgments_without_rows_to_train_on_are_an_error(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = dict(settings["inputs"])
    judgments = pd.read_parquet(inputs["judgments"]["path"])
    judgments[judgments["split"] == "dev"].to_parquet(tmp_path / "judgments.parquet")
    inputs["judgments"] = {"path": str(tmp_path / "judgments.parquet"), "format": "parquet"}
    assert run_job(train.main, setting_arguments(**{**settings, "inputs": inputs})) == 2
    assert "no rows of split train; splits are ['dev']" in capsys.readouterr().err


def test_a_true_grade_without_a_label_is_an_error_before_anything_is_trained(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = dict(settings["inputs"])
    judgments = pd.read_parquet(inputs["judgments"]["path"])
    judgments.loc[judgments.index[judgments["split"] == "train"][0], "true_grade"] = "partly"
    judgments.to_parquet(tmp_path / "judgments.parquet")
    inputs["judgments"] = {"path": str(tmp_path / "judgments.parquet"), "format": "parquet"}
    changes = {"inputs": inputs, "distillation": {"rounds": 1}, "model_dir": str(tmp_path / "model")}
    assert run_job(train.main, setting_arguments(**{**settings, **changes})) == 2
    assert "judgments: true_grades ['partly'] have no label; labels are" in capsys.readouterr().err
    assert not (tmp_path / "model.stages").exists()


def test_a_tokenizer_that_spells_a_language_in_bytes_is_named(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = write_tiny_base_model(tmp_path / "english", train_byte_tokenizer(["wireless mouse", "towel"] * 50, 400))
    changes = {"base_model": {"folder": str(base)}, "model_dir": str(tmp_path / "model")}
    assert run_job(train.main, setting_arguments(**{**settings, **changes})) == 0
    warned = [record.getMessage() for record in caplog.records if "splits the text into bytes" in record.getMessage()]
    assert [message.split(":")[0] for message in warned] == ["language ko", "language zh-TW"]


def test_distillation_needs_a_dev_split(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"distillation": {"rounds": 1}, "dev_split": "clean"}
    assert run_job(train.main, setting_arguments(**{**settings, **changes})) == 2
    message = "no rows of split clean; splits are ['dev', 'test', 'train']. The dev split chooses the round: set"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"markets": {"jp": "ja"}}, "no rows for markets ['jp']"),
        ({"markets": {}}, "markets: Dictionary should have at least 1 item"),
        (
            {"labels": [{"name": "E", "token": " yes", "gain": 1.0}, {"name": "I", "token": " no", "gain": 0}]},
            "no label",
        ),
        ({"pack_tokens": 100}, "a prefix with one suffix may take 352 tokens"),
        ({"tuning": {"max_steps": 0}}, "tuning.max_steps"),
        ({"base_model": {"folder": "nowhere"}}, "'nowhere/config.json' is not there"),
        ({"labels": [{"name": "E", "token": " yes", "gain": 2.0}]}, "its gain is 2.0"),
        ({"labels": [{"name": "E", "token": " yes", "gain": 1.0}]}, "at least two of different names, got ['E']"),
        ({"grade_labels": {"exact": "X"}}, "grade_labels name ['X']; labels are"),
        ({"dev_split": "train"}, "dev_split is 'train', what is learnt"),
        (
            {"translation": {"parallel_text": {"path": "nowhere"}, "held_out_split": "train"}},
            "translation.held_out_split: Value error, is what is learnt: name a split that is not (got 'train')",
        ),
        (
            {"translation": {"parallel_text": {"path": "nowhere"}, "text_tokens": 256}},
            "text_tokens is 256, but two texts fit a pack of 512 tokens, pack_tokens, with at most 224 each",
        ),
    ],
)
def test_bad_settings_end_with_exit_code_2_and_their_reason(
    settings: dict[str, Any], change: dict, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job(train.main, setting_arguments(**{**settings, **change})) == 2
    assert message in capsys.readouterr().err


def test_a_broken_base_model_ends_with_exit_code_2_before_any_table_is_read(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(settings["base_model"]["folder"], tmp_path / "base"))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    changes = {"base_model": {"folder": str(folder)}, "model_dir": str(tmp_path / "model")}
    inputs = {name: {"path": "nowhere"} for name in ("judgments", "queries", "catalog")}
    assert run_job(train.main, setting_arguments(**{**settings, **changes, "inputs": inputs})) == 2
    message = capsys.readouterr().err
    assert "it was cut off, or is still being copied" in message
    assert "nowhere" not in message
    assert not list(tmp_path.glob("model*"))


def test_an_export_without_a_market_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job(export_bundle.main, setting_arguments(markets={})) == 2
    assert "markets: Dictionary should have at least 1 item" in capsys.readouterr().err
