"""Trainings and bundles in MLflow, on a real server with a SQLite store on this machine."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pydantic import Field

from csrm.artefacts import cache
from csrm.artefacts.cache import artefact_kind, fetch_folder, pinned
from csrm.artefacts.manifest import verify_manifest
from csrm.artefacts.tracking import register_bundle, tracked_run
from csrm.bundle.loading import load_bundle, load_scorer
from csrm.cli import run_job, setting_arguments
from csrm.commands import bundle, export_bundle, train
from csrm.config import Settings
from csrm.errors import BundleError, ConfigError

STARTS_WITHIN_S = 200


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of an MLflow server on loopback."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    uri = f"http://127.0.0.1:{port}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
        try:
            deadline = time.monotonic() + STARTS_WITHIN_S
            while not _answers(uri):
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.5)
            yield uri
        finally:
            process.terminate()
            process.wait(timeout=60)


def _answers(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@pytest.fixture
def client(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Client of the server, which is the one of this test's environment."""
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("CSRM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_used", {})
    return mlflow.MlflowClient(server)


@pytest.mark.slow
def test_a_training_and_its_bundle_are_one_run_and_the_registry_names_the_bundle(
    client: Any,
    market_settings: dict[str, Any],
    tmp_path: Path,
    pairs_pdf: pd.DataFrame,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model_dir, bundle_dir = tmp_path / "model", tmp_path / "bundle"
    settings = {
        **market_settings,
        "translation": None,
        "tuning": {"method": "full", "max_steps": 4, "learning_rate": 1e-3, "eval_steps": 2},
        "distillation": None,
        "tracking": "mlflow",
        "model_dir": str(model_dir),
    }
    assert run_job(train.main, setting_arguments(**settings)) == 0
    export = {"inputs": settings["inputs"], "model_dir": str(model_dir), "parity_pairs": 40, "tracking": "mlflow"}
    for _ in range(2):
        assert run_job(export_bundle.main, setting_arguments(**export, bundle_dir=str(bundle_dir))) == 0
    assert "registered as models:/csrm/2" in capsys.readouterr().out

    (run,) = client.search_runs([client.get_experiment_by_name("csrm").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["tuning.learning_rate"] == "0.001"
    assert run.data.params["markets.kr"] == "ko"
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in losses] == [1, 2, 3, 4]
    assert [point.step for point in client.get_metric_history(run.info.run_id, "dev_roc_auc")] == [2, 4]
    assert {"final/ndcg_at_10", "final/roc_auc"} <= set(run.data.metrics)
    assert run.data.tags["csrm.trained_model"] == verify_manifest(model_dir, "model")
    versions = [client.get_model_version("csrm", number) for number in ("1", "2")]
    first, digest = (version.tags["digest"] for version in versions)
    assert digest == verify_manifest(bundle_dir, "bundle") != first  # speed was measured again
    assert f"digest      {digest}" in versions[1].description
    assert {version.run_id for version in versions} == {run.info.run_id}
    kept = {item.path for item in client.list_artifacts(run.info.run_id)}
    bundles = {f"bundle-{each[:12]}{end}" for each in (first, digest) for end in ("", ".txt")}
    assert kept == {"report.html", "model.json", "history.json", *bundles}

    client.set_registered_model_alias("csrm", "champion", "1")
    assert pinned("models:/csrm@champion") == "models:/csrm/1"
    assert artefact_kind("models:/csrm@champion") == "bundle"
    assert load_bundle("models:/csrm@champion").digest == first
    client.set_registered_model_alias("csrm", "champion", "2")
    assert load_bundle("models:/csrm@champion").digest == digest
    folder = fetch_folder("models:/csrm/2", "bundle")
    assert folder.parent == tmp_path / "cache"
    assert load_scorer("models:/csrm/2", "cpu", threads=1).score(pairs_pdf)["relevance_score"].between(0, 1).all()
    assert run_job(bundle.main, ["show", "models:/csrm@champion"]) == 0
    assert digest in capsys.readouterr().out


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/nothing@champion", r"does not give it: .*nothing.* Is its name right, and MLFLOW_TRACKING_URI set"),
        ("models:/nothing/1", "does not give it: "),
        ("models:/csrm", "expected models:/name/version or models:/name@alias"),
    ],
)
def test_a_model_that_the_registry_has_not_is_named(client: Any, uri: str, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        load_bundle(uri)
    assert artefact_kind(uri) is None


class Nothing(Settings):
    """Settings of a run that does nothing."""

    learning_rate: float = 0.1
    place: str = "s3a://KEY:SECRET@bucket/catalog"
    inputs: dict[str, Any] = Field(default={"catalog": {"path": "x" * 7_000, "options": {"secret": "SECRET"}}})


def test_settings_are_logged_without_what_is_secret(client: Any) -> None:
    with tracked_run("mlflow", "model", Nothing()) as run:
        assert run is not None
    parameters = client.get_run(run.run_id).data.params
    assert parameters["learning_rate"] == "0.1"
    assert parameters["place"] == "s3a://***@bucket/catalog"
    assert len(parameters["inputs.catalog.path"]) == 6_000
    assert "SECRET" not in str(parameters)


class Grades(Nothing):
    grade_labels: dict[str, str] = Field(default={"good!": "E", "good?": "S"})


def test_settings_whose_names_are_one_to_mlflow_end_no_training(client: Any) -> None:
    with tracked_run("mlflow", "model", Grades()) as run:
        assert run is not None
    assert client.get_run(run.run_id).data.params["grade_labels.good_"] in ("E", "S")


def test_a_bundle_that_its_store_does_not_take_is_named(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    client.create_experiment("no room", artifact_location=(tmp_path / "file" / "folder").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "no room")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"the bundle is in '.*bundle', but MLflow did not take it: .*Not a directory"
    ):
        register_bundle(tmp_path / "bundle", "card", Nothing(), name="csrm", digest="0" * 64, trained_model="")


def test_a_run_that_mlflow_takes_no_more_ends_no_training(client: Any, caplog: pytest.LogCaptureFixture) -> None:
    with tracked_run("mlflow", "model", Nothing()) as run:
        assert run is not None
        run.log_metrics("model", {"loss": 1.0}, 1)
        client.delete_run(run.run_id)  # as a person may
        run.log_metrics("model", {"loss": 0.5}, 2)
        run.log_metrics("model", {"loss": 0.25}, 3)
    assert caplog.text.count("tracking: MLflow took no more, the training goes on without it") == 1


def test_how_a_run_ended_is_told(client: Any) -> None:
    ended = {}
    for error, status in ((None, "FINISHED"), (KeyboardInterrupt, "KILLED"), (ValueError, "FAILED")):
        try:
            with tracked_run("mlflow", "model", Nothing()) as run:
                assert run is not None
                if error is not None:
                    raise error
        except (KeyboardInterrupt, ValueError):
            pass
        ended[status] = client.get_run(run.run_id).info.status
    assert all(status == told for status, told in ended.items()), ended


@pytest.mark.parametrize("job", [train, export_bundle])
def test_a_server_that_is_not_there_is_told_before_anything_is_read(
    job: Any,
    market_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    inputs = {**market_settings["inputs"], "judgments": {"path": str(tmp_path / "nowhere"), "format": "parquet"}}
    base_model = {"base_model": market_settings["base_model"]} if job is train else {"bundle_dir": str(tmp_path / "b")}
    changes = {"inputs": inputs, "tracking": "mlflow", "model_dir": str(tmp_path / "model"), **base_model}
    assert run_job(job.main, setting_arguments(**changes)) == 2
    message = capsys.readouterr().err
    assert "error: tracking: MLflow at 'http://127.0.0.1:" in message
    assert "Start its server, set MLFLOW_TRACKING_URI to where it is, or leave `tracking` out." in message


def test_without_mlflow_the_extra_is_named(
    market_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    changes = {"tracking": "mlflow", "model_dir": str(tmp_path / "model"), "inputs": market_settings["inputs"]}
    assert run_job(train.main, setting_arguments(**changes, base_model=market_settings["base_model"])) == 2
    assert "tracking: mlflow: MLflow is not installed: pip install 'csrm[mlflow]'." in capsys.readouterr().err
    with pytest.raises(Exception, match=r"bundle 'models:/csrm/1': MLflow is not installed"):
        load_bundle("models:/csrm/1")
