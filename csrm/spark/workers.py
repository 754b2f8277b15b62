"""The Python workers of a scoring job: their device, threads, resources and errors."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark import TaskContext
from pyspark.errors import PySparkException
from pyspark.resource import ResourceProfile, ResourceProfileBuilder, TaskResourceRequests
from pyspark.sql import SparkSession

from csrm import errors
from csrm.errors import ConfigError, ScoringError
from csrm.spark.sources import reason


def task_threads(spark: SparkSession) -> int:
    """Threads of one forward pass: the cores that Spark gives a task, since tasks run side by side."""
    return int(spark.sparkContext.getConf().get("spark.task.cpus", "1") or "1")


def scoring_profile(spark: SparkSession, device: str, one_task_per_gpu: bool | None = None) -> ResourceProfile | None:
    """Resources of a task that scores: a GPU for itself, while the tasks of other stages use every core.

    Args:
        spark: the session.
        device: as in ScorerPlace.
        one_task_per_gpu: None: where the device is cuda and Spark's executors have GPU resources.

    Returns:
        The profile; None where a task that scores has what any task has.

    Raises:
        ConfigError: it was asked for, and the executors have no GPU resources.
    """
    conf = spark.sparkContext.getConf()
    has_gpus = int(conf.get("spark.executor.resource.gpu.amount", "0") or "0") > 0
    if one_task_per_gpu and not has_gpus:
        raise ConfigError(
            "one_task_per_gpu: expected executors with GPU resources, found none. Submit the job with "
            "--conf spark.executor.resource.gpu.amount=1, or leave this setting out."
        )
    if not has_gpus or not (device == "cuda" if one_task_per_gpu is None else one_task_per_gpu):
        return None
    return ResourceProfileBuilder().require(TaskResourceRequests().cpus(task_threads(spark)).resource("gpu", 1)).build


def task_device(device: str) -> str:
    """The device of this task: cuda is the GPU that Spark gave it, if it gave one."""
    context = TaskContext.get()
    gpu = context.resources().get("gpu") if context is not None else None
    return f"cuda:{gpu.addresses[0]}" if device == "cuda" and gpu is not None else device


def end_silent_workers(spark: SparkSession, minutes: float) -> None:
    """Have Spark kill Python workers that give no sign of life for so long; their tasks are tried again."""
    spark.conf.set("spark.sql.execution.pyspark.udf.idleTimeoutSeconds", str(max(1, round(60 * minutes))))
    spark.conf.set("spark.sql.execution.pyspark.udf.killOnIdleTimeout", "true")


@contextmanager
def errors_of_workers() -> Iterator[None]:
    """Where Spark fails in the block, raise what CSRM raised in a worker, as if it had been raised here.

    Raises:
        CsrmError: of a worker; ScoringError where it was something else that failed.
    """
    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        text = str(error)
        found = re.search(r"^csrm\.errors\.(\w+): (.+?)$", text, re.MULTILINE)
        if found is not None and hasattr(errors, found[1]):
            raise getattr(errors, found[1])(found[2]) from error
        raise ScoringError(
            f"Spark gave up: {_cause(error)}\n"
            "Each market is as it was or published whole, and what was staged is kept. Start it again. The log of the "
            "executor that is named says more."
        ) from error


def _cause(error: Exception) -> str:
    """What a failure was, in one line: Spark's own about a task, where there is one, else its first and last reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "Job aborted due to stage failure" in line), reason(error))
