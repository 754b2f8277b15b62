"""The programs under docs/examples, and the first program of the README, with what they print."""

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

from tests.docs.pages import ROOT, python_blocks, read_page

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytest.importorskip("onnxruntime")


@pytest.fixture
def run_example(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Lines that an example prints, run as a program from the root of a checkout: run_example(name, *arguments)."""

    def run(name: str, *arguments: str) -> list[str]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr("sys.argv", [name, *arguments])
        capsys.readouterr()
        runpy.run_path(f"docs/examples/{name}", run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_the_readme_prints_what_it_says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    exec(python_blocks("README.md")["Quick start"], {})
    printed = capsys.readouterr().out.split()

    (shown,) = re.findall(r"^```text\n(.*?)^```", read_page("README.md"), re.DOTALL | re.MULTILINE)
    assert len(printed) == len(shown.split())
    for word, expected in zip(printed, shown.split(), strict=True):
        assert word == expected or float(word) == pytest.approx(float(expected), abs=0.0011)


def test_what_a_score_means_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(0).uniform(0.01, 0.99, 2000)
    queries = np.arange(2000) // 10
    judged = pd.DataFrame({"market": "us", "query_id": queries.astype(str), "relevance_score": scores})
    judged["grade"] = np.where(scores**2 > np.random.default_rng(1).random(2000), "E", "I")
    names = {"judged": judged}
    exec(python_blocks("docs/read-scores.md")["Which score is good enough?"], names)
    assert names["curves"]["error"].item() > 0.1 > 0.05 > names["curves"]["calibrated_error"].item()
    assert names["thresholds"]["precision"].is_monotonic_increasing


def test_the_parts_of_a_pair_are_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    exec(python_blocks("docs/read-scores.md")["Why does a product have its score?"], {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["market", "language", "query", "title", "brand"]


def test_score_pairs_prints_the_best_products_of_each_query_first(run_example: Callable[..., list[str]]) -> None:
    lines = run_example("score_pairs.py")

    titles = {line.rpartition("  ")[2]: float(line.split()[0]) for line in lines if line.startswith("  ")}
    assert [line for line in lines if not line.startswith("  ")] == [
        "us: white frying pan",
        "kr: 프라이팬",
        "tw: 平底鍋",
    ]
    assert list(titles)[2] == "Wireless Mouse"
    assert list(titles)[3] == "블랙 후라이팬 28cm"
    assert list(titles)[8] == "無線滑鼠"
    scores = list(titles.values())
    assert all(scores[i : i + 3] == sorted(scores[i : i + 3], reverse=True) for i in (0, 3, 6))
    assert titles["White Nonstick Skillet, 11-Inch"] == pytest.approx(0.997, abs=0.0011)


@pytest.mark.slow
def test_the_notebook_of_an_own_market_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    notebook = nbformat.read(ROOT / "docs/examples/own_market.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"

    client = nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()

    outputs = "\n".join(
        output.get("text") or output["data"].get("text/plain", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    (ndcg, of_random) = re.findall(r"nDCG@10 +(0\.\d+) \[.*?\] +(0\.\d+) ", outputs)[0]
    assert float(ndcg) > float(of_random) + 0.2
    assert "calibrated_error" in outputs
    assert "share_kept" in outputs


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.usefixtures("spark")
def test_score_in_spark_prints_the_best_product_of_each_query(run_example: Callable[..., list[str]]) -> None:
    lines = run_example("score_in_spark.py")

    assert [line.rpartition("  ")[2] for line in lines] == [
        "Creme Rinse for Damaged Hair, 350ml",
        "Navy Nonstick Skillet, 9.5-Inch",
    ]
    assert [float(line.split("  ")[-2]) for line in lines] == pytest.approx([0.068, 0.147], abs=0.0011)


@pytest.mark.spark
@pytest.mark.slow
def test_read_changes_prints_each_change_once(
    spark: "SparkSession", tmp_path: Path, run_example: Callable[..., list[str]]
) -> None:
    pytest.importorskip("deltalake")
    from csrm.operations.maintenance import cluster_market
    from csrm.schemas import RELEVANCE_SCORES
    from csrm.spark.tables import table_path
    from tests.consumers.publishing import publish

    path = table_path(str(tmp_path), RELEVANCE_SCORES)
    state = tmp_path / "last_version.txt"

    def read() -> list[str]:
        return [" ".join(line.split()) for line in run_example("read_changes.py", path, str(state))]

    publish(spark, str(tmp_path), "r1", {"kr": {("q1", "p1"): 0.25, ("q1", "p2"): 0.5}}, day=0)  # version 1
    assert sorted(read()) == ["2 changes up to version 1", "insert kr q1 p1 0.250", "insert kr q1 p2 0.500"]

    publish(spark, str(tmp_path), "r2", {"kr": {("q1", "p1"): 0.75, ("q1", "p2"): None}}, day=1)  # version 2
    publish(spark, str(tmp_path), "r3", {"kr": {("q1", "p1"): 1.0}, "tw": {("q2", "p9"): 0.125}}, day=2)  # 3 and 4
    lines = read()
    assert sorted(lines[:2]) == ["delete kr q1 p2 0.500", "update_postimage kr q1 p1 0.750"]
    assert lines[2:] == ["update_postimage kr q1 p1 1.000", "insert tw q2 p9 0.125", "4 changes up to version 4"]

    cluster_market(spark, path, "kr", file_mb=1)  # other files, the same rows
    assert read() == ["0 changes up to version 5"]
    assert read() == ["0 changes up to version 5"]
