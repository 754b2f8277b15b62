"""A standalone Spark cluster on this machine: a master and two workers, each with one GPU address that is made up."""

import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyspark

ROOT = Path(__file__).parents[2]
SPARK_HOME = Path(pyspark.__file__).parent
PATIENCE_S = 600
"""For what takes a few seconds on a quiet machine."""
_NOT_SHIPPED = "raise ImportError('this csrm was not shipped with --py-files')\n"


def wait_for(happened: Callable[[], Any], what: str, seconds: float = PATIENCE_S) -> Any:
    """What `happened` returns, once that is true."""
    deadline = time.monotonic() + seconds
    while not (value := happened()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.05)
    return value


def kill(process: psutil.Process, number: int = signal.SIGKILL) -> None:
    process.send_signal(number)


@dataclass(frozen=True)
class Finished:
    """How a submitted program ended."""

    code: int
    output: str


class Submitted:
    """A program that spark-submit runs."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        self.log = folder / f"submit-{time.monotonic_ns()}.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.jvm = psutil.Process(self._process.pid)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def driver(self) -> psutil.Process:
        """The Python that runs the job."""
        # Not by children(), which leaves those out that seem older than their parent: times of processes jitter.
        processes = psutil.process_iter(["ppid", "cmdline"])
        return next(
            process
            for process in processes
            if process.info["ppid"] == self.jvm.pid and "score_catalog" in " ".join(process.info["cmdline"] or ())
        )

    def end(self) -> Finished:
        """Wait until it has ended by itself."""
        wait_for(lambda: not self.is_running, f"end of {self.log}\n{self.output[-3000:]}", PATIENCE_S)
        return Finished(self._process.returncode, self.output)

    def kill(self) -> None:
        """SIGKILL for the driver, its JVM and what else it has started: a machine that is gone."""
        if self.is_running:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Cluster:
    """A master and two workers of two cores and one GPU address each, on free ports of the loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, ""
        self._archive = folder / "csrm.zip"
        with zipfile.ZipFile(self._archive, "w") as archive:
            for path in sorted((ROOT / "csrm").rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    archive.write(path, path.relative_to(ROOT))
        (folder / "events").mkdir()
        decoy = folder / "decoy" / "csrm"
        decoy.mkdir(parents=True)
        (decoy / "__init__.py").write_text(_NOT_SHIPPED)
        self._environment = {
            **clean_environment(),
            "PYTHONPATH": str(decoy.parent),
            "SPARK_NO_DAEMONIZE": "1",
            "SPARK_LOCAL_DIRS": str(folder / "local"),
        }
        self._started: list[subprocess.Popen[bytes]] = []
        self._workers: dict[str, psutil.Process] = {}
        """GPU address to the daemon that has it."""

    def start(self) -> None:
        log = self._start("master", "master.Master")
        pattern = re.compile(r"Starting Spark master at (spark://127\.0\.0\.1:\d+)")
        self.url = wait_for(lambda: pattern.search(log.read_text()), "master")[1]
        for address in ("0", "1"):
            self._start_worker(address)

    def stop(self) -> None:
        for process in reversed(self._started):
            process.terminate()
        for process in self._started:
            process.wait(PATIENCE_S)

    def _start(self, name: str, class_name: str, *arguments: str) -> Path:
        log = self.folder / f"{name}-{len(self._started)}.log"
        command = [str(SPARK_HOME / "bin" / "spark-class"), f"org.apache.spark.deploy.{class_name}"]
        command += ["--host", "127.0.0.1", "--port", "0", "--webui-port", "0", *arguments]
        with log.open("w") as stream:
            process = subprocess.Popen(command, env=self._environment, stdout=stream, stderr=subprocess.STDOUT)
        self._started.append(process)
        return log

    def _start_worker(self, address: str) -> None:
        script = self.folder / f"gpus-{address}.sh"
        script.write_text(f'#!/bin/sh\necho \'{{"name": "gpu", "addresses": ["{address}"]}}\'\n')
        script.chmod(0o755)
        resource = "spark.worker.resource.gpu"
        properties = self.folder / f"worker-{address}.properties"
        properties.write_text(f"{resource}.amount 1\n{resource}.discoveryScript {script}\n")
        arguments = ["--cores", "2", "--memory", "1g", "--work-dir", str(self.folder / f"work-{address}")]
        arguments += ["--properties-file", str(properties), self.url]
        log = self._start(f"worker-{address}", "worker.Worker", *arguments)
        wait_for(lambda: "Successfully registered with master" in log.read_text(), f"worker {log}")
        self._workers[address] = psutil.Process(self._started[-1].pid)

    @contextmanager
    def lost_machine(self) -> Iterator[None]:
        """While the block runs, one of the two machines is gone, and all that ran on it."""
        worker = self._workers.pop("0")
        for process in [worker, *worker.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        try:
            yield
        finally:
            self._start_worker("0")

    @contextmanager
    def submit(
        self,
        *arguments: str,
        job: Path = ROOT / "jobs" / "score_catalog.py",
        master: str = "",
        cores: int = 1,
        properties: Path | None = None,
        program: tuple[str, ...] = (str(SPARK_HOME / "bin" / "spark-submit"),),
        **conf: object,
    ) -> Iterator[Submitted]:
        """A job on the cluster, which is killed where it is left running.

        Args:
            arguments: of the job.
            job: its script.
            master: another one than the cluster's.
            cores: of each executor.
            properties: file with more of them.
            program: what submits it.
            conf: of Spark, with __ for each point of a name.
        """
        settings = {
            "spark.driver.memory": "1g",
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.executor.memory": "1g",
            "spark.executor.cores": cores,
            "spark.cores.max": 2 * cores,
            "spark.executor.resource.gpu.amount": 1,
            "spark.executor.extraJavaOptions": os.environ["SPARK_SUBMIT_OPTS"],  # see the tests' conftest.py
            "spark.executorEnv.CSRM_CACHE_DIR": self.folder / "cache",
            "spark.executorEnv.OMP_NUM_THREADS": 1,
            "spark.pyspark.python": sys.executable,
            "spark.ui.enabled": "false",
            "spark.log.level": "WARN",
            "spark.sql.session.timeZone": "UTC",
            "spark.sql.shuffle.partitions": 2,
            "spark.databricks.delta.snapshotPartitions": 2,
            "spark.eventLog.enabled": "true",
            "spark.eventLog.dir": (self.folder / "events").as_uri(),
            "spark.eventLog.rolling.enabled": "false",
            "spark.eventLog.compress": "false",
            **{name.replace("__", "."): value for name, value in conf.items()},
        }
        command = [*program, "--master", master or self.url, "--py-files", str(self._archive)]
        command += ["--properties-file", str(properties)] if properties is not None else []
        command += [word for name, value in settings.items() for word in ("--conf", f"{name}={value}")]
        environment = {**clean_environment(), "CSRM_CACHE_DIR": str(self.folder / "cache")}
        submitted = Submitted([*command, str(job), *arguments], environment, self.folder)
        try:
            yield submitted
        finally:
            submitted.kill()

    def run(self, *arguments: str, **settings: Any) -> Finished:
        """A job on the cluster, until its end."""
        with self.submit(*arguments, **settings) as submitted:
            return submitted.end()

    def executors(self) -> list[psutil.Process]:
        """JVMs of the executors that are running."""
        return [child for worker in self._workers.values() for child in worker.children() if _is_executor(child)]

    def python_workers(self) -> list[psutil.Process]:
        """Python workers of the executors: children of each one's daemon."""
        found = []
        for executor in self.executors():
            try:
                found += [worker for daemon in executor.children() for worker in daemon.children()]
            except psutil.NoSuchProcess:
                continue
        return found

    def newest_events(self) -> Path:
        """Spark's event log of the program that started last."""
        return max((self.folder / "events").iterdir(), key=lambda path: path.stat().st_mtime)


@contextmanager
def run_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster while the block runs."""
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _is_executor(process: psutil.Process) -> bool:
    try:
        return "CoarseGrainedExecutorBackend" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def clean_environment() -> dict[str, str]:
    """Of this process, without what would bring its own code, Spark or session to another one."""
    dropped = (
        *("PYTHONPATH", "SPARK_HOME", "SPARK_LOCAL_DIRS"),
        *("PYSPARK_GATEWAY_PORT", "PYSPARK_GATEWAY_SECRET", "PYSPARK_SUBMIT_ARGS"),
    )
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "SPARK_HOME": str(SPARK_HOME), "SPARK_LOCAL_IP": "127.0.0.1", "SPARK_DAEMON_MEMORY": "256m"}
