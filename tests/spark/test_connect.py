"""The scorer's UDF through Spark Connect: a server and a client, each a process of its own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyspark
import pytest

from csrm.bundle.loading import load_scorer

pytestmark = [pytest.mark.spark, pytest.mark.slow]

THROUGH_CONNECT = """
import sys
from pyspark.sql import SparkSession, functions as F
from csrm import relevance_score_udf
from csrm.cli import run_job
from csrm.commands import maintain
spark = SparkSession.builder.remote(sys.argv[1]).getOrCreate()
columns = ["market", "language", "query", "title"]
rows = [("kr", "ko", "tent", "tent peg"), ("kr", "ko", "tent", None)]
pairs_df = spark.createDataFrame(rows, ", ".join(f"{column} string" for column in columns))
score = relevance_score_udf(sys.argv[2])
print("scores", *(row["s"] for row in pairs_df.select(score(F.struct(*columns)).alias("s")).collect()))
print("exit code", run_job(maintain.main, ["--set", "tables=x"]))
"""


@pytest.fixture
def connect_server() -> Iterator[str]:
    """Address of a Spark Connect server, a process of its own on loopback."""
    pytest.importorskip("grpc_status", reason="Spark Connect needs pip install pyspark[connect]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    submit = Path(pyspark.__file__).parent / "bin" / "spark-submit"
    service = ["--class", "org.apache.spark.sql.connect.service.SparkConnectServer", "--master", "local[1]"]
    settings = {"binding.address": "127.0.0.1", "binding.port": port}
    words = [word for name, value in settings.items() for word in ("--conf", f"spark.connect.grpc.{name}={value}")]
    environment = _without_spark() | {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    command = [str(submit), *service, *words, "--conf", "spark.ui.enabled=false", "spark-internal"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            while server.poll() is None:
                with socket.socket() as client:
                    if client.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.2)
            assert server.poll() is None, "expected a Spark Connect server, found that it ended"
            yield f"sc://127.0.0.1:{port}"
        finally:
            server.terminate()


def _without_spark() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYSPARK_", "SPARK_"))}
    return kept | {name: os.environ[name] for name in ("SPARK_SUBMIT_OPTS",) if name in os.environ}


def test_the_udf_works_through_spark_connect(tiny_bundle: Path, connect_server: str) -> None:
    command = [sys.executable, "-c", THROUGH_CONNECT, connect_server, str(tiny_bundle)]
    finished = subprocess.run(command, env=_without_spark(), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    (line,) = [line for line in finished.stdout.splitlines() if line.startswith("scores")]
    pair = pd.DataFrame([("kr", "ko", "tent", "tent peg")], columns=["market", "language", "query", "title"])
    expected = float(load_scorer(tiny_bundle, "cpu").score(pair)["relevance_score"][0])
    _, first, second = line.split()
    assert (float(first), second) == (pytest.approx(expected, abs=1e-5), "None")
    assert "exit code 2" in finished.stdout  # a job, which needs a driver of its own
    assert "error: Spark session: expected a driver of its own, got Spark Connect" in finished.stderr
