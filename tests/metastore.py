"""A Hive metastore as companies run one: Hive's own server, from Spark's jars, on loopback with a Derby database."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyspark

from csrm.spark.jars import spark_jars_dir

ROOT = Path(__file__).parents[1]
STEPS = """
import json, sys
from csrm.__main__ import main
from csrm.spark.session import build_session

spark, results = build_session("steps"), []
for step in json.loads(sys.argv[1]):
    is_sql = isinstance(step, str)
    results.append([list(row) for row in spark.sql(step).collect()] if is_sql else main(step))
print("results", json.dumps(results, default=str))
"""
"""A session that runs SQL (text) and commands (words), and prints the rows and the exit codes."""
_SITE = """
<configuration>
  <property><name>javax.jdo.option.ConnectionURL</name><value>jdbc:derby:;databaseName={0}/db;create=true</value></property>
  <property><name>datanucleus.schema.autoCreateAll</name><value>true</value></property>
  <property><name>hive.metastore.schema.verification</name><value>false</value></property>
  <property><name>hive.metastore.warehouse.dir</name><value>file:{0}/warehouse</value></property>
  <property><name>hive.async.log.enabled</name><value>false</value></property>
</configuration>
"""


@dataclass(frozen=True)
class Metastore:
    """A metastore that runs, and the jobs on it."""

    warehouse: Path
    """Folder of the schemas that name no location."""
    environment: dict[str, str]
    """Of processes whose Spark has this metastore."""

    def start(self, steps: Sequence[str | Sequence[str]], *settings: str) -> "subprocess.Popen[str]":
        """A process for steps; settings are more words of --conf."""
        words = " ".join(f"--conf {setting}" for setting in settings)
        environment = {**self.environment, "PYSPARK_SUBMIT_ARGS": f"{words} {self.environment['PYSPARK_SUBMIT_ARGS']}"}
        command = [sys.executable, "-c", STEPS, json.dumps(steps)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)

    def run(self, steps: Sequence[str | Sequence[str]], *settings: str) -> tuple[list[Any], str]:
        """Rows or exit code of each step, and all that was printed."""
        return ended(self.start(steps, *settings))


def ended(process: "subprocess.Popen[str]") -> tuple[list[Any], str]:
    """What a process of Metastore.start printed, once it has ended."""
    printed, _ = process.communicate()
    (line,) = [line for line in printed.splitlines() if line.startswith("results ")] or [""]
    assert line, printed
    return json.loads(line.removeprefix("results ")), printed


@contextmanager
def hive_metastore(folder: Path) -> Iterator[Metastore]:
    """A metastore with its database and its warehouse below a folder, while the block runs."""
    (folder / "conf").mkdir(parents=True)
    (folder / "conf" / "hive-site.xml").write_text(_SITE.format(folder))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    java = Path(os.environ["JAVA_HOME"], "bin", "java") if "JAVA_HOME" in os.environ else "java"
    options = [*os.environ.get("SPARK_SUBMIT_OPTS", "").split(), f"-Dderby.stream.error.file={folder}/derby.log"]
    classes = f"{folder}/conf:{spark_jars_dir()}/*"
    server = [str(java), *options, "-cp", classes, "org.apache.hadoop.hive.metastore.HiveMetaStore", "-p", str(port)]
    settings = {
        "spark.sql.catalogImplementation": "hive",
        "spark.sql.warehouse.dir": f"{folder}/warehouse",
        "spark.hadoop.hive.metastore.uris": f"thrift://127.0.0.1:{port}",
    }
    submit = " ".join(f"--conf {name}={value}" for name, value in settings.items())
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYSPARK_GATEWAY", "SPARK_"))}
    kept |= {name: os.environ[name] for name in ("SPARK_SUBMIT_OPTS",) if name in os.environ}
    environment = {**kept, "PYTHONPATH": str(ROOT), "PYSPARK_SUBMIT_ARGS": f"{submit} pyspark-shell"}
    with (folder / "log").open("w") as log, subprocess.Popen(server, cwd=folder, stdout=log, stderr=log) as process:
        try:
            _wait_for(port, process, folder / "log")
            yield Metastore(folder / "warehouse", environment)
        finally:
            process.terminate()


def _wait_for(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    while process.poll() is None:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"Hive's metastore of pyspark {pyspark.__version__} has not started: {log.read_text()}")
