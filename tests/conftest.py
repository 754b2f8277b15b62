"""Fixtures that more than one test module uses."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator["SparkSession"]:
    """One real session with Delta for the whole test run; its scratch files are under a temporary folder."""
    from csrm.spark.session import build_session

    os.environ["SPARK_LOCAL_DIRS"] = str(tmp_path_factory.mktemp("spark-local"))
    session = build_session("csrm-tests")
    yield session
    session.stop()
