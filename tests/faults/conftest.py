"""What the tests of faults share: a cluster, tables that are scored on it, and what must hold afterwards.

make faults                                         # all tests, and docs/faults.md
pytest tests/faults --fault-table docs/faults.md    # the same
"""

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.faults.cluster import ROOT, Cluster, run_cluster
from tests.faults.night import RESULTS, Night

_ROWS = pytest.StashKey[list[list[str]]]()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with run_cluster(folder) as cluster:
        yield cluster


@pytest.fixture
def night(tmp_path: Path) -> Night:
    return Night(tmp_path, ROOT / "conf" / "demo_bundle")


@pytest.fixture
def shown() -> set[str]:
    """Those of RESULTS that a test of a build before the night has checked, and that held."""
    return set()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", metavar="FILE", help="write what the tests of faults have shown as Markdown")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    mark = item.get_closest_marker("fault")
    if mark is not None and report.when == "call":
        assert isinstance(item, pytest.Function)
        name = f"{mark.args[0]}: {item.callspec.id}" if hasattr(item, "callspec") else str(mark.args[0])
        shown = item.funcargs["night"].shown if "night" in item.funcargs else item.funcargs["shown"]
        held = ["yes" if result in shown else "-" for result in RESULTS]
        item.config.stash[_ROWS].append([name, *(held if report.passed else ["FAILED"] * len(RESULTS))])
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    path, rows = session.config.getoption("--fault-table", None), session.config.stash[_ROWS]
    if path is None or not rows:
        return
    lines = [
        "# What a night is after a fault",
        "",
        "Written by `make faults`, which breaks jobs in each of these ways, on a standalone Spark cluster",
        "of two workers or in one process. `yes`: checked in the test of this fault, after the job was run again where",
        "it had ended; `-`: not a question there, such as the scores of a run that is refused. What each result means:",
        "[promise.md](promise.md).",
        "",
        "| " + " | ".join(["fault", *RESULTS]) + " |",
        "|" + " --- |" * (len(RESULTS) + 1),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
