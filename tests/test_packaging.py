import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from csrm.bundle.loading import load_bundle
from csrm.config import Settings, load_config
from csrm.errors import ConfigError, MissingDependencyError
from csrm.scoring import runtime as onnx_install

ROOT = Path(__file__).parent.parent
CORE_MODULES = sorted(f"csrm.{path.stem}" for path in (ROOT / "csrm").glob("*.py") if path.stem != "__init__")
SCORING_MODULES = [
    *sorted(f"csrm.spark.{path.stem}" for path in (ROOT / "csrm" / "spark").glob("*.py") if path.stem != "__init__"),
    *(name for name in CORE_MODULES if name == "csrm.scoring.runtime"),
    "csrm.night.run",
]

# A finder in front of all others: importing a blocked package fails as if it were not installed.
IMPORT_WITHOUT = """
import importlib, sys
blocked, modules = sys.argv[1].split(","), sys.argv[2].split(",")
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked here", name=name)
sys.meta_path.insert(0, Blocker())
for module in modules:
    importlib.import_module(module)
"""


def import_without(blocked: list[str], modules: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT, ",".join(blocked), ",".join(modules)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_the_core_imports_without_spark_torch_and_an_onnx_runtime() -> None:
    modules = [name for name in CORE_MODULES if name != "csrm.scoring.runtime"]
    assert "csrm.schemas" in modules
    import_without(["pyspark", "delta", "torch", "transformers", "peft", "optimum", "onnxruntime", "onnx"], modules)


def test_the_scoring_side_imports_without_torch_and_transformers() -> None:
    assert "csrm.spark.session" in SCORING_MODULES
    import_without(["torch", "transformers", "peft", "accelerate", "optimum", "onnx"], SCORING_MODULES)


def test_a_blocked_import_is_noticed() -> None:
    with pytest.raises(AssertionError, match="yaml is blocked here"):
        import_without(["yaml"], ["csrm.config"])


def test_every_module_ships_type_information() -> None:
    assert (ROOT / "csrm" / "py.typed").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "conf").rglob("*.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_conf_file_loads_with_the_settings_of_its_job(path: Path) -> None:
    # conf/score_catalog.yaml and conf/score_catalog_*.yaml belong to jobs/score_catalog.py.
    scripts = [*(ROOT / "jobs").glob("*.py"), *(ROOT / "export").glob("*.py")]
    jobs = [script for script in scripts if f"{path.stem}_".startswith(f"{script.stem}_")]
    assert jobs, f"{path.name}: no job's name begins this file's name"
    job = max(jobs, key=lambda script: len(script.stem))
    module_name = f"{job.parent.name}.{job.stem}"
    module = importlib.import_module(module_name)
    settings_classes = [
        value
        for name, value in vars(module).items()
        if name.endswith("Config")
        and inspect.isclass(value)
        and issubclass(value, Settings)
        and value.__module__ == module_name
    ]
    assert len(settings_classes) == 1, f"{module_name}: expected one class named ...Config, got {settings_classes}"
    load_config(path, settings_classes[0])


def fake_installed(monkeypatch: pytest.MonkeyPatch, *installed: str) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(onnx_install, "version", version)


def test_both_onnx_runtimes_are_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_installed(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    with pytest.raises(ConfigError, match=r"got both.*pip uninstall onnxruntime onnxruntime-gpu.*csrm\[cpu\]"):
        onnx_install.require_one_onnxruntime()


def test_no_onnx_runtime_names_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_installed(monkeypatch)
    with pytest.raises(MissingDependencyError, match=r"got neither.*csrm\[cpu\].*csrm\[gpu\]"):
        onnx_install.require_one_onnxruntime()


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-gpu"])
def test_one_onnx_runtime_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fake_installed(monkeypatch, name)
    assert onnx_install.require_one_onnxruntime() == name


def normalised(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def plain_pins(name: str) -> list[str]:
    """The pins of a constraints file, all of the form package==version."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==[0-9][A-Za-z0-9.+]*", pin)] == []
    return pins


def test_constraints_are_plain_pins_and_cover_every_dependency_but_the_gpu_runtime() -> None:
    pins = plain_pins("constraints.txt")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    required = {normalised(entry) for entries in [project["dependencies"], *extras.values()] for entry in entries}
    required.remove("csrm")  # the train extra holds the eval extra
    assert required - {normalised(pin) for pin in pins} == {"onnxruntime-gpu"}


def test_airflow_has_plain_pins_of_its_own() -> None:
    assert {"apache-airflow", "deltalake", "uv"} <= {normalised(pin) for pin in plain_pins("constraints-airflow.txt")}


def test_scoring_needs_no_torch_and_each_onnx_runtime_has_an_extra_of_its_own() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = {normalised(requirement) for requirement in project["dependencies"]}
    assert base.isdisjoint({"torch", "transformers", "peft", "optimum", "onnxruntime", "onnxruntime-gpu"})
    extras = {
        name: {normalised(entry) for entry in entries} for name, entries in project["optional-dependencies"].items()
    }
    assert [name for name, entries in extras.items() if "onnxruntime" in entries] == ["cpu"]
    assert [name for name, entries in extras.items() if "onnxruntime-gpu" in entries] == ["gpu"]


def test_the_demo_bundle_is_what_its_training_makes() -> None:
    from csrm.training.settings import TrainConfig

    settings = load_bundle(ROOT / "conf" / "demo_bundle").settings
    config = load_config(ROOT / "conf" / "train.yaml", TrainConfig)
    assert (settings.labels, settings.budgets, settings.pack_tokens) == (
        config.labels,
        config.budgets,
        config.pack_tokens,
    )
