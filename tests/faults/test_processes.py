"""Faults of processes and machines: what runs a night is killed or hangs, two drivers at once, a full disk."""

import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil
import pytest

from tests.disks import small_disk
from tests.faults.bundles import HANG_MARK, faulty_bundle
from tests.faults.cluster import ROOT, Cluster, Submitted, kill, wait_for
from tests.faults.night import KEY, KR, LEASE_SECONDS, Night

pytestmark = [pytest.mark.long, pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(1800)]

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
    """Have the Python workers stand still."""
    stopped.extend(cluster.python_workers())
    for worker in stopped:
        kill(worker, signal.SIGSTOP)
    return stopped


@pytest.mark.fault("a Python worker dies")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV], ids=["SIGKILL", "SIGSEGV"])
def test_a_python_worker_that_dies_costs_its_task(cluster: Cluster, night: Night, number: int) -> None:
    with cluster.submit(*night.arguments("night", **SMALL_CHUNKS)) as submitted:
        scoring_worker(cluster, night, submitted)
        for worker in cluster.python_workers():
            kill(worker, number)
        finished = submitted.end()

    night.check_ended(finished.code, finished.output, 0, "published run night")
    night.check_published("night")


@pytest.mark.fault("an executor is killed")
def test_an_executor_that_dies_costs_its_tasks(cluster: Cluster, night: Night) -> None:
    with cluster.submit(*night.arguments("night", **SMALL_CHUNKS)) as submitted:
        scoring_worker(cluster, night, submitted)
        kill(cluster.executors()[0])
        finished = submitted.end()

    night.check_ended(finished.code, finished.output, 0, "Lost executor", "published run night")
    night.check_published("night")


@pytest.mark.fault("a worker daemon is killed, and the executor and Python worker of its machine with it")
def test_a_machine_that_dies_costs_its_tasks(cluster: Cluster, night: Night) -> None:
    with cluster.submit(*night.arguments("night", **SMALL_CHUNKS)) as submitted:
        scoring_worker(cluster, night, submitted)
        with cluster.lost_machine():
            finished = submitted.end()

    night.check_ended(finished.code, finished.output, 0, "published run night")
    night.check_published("night")


@pytest.mark.fault("native code hangs at a pair, every time")
def test_a_pair_at_which_its_worker_hangs_every_time_is_found_and_set_aside(
    cluster: Cluster, night: Night, tmp_path: Path
) -> None:
    night.bundle = faulty_bundle(ROOT / "conf" / "demo_bundle", tmp_path / "bundle")
    poison = (KR, "p007")
    titles = night.catalog.set_index(["market", "product_id"])["title"]
    titles[poison] += HANG_MARK
    night.catalog = titles.reset_index()
    queries = night.candidates.set_index(["market", "product_id"])["query_id"]
    sound = queries.drop(index=poison).reset_index()[KEY]
    night.candidates = pd.concat([sound, pd.DataFrame([(KR, "q1", "p007")], columns=KEY)])

    finished = cluster.run(*night.arguments("night", hang_minutes=0.25, audit={"rejected_share": 0.5}))

    night.check_ended(finished.code, finished.output, 0, "idle timeout", "rejected 1 pairs: 1 process_died")
    rejected = night.table("rejected_pairs")
    assert rejected[[*KEY, "reason"]].to_numpy().tolist() == [[KR, "q1", "p007", "process_died"]]
    assert not (night.folder / "tables" / "_attempts" / "night").exists()
    night.candidates = sound
    night.bundle = ROOT / "conf" / "demo_bundle"
    night.check_scores({"night"})
    night.check_staged_once()


BROKEN = """
import os, signal, sys, threading
from contextlib import suppress
from csrm.cli import run_job
from csrm.commands import score_catalog
from csrm.night import publish, run

def die(*_, **__):
    os.killpg(0, signal.SIGKILL)

if {place!r} == "publish":
    run.publish_changes = die
elif {place!r} == "between markets":
    merge = publish.merge_changes
    publish.merge_changes = lambda *arguments: (merge(*arguments), die())
elif {place!r} == "in a commit":
    merge = publish.merge_changes
    publish.merge_changes = lambda *arguments: (threading.Timer(1.0, die).start(), merge(*arguments), die())
elif {place!r} == "full disk":
    stage_scores = run.stage_scores
    def stage(*arguments):
        with suppress(OSError), open({ballast!r}, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        return stage_scores(*arguments)
    run.stage_scores = stage
else:
    run.stage_scores = die
sys.exit(run_job(score_catalog.main))
"""
"""The scoring job, with a fault at a place: the driver is killed with its JVM, or a file fills the disk."""


