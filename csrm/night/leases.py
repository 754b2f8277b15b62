"""Leases: one run at a time works on a market, and one that slept past its lease cannot publish over its successor.

A lease is a file that only one process can create, in `_leases/market=<market>` beside the tables. Its holder rewrites
a second file while it lives; where that has become old, another run may take the next lease. Each lease has a fence, a
number that only grows: publishes are Delta transactions with the fence as their version, and who takes over a lease
that was not given back commits its own fence first, after which Delta skips whatever the former holder tries to commit.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark.sql import SparkSession

from csrm.errors import LeaseError
from csrm.night.settings import LEASE_SECONDS
from csrm.schemas import RELEVANCE_SCORES
from csrm.spark.commits import Transaction, append_nothing
from csrm.spark.storage import Folder, open_folder, require_one_place
from csrm.spark.tables import table_exists, table_path

logger = logging.getLogger(__name__)
_BEATS_PER_LEASE = 6


class Lease:
    """A market's lease that this process holds."""

    def __init__(self, folder: "Folder", market: str, number: int, fence: int, seconds: float) -> None:
        self.market = market
        self.fence = fence
        self._folder, self._number, self._seconds = folder, number, seconds
        self._last_beat = time.monotonic()

    @property
    def transaction(self) -> Transaction:
        """Of commits to the market's published rows under this lease."""
        return Transaction(_app(self.market), self.fence + 1)

    def beat(self) -> None:
        """Leave a sign of life."""
        self._folder.write(f"{self._number}.beat", json.dumps({"at": time.time()}))
        self._last_beat = time.monotonic()

    def give_back(self) -> None:
        """Others need not wait until the lease ends."""
        self._folder.write(f"{self._number}.given_back", "")

    def require(self) -> None:
        """Raises:
        LeaseError: the lease has ended, or another process has taken the next one.
        """
        newest = _newest(self._folder)
        if newest != self._number or time.monotonic() - self._last_beat > self._seconds:
            raise LeaseError(
                f"market {self.market!r}: this run was silent for over {self._seconds:.0f} s and lost its lease"
                + (f" to {_described(self._folder, newest)}" if newest > self._number else "")
                + ". Nothing of it was published there; run it again, its scores are kept."
            )


@contextmanager
def hold_leases(
    spark: SparkSession, tables_dir: str, markets: Sequence[str], owner: str, seconds: float = LEASE_SECONDS
) -> Iterator[dict[str, Lease]]:
    """The leases of some markets, all or none, while the block runs.

    Args:
        spark: the session.
        tables_dir: folder of CSRM's tables. Where its storage has no way to create a file only once, a warning says so:
            there nothing but the scheduler keeps two runs apart.
        markets: the markets.
        owner: who asks, for the message that others get.
        seconds: for which the leases hold after a sign of life; see LEASE_SECONDS.

    Raises:
        ConfigError: see require_one_place.
        LeaseError: another process holds one of them.
    """
    require_one_place(spark, tables_dir)
    with ExitStack() as stack:
        leases = {}
        for market in sorted(markets):
            leases[market] = lease = _take(spark, tables_dir, market, owner, seconds)
            stack.callback(lease.give_back)
        stack.enter_context(_beating(list(leases.values()), seconds / _BEATS_PER_LEASE))
        yield leases


def _take(spark: SparkSession, tables_dir: str, market: str, owner: str, seconds: float) -> Lease:
    folder = open_folder(spark, f"{tables_dir.rstrip('/')}/_leases/market={quote(market, safe='')}")
    number = _newest(folder)
    last = _Holder.read(folder, number) if number else None
    if last is not None and last.holds:
        raise LeaseError(
            f"market {market!r}: {last} works on it; its last sign of life is {last.silent_s:.0f} s old. Wait until it "
            f"ends; where it is dead, its lease ends {max(last.seconds - last.silent_s, 0):.0f} s from now."
        )
    # Time keeps the fence growing where the folder of leases was lost, but the table was not.
    fence = max(last.fence + 2 if last else 0, time.time_ns() // 1_000_000)
    number += 1
    content = {"owner": owner, "host": socket.gethostname(), "pid": os.getpid(), "at": time.time()}
    if not folder.create(f"{number}.lease", json.dumps({**content, "seconds": seconds, "fence": fence})):
        raise LeaseError(
            f"market {market!r}: {_described(folder, number)} took it at the same moment. Wait until it ends."
        )
    for old in {name for name in folder.names() if int(name.partition(".")[0]) < number - 1}:
        folder.delete(old)
    lease = Lease(folder, market, number, fence, seconds)
    scores_path = table_path(tables_dir, RELEVANCE_SCORES)
    if last is not None and not last.gave_back and table_exists(spark, scores_path):
        logger.warning("market %r: took over the lease of %s, which ended without giving it back.", market, last)
        append_nothing(spark, RELEVANCE_SCORES, scores_path, Transaction(_app(market), fence))
    return lease


@dataclass(frozen=True)
class _Holder:
    """Who took a lease."""

    owner: str
    host: str
    pid: int
    seconds: float
    """Of its lease."""
    fence: int
    silent_s: float
    gave_back: bool

    @classmethod
    def read(cls, folder: "Folder", number: int) -> "_Holder":
        content, beat = _read_values(folder, f"{number}.lease"), _read_values(folder, f"{number}.beat")
        return cls(
            content.get("owner", "a run"),
            content.get("host", "an unknown host"),
            content.get("pid", 0),
            content.get("seconds", LEASE_SECONDS),
            content.get("fence", 0),
            time.time() - beat.get("at", content.get("at", 0)),
            folder.read(f"{number}.given_back") is not None,
        )

    @property
    def holds(self) -> bool:
        return not self.gave_back and self.silent_s <= self.seconds

    def __str__(self) -> str:
        return f"{self.owner} (process {self.pid} on {self.host})"


@contextmanager
def _beating(leases: Sequence[Lease], interval_s: float) -> Iterator[None]:
    stopped = threading.Event()

    def beat() -> None:
        while not stopped.wait(interval_s):
            for lease in leases:
                try:
                    lease.beat()
                except (OSError, Py4JJavaError) as error:  # the next beat may get through
                    logger.warning("market %r: the lease could not be renewed: %s", lease.market, error)

    for lease in leases:
        lease.beat()
    thread = threading.Thread(target=beat, name="csrm-leases", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _app(market: str) -> str:
    return f"csrm-publish/{market}"


def _newest(folder: "Folder") -> int:
    return max((int(name.removesuffix(".lease")) for name in folder.names() if name.endswith(".lease")), default=0)


def _described(folder: "Folder", number: int) -> str:
    return str(_Holder.read(folder, number))


def _read_values(folder: "Folder", name: str) -> dict[str, Any]:
    """Values of a lease's file; none where there is no such file.

    Hadoop's storages show a file before its text. An empty one is being written, or its writer died at it: it is a
    sign of life of when it was created.
    """
    text = folder.read(name)
    if text is None:
        return {}
    return dict(json.loads(text)) if text else {"at": folder.modified_at(name)}
