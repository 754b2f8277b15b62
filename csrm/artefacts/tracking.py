"""Trainings and bundles in MLflow, where a configuration asks for it; and bundles that its model registry names.

MLflow is found by its own environment: MLFLOW_TRACKING_URI, MLFLOW_REGISTRY_URI, MLFLOW_EXPERIMENT_NAME (default here:
csrm).
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from csrm.cli import without_credentials
from csrm.config import Settings
from csrm.errors import BundleError, ConfigError, MissingDependencyError, StoppedError

Tracker = Literal["mlflow"]
MODEL_SCHEME = "models:/"
_MODEL = re.compile(r"models:/+(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@]+))")
_DIGEST = "csrm.trained_model"
"""Tag of a run: digest of the trained folder, by which its bundles find it."""
logger = logging.getLogger(__name__)


class TrackedRun:
    """A run of MLflow. What cannot be written there is told, once, and ends no training."""

    def __init__(self, mlflow: Any, run_id: str, main_stage: str) -> None:
        self._mlflow = mlflow
        self._client = mlflow.MlflowClient()
        self.run_id = run_id
        self._main_stage = main_stage
        self._is_reached = True

    def log_metrics(self, stage: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Metrics of a stage, after a step; those of the main stage have no stage in their names."""
        prefix = "" if stage == self._main_stage else f"{stage}/"
        now = int(1000 * time.time())
        points = [self._mlflow.entities.Metric(prefix + name, value, now, step) for name, value in metrics.items()]
        self._try(lambda: self._client.log_batch(self.run_id, metrics=points))

    def log_training(self, model_dir: Path, digest: str, files: Sequence[Path]) -> None:
        """Tag the run with the digest of its model, and keep some files of it."""

        def write() -> None:
            self._client.set_tag(self.run_id, _DIGEST, digest)
            self._client.set_tag(self.run_id, "csrm.model_dir", str(model_dir))
            for path in files:
                self._client.log_artifact(self.run_id, str(path))

        self._try(write)

    def end(self, status: str) -> None:
        """Tell how the run ended: FINISHED, FAILED or KILLED."""
        self._try(lambda: self._client.set_terminated(self.run_id, status))

    def _try(self, write: Callable[[], object]) -> None:
        if not self._is_reached:
            return
        try:
            write()
        except Exception as error:  # of its store: of any kind
            self._is_reached = False
            logger.warning("tracking: MLflow took no more, the training goes on without it: %s", _first_line(error))


_current: TrackedRun | None = None


def current_run() -> TrackedRun | None:
    """The run of the training that this process is in; None: it is not tracked."""
    return _current


