"""The DAG in a real Airflow, in an environment of its own (.ci/setup airflow)."""

import importlib
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from csrm.cli import setting_arguments
from csrm.commands import generate_market
from csrm.config import Settings, load_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[3]
AIRFLOW = ROOT / ".venv-airflow" / "bin"
IN_AIRFLOW = Path(__file__).with_name("in_airflow.py")
STAND_IN = f"{sys.executable} {Path(__file__).with_name('submit.py')}"
JOBS = ["build_retrieval_table", "build_candidates", "score_catalog", "evaluate", "report", "maintain"]
PUBLISHED = {"score_catalog": {"event": "published", "verdict": "published"}}
PUBLISHED_BEFORE = {"score_catalog": {"event": "already_published", "verdict": "published"}}
ALREADY_PUBLISHED = {"score_catalog": {"event": "already_published", "verdict": "already_published"}}


@dataclass
class Airflow:
    """An Airflow with a database of its own."""

    home: Path
    env: dict[str, str]

    def run(self, program: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [str(AIRFLOW / program), *arguments]
        environment = {**self.env, **env}
        return subprocess.run(
            command, env=environment, cwd=self.home, capture_output=True, text=True, check=False, timeout=1500
        )

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        with sqlite3.connect(self.home / "airflow.db") as connection:
            return connection.execute(sql).fetchall()

    def states(self) -> dict[str, str]:
        """Tasks of the last run to their state and number of attempts."""
        rows = self.query(
            "select task_id, state, try_number from task_instance where run_id ="
            " (select run_id from dag_run order by id desc limit 1)"
        )
        return {task_id: f"{state} {tries}" for task_id, state, tries in rows}

    def asset_events(self) -> list[dict[str, Any]]:
        return [json.loads(extra) for (extra,) in self.query("select extra from asset_event order by id")]


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Airflow:
    assert AIRFLOW.exists(), "expected Airflow in .venv-airflow, found none. Run .ci/setup airflow."
    home = tmp_path_factory.mktemp("airflow")
    env = {
        **os.environ,
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "jobs" / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "CSRM_DEADLINE_HOURS": "6",
    }
    made = Airflow(home, env)
    ended = made.run("airflow", "db", "migrate")
    assert ended.returncode == 0, ended.stderr
    return made


@dataclass
class Alerts:
    """A web hook."""

    url: str
    texts: list[str] = field(default_factory=list)
    """That it was sent."""


@pytest.fixture(scope="module")
def alerts() -> Iterator[Alerts]:
    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.texts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        sent = Alerts(f"http://127.0.0.1:{server.server_port}/")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield sent
        server.shutdown()


def night(day: int, plan: dict[str, Any], has_date: bool = True, **conf: object) -> dict[str, Any]:
    """A night in November whose jobs do what the plan says (see submit.py)."""
    moment = f"2026-11-{day:02}T02:00:00+00:00"
    return {"plan": plan, "conf": conf, "run_after": moment, "logical_date": moment if has_date else None}


def run_nights(airflow: Airflow, nights: dict[str, dict[str, Any]], folder: Path, **env: str) -> dict[str, Any]:
    """See in_airflow.py. Of each night also its command lines: [job, arguments, processes that it started]."""
    asked, results = folder / "nights.json", folder / "results.json"
    plans = [
        {
            **{key: value for key, value in one.items() if key != "plan"},
            "conf": {"tables": "tables", **one["conf"]},
            "env": {"NIGHT": json.dumps(one["plan"]), "NOTES": str(folder / name)},
        }
        for name, one in nights.items()
    ]
    asked.write_text(json.dumps(plans))
    (folder / "conf").mkdir()
    (folder / "conf" / "evaluate.yaml").touch()  # is looked for; the jobs' stand-in reads no file
    for conf, semantic in (("conf_with_encoder", "semantic: {encoder: e}"), ("conf_of_words", "semantic: null")):
        (folder / conf).mkdir()
        for name in ("evaluate", "embed_catalog", "build_candidates"):
            (folder / conf / f"{name}.yaml").write_text(semantic)
    (folder / "conf_in_parts").mkdir()
    for name in ("embed_catalog", "build_candidates"):
        (folder / "conf_in_parts" / f"{name}.yaml").write_text("extends: market.yaml")
    env = {"AIRFLOW_VAR_CSRM_SUBMIT": STAND_IN, "AIRFLOW_VAR_CSRM_HOME": str(folder), **env}
    ended = airflow.run("python", str(IN_AIRFLOW), str(asked), str(results), **env)
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-5000:]
    content = json.loads(results.read_text())
    content["log"] = ended.stdout + ended.stderr
    content["nights"] = dict(zip(nights, content["nights"], strict=True))
    for name, one in content["nights"].items():
        one["commands"] = command_lines(folder / name)
    return content


