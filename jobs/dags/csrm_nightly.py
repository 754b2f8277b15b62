"""The night of CSRM: from the retrieval table to published relevance scores, their evaluation and a report.

**Deploy** (Airflow 3.3 or newer): point a DAG bundle at `jobs/dags` of a checkout, or copy this file to your DAGs.
It needs no package of CSRM's; each task starts `jobs/<name>.py` in a process of its own, on the worker's machine.

| Airflow Variable | default | meaning |
| --- | --- | --- |
| `csrm_home` | the checkout that holds this file | folder with `jobs/` and `conf/`; relative paths start there |
| `csrm_submit` | `spark-submit` | starts a job: `spark-submit --master yarn ...`, or `python` for a local session |
| `csrm_alert_url` | none | a web hook that takes alerts as `{"text": ...}`; without it they are only logged |

A market without judgments: leave `evaluate.yaml` out of the configurations, and the night is not evaluated. Texts are
embedded before the builds where there is an `embed_catalog.yaml` and a build has the setting `semantic`; the builds
embed what is left.

The form of a run describes its parameters. The data date is the day (UTC) of the run's logical date, or of its start
where it has none. The run id of the scores is that of the DAG and its run, so what is tried again goes on where it
stopped, and copies of this DAG for other markets may share tables.

| a job's exit code | the task |
| --- | --- |
| 0 | succeeds |
| 2 configuration or input, 3 audit, 4 device | fails at once and alerts: trying again would not help |
| 5 another run holds the market | is skipped, and what follows with it |
| else | is tried again up to three times, 5 to 60 minutes apart (beyond a dead run's lease), then fails and alerts |

The asset `csrm_relevance_scores` is updated once by each run that changed the published table (extra: run_id, verdict,
version, tables), and by no other. A rejected run gets its report, too. After `jobs/publish.py` has published it, clear
its task `score_and_publish`: nothing is scored again, the asset is updated, and the night goes on.

A run that has not ended 6 hours after it was queued alerts. The environment variable `CSRM_DEADLINE_HOURS` of the DAG
processor sets other hours; 0 is no deadline, which `airflow dags test` needs: Airflow 3.3 fails at its end otherwise.

Install `deltalake` beside Airflow: the run's row in `scoring_runs` then says what became of it, also where a cluster
manager turns every exit code into 1 and keeps what a job prints, or where a run was published by hand. Of tables in a
schema, Airflow finds the row where `tables` names their folder: `schema:main.csrm?folder=URI`. Tasks use the
default pool; where several copies of this DAG share a cluster, name a pool of one slot in POOL.
"""

import json
import logging
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import yaml
from airflow.sdk import (
    DAG,
    Asset,
    BaseOperator,
    Context,
    CronTriggerTimetable,
    DeadlineAlert,
    DeadlineReference,
    Param,
    SyncCallback,
    TriggerRule,
    Variable,
    task,
)
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

SCHEDULE = CronTriggerTimetable("0 2 * * *", timezone="UTC")
DEADLINE_HOURS = float(os.environ.get("CSRM_DEADLINE_HOURS", "6"))
POOL = "default_pool"
RELEVANCE_SCORES = Asset("csrm_relevance_scores")

FINAL_EXIT_CODES = {2: "bad configuration or input", 3: "the audit rejected the run", 4: "no such device"}
HELD_EXIT_CODE = 5
EXIT_CODE_OF_VERDICT = {"rejected": 3, "superseded": HELD_EXIT_CODE}
SECONDS_TO_DIE = 4
"""After SIGTERM, before SIGKILL. Airflow kills a task five seconds after it asked it to end."""

logger = logging.getLogger(__name__)


