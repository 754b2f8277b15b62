"""The report job on real Delta tables, from the command line to the page."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pyspark.sql import SparkSession

from csrm.cli import run_job
from csrm.commands.report import build_parser, main
from csrm.errors import ConfigError
from csrm.operations.history import read_runs, taken_back
from csrm.operations.rollback import RollbackConfig, roll_back
from csrm.operations.run_metrics import write_run_metrics
from csrm.schemas import RELEVANCE_SCORES, RUN_PAIRS, SCORES_STAGING, SCORING_RUNS
from csrm.spark.tables import table_id, table_path
from tests.consumers.publishing import publish, record
from tests.operations.test_history import DIGEST, STARTED, run_row, scores, write
from tests.operations.test_report import HOSTILE, SHOWN, Page

pytestmark = pytest.mark.spark

CONF = Path(__file__).parents[2] / "conf" / "report.yaml"
RUN = f"../{HOSTILE[:60]}"
AUDIT = [
    {
        **{"market": "kr", "name": "deleted", "value": 0.6, "bound": "<= 0.2", "passed": False, "severity": "error"},
        **{"sentence": "3 of 5 published rows would be deleted.", "accepted": None},
    }
]


@pytest.fixture(scope="module")
def folder(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two nights: one published, one rejected, whose name, texts and reasons are hostile."""
    folder = tmp_path_factory.mktemp("report")
    tables = folder / "tables"
    write(spark, tables, RELEVANCE_SCORES, scores([("kr", HOSTILE, HOSTILE, 0.25, "S", "r0")]))
    pairs = [("kr", HOSTILE, HOSTILE, 7, "to_score", None, 0, RUN), ("kr", "q", "p", None, "rejected", HOSTILE, 0, RUN)]
    write(spark, tables, RUN_PAIRS, pairs)
    write(spark, tables, SCORES_STAGING, [("kr", HOSTILE, HOSTILE, 0.75, "E", DIGEST, 7, STARTED, RUN, None)])
    first = run_row("r0", 0, "published", published_version=1, markets=["kr"], changes={"insert": 1})
    second = run_row(RUN, 1, "rejected", base_version=1, markets=["kr"], audit=json.dumps(AUDIT), rejected={HOSTILE: 1})
    write(spark, tables, SCORING_RUNS, [first, second])
    for name, column in (("catalog", "title"), ("queries", "query")):
        id_column = "product_id" if name == "catalog" else "query_id"
        rows = [("kr", HOSTILE, HOSTILE * 30), ("kr", "q" if name == "queries" else "p", HOSTILE)]
        pd.DataFrame(rows, columns=["market", id_column, column]).to_parquet(folder / f"{name}.parquet")
    return folder


def arguments(folder: Path, *words: str) -> list[str]:
    settings = [f"inputs.{name}.path={folder}/{name}.parquet" for name in ("catalog", "queries")]
    settings += [f"tables={folder}/tables", f"output={folder}/reports"]
    return ["--config", str(CONF), *(word for setting in settings for word in ("--set", setting)), *words]


def page_of(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, Path]:
    """The page, and where it is: in one line of output."""
    assert main(arguments(folder, *words)) == 0
    (line,) = capsys.readouterr().out.splitlines()
    path = Path(line.rpartition(": ")[2])
    assert path.parent == folder / "reports"
    return path.read_text(encoding="utf-8"), path


def test_the_page_of_the_newest_run_is_written_and_foreign_text_is_only_text_in_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    html, path = page_of(folder, capsys)
    page = Page(html)

    assert path.name.startswith("..%2F")
    assert {"script", "img", "b"}.isdisjoint(page.tags)
    assert "Rejected" in page.text
    assert "3 of 5 published rows would be deleted." in page.text
    assert page.text.count(SHOWN) > 5
    assert f"… ({30 * len(HOSTILE):,} characters)" in page.text
    # the one pair moves from 0.25 to 0.75
    for shown in ("0.2500", "0.7500", "0.500", "0.250", "0.750"):
        assert shown in page.text


def test_a_run_can_be_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html, path = page_of(folder, capsys, "--run-id", "r0")
    assert path.name == "r0.html"
    assert "relevance_scores went to version 1: 1 inserted." in Page(html).text
    assert "1 started later." in Page(html).text


