"""What the tests of faults share: a cluster, tables that are scored on it, and what must hold afterwards."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cluster import ROOT, Cluster, run_cluster
from tests.faults.night import Night


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with run_cluster(folder) as cluster:
        yield cluster


@pytest.fixture
def night(tmp_path: Path) -> Night:
    return Night(tmp_path, ROOT / "conf" / "demo_bundle")
