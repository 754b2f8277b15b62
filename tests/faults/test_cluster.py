"""The scoring job on a cluster, as it is submitted there: no fault, and where its tasks run."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults.cluster import Cluster
from tests.faults.night import Night

pytestmark = [pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(900)]


def read_events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def most_at_once(ends: list[dict[str, Any]]) -> int:
    """Most tasks that one executor had at one time, from the events of their ends."""
    most = 0
    for executor in {end["Task Info"]["Executor ID"] for end in ends}:
        moments = []
        for end in (end for end in ends if end["Task Info"]["Executor ID"] == executor):
            launched, metrics = end["Task Info"]["Launch Time"], end["Task Metrics"]
            milliseconds = metrics["Executor Deserialize Time"] + metrics["Executor Run Time"]
            moments += [(launched, 1), (launched + milliseconds, -1)]
        running = 0
        for _, step in sorted(moments):
            running += step
            most = max(most, running)
    return most


def test_scoring_has_one_task_for_each_gpu_address_and_joins_have_all_cores(cluster: Cluster, night: Night) -> None:
    arguments = night.arguments("clean", one_task_per_gpu=True, num_partitions=8)

    finished = cluster.run(*arguments, cores=2)

    assert finished.code == 0, finished.output
    assert "published run clean: relevance_scores version 2" in finished.output
    night.check_published("clean")
    events = read_events(cluster.newest_events())
    (profile,) = [
        event
        for event in events
        if event["Event"] == "SparkListenerResourceProfileAdded" and event["Resource Profile Id"] != 0
    ]
    requests = profile["Task Resource Requests"]
    assert {name: request["Amount"] for name, request in requests.items()} == {"cpus": 1.0, "gpu": 1.0}
    profile_of = {
        event["Stage Info"]["Stage ID"]: event["Stage Info"]["Resource Profile Id"]
        for event in events
        if event["Event"] == "SparkListenerStageCompleted"
    }
    tasks: dict[int, list[dict[str, Any]]] = {0: [], profile["Resource Profile Id"]: []}
    for event in events:
        if event["Event"] == "SparkListenerTaskEnd":
            tasks[profile_of[event["Stage ID"]]].append(event)
    scoring = tasks[profile["Resource Profile Id"]]
    assert {task["Task Info"]["Executor ID"] for task in scoring} == {"0", "1"}
    assert most_at_once(scoring) == 1
    assert most_at_once(tasks[0]) == 2
