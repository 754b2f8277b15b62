"""Faults of processes: workers and executors that are killed."""

import signal

import psutil
import pytest

from tests.faults.cluster import Cluster, Submitted, kill, wait_for
from tests.faults.night import Night

pytestmark = [pytest.mark.faults, pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(1800)]

SMALL_CHUNKS = {"chunk_minutes": 1e-6, "num_partitions": 1}
"""A commit for each query: enough of them to be killed between two."""


def scoring_worker(cluster: Cluster, night: Night, submitted: Submitted) -> psutil.Process:
    """A Python worker, after the first chunk was staged: it scores, or waits for the next chunk."""

    def found() -> psutil.Process | None:
        assert submitted.is_running, submitted.output
        return next(iter(cluster.python_workers()), None) if night.version("scores_staging") >= 1 else None

    return wait_for(found, "a chunk that is staged")


def test_a_python_worker_that_dies_costs_its_task(cluster: Cluster, night: Night) -> None:
    with cluster.submit(*night.arguments("night", **SMALL_CHUNKS)) as submitted:
        scoring_worker(cluster, night, submitted)
        for worker in cluster.python_workers():
            kill(worker, signal.SIGKILL)
        finished = submitted.end()

    assert finished.code == 0, finished.output
    night.check_published("night")


def test_an_executor_that_dies_costs_its_tasks(cluster: Cluster, night: Night) -> None:
    with cluster.submit(*night.arguments("night", **SMALL_CHUNKS)) as submitted:
        scoring_worker(cluster, night, submitted)
        kill(cluster.executors()[0])
        finished = submitted.end()

    assert finished.code == 0, finished.output
    assert "ExecutorLostFailure" in finished.output or "Lost executor" in finished.output
    night.check_published("night")
