"""Faults of processes: workers, executors and drivers that are killed or hang, and two drivers at once."""

import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.faults.cluster import ROOT, Cluster, Submitted, kill, wait_for
from tests.faults.night import LEASE_SECONDS, Night

pytestmark = [pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(1800)]

stopped: list[psutil.Process] = []
SMALL_CHUNKS = {"chunk_minutes": 1e-6, "num_partitions": 1}
"""A commit for each query: enough of them to be killed between two."""


def scoring_worker(cluster: Cluster, night: Night, submitted: Submitted) -> psutil.Process:
    """A Python worker, after the first chunk was staged: it scores, or waits for the next chunk."""

    def found() -> psutil.Process | None:
        assert submitted.is_running, submitted.output
        return next(iter(cluster.python_workers()), None) if night.version("scores_staging") >= 1 else None

    return wait_for(found, "a chunk that is staged")


@pytest.fixture(autouse=True)
def no_stopped_workers() -> Iterator[None]:
    """A stopped process outlives its parent."""
    stopped.clear()
    yield
    for worker in stopped:
        with suppress(psutil.NoSuchProcess):
            worker.kill()


def stop_workers(cluster: Cluster) -> list[psutil.Process]:
    """Have the Python workers hang."""
    stopped.extend(cluster.python_workers())
    for worker in stopped:
        kill(worker, signal.SIGSTOP)
    return stopped


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSEGV, marks=pytest.mark.faults)])
def test_a_python_worker_that_dies_costs_its_task(cluster: Cluster, night: Night, number: int) -> None:
    with cluster.submit(*night.arguments("night", **SMALL_CHUNKS)) as submitted:
        scoring_worker(cluster, night, submitted)
        for worker in cluster.python_workers():
            kill(worker, number)
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


def test_a_worker_that_hangs_is_ended_and_its_task_tried_again(cluster: Cluster, night: Night) -> None:
    with cluster.submit(*night.arguments("night", **SMALL_CHUNKS, hang_minutes=0.5)) as submitted:
        scoring_worker(cluster, night, submitted)
        stop_workers(cluster)
        finished = submitted.end()

    assert finished.code == 0, finished.output
    assert not any(worker.is_running() and worker.status() == psutil.STATUS_STOPPED for worker in stopped)
    night.check_published("night")


DIES = """
import os, signal, sys
sys.path.insert(0, {jobs!r})
import score_catalog
from csrm.cli import run_job

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if {place!r} == "publish":
    score_catalog.publish_changes = die
elif {place!r} == "between markets":
    from csrm.spark import publish
    merge = publish.merge_changes
    publish.merge_changes = lambda *arguments: (merge(*arguments), die())
else:
    score_catalog.stage_scores = die
sys.exit(run_job(score_catalog.main))
"""
"""The scoring job, in a driver that is killed at a place."""


def dying_job(folder: Path, place: str) -> Path:
    path = folder / f"score_catalog_dies_{place.replace(' ', '_')}.py"
    path.write_text(DIES.format(jobs=str(ROOT / "jobs"), place=place))
    return path


def test_a_driver_killed_anywhere_loses_no_work_and_publishes_nothing_by_halves(
    cluster: Cluster, night: Night, tmp_path: Path
) -> None:
    num_pairs = len(night.candidates)

    def die(place: str) -> None:
        ended = cluster.run(*night.arguments("night"), job=dying_job(tmp_path, place))
        assert ended.code == 137, ended.output
        time.sleep(LEASE_SECONDS)

    die("staging")
    assert (night.run("night")["verdict"], night.version("scores_staging")) == ("running", 0)

    with cluster.submit(*night.arguments("night", **SMALL_CHUNKS)) as submitted:
        scoring_worker(cluster, night, submitted)
        submitted.kill()
    time.sleep(LEASE_SECONDS)
    assert night.run("night")["verdict"] == "running"
    num_staged = len(night.table("scores_staging"))
    assert 0 < num_staged < num_pairs

    die("publish")
    assert (night.run("night")["verdict"], night.version("relevance_scores")) == ("running", 0)
    assert len(night.table("scores_staging")) == num_pairs

    die("between markets")
    assert night.scores()["market"].unique().tolist() == ["kr"]
    assert len(night.scores()) == num_pairs // 2  # one market is whole, the other as it was

    finished = cluster.run(*night.arguments("night"))

    assert finished.code == 0, finished.output
    run = night.run("night")
    assert (run["num_scored"], run["num_reused"], run["num_unchanged"]) == (0, num_pairs // 2, num_pairs // 2)
    assert len(night.table("scores_staging")) == num_pairs
    night.check_scores({"night"})
    assert run["verdict"] == "published"


@pytest.mark.parametrize("who", ["spark-submit", pytest.param("driver", marks=pytest.mark.faults)])
def test_sigterm_ends_a_run_at_once_and_gives_its_leases_back(cluster: Cluster, night: Night, who: str) -> None:
    with cluster.submit(*night.arguments("night", **SMALL_CHUNKS, lease_seconds=600)) as submitted:
        scoring_worker(cluster, night, submitted)
        stop_workers(cluster)  # so that it does not end by itself
        with cluster.submit(*night.arguments("other", **SMALL_CHUNKS, lease_seconds=600)) as second:
            refused = second.end()
        assert refused.code == 5, refused.output
        assert "market 'kr': run night (process " in refused.output
        assert submitted.is_running
        kill(submitted.driver() if who == "driver" else submitted.jvm, signal.SIGTERM)
        ended = submitted.end()

    assert ended.code == 143, ended.output
    num_staged = len(night.table("scores_staging"))
    assert num_staged > 0
    finished = cluster.run(*night.arguments("next", **SMALL_CHUNKS, lease_seconds=600))
    assert finished.code == 0, finished.output
    assert night.run("next")["num_reused"] == num_staged
    night.check_published("next")