class CsrmJobOperator(BaseOperator):
    """Runs `jobs/<job>.py` in a process of its own and does what its exit code says; see the table above.

    Args:
        job: name of the job.
        config: its configuration file.
        arguments: the rest of its command line; empty words are left out.
        submit: words that start it, as a shell would read them.
        home: working directory.
        tables: folder or schema of CSRM's tables; empty: the one that the configuration file names.
        run_id: for a job that writes a row of scoring_runs: the row's run. What became of the run is then pushed as the
            XCom `outcome`.
        is_optional: whether the task is skipped where there is no such configuration file.
        semantic_in: configuration files of which one must have the setting `semantic`, or the task is skipped too.
    """

    template_fields = ("config", "arguments", "submit", "home", "tables", "run_id", "semantic_in")

    def __init__(
        self,
        *,
        job: str,
        config: str,
        arguments: Sequence[str],
        submit: str = "{{ var.value.get('csrm_submit', 'spark-submit') }}",
        home: str = "{{ var.value.get('csrm_home', '') or checkout }}",
        tables: str = "",
        run_id: str = "",
        is_optional: bool = False,
        semantic_in: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.job = job
        self.config = config
        self.arguments = arguments
        self.submit = submit
        self.home = home
        self.tables = tables
        self.run_id = run_id
        self.is_optional = is_optional
        self.semantic_in = semantic_in
        self._process: subprocess.Popen[str] | None = None

    def execute(self, context: Context) -> None:
        if self.is_optional and not Path(self.home, self.config).exists():
            raise AirflowSkipException(f"{self.job}: there is no {self.config}.")
        if self.semantic_in and not any(self._settings(config).get("semantic") for config in self.semantic_in):
            raise AirflowSkipException(f"{self.job}: none of {', '.join(self.semantic_in)} has the setting semantic.")
        started_at = datetime.now(UTC)
        words = [f"--config={self.config}", setting("tables", self.tables or None), *self.arguments]
        command = [*shlex.split(self.submit), f"jobs/{self.job}.py", *filter(None, words)]
        self.log.info("in %s: %s", self.home, shlex.join(command))
        exit_code, event = self._run(command)
        if self.run_id:
            row = self._run_row()
            if exit_code == 1 and row.get("finished_at") and row["finished_at"] >= started_at:
                exit_code = EXIT_CODE_OF_VERDICT.get(row["verdict"], 1)
            if exit_code in (0, 3):
                outcome = {
                    "run_id": self.run_id,
                    "verdict": row.get("verdict") or event.get("event"),
                    "version": row.get("published_version") or event.get("version"),
                    "tables": self._tables(),
                }
                context["ti"].xcom_push(key="outcome", value=outcome)
        if exit_code in FINAL_EXIT_CODES:
            raise AirflowFailException(
                f"{self.job}: exit code {exit_code}, {FINAL_EXIT_CODES[exit_code]}; see its log."
            )
        if exit_code == HELD_EXIT_CODE:
            raise AirflowSkipException(f"{self.job}: exit code 5, another run holds a market; see its log.")
        if exit_code:
            raise AirflowException(f"{self.job}: exit code {exit_code}; see its log.")

    def on_kill(self) -> None:
        """Ends the job and what it started: spark-submit runs a JVM, and that the job."""
        if self._process is None or self._process.poll() is not None:
            return
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(SECONDS_TO_DIE)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)

    def _run(self, command: list[str]) -> tuple[int, Mapping[str, Any]]:
        """The exit code, and the last event that was printed."""
        event: Mapping[str, Any] = {}
        self._process = subprocess.Popen(
            command,
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # so that on_kill reaches all of it
        )
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self.log.info("%s", line.rstrip())
                event = printed_event(line) or event
            return self._process.wait(), event
        finally:
            self.on_kill()

    def _tables(self) -> str:
        """The folder, URI or schema of the tables that the job writes."""
        if self.tables:
            return self.tables
        return str(self._settings(self.config)["tables"])

    def _settings(self, config: str) -> Mapping[str, Any]:
        """Settings of a configuration file, and of the one that it extends; empty where there is no such file."""
        path = Path(self.home, config)
        own: dict[str, Any] = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}
        shared = own.pop("extends", None)
        if shared is None:
            return own
        if not (path.parent / shared).exists():
            raise AirflowFailException(
                f"{self.job}: {path} extends {shared}, expected at {path.parent / shared}, found no such file. "
                "Copy it to there, or correct 'extends'."
            )
        return {**(yaml.safe_load((path.parent / shared).read_text(encoding="utf-8")) or {}), **own}

    def _run_row(self) -> Mapping[str, Any]:
        """What scoring_runs says of the run; empty where it cannot be read, and then what was printed has to do."""
        try:
            tables = self._tables()
            if tables.startswith("schema:"):
                tables = tables.partition("?folder=")[2]
                if not tables:
                    self.log.info("The schema's location is not known here: the job's output and exit code count.")
                    return {}
            return read_run_row(tables if "://" in tables else os.path.join(self.home, tables), self.run_id)
        except ImportError:
            self.log.info("deltalake is not installed: what the job printed and its exit code say what became of it.")
        except Exception as error:
            self.log.warning("scoring_runs cannot be read: %s", error)
        return {}


def printed_event(line: str) -> Mapping[str, Any] | None:
    """The event in a line of a job that runs with --log-format json; None in other lines."""
    if not line.startswith("{"):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if "event" in event else None


def read_run_row(tables: str, run_id: str) -> Mapping[str, Any]:
    """verdict, published_version and finished_at of a run; empty where it has no row."""
    from deltalake import DeltaTable, QueryBuilder

    query = f"SELECT verdict, published_version, finished_at FROM scoring_runs WHERE run_id = '{run_id}'"
    rows = QueryBuilder().register("scoring_runs", DeltaTable(f"{tables}/scoring_runs")).execute(query).read_all()
    return {name: rows[name][0].as_py() for name in rows.column_names} if rows.num_rows else {}


def setting(name: str, value: object) -> str:
    """The command-line word that replaces a setting of a job; empty for None."""
    return "" if value is None else f"--set={name}={json.dumps(value, ensure_ascii=False)}"


def run_id_of(dag_id: str, dag_run_id: str) -> str:
    """Both in the characters that a run id may have."""
    return re.sub(r"[^\w.:-]", "_", f"{dag_id}.{dag_run_id}")