def broken_job(folder: Path, place: str, ballast: Path = Path()) -> Path:
    path = folder / f"score_catalog_{place.replace(' ', '_')}.py"
    path.write_text(BROKEN.format(place=place, ballast=str(ballast)))
    return path


@pytest.mark.fault("the driver is killed before staging, after some chunks, before the publish, in it, between markets")
def test_a_driver_killed_anywhere_loses_no_work_and_publishes_nothing_by_halves(
    cluster: Cluster, night: Night, tmp_path: Path
) -> None:
    num_pairs = len(night.candidates)

    def die(place: str) -> None:
        ended = cluster.run(*night.arguments("night", lease_seconds=LEASE_SECONDS), job=broken_job(tmp_path, place))
        night.check_ended(ended.code, ended.output, -signal.SIGKILL)
        time.sleep(LEASE_SECONDS)

    die("staging")
    assert (night.run("night")["verdict"], night.version("scores_staging")) == ("running", 0)

    with cluster.submit(*night.arguments("night", **SMALL_CHUNKS, lease_seconds=LEASE_SECONDS)) as submitted:
        scoring_worker(cluster, night, submitted)
        submitted.kill()
    time.sleep(LEASE_SECONDS)
    assert night.run("night")["verdict"] == "running"
    num_staged = len(night.table("scores_staging"))
    assert 0 < num_staged < num_pairs

    die("publish")
    assert (night.run("night")["verdict"], len(night.scores())) == ("running", 0)
    assert len(night.table("scores_staging")) == num_pairs

    die("in a commit")
    scores = night.scores()
    assert len(scores) in (0, num_pairs // 2)  # as it was, or whole
    if scores.empty:
        die("between markets")
    assert night.scores()["market"].unique().tolist() == ["kr"]
    assert len(night.scores()) == num_pairs // 2  # one market is whole, the other as it was

    finished = cluster.run(*night.arguments("night"))

    assert finished.code == 0, finished.output
    run = night.run("night")
    assert (run["num_scored"], run["num_reused"], run["num_unchanged"]) == (0, num_pairs // 2, num_pairs // 2)
    night.check_scores({"night"})
    night.check_staged_once()
    assert run["verdict"] == "published"


@pytest.mark.fault("a second driver at once; then SIGTERM to the first")
@pytest.mark.parametrize("who", ["spark-submit", "driver"])
def test_sigterm_ends_a_run_at_once_and_gives_its_leases_back(cluster: Cluster, night: Night, who: str) -> None:
    with cluster.submit(*night.arguments("night", **SMALL_CHUNKS, lease_seconds=600)) as submitted:
        scoring_worker(cluster, night, submitted)
        stop_workers(cluster)  # so that it does not end by itself
        with cluster.submit(*night.arguments("other", **SMALL_CHUNKS, lease_seconds=600)) as second:
            refused = second.end()
        night.check_ended(refused.code, refused.output, 5, "market 'kr': run night (process ")
        assert submitted.is_running
        kill(submitted.driver() if who == "driver" else submitted.jvm, signal.SIGTERM)
        ended = submitted.end()

    night.check_ended(ended.code, ended.output, 143)
    num_staged = len(night.table("scores_staging"))
    finished = cluster.run(*night.arguments("next", **SMALL_CHUNKS, lease_seconds=600))
    night.check_ended(finished.code, finished.output, 0, "published run next")
    night.check_reused("next", num_staged)
    night.check_published("next")


@pytest.mark.fault("the disk that Spark spills to is full")
def test_a_full_disk_ends_the_run_with_its_cause_and_the_next_one_goes_on(
    cluster: Cluster, night: Night, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "spill", "64m") as spill:
        job = broken_job(tmp_path, "full disk", spill / "ballast")
        arguments = night.arguments("night", lease_seconds=LEASE_SECONDS)
        ended = cluster.run(*arguments, job=job, master="local[2]", spark__local__dir=spill)
        night.check_ended(ended.code, ended.output, 1, "Spark gave up: ", "No space left on device")
    assert len(night.scores()) == 0
    time.sleep(LEASE_SECONDS)

    finished = cluster.run(*night.arguments("night"))

    night.check_ended(finished.code, finished.output, 0, "published run night")
    night.check_published("night")