def command_lines(notes: Path) -> list[tuple[str, list[str], list[int]]]:
    return [tuple(json.loads(line)) for line in notes.read_text().splitlines()] if notes.exists() else []


NIGHTS = {
    "published": night(1, PUBLISHED, markets={"kr": "ko", 'a\'b "장"': "en"}, bundle="s3://x/y z"),
    "same run again": night(1, PUBLISHED_BEFORE),
    "nothing changed": night(2, ALREADY_PUBLISHED, data_date="2026-10-31"),
    "no logical date": night(3, PUBLISHED, has_date=False),
    "configuration": night(5, {"build_retrieval_table": {"exit": [2]}}),
    "audit": night(6, {"score_catalog": {"exit": [3], "event": "rejected", "verdict": "rejected"}}),
    "published by hand": night(6, PUBLISHED_BEFORE),
    "device": night(7, {"score_catalog": {"exit": [4]}}),
    "held": night(8, {"score_catalog": {"exit": [5]}}),
    "flattened audit": night(9, {"score_catalog": {"exit": [1], "verdict": "rejected"}}),
    "flattened superseded": night(10, {"score_catalog": {"exit": [1], "verdict": "superseded"}}),
    "died": night(11, {"score_catalog": {"exit": [1, 137, 0], "event": "published", "verdict": "published"}}),
    "evaluation": night(12, {**PUBLISHED, "evaluate": {"exit": [2]}}),
    "no judgments": night(13, PUBLISHED, conf="conf_without_evaluate"),
    "encoder": night(14, ALREADY_PUBLISHED, conf="conf_with_encoder", markets={"kr": "ko"}),
    "encoder of no build": night(15, ALREADY_PUBLISHED, conf="conf_of_words"),
    "broken encoder": night(16, {"embed_catalog": {"exit": [2]}}, conf="conf_with_encoder"),
    "shared file": night(17, {}, conf="conf_in_parts"),
    "flattened audit, schema with folder": night(
        18, {"score_catalog": {"exit": [1], "verdict": "rejected"}}, tables="schema:csrm?folder=tables"
    ),
    "schema": night(19, PUBLISHED, tables="schema:csrm"),
}