def send_alert(text: str) -> None:
    logger.error(text)
    url = Variable.get("csrm_alert_url", default=None)
    if url:
        request = Request(url, json.dumps({"text": text}).encode(), {"Content-Type": "application/json"})
        urlopen(request, timeout=30).close()


def alert_failure(context: Context) -> None:
    ti = context["ti"]
    send_alert(f"{ti.dag_id}, {ti.run_id}: {ti.task_id} failed: {context.get('exception')} {ti.log_url}")


def alert_deadline(context: Mapping[str, Any]) -> None:
    run, deadline = context["dag_run"], context["deadline"]
    send_alert(f"{run['dag_id']}, {run['dag_run_id']}: not done by {deadline['deadline_time']}.")


def skip_without_outcome(context: Context) -> None:
    """Reports need a run that was published or rejected."""
    if context["ti"].xcom_pull(task_ids="score_and_publish", key="outcome") is None:
        raise AirflowSkipException("No run was audited, so there is nothing to report.")


@task(inlets=[RELEVANCE_SCORES], outlets=[RELEVANCE_SCORES])
def announce(**context: Any) -> None:
    """Updates the asset where the run has changed the published table: being skipped, it does not."""
    outcome = context["ti"].xcom_pull(task_ids="score_and_publish", key="outcome")
    if outcome["verdict"] is None:
        logger.warning("Unknown whether anything was published. Is deltalake installed beside Airflow?")
    if outcome["verdict"] != "published":
        raise AirflowSkipException(f"verdict: {outcome['verdict']}")
    if any(event.extra.get("run_id") == outcome["run_id"] for event in context["inlet_events"][RELEVANCE_SCORES]):
        raise AirflowSkipException("announced before, when this run published")
    context["outlet_events"][RELEVANCE_SCORES].extra = outcome


def job(name: str, *arguments: str, task_id: str | None = None, **kwargs: Any) -> CsrmJobOperator:
    """Runs a job with its configuration, on the run's tables."""
    return CsrmJobOperator(
        task_id=task_id or name,
        job=name,
        config="{{ params.conf }}/" + name + ".yaml",
        arguments=arguments,
        tables="{{ params.tables or '' }}",
        **kwargs,
    )


MARKETS = "{{ setting('markets', params.markets) }}"
RUN_ID = "{{ run_id_of(dag.dag_id, dag_run.run_id) }}"
DATA_DATE = "{{ params.data_date or (dag_run.logical_date or dag_run.run_after) | ds }}"

DEADLINE = DeadlineAlert(
    DeadlineReference.DAGRUN_QUEUED_AT, timedelta(hours=DEADLINE_HOURS), SyncCallback(alert_deadline)
)

with DAG(
    dag_id="csrm_nightly",
    description="Scores what changed in the catalog and publishes it to relevance_scores",
    doc_md=__doc__,
    schedule=SCHEDULE,
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    params={
        "markets": Param(None, type=["null", "object"], description="Market to its language; null: as in `conf`"),
        "conf": Param("conf", type="string", description="Folder with a YAML file for each job"),
        "tables": Param(
            None, type=["null", "string"], description="Folder or schema of the tables; null: as in `conf`"
        ),
        "bundle": Param(None, type=["null", "string"], description="Folder or URI of the bundle; null: as in `conf`"),
        "data_date": Param(None, type=["null", "string"], format="date", description="Day whose inputs are scored"),
    },
    default_args={
        "pool": POOL,
        "retries": 3,
        "retry_delay": timedelta(minutes=5),
        "retry_exponential_backoff": True,
        "max_retry_delay": timedelta(hours=1),
        "on_failure_callback": alert_failure,
    },
    deadline=DEADLINE if DEADLINE_HOURS else None,
    user_defined_macros={"setting": setting, "run_id_of": run_id_of, "checkout": str(Path(__file__).parents[2])},
    tags=["csrm"],
):
    builds = ("build_retrieval_table", "build_candidates")
    vectors = job(
        "embed_catalog",
        MARKETS,
        is_optional=True,
        semantic_in=["{{ params.conf }}/" + f"{name}.yaml" for name in builds],
    )
    retrieval_table = job("build_retrieval_table", MARKETS, trigger_rule=TriggerRule.NONE_FAILED)
    candidates = job("build_candidates", MARKETS)
    score_and_publish = job(
        "score_catalog",
        MARKETS,
        "{{ setting('bundle', params.bundle) }}",
        f"--run-id={RUN_ID}",
        f"--data-date={DATA_DATE}",
        "--log-format=json",
        task_id="score_and_publish",
        run_id=RUN_ID,
    )
    evaluation = job("evaluate", MARKETS, is_optional=True)
    report = job(
        "report", MARKETS, f"--run-id={RUN_ID}", trigger_rule=TriggerRule.ALL_DONE, pre_execute=skip_without_outcome
    )
    maintenance = job("maintain", trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS)

    vectors >> retrieval_table >> candidates >> score_and_publish >> evaluation >> report >> maintenance
    score_and_publish >> announce()
    evaluation >> maintenance  # after a report all the same, but only where all went well
