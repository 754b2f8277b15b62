"""Inputs and bundles that are changed, damaged or swapped, before a run and while it runs."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from delta.tables import DeltaTable
from pyspark.sql import DataFrame, SparkSession

from csrm.artefacts.manifest import write_manifest
from csrm.bundle.contents import BUNDLE_KIND
from csrm.bundle.loading import load_bundle
from csrm.commands import score_catalog
from csrm.errors import BundleError, InputError
from csrm.night import run
from csrm.spark.commits import session_settings
from tests.faults.bundles import give_one_score
from tests.faults.cluster import ROOT
from tests.faults.night import Night

pytestmark = [pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(900)]

Fault = Callable[[Callable[[], None]], None]


@pytest.fixture
def before_scoring(monkeypatch: pytest.MonkeyPatch) -> Fault:
    """Has something happen between a run's plan and its scoring."""

    def plan(happen: Callable[[], None]) -> None:
        stage_scores = run.stage_scores

        def staged(*arguments: Any) -> int:
            happen()
            return stage_scores(*arguments)

        monkeypatch.setattr(run, "stage_scores", staged)

    return plan


def delta_catalog(spark: SparkSession, night: Night) -> tuple[DataFrame, str, list[str]]:
    """The night's catalog as a Delta table: its rows, its path, and the arguments that make it the input."""
    path = str(night.folder / "catalog_delta")
    catalog_df = spark.read.parquet(str(night.folder / "catalog.parquet"))
    catalog_df.write.format("delta").save(path)
    return catalog_df, path, ["--set", f"inputs.catalog={{path: '{path}', format: delta}}"]


@pytest.mark.fault("a Delta input is overwritten while the job runs")
def test_a_delta_input_that_is_overwritten_is_read_as_it_was(
    spark: SparkSession, night: Night, before_scoring: Fault
) -> None:
    arguments = night.arguments("night")
    catalog_df, path, delta = delta_catalog(spark, night)

    def overwrite() -> None:
        catalog_df.selectExpr("market", "product_id", "'x' AS title").write.format("delta").mode("overwrite").save(path)

    before_scoring(overwrite)

    night.check_ended(score_catalog.main([*arguments, *delta]), "", 0)
    night.check_published("night")
    assert dict(night.run("night")["inputs"])["catalog"] == f"{path}@v0"


@pytest.mark.fault("the version of a Delta input is vacuumed while the job runs; then it is started again")
def test_a_delta_input_whose_version_is_vacuumed_is_an_error_and_nothing_is_published(
    spark: SparkSession, night: Night, before_scoring: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = night.arguments("night")
    catalog_df, path, delta = delta_catalog(spark, night)

    def vacuum() -> None:
        catalog_df.write.format("delta").mode("overwrite").save(path)
        with session_settings(spark, {"spark.databricks.delta.retentionDurationCheck.enabled": "false"}):
            DeltaTable.forPath(spark, path).vacuum(0)

    before_scoring(vacuum)

    with pytest.raises(InputError, match=r"input catalog at .* files of its version 0 are gone") as caught:
        score_catalog.main([*arguments, *delta])

    night.check_ended(caught.value.exit_code, "", 2)
    assert len(night.scores()) == 0
    monkeypatch.undo()
    assert score_catalog.main([*arguments, *delta]) == 0
    night.check_published("night")


@pytest.mark.fault("files of a Parquet input change while the job runs")
@pytest.mark.parametrize("how", ["replaced", "deleted"])
def test_a_parquet_input_that_changes_is_an_error_and_nothing_is_published(
    spark: SparkSession, night: Night, before_scoring: Fault, how: str
) -> None:
    arguments = night.arguments("night")
    path = night.folder / "catalog.parquet"

    def change() -> None:
        if how == "deleted":
            path.unlink()
        else:
            night.catalog.assign(title="x").to_parquet(path)

    before_scoring(change)

    with pytest.raises(InputError, match=r"input catalog at .*: 1 of its 1 files were replaced or deleted") as caught:
        score_catalog.main(arguments)

    night.check_ended(caught.value.exit_code, "", 2)
    assert len(night.scores()) == 0
    assert night.run("night")["verdict"] != "published"


def damage(folder: Path, how: str) -> None:
    model = folder / "model.onnx"
    content = bytearray(model.read_bytes())
    if how == "missing":
        shutil.rmtree(folder)
    elif how == "a file is missing":
        model.unlink()
    elif how == "truncated":
        model.write_bytes(content[:-1000])
    elif how == "one byte flipped":
        content[len(content) // 2] ^= 1
        model.write_bytes(content)


@pytest.mark.fault("a bundle is damaged")
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"manifest\.json cannot be read"),
        ("a file is missing", r"model\.onnx is missing"),
        ("truncated", r"model\.onnx has \d+ bytes, expected \d+"),
        ("one byte flipped", r"model\.onnx has another content \(sha256\)"),
    ],
    ids=["missing", "a file is missing", "truncated", "one byte flipped"],
)
@pytest.mark.parametrize("as_uri", [False, True], ids=["in a folder", "at a URI"])
def test_a_damaged_bundle_is_refused_before_anything_is_written(
    night: Night, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, message: str, as_uri: bool
) -> None:
    monkeypatch.setenv("CSRM_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "bundle"
    shutil.copytree(ROOT / "conf" / "demo_bundle", folder)
    damage(folder, how)
    missing_uri = as_uri and how == "a file is missing"

    with pytest.raises(BundleError, match="did not arrive whole" if missing_uri else message) as caught:
        score_catalog.main([*night.arguments("night", bundle=folder.as_uri() if as_uri else str(folder))])

    night.check_ended(caught.value.exit_code, "", 2)
    assert not (night.folder / "tables").exists()


@pytest.mark.fault("a bundle gives all pairs one score, and nothing was published that it could be compared with")
def test_a_bundle_that_gives_all_pairs_one_score_is_refused_on_its_first_night(night: Night, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(ROOT / "conf" / "demo_bundle", folder)
    give_one_score(folder)

    with pytest.raises(BundleError, match="one score ranks nothing: train it again") as caught:
        score_catalog.main(night.arguments("night", bundle=str(folder)))

    night.check_ended(caught.value.exit_code, "", 2)
    assert not (night.folder / "tables" / "relevance_scores").exists()


@pytest.mark.fault("the bundle is replaced while the job runs")
def test_a_bundle_that_is_replaced_while_the_job_runs_never_scores_under_the_old_digest(
    spark: SparkSession, night: Night, before_scoring: Fault, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(ROOT / "conf" / "demo_bundle", folder)
    digest = load_bundle(folder).digest

    def replace() -> None:
        about = load_bundle(folder).settings.model_dump(mode="json")
        write_manifest(folder, BUNDLE_KIND, {**about, "device": "cuda"})
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # some have ended, and are zombies
                if "pyspark.daemon" in " ".join(process.cmdline()):
                    for worker in process.children():  # those that have loaded the old one; the daemon starts others
                        worker.kill()

    before_scoring(replace)

    with pytest.raises(BundleError, match=f"expected digest {digest}, this worker has") as caught:
        score_catalog.main(night.arguments("night", bundle=str(folder)))

    night.check_ended(caught.value.exit_code, "", 2)
    assert len(night.scores()) == 0
    assert len(night.table("scores_staging")) == 0
