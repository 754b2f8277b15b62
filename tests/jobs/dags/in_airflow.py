"""Runs the DAG in Airflow's environment: in_airflow.py NIGHTS RESULTS.

NIGHTS is a JSON list of {"env", "conf", "run_after", "logical_date"}; they run one after the other in this process,
without the waits between attempts. RESULTS gets what the DAG is made of and what became of each night.
"""

import json
import os
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import structlog
from airflow.dag_processing.dagbag import DagBag
from airflow.models.asset import AssetEvent
from airflow.sdk import DAG
from airflow.sdk.execution_time.callback_supervisor import execute_callback
from airflow.utils.session import create_session
from sqlalchemy import select


def described(dag: DAG) -> dict[str, Any]:
    tasks = {
        task.task_id: {
            "downstream": sorted(task.downstream_task_ids),
            "retries": task.retries,
            "retry_minutes": task.retry_delay.total_seconds() / 60,
            "max_retry_minutes": task.max_retry_delay.total_seconds() / 60,
            "is_exponential": bool(task.retry_exponential_backoff),
            "pool": task.pool,
            "outlets": [outlet.name for outlet in task.outlets],
            "alerts": [callback.__name__ for callback in task.on_failure_callback],
        }
        for task in dag.tasks
    }
    return {
        "dag_id": dag.dag_id,
        "timetable": type(dag.timetable).__name__,
        "max_active_runs": dag.max_active_runs,
        "catchup": dag.catchup,
        "deadline_hours": [alert.interval.total_seconds() / 3600 for alert in dag.deadline],
        "tasks": tasks,
    }


def miss_deadline(dag: DAG) -> tuple[bool, str | None]:
    """Calls what the deadline calls, as an executor does."""
    (alert,) = dag.deadline
    run = {"dag_id": dag.dag_id, "dag_run_id": "late"}
    context = {"dag_run": run, "deadline": {"id": "1", "deadline_time": "2026-11-01T08:00:00Z"}}
    file = Path(dag.fileloc)
    return execute_callback(alert.callback.path, {"context": context}, file.name, file.parent, structlog.get_logger())


def run_night(env: dict[str, str], conf: dict[str, Any], run_after: str, logical_date: str | None) -> dict[str, Any]:
    os.environ.update(env)
    (dag,) = DagBag().dags.values()  # as each task of Airflow's does; a run leaves its parameters in it
    dag.deadline = None  # see the DAG's docstring
    for task in dag.tasks:
        task.retry_delay = timedelta(seconds=1)
    moment = datetime.fromisoformat(logical_date) if logical_date else None
    run = dag.test(run_after=datetime.fromisoformat(run_after), logical_date=moment, run_conf=conf)
    with create_session() as session:
        events = [event.extra for event in session.scalars(select(AssetEvent).order_by(AssetEvent.id))]
    return {
        "run_id": run.run_id,
        "tasks": {ti.task_id: f"{ti.state} {ti.try_number}" for ti in run.get_task_instances()},
        "asset_events": events,
    }


if __name__ == "__main__":
    bag = DagBag()
    heavy = sorted({"pyspark", "pandas", "numpy", "deltalake", "csrm"} & set(sys.modules))
    (dag,) = bag.dags.values()
    results = {"import_errors": bag.import_errors, "heavy": heavy, "dag": described(dag), "missed": miss_deadline(dag)}
    nights = json.loads(Path(sys.argv[1]).read_text())
    results["nights"] = [run_night(**night) for night in nights]
    Path(sys.argv[2]).write_text(json.dumps(results, default=str))