@contextmanager
def tracked_run(tracker: Tracker | None, name: str, config: Settings) -> Iterator[TrackedRun | None]:
    """A block that is one run: its settings are logged, and how it ended.

    Args:
        tracker: None: nothing is tracked.
        name: of the run, and of the main stage of its training.
        config: whose settings are its parameters.

    Raises:
        ConfigError: MLflow cannot be reached.
        MissingDependencyError: it is not installed.
    """
    global _current
    if tracker is None:
        yield None
        return
    mlflow = import_mlflow("tracking: mlflow")
    _current = run = TrackedRun(mlflow, _started_run(mlflow, name, config).info.run_id, name)
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except (StoppedError, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        _current = None
        run.end(status)


def register_bundle(folder: Path, card: str, config: Settings, *, name: str, digest: str, trained_model: str) -> str:
    """Put a bundle into the run of its training, or into a new one, and make it a version of a registered model.

    Args:
        folder: of the bundle.
        card: what it is, as plain text.
        config: of the export, logged where a run is new.
        name: of the registered model, made where there is none.
        digest: of the bundle.
        trained_model: digest of the trained folder; may be empty.

    Returns:
        The URI of the version: models:/name/version.

    Raises:
        ConfigError: MLflow cannot be reached, or refuses it.
    """
    mlflow = import_mlflow("tracking: mlflow")
    client = mlflow.MlflowClient()
    try:
        run = _run_of(client, trained_model) or _started_run(mlflow, f"export {name}", config)
        place = f"bundle-{digest[:12]}"
        client.log_artifacts(run.info.run_id, str(folder), place)
        client.log_text(run.info.run_id, card, f"{place}.txt")
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        version = client.create_model_version(
            name,
            source=f"{run.info.artifact_uri}/{place}",
            run_id=run.info.run_id,
            description=f"```\n{card}\n```",
            tags={"digest": digest, _DIGEST: trained_model},
        )
        client.set_terminated(run.info.run_id)
    except Exception as error:  # of its stores: of any kind
        raise ConfigError(
            f"tracking: the bundle is in {str(folder)!r}, but MLflow did not take it: {_first_line(error)}. Mend that, "
            "and export again."
        ) from error
    return f"{MODEL_SCHEME}{name}/{version.version}"


def check_reached(tracker: Tracker | None) -> None:
    """Say before the work that MLflow cannot be reached.

    Raises:
        ConfigError: it cannot.
        MissingDependencyError: it is not installed.
    """
    if tracker is not None:
        _experiment_id(import_mlflow("tracking: mlflow"))


def pinned_model(uri: str) -> str:
    """The URI of one version of a registered model: models:/name@alias becomes models:/name/version.

    Raises:
        BundleError: there is no such model, version or alias, or the URI names none.
    """
    found = _MODEL.fullmatch(uri)
    if found is None:
        raise BundleError(f"bundle {uri!r}: expected models:/name/version or models:/name@alias.")
    if found["version"]:
        return uri
    with _registry(uri) as mlflow:
        version = mlflow.MlflowClient().get_model_version_by_alias(found["name"], found["alias"]).version
    return f"{MODEL_SCHEME}{found['name']}/{version}"


def read_model_text(uri: str, name: str) -> str:
    """The text of a file of a registered model's version.

    Raises:
        BundleError: see pinned_model; or the file cannot be read.
    """
    with _registry(uri) as mlflow:
        text: str = mlflow.artifacts.load_text(f"{uri}/{name}")
    return text


def download_model(uri: str, folder: Path) -> None:
    """Copy all files of a registered model's version into a folder.

    Raises:
        BundleError: see pinned_model; or a file cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _registry(uri) as mlflow:
        mlflow.artifacts.download_artifacts(uri, dst_path=str(folder))
    for left in folder.glob("registered_model_meta"):  # MLflow's own note of where it is from
        left.unlink()


@contextmanager
def _registry(uri: str) -> Iterator[Any]:
    mlflow = import_mlflow(f"bundle {uri!r}")
    try:
        with _one_retry():
            yield mlflow
    except (mlflow.exceptions.MlflowException, OSError, UnicodeDecodeError) as error:
        raise BundleError(
            f"bundle {uri!r}: MLflow at {_uri(mlflow)} does not give it: {_first_line(error)}. Is its name right, and "
            "MLFLOW_TRACKING_URI set on this machine?"
        ) from error


def import_mlflow(where: str) -> Any:
    """MLflow without its telemetry and its bars.

    Args:
        where: what the message begins with.

    Raises:
        MissingDependencyError: it is not installed.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        import mlflow
        import mlflow.artifacts
        import mlflow.entities
    except ImportError as error:
        raise MissingDependencyError(f"{where}: MLflow is not installed: pip install 'csrm[mlflow]'.") from error
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    return mlflow


def _started_run(mlflow: Any, name: str, config: Settings) -> Any:
    """A new run with the settings as its parameters.

    Raises:
        ConfigError: MLflow cannot be reached.
    """
    experiment_id = _experiment_id(mlflow)
    values = dict(_flat(config.model_dump(mode="json")))  # two names may be one to MLflow, which takes it once
    parameters = [mlflow.entities.Param(*parameter) for parameter in values.items()]
    client = mlflow.MlflowClient()
    with _reached(mlflow):
        run = client.create_run(experiment_id, run_name=name)
        for start in range(0, len(parameters), 100):  # the most that it takes at once
            client.log_batch(run.info.run_id, params=parameters[start : start + 100])
    return run


def _experiment_id(mlflow: Any) -> str:
    """The experiment of the environment, made where there is none.

    Raises:
        ConfigError: MLflow cannot be reached.
    """
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "csrm"
    with _reached(mlflow):
        experiment_id: str = mlflow.set_experiment(name).experiment_id
    return experiment_id


@contextmanager
def _reached(mlflow: Any) -> Iterator[None]:
    """A block before the work, which ends where MLflow cannot be used.

    Raises:
        ConfigError: it cannot.
    """
    try:
        with _one_retry():
            yield
    except mlflow.exceptions.MlflowException as error:
        raise ConfigError(
            f"tracking: MLflow at {_uri(mlflow)} cannot be used: {_first_line(error)}. Start its server, set "
            "MLFLOW_TRACKING_URI to where it is, or leave `tracking` out."
        ) from error


def _run_of(client: Any, trained_model: str) -> Any:
    """The newest run of a trained folder; None where there is none."""
    if not trained_model:
        return None
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.`{_DIGEST}` = '{trained_model}'", max_results=1)
    return runs[0] if runs else None


def _flat(values: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values; options of a table are left out, for they may hold the keys of its storage."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            if key == "options":
                continue
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield re.sub(r"[^\w\-. :/]", "_", name), without_credentials(str(values))[:6_000]  # the most that it takes


@contextmanager
def _one_retry() -> Iterator[None]:
    """MLflow retries for minutes; before a training nobody waits for that, unless the environment says so."""
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


def _uri(mlflow: Any) -> str:
    return repr(without_credentials(mlflow.get_tracking_uri()))


def _first_line(error: BaseException) -> str:
    return without_credentials(str(error).splitlines()[0] if str(error) else repr(error)).rstrip(".")