@pytest.fixture(scope="module")
def results(airflow: Airflow, alerts: Alerts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the DAG is made of and what became of NIGHTS."""
    folder = tmp_path_factory.mktemp("nights")
    return run_nights(airflow, NIGHTS, folder, AIRFLOW_VAR_CSRM_ALERT_URL=alerts.url)


def test_the_file_imports_without_errors_and_without_what_airflow_need_not_have(results: dict[str, Any]) -> None:
    assert results["import_errors"] == {}
    assert results["heavy"] == []


def test_tasks_follow_one_another(results: dict[str, Any]) -> None:
    dag = results["dag"]
    assert (dag["dag_id"], dag["timetable"]) == ("csrm_nightly", "CronTriggerTimetable")
    assert (dag["max_active_runs"], dag["catchup"], dag["deadline_hours"]) == (1, False, [6.0])
    assert {name: task["downstream"] for name, task in dag["tasks"].items()} == {
        "embed_catalog": ["build_retrieval_table"],
        "build_retrieval_table": ["build_candidates"],
        "build_candidates": ["score_and_publish"],
        "score_and_publish": ["announce", "evaluate"],
        "announce": [],
        "evaluate": ["maintain", "report"],
        "report": ["maintain"],
        "maintain": [],
    }
    assert {name for name, task in dag["tasks"].items() if task["outlets"]} == {"announce"}


def test_every_task_is_retried_with_back_off_and_alerts(results: dict[str, Any]) -> None:
    for task in results["dag"]["tasks"].values():
        assert (task["retries"], task["retry_minutes"], task["max_retry_minutes"]) == (3, 5, 60)
        assert (task["is_exponential"], task["pool"], task["alerts"]) == (True, "default_pool", ["alert_failure"])


def test_a_missed_deadline_alerts(results: dict[str, Any], alerts: Alerts) -> None:
    assert results["missed"] == [True, None]
    assert "csrm_nightly, late: not done by 2026-11-01T08:00:00Z." in alerts.texts


@pytest.mark.parametrize("name", ["published", "nothing changed", "no logical date"])
def test_each_job_understands_its_command_line(results: dict[str, Any], name: str) -> None:
    commands = results["nights"][name]["commands"]
    assert [job for job, _, _ in commands] == JOBS
    for job, words, _ in commands:
        module = importlib.import_module(f"csrm.commands.{job}")
        arguments = module.build_parser().parse_args(words)
        (settings_class,) = (
            value for key, value in vars(module).items() if key.endswith("Config") and issubclass(value, Settings)
        )
        config = load_config(ROOT / arguments.config, settings_class, arguments.overrides)
        assert config.tables == "tables"
        if name == "published" and job != "maintain":
            assert config.markets == {"kr": "ko", 'a\'b "장"': "en"}
        if name == "published" and job == "score_catalog":
            assert (config.bundle, arguments.log_format) == ("s3://x/y z", "json")


def test_texts_are_embedded_before_the_builds_where_one_searches_by_meaning(results: dict[str, Any]) -> None:
    commands = results["nights"]["encoder"]["commands"]
    assert [job for job, _, _ in commands] == ["embed_catalog", *JOBS]
    words = importlib.import_module("csrm.commands.embed_catalog").build_parser().parse_args(commands[0][1])
    assert words.config == "conf_with_encoder/embed_catalog.yaml"
    assert words.overrides == ['tables="tables"', 'markets={"kr": "ko"}']


def test_the_data_date_is_named_or_the_day_of_the_run(results: dict[str, Any]) -> None:
    dates = {
        name: next(word for word in words if word.startswith("--data-date="))
        for name in ("published", "nothing changed", "no logical date")
        for job, words, _ in results["nights"][name]["commands"]
        if job == "score_catalog"
    }
    assert dates == {
        "published": "--data-date=2026-11-01",
        "nothing changed": "--data-date=2026-10-31",
        "no logical date": "--data-date=2026-11-03",
    }


def test_every_attempt_and_the_report_use_the_run_id_of_the_dag_and_its_run(results: dict[str, Any]) -> None:
    died = results["nights"]["died"]
    assert [job for job, _, _ in died["commands"]] == [*JOBS[:2], *["score_catalog"] * 3, *JOBS[3:]]
    run_ids = {word for _, words, _ in died["commands"] for word in words if word.startswith("--run-id=")}
    assert run_ids == {"--run-id=csrm_nightly.manual__2026-11-11T02:00:00_00:00"}


ALL_DONE = {
    **dict.fromkeys(("build_retrieval_table", "build_candidates", "score_and_publish"), "success 1"),
    **dict.fromkeys(("announce", "evaluate", "report", "maintain"), "success 1"),
    "embed_catalog": "skipped 1",
}
NOT_SCORED = {
    **ALL_DONE,
    "score_and_publish": "failed 1",
    **dict.fromkeys(("announce", "evaluate", "maintain"), "upstream_failed 0"),
    "report": "skipped 1",
}
FAILED_AUDIT = {**NOT_SCORED, "report": "success 1"}
SKIPPED = {
    **ALL_DONE,
    **dict.fromkeys(("score_and_publish", "report"), "skipped 1"),
    **dict.fromkeys(("announce", "evaluate", "maintain"), "skipped 0"),
}


@pytest.mark.parametrize(
    ("name", "states"),
    [
        ("published", ALL_DONE),
        ("same run again", {**ALL_DONE, "announce": "skipped 1"}),
        ("nothing changed", {**ALL_DONE, "announce": "skipped 1"}),
        (
            "configuration",
            {
                **NOT_SCORED,
                "build_retrieval_table": "failed 1",
                **dict.fromkeys(("build_candidates", "score_and_publish"), "upstream_failed 0"),
            },
        ),
        ("audit", FAILED_AUDIT),
        ("published by hand", ALL_DONE),
        ("device", NOT_SCORED),
        ("held", SKIPPED),
        ("flattened audit", FAILED_AUDIT),
        ("flattened superseded", SKIPPED),
        ("died", {**ALL_DONE, "score_and_publish": "success 3"}),
        ("evaluation", {**ALL_DONE, "evaluate": "failed 1", "maintain": "upstream_failed 0"}),
        ("no judgments", {**ALL_DONE, "evaluate": "skipped 1"}),
        ("encoder", {**ALL_DONE, "embed_catalog": "success 1", "announce": "skipped 1"}),
        ("encoder of no build", {**ALL_DONE, "announce": "skipped 1"}),
        ("flattened audit, schema with folder", FAILED_AUDIT),
        ("schema", ALL_DONE),
        (
            "broken encoder",
            {
                **NOT_SCORED,
                "embed_catalog": "failed 1",
                **dict.fromkeys(
                    ("build_retrieval_table", "build_candidates", "score_and_publish"), "upstream_failed 0"
                ),
            },
        ),
    ],
)
def test_exit_codes_say_what_becomes_of_the_night(results: dict[str, Any], name: str, states: dict[str, str]) -> None:
    assert results["nights"][name]["tasks"] == states


def test_the_asset_is_updated_once_for_each_run_that_published(results: dict[str, Any]) -> None:
    published = ("published", "no logical date", "published by hand", "died", "evaluation", "no judgments")
    assert results["nights"]["no judgments"]["asset_events"] == [
        {
            "run_id": "csrm_nightly." + results["nights"][name]["run_id"].replace("+", "_"),
            "verdict": "published",
            "version": 8,
            "tables": "tables",
        }
        for name in published
    ]


def test_of_tables_in_a_schema_without_folder_the_output_of_the_job_counts(results: dict[str, Any]) -> None:
    event = results["nights"]["schema"]["asset_events"][-1]
    assert (event["verdict"], event["version"], event["tables"]) == ("published", 7, "schema:csrm")
    assert "The schema's location is not known here" in results["log"]


def test_failures_alert_once_with_task_and_exit_code(results: dict[str, Any], alerts: Alerts) -> None:
    for name, task, code in (
        ("configuration", "build_retrieval_table", "exit code 2, bad configuration or input"),
        ("audit", "score_and_publish", "exit code 3, the audit rejected the run"),
        ("flattened audit", "score_and_publish", "exit code 3, the audit rejected the run"),
        ("device", "score_and_publish", "exit code 4, no such device"),
        ("evaluation", "evaluate", "exit code 2, bad configuration or input"),
        ("shared file", "embed_catalog", "found no such file. Copy it to there, or correct 'extends'."),
    ):
        start = f"csrm_nightly, {results['nights'][name]['run_id']}: "
        (text,) = (text for text in alerts.texts if text.startswith(start))
        assert text.startswith(f"{start}{task} failed: ")
        assert code in text
    for name in ("published", "nothing changed", "held", "flattened superseded", "died"):
        assert not any(results["nights"][name]["run_id"] in text for text in alerts.texts)


def test_what_jobs_print_is_in_the_log(results: dict[str, Any]) -> None:
    assert "build_retrieval_table says 안녕" in results["log"]


def test_without_deltalake_what_the_job_printed_says_whether_it_published(airflow: Airflow, tmp_path: Path) -> None:
    (tmp_path / "deltalake.py").write_text("raise ImportError")
    nights = {
        "published": night(21, {"score_catalog": {"event": "published"}}),
        "nothing changed": night(22, {"score_catalog": {"event": "already_published"}}),
        "silent": night(23, {}),
        "flattened audit": night(24, {"score_catalog": {"exit": [1]}}),
    }
    before = len(airflow.asset_events())
    results = run_nights(airflow, nights, tmp_path, PYTHONPATH=str(tmp_path))["nights"]
    announced = {name: result["tasks"]["announce"] for name, result in results.items()}
    assert announced == {
        "published": "success 1",
        "nothing changed": "skipped 1",
        "silent": "skipped 1",
        "flattened audit": "upstream_failed 0",
    }
    assert results["flattened audit"]["tasks"]["score_and_publish"] == "failed 4"
    assert [event["version"] for event in airflow.asset_events()[before:]] == [7]


def test_a_killed_task_leaves_no_process_and_is_tried_again(airflow: Airflow, tmp_path: Path) -> None:
    plan = {"build_retrieval_table": {"sleep": [600, 600, 0], "stubborn": [False, True, False]}}
    with ThreadPoolExecutor() as pool:
        ended = pool.submit(run_nights, airflow, {"killed": night(25, plan)}, tmp_path)
        for attempt in range(2):
            wait_for(lambda number=attempt: ended.done() or started(tmp_path / "killed", number))
            pids = started(tmp_path / "killed", attempt)
            assert pids, ended.result()
            (task_runner,) = (child for child in psutil.Process().children() if str(IN_AIRFLOW) in child.cmdline())
            task_runner.terminate()
            wait_for(lambda gone=pids: not any(is_running(pid) for pid in gone))
        assert ended.result()["nights"]["killed"]["tasks"]["build_retrieval_table"] == "success 3"


def started(notes: Path, attempt: int) -> list[int] | None:
    """Processes of an attempt, once it has noted them."""
    commands = command_lines(notes) if notes.exists() else []
    return commands[attempt][2] if len(commands) > attempt else None


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], Any], seconds: float = 600) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.2)
    pytest.fail("waited in vain")


@dataclass
class Market:
    """A small market on disk: its inputs, a conf folder for it, and its tables."""

    folder: Path

    @property
    def conf(self) -> dict[str, Any]:
        """Parameters of the DAG."""
        conf = str(self.folder / "conf")  # which names the tables
        return {"conf": conf, "markets": {"kr": "ko", "us": "en"}, "bundle": "conf/demo_bundle"}

    def scores(self) -> DeltaTable:
        return DeltaTable(self.folder / "tables" / "relevance_scores")

    def runs(self) -> pd.DataFrame:
        return DeltaTable(self.folder / "tables" / "scoring_runs").to_pandas().sort_values("started_at")


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Market:
    folder = tmp_path_factory.mktemp("market")
    settings = {"products_per_market": 20, "queries_per_market": 4, "markets": {"kr": "ko", "us": "en"}}
    assert generate_market.main(setting_arguments(**settings, output=str(folder / "inputs"))) == 0
    (folder / "conf").mkdir()
    for path in (ROOT / "conf").glob("*.yaml"):
        (folder / "conf" / path.name).write_text(path.read_text().replace("build/demo", str(folder)))
    night = folder / "conf" / "score_catalog.yaml"  # takes its tables from a file that jobs share
    kept = [line for line in night.read_text().splitlines() if not line.startswith("tables:")]
    night.write_text("\n".join(["extends: market.yaml", *kept]))
    (folder / "conf" / "market.yaml").write_text(f"tables: {folder / 'tables'}\n")
    return Market(folder)


def dags_test(airflow: Airflow, market: Market, logical_date: str, *options: str) -> subprocess.CompletedProcess[str]:
    conf = json.dumps(market.conf)
    env = {
        "AIRFLOW_VAR_CSRM_SUBMIT": str(Path(sys.executable).with_name("spark-submit")),
        "CSRM_DEADLINE_HOURS": "0",
    }
    return airflow.run("airflow", "dags", "test", "csrm_nightly", logical_date, "--conf", conf, *options, **env)


@pytest.fixture(scope="module")
def first_night(airflow: Airflow, market: Market) -> dict[str, Any]:
    num_before = len(airflow.asset_events())
    ended = dags_test(airflow, market, "2026-11-26")
    assert ended.returncode == 0, ended.stdout[-10_000:]
    return {"states": airflow.states(), "events": airflow.asset_events()[num_before:]}


@pytest.mark.spark
def test_a_night_scores_a_market_with_spark_and_updates_the_asset(first_night: dict[str, Any], market: Market) -> None:
    assert first_night["states"] == ALL_DONE
    (event,) = first_night["events"]
    assert event["tables"] == str(market.folder / "tables")
    (run,) = market.runs().to_dict("records")
    assert (run["run_id"], run["published_version"]) == (event["run_id"], event["version"])
    assert (run["verdict"], str(run["data_date"])) == ("published", "2026-11-26")
    scores = market.scores().to_pandas()
    assert set(scores["market"]) == {"kr", "us"}
    assert (market.folder / "evaluation" / "metrics.json").exists()


@pytest.mark.spark
def test_a_night_whose_audit_fails_publishes_nothing_and_leaves_the_asset_alone(
    first_night: dict[str, Any], airflow: Airflow, market: Market
) -> None:
    for name in ("catalog", "candidates"):  # half of the products are gone: more deletes than the audit lets through
        path = market.folder / "inputs" / f"{name}.parquet"
        rows = pq.read_table(path)
        gone = pc.ends_with(rows["product_id"], "1")
        for digit in "3579":
            gone = pc.or_(gone, pc.ends_with(rows["product_id"], digit))
        pq.write_table(rows.filter(pc.invert(gone)), path)
    before, events = market.scores().version(), airflow.asset_events()
    # the tables that it scores from are those of the first night
    ended = dags_test(airflow, market, "2026-11-27", "--mark-success-pattern", "build_.*")
    assert ended.returncode != 0
    assert airflow.states() == FAILED_AUDIT, ended.stdout[-10_000:]
    assert airflow.asset_events() == events
    assert market.runs()["verdict"].tolist() == ["published", "rejected"]
    assert (
        market.scores()
        .to_pandas()
        .equals(DeltaTable(market.folder / "tables" / "relevance_scores", version=before).to_pandas())
    )