def test_a_run_that_does_not_exist_is_bad_input(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job(main, arguments(folder, "--run-id", "r9")) == 2
    error = capsys.readouterr().err
    assert "run 'r9'" in error
    assert "'r0'" in error


def test_a_folder_without_runs_is_bad_input(folder: Path, tmp_path: Path) -> None:
    assert run_job(main, arguments(folder, "--set", f"tables={tmp_path}")) == 2


def test_a_setting_that_shows_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="num_runs"):
        main(arguments(folder, "--set", "num_runs=0"))


@pytest.mark.parametrize(("words", "run_id"), [([], None), (["--run-id", "R"], "R")])
def test_a_scheduler_can_parse_its_command_line(words: list[str], run_id: str | None) -> None:
    args: Any = build_parser().parse_args(words)
    assert args.run_id == run_id
    assert args.config == "conf/report.yaml"


def test_the_row_of_a_run_is_written_as_metrics(folder: Path, tmp_path: Path) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    file = tmp_path / "new" / "csrm.prom"
    for _ in range(2):  # the second replaces the first
        assert main(arguments(folder, "--set", f"metrics_file={file}")) == 0
    families = list(parser.text_string_to_metric_families(file.read_text(encoding="utf-8")))
    values = {(sample.name, *sample.labels.values()): sample.value for each in families for sample in each.samples}
    labels = {sample.name: sample.labels for each in families for sample in each.samples}

    assert labels["csrm_run_info"]["verdict"] == "rejected"
    assert labels["csrm_run_info"]["bundle_digest"] == DIGEST
    assert labels["csrm_run_info"]["run_id"].startswith("../<script>")
    assert values["csrm_run_is_published",] == 0
    assert values["csrm_run_rejected", SHOWN] == 1
    assert values["csrm_run_audit_value", "deleted", "kr"] == 0.6
    assert values["csrm_run_audit_failed", "deleted", "kr", "error"] == 1
    assert values["csrm_last_published_timestamp_seconds",] < values["csrm_run_started_timestamp_seconds",]
    assert [path.name for path in file.parent.iterdir()] == ["csrm.prom"]


def test_a_run_that_was_rolled_back_is_not_published_any_more_and_the_page_says_so_once(
    spark: SparkSession, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    tables, file = str(tmp_path), tmp_path / "csrm.prom"
    for day, score in ((1, 0.25), (2, 0.75)):
        version = publish(spark, tables, f"n{day}", {"kr": {("q", "p"): score}}, day=day)
        known = {"published_version": version, "table_id": table_id(spark, table_path(tables, RELEVANCE_SCORES))}
        record(spark, tables, f"n{day}", ["kr"], "published", day, base_version=version - 1, **known)
    words = ["--set", f"tables={tables}", "--set", f"metrics_file={file}"]

    def is_published() -> float:
        text = file.read_text(encoding="utf-8")
        samples = [sample for each in parser.text_string_to_metric_families(text) for sample in each.samples]
        (info,) = [sample.labels for sample in samples if sample.name == "csrm_run_info"]
        assert info["run_id"] == "n2"
        return float(next(sample.value for sample in samples if sample.name == "csrm_run_is_published"))

    roll_back(spark, RollbackConfig(tables=tables), "kr", run_id="n1")
    html, path = page_of(folder, capsys, *words)

    assert (path.name, is_published()) == ("n2.html", 0)
    assert "Published, then changed" in Page(html).text
    assert Page(html.partition('id="history"')[2]).text.count("Market kr was rolled back to run n1 in version") == 1
    roll_back(spark, RollbackConfig(tables=tables), "kr", run_id="n2")
    runs, _ = read_runs(spark, tables, None, 9)
    assert taken_back(spark, tables, runs) == {}
    write_run_metrics(runs, file)
    assert is_published() == 1


def test_a_folder_is_no_file_for_metrics(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics_file '.*': expected a file, got a folder\. Name a file in it\."):
        main(arguments(folder, "--set", f"metrics_file={tmp_path}"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"metrics_file '.*/file': cannot be made .* --set metrics_file=/tmp/csrm\."):
        main(arguments(folder, "--set", f"metrics_file={tmp_path}/file/csrm.prom"))
