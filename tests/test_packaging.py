import ast
import graphlib
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

# The law of the house: the rooms that a room may import, lazily or not. Ground files (errors, config, ...) are open to
# all. Rooms stand in the order of reading: a room imports rooms above it only, so there is no circle.
LAW = {
    "artefacts": [],
    "scoring": [],
    "embedding": ["artefacts", "scoring"],
    "bundle": ["artefacts", "scoring", "embedding"],
    "evaluation": [],
    "pages": [],
    "market": [],
    "spark": ["artefacts", "scoring", "embedding", "bundle"],
    "retrieval": ["embedding", "spark"],
    "night": ["artefacts", "scoring", "bundle", "evaluation", "spark"],
    "operations": ["scoring", "evaluation", "pages", "spark", "retrieval", "night"],
    "doctor": ["artefacts", "scoring", "bundle", "embedding", "spark", "night"],
    "capacity": ["artefacts", "scoring", "bundle", "embedding", "night"],
    "start": ["artefacts", "scoring"],
    "training": ["artefacts", "scoring", "bundle", "embedding", "evaluation", "pages"],
    "export": ["artefacts", "scoring", "bundle", "embedding", "evaluation", "training"],
    "commands": None,  # parser, configuration, one call: any room
}
# The packages that the modules of a room may not import.
SPARK = {"pyspark", "delta", "py4j"}
TORCH = {"torch", "transformers", "peft", "accelerate", "optimum", "onnx", "gguf", "safetensors"}
FOREIGN = {
    **dict.fromkeys(
        ["ground", "artefacts", "scoring", "bundle", "embedding", "evaluation", "pages", "market", "capacity", "start"],
        SPARK | TORCH,
    ),
    **dict.fromkeys(["spark", "retrieval", "night", "operations", "doctor"], TORCH),
    **dict.fromkeys(["training", "export"], SPARK),
    "commands": TORCH,
}
# A module that may import what its room may not, inside a function: it does without where that is not installed.
OPTIONAL = {"csrm.retrieval.blocks": {"torch"}}
PRODUCT = sorted((ROOT / "csrm").rglob("*.py"))


def room_of(module: str) -> str:
    """Room of a module of csrm; ground for the files that lie flat."""
    parts = module.split(".")[1:]
    return parts[0] if parts and (ROOT / "csrm" / parts[0]).is_dir() else "ground"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Names that a file imports, also inside functions: modules, and what is taken from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{path}: expected absolute imports"
            assert node.level == 0, f"{path}: expected absolute imports"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


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


def test_every_room_is_named_in_the_law() -> None:
    rooms = {path.parent.name for path in (ROOT / "csrm").glob("*/__init__.py")}
    assert rooms == set(LAW)
    assert rooms | {"ground"} == set(FOREIGN)


def test_a_room_imports_only_rooms_above_it() -> None:
    order = list(LAW)
    for room, allowed in LAW.items():
        assert all(order.index(other) < order.index(room) for other in allowed or []), room


@pytest.mark.parametrize("path", PRODUCT, ids=module_of)
def test_a_module_imports_what_the_law_lets_it(path: Path) -> None:
    if path.name == "__main__.py" or module_of(path) == "csrm":
        return  # a door, or the face: it hands names of any room on
    room = room_of(module_of(path))
    imported = imports_of(path)
    foreign = {name.partition(".")[0] for name in imported}
    assert not foreign & {"jobs", "tests"}
    assert not foreign & FOREIGN[room] - OPTIONAL.get(module_of(path), set())
    rooms = {room_of(name) for name in imported if name.partition(".")[0] == "csrm"} - {room, "ground"}
    allowed = LAW.get(room, [])
    assert allowed is None or rooms <= set(allowed)


def test_there_is_no_circle_of_modules() -> None:
    modules = {module_of(path): path for path in PRODUCT if path.name != "__init__.py"}
    graph = {
        module: {name for found in imports_of(path) for name in (found, found.rpartition(".")[0]) if name in modules}
        for module, path in modules.items()
    }
    graphlib.TopologicalSorter({module: others - {module} for module, others in graph.items()}).prepare()


def test_the_doors_import_nothing_but_the_command_line() -> None:
    doors = [*(ROOT / "jobs").glob("*.py"), *(ROOT / "export").glob("*.py")]
    assert len(doors) > 10
    for door in doors:
        rooms = {room_of(name) for name in imports_of(door) if name.startswith("csrm")}
        assert rooms <= {"commands", "ground", *(["training"] if door.stem == "train" else [])}, door
        assert len(door.read_text(encoding="utf-8").splitlines()) < 20, door


def modules_of(*rooms: str) -> list[str]:
    """Modules of some rooms but their doors and, of scoring, ONNX Runtime's."""
    return [
        module
        for path in PRODUCT
        if room_of(module := module_of(path)) in rooms and path.name not in ("__main__.py", "runtime.py")
    ]


def test_the_core_imports_without_spark_torch_and_an_onnx_runtime() -> None:
    modules = modules_of("ground", "scoring", "bundle", "embedding", "evaluation", "pages", "market", "capacity")
    assert "csrm.schemas" in modules
    import_without([*SPARK, *TORCH, "onnxruntime"], modules)


def test_the_scoring_side_imports_without_torch_and_transformers() -> None:
    modules = modules_of("spark", "retrieval", "night", "operations", "doctor")
    assert "csrm.spark.session" in modules
    import_without([*TORCH], [*modules, "csrm.scoring.runtime", "csrm.commands.score_catalog"])


def test_a_blocked_import_is_noticed() -> None:
    with pytest.raises(AssertionError, match="yaml is blocked here"):
        import_without(["yaml"], ["csrm.config"])


def test_every_module_ships_type_information() -> None:
    assert (ROOT / "csrm" / "py.typed").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "conf").rglob("*.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_conf_file_loads_with_the_settings_of_its_job(path: Path) -> None:
    # conf/score_catalog.yaml and conf/score_catalog_*.yaml belong to jobs/score_catalog.py.
    commands = [script.stem for script in (ROOT / "csrm" / "commands").glob("*.py")]
    matching = [name for name in commands if f"{path.stem}_".startswith(f"{name}_")]
    assert matching, f"{path.name}: no job's name begins this file's name"
    module = importlib.import_module(f"csrm.commands.{max(matching, key=len)}")
    settings_classes = [
        value
        for name, value in vars(module).items()
        if name.endswith("Config") and inspect.isclass(value) and issubclass(value, Settings)
    ]
    assert len(settings_classes) == 1, f"{module.__name__}: expected one class named ...Config, got {settings_classes}"
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
    assert (settings.labels, settings.budgets) == (config.labels, config.budgets)
