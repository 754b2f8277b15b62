import doctest
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FACES = ["csrm", "csrm.bundle", "csrm.evaluation", "csrm.market", "csrm.scoring"]
MEMBERS = [(face, name) for face in FACES for name in importlib.import_module(face).__all__]
HOMES = sorted(
    {
        member.__module__
        for face, name in MEMBERS
        if inspect.isclass(member := getattr(importlib.import_module(face), name)) or inspect.isfunction(member)
    }
)


def test_importing_csrm_imports_nothing_heavy() -> None:
    heavy = {"pyspark", "torch", "onnxruntime", "pandas", "numpy", "pydantic", "yaml"}
    code = "import csrm, sys; csrm.__version__; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = {name.partition(".")[0] for name in result.stdout.split()}
    assert "csrm" in modules
    assert heavy & modules == set()


def test_an_unknown_name_is_refused_with_those_that_there_are() -> None:
    import csrm

    with pytest.raises(AttributeError, match=r"'csrm' has no attribute 'load_scorers'; it has Bundle, .*load_scorer"):
        csrm.load_scorers  # noqa: B018
    assert set(csrm.__all__) <= set(dir(csrm))


@pytest.mark.parametrize("face", FACES)
def test_the_names_of_a_face_are_sorted(face: str) -> None:
    # As ruff sorts them: constants, classes, functions.
    names = importlib.import_module(face).__all__
    assert names == sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))


@pytest.mark.parametrize(("face", "name"), MEMBERS)
def test_a_public_name_exists_and_its_docstring_has_an_example(face: str, name: str) -> None:
    member = getattr(importlib.import_module(face), name)
    if inspect.isclass(member) or inspect.isfunction(member):
        assert ">>> " in (member.__doc__ or "")


@pytest.mark.parametrize(("face", "name"), MEMBERS)
def test_a_public_function_takes_keywords_from_the_third_argument_on(face: str, name: str) -> None:
    member = getattr(importlib.import_module(face), name)
    if not inspect.isfunction(member):
        return
    positional = [
        parameter.name
        for parameter in inspect.signature(member).parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    assert len(positional) <= 2, f"{name}{inspect.signature(member)}"


@pytest.mark.parametrize("module", ["csrm", *(home for home in HOMES if home != "csrm.spark.scoring")])
def test_the_examples_of_public_names_give_what_they_show(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # examples name conf/demo_bundle
    results = doctest.testmod(importlib.import_module(module))  # prints what failed
    assert results.attempted > 0
    assert results.failed == 0
