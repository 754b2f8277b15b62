"""Several processes train what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from csrm.cli import run_job, setting_arguments
from csrm.commands import train

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

ROOT = Path(__file__).parents[2]
STAGES = ("model", "model.stages/translation")


@pytest.fixture(scope="module")
def settings(market_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Translation first, then mixed into the relevance stage."""
    path = tmp_path_factory.mktemp("devices") / "parallel.parquet"
    texts = [
        ("ko", "en", f"수건 {number}", "big " * (number % 7) + f"towel {number}x", "train") for number in range(90)
    ]
    texts.append(("ko", "en", "담요", "blanket", "dev"))
    names = ["source_language", "target_language", "source_text", "target_text", "split"]
    pd.DataFrame(texts, columns=names).to_parquet(path)
    parallel_text = {"path": str(path), "format": "parquet"}
    return {
        **market_settings,
        "tuning": {"method": "lora", "max_steps": 6, "packs_per_step": 4, "learning_rate": 1e-4},
        "translation": {"parallel_text": parallel_text, "max_steps": 3, "mixed_share": 0.5},
        "distillation": None,
    }


@pytest.fixture(scope="module")
def alone(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process trained."""
    folder = tmp_path_factory.mktemp("alone")
    assert run_job(train.main, setting_arguments(**settings, model_dir=str(folder / "model"))) == 0
    return folder


def assert_same_training(actual: Path, expected: Path) -> None:
    for name in STAGES:
        histories = [
            pd.DataFrame(json.loads((folder / name / "history.json").read_text())) for folder in (actual, expected)
        ]
        pd.testing.assert_frame_equal(*histories, rtol=1e-5)
        weights = [load_file(folder / name / "weights" / "adapter_model.safetensors") for folder in (actual, expected)]
        assert weights[0].keys() == weights[1].keys()
        for key, tensor in weights[0].items():
            torch.testing.assert_close(tensor, weights[1][key], rtol=1e-5, atol=1e-5)


def in_two_processes(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [*torchrun, "--nproc-per-node", "2", str(ROOT / "jobs" / "train.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_two_processes_train_the_model_that_one_trains(settings: dict[str, Any], alone: Path, tmp_path: Path) -> None:
    arguments = setting_arguments(**settings, model_dir=str(tmp_path / "model"))
    ended = in_two_processes(arguments)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("trained on") == 1
    assert_same_training(tmp_path, alone)

    again = in_two_processes(arguments)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("not trained again") == 2


@pytest.mark.slow
def test_what_is_wrong_ends_all_processes(settings: dict[str, Any], tmp_path: Path) -> None:
    tuning = {"packs_per_step": 3}
    ended = in_two_processes(setting_arguments(**{**settings, "tuning": tuning}, model_dir=str(tmp_path / "model")))
    assert ended.returncode != 0
    assert ended.stderr.count("tuning.packs_per_step: expected a multiple of 2, that is 2 processes times 1 ") == 1
    tuning = {"method": "full", "max_steps": 12, "learning_rate": 1e38}
    ended = in_two_processes(setting_arguments(**{**settings, "tuning": tuning}, model_dir=str(tmp_path / "model")))
    assert ended.returncode != 0
    assert "error: training: the loss is nan at step " in ended.stderr


@pytest.mark.slow
@pytest.mark.spark
def test_processes_that_spark_starts_train_the_same_model(
    settings: dict[str, Any], alone: Path, tmp_path: Path, spark: "SparkSession"
) -> None:
    from csrm.commands import train_on_spark

    arguments = setting_arguments(**settings, model_dir=str(tmp_path / "model"))
    assert run_job(train_on_spark.main, [*arguments, "--local", "--num-processes", "2"]) == 0
    assert_same_training(tmp_path, alone)
