"""The chain of a night, with the commands that it really starts."""

from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from csrm.cli import run_job, setting_arguments
from csrm.commands import generate_market, init, run
from csrm.config import load_config
from csrm.night.settings import ScoringConfig
from tests.docs.pages import ROOT


def test_the_first_step_that_fails_ends_the_night(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for step in run.NIGHT:
        (tmp_path / step.file).write_text("tabel: x\n")
    assert run_job(run.main, ["night", "--config", str(tmp_path)]) == 2
    printed, errors = capfd.readouterr()
    assert "[1/7] csrm embed-catalog --config" in printed
    assert "csrm embed-catalog: failed with exit code 2 after 00:" in printed
    assert "the night ended with exit code 2" in printed
    assert "[2/7]" not in printed
    assert "tabel: Extra inputs are not permitted (got 'x'). Is it tables?" in errors


def test_a_folder_without_the_files_of_the_jobs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.yaml").touch()
    assert run_job(run.main, ["night", "--config", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "it lacks build_retrieval_table.yaml, build_candidates.yaml, score_catalog.yaml, maintain.yaml." in message


def test_a_rejected_night_ends_as_rejected_also_where_its_report_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in run.NIGHT:
        (tmp_path / step.file).touch()
    started: list[str] = []

    def ended(words: list[str]) -> int:
        started.append(words[0])
        return {"score-catalog": 3, "report": 2}.get(words[0], 0)

    monkeypatch.setattr(run, "_run", ended)
    assert run.main(["night", "--config", str(tmp_path)]) == 3
    assert started == ["embed-catalog", "build-retrieval-table", "build-candidates", "score-catalog", "report"]


@pytest.mark.long
@pytest.mark.spark
@pytest.mark.timeout(1800)
def test_what_init_wrote_runs_a_night_and_a_rejected_one_gets_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    size = {"products_per_market": 60, "queries_per_market": 8}
    words = ["--config", str(ROOT / "conf" / "generate_market.yaml")]
    assert run_job(generate_market.main, [*words, *setting_arguments(**size, output="inputs")]) == 0
    names = ("catalog", "queries", "judgments", "behaviour", "candidates", "parallel-text")
    given = [word for name in names for word in (f"--{name}", f"inputs/{name.replace('-', '_')}.parquet")]
    assert run_job(init.main, ["mine", *given, "--bundle", str(ROOT / "conf" / "demo_bundle")]) == 0
    assert load_config("mine/score_catalog.yaml", ScoringConfig).markets == {"kr": "ko", "tw": "zh-TW", "us": "en"}

    assert run_job(run.main, ["night", "--config", "mine", "--run-id", "monday"]) == 0
    printed = capfd.readouterr().out
    assert "[6/6] csrm maintain --config mine/maintain.yaml" in printed
    assert "published run monday" in printed
    assert "run monday: the night is done in" in printed
    assert Path("mine/reports/monday.html").exists()
    assert Path("mine/evaluation/metrics.json").exists()

    catalog = pq.read_table("inputs/catalog.parquet")  # half of a delivery: the audit rejects so many deletions
    pq.write_table(
        catalog.filter(pc.equal(pc.utf8_slice_codeunits(catalog["product_id"], -1), "1")), "inputs/catalog.parquet"
    )
    assert run_job(run.main, ["night", "--config", "mine", "--run-id", "tuesday"]) == 3
    printed = capfd.readouterr().out
    assert "csrm score-catalog: failed with exit code 3" in printed
    assert "csrm evaluate" not in printed
    assert Path("mine/reports/tuesday.html").exists()
    assert "csrm maintain" not in printed
