"""Leases: one run at a time works on a market, and one that slept past its lease cannot publish over its successor.

A lease is a file that only one process can create, in `_leases/market=<market>` beside the tables. Its holder rewrites
a second file while it lives; where that has become old, another run may take the next lease. Each lease has a fence, a
number that only grows: publishes are Delta transactions with the fence as their version, and who takes over a lease
that was not given back commits its own fence first, after which Delta skips whatever the former holder tries to commit.

A run also holds the lease of its own id, in `_leases/run=<run id>`: what two runs of one id and different markets wrote
about themselves would replace each other.
"""

import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote

from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark.sql import SparkSession

from csrm.errors import ConfigError, CsrmError, LeaseError
from csrm.night.settings import LEASE_SECONDS
from csrm.schemas import RELEVANCE_SCORES
from csrm.spark.commits import Transaction, append_nothing
from csrm.spark.sources import reason
from csrm.spark.storage import Folder, absolute_path, delete_table, open_folder, require_one_place
from csrm.spark.tables import table_exists, table_path

logger = logging.getLogger(__name__)
_BEATS_PER_LEASE = 6
_CALLS_AT_ONCE = 16
"""Calls to the storage side by side: of many markets, each needs several."""
RUN_ID = ""
"""Key of the lease of a run's id among those of its markets; no market is called so."""
_FENCE = "fence"
"""In the file of a lease that was given back while a commit of its holder may have been on its way."""
_FILE_NAME = re.compile(r"([0-9]{1,18})[.](lease|beat|given_back)(?![^.])")
"""Number and kind; more may follow behind a dot while the file is written."""
_LEASE_VALUES = {"owner": str, "host": str, "pid": int, "seconds": int | float, "fence": int, "at": int | float}


class Lease:
    """A lease that this process holds, of a market or of a run's id."""

    def __init__(self, folder: Folder, market: str, number: int, fence: int, seconds: float, of: str) -> None:
        self.market = market
        """RUN_ID of a lease of a run's id."""
        self.of = of
        """What it is a lease of, for messages."""
        self.fence = fence
        self.is_settled = False
        """Whether former holders are shut out."""
        self._folder, self._number, self._seconds = folder, number, seconds
        self._last_beat = time.monotonic()

    @property
    def transaction(self) -> Transaction:
        """Of commits to the market's published rows under this lease."""
        return Transaction(_app(self.market), self.fence + 1)

    def beat(self) -> None:
        """Leave a sign of life."""
        at = time.monotonic()  # before the call, as what others read
        self._folder.write(f"{self._number}.beat", json.dumps({"at": time.time()}))
        self._last_beat = at

    def give_back(self, needs_fence: bool = False) -> None:
        """Others need not wait until the lease ends.

        Args:
            needs_fence: whether a commit of this holder, or of one before it, may still be on its way.
        """
        try:
            self._folder.write(f"{self._number}.given_back", _FENCE if needs_fence or not self.is_settled else "")
        except Exception as error:  # whatever it is, the lease ends by itself
            logger.warning("%s: the lease could not be given back: %s", self.of, error)

    def require(self) -> None:
        """Make sure that the lease is still held.

        Raises:
            LeaseError: it has ended, another process has taken the next one, or its folder is gone.
        """
        try:
            newest = _newest(self._folder)
        except (OSError, Py4JJavaError) as error:
            raise LeaseError(
                f"{self.of}: its lease in _leases cannot be read any more: {_why(error)}. Nothing of this run was "
                "published there; run it again, its scores are kept."
            ) from error
        if newest != self._number or time.monotonic() - self._last_beat > self._seconds:
            raise LeaseError(
                f"{self.of}: this run was silent for over {self._seconds:.0f} s and lost its lease"
                + (f" to {_described(self._folder, newest)}" if newest > self._number else "")
                + ". Nothing of it was published there; run it again, its scores are kept."
            )


@contextmanager
def hold_leases(
    spark: SparkSession,
    tables_dir: str,
    markets: Sequence[str],
    owner: str,
    seconds: float = LEASE_SECONDS,
    *,
    run_id: str | None = None,
) -> Iterator[dict[str, Lease]]:
    """The leases of some markets, all or none, while the block runs.

    Args:
        spark: the session.
        tables_dir: folder of CSRM's tables. Where its storage has no way to create a file only once, a warning says so:
            there nothing but the scheduler keeps two runs apart.
        markets: the markets.
        owner: who asks, for the message that others get.
        seconds: for which the leases hold after a sign of life; see LEASE_SECONDS.
        run_id: of a run that holds its id too, under the key RUN_ID.

    Raises:
        ConfigError: see require_one_place; or the storage does not let leases be written.
        LeaseError: another process holds one of them.
    """
    require_one_place(spark, tables_dir)
    leases: dict[str, Lease] = {}
    wanted: list[tuple[str, str | None]] = [(market, None) for market in sorted(markets)]
    wanted += [] if run_id is None else [(RUN_ID, run_id)]
    with ThreadPoolExecutor(_CALLS_AT_ONCE, thread_name_prefix="csrm-leases") as pool, ExitStack() as stack:
        stack.push(lambda kind, *_: _give_back(leases, pool, kind))
        # Leases that are held are renewed while the others are still being taken.
        stack.enter_context(_beating(leases, seconds / _BEATS_PER_LEASE))
        with _errors_of_storage(tables_dir):
            seen = list(pool.map(lambda each: _look(spark, tables_dir, *each), wanted))
            for each in seen:  # in order: of two runs that want the same markets, one gets all of them
                leases[each.market] = _create(each, owner, seconds)
            list(pool.map(lambda each: _settle(spark, tables_dir, each, leases[each.market]), seen))
        yield dict(leases)


@contextmanager
def _errors_of_storage(tables_dir: str) -> Iterator[None]:
    try:
        yield
    except (OSError, Py4JJavaError) as error:
        raise ConfigError(
            f"tables at {tables_dir!r}: leases, which keep two runs apart, cannot be written in _leases: {_why(error)}"
            ". Is the folder writable, and has its storage room?"
        ) from error


def _why(error: OSError | Py4JJavaError) -> str:
    return reason(error) if isinstance(error, Py4JJavaError) else f"{error.strerror or error} ({error.filename})"


def _give_back(leases: Mapping[str, Lease], pool: ThreadPoolExecutor, kind: type[BaseException] | None) -> None:
    """Give all leases back. After an error that is none of CSRM's, or a signal, a commit may still be on its way."""
    needs_fence = kind is not None and not issubclass(kind, CsrmError)
    list(pool.map(lambda lease: lease.give_back(needs_fence), leases.values()))


class _Seen(NamedTuple):
    """The leases of a market or of a run's id, as they were found."""

    market: str
    of: str
    folder: Folder
    number: int
    """Number of the newest lease; 0 where there is none."""
    last: "_Holder | None"


def _look(spark: SparkSession, tables_dir: str, market: str, run_id: str | None = None) -> _Seen:
    kind, name = ("market", market) if run_id is None else ("run", run_id)
    folder = open_folder(spark, f"{tables_dir.rstrip('/')}/_leases/{kind}={quote(name, safe='')}")
    number = _newest(folder)
    of = f"market {name!r}" if run_id is None else f"run id {name!r}"
    return _Seen(market, of, folder, number, _Holder.read(folder, number) if number else None)


def _create(seen: _Seen, owner: str, seconds: float) -> Lease:
    """Take the next lease.

    Raises:
        LeaseError: another process holds the market, or works under the run id.
    """
    market, of, folder, number, last = seen
    if last is not None and last.holds:
        raise LeaseError(
            f"{of}: {last} works on it; its last sign of life is {last.silent_s:.0f} s old. Wait until it "
            f"ends; where it is dead, its lease ends {max(last.seconds - last.silent_s, 0):.0f} s from now."
            + (" A run of other markets needs another --run-id." if market == RUN_ID else "")
        )
    # Time keeps the fence growing where the folder of leases was lost, but the table was not.
    fence = max(last.fence + 2 if last else 0, time.time_ns() // 1_000_000)
    number += 1
    content = {"owner": owner, "host": socket.gethostname(), "pid": os.getpid(), "at": time.time()}
    if not folder.create(f"{number}.lease", json.dumps({**content, "seconds": float(seconds), "fence": fence})):
        raise LeaseError(
            f"{of}: {_described(folder, number)} took it at the same moment. Wait until it ends."
            + (" A run of other markets needs another --run-id." if market == RUN_ID else "")
        )
    return Lease(folder, market, number, fence, seconds, of)


def _settle(spark: SparkSession, tables_dir: str, seen: _Seen, lease: Lease) -> None:
    """Shut a former holder out that did not give its lease back, and remove the files of older leases."""
    for name in seen.folder.names():
        found = _FILE_NAME.match(name)
        if found is not None and int(found[1]) < seen.number:
            seen.folder.delete(name)
    scores_path = table_path(tables_dir, RELEVANCE_SCORES)
    is_fenced = seen.market != RUN_ID  # no commit carries the fence of a run's id
    if is_fenced and seen.last is not None and seen.last.needs_fence and table_exists(spark, scores_path):
        logger.warning("%s: took over the lease of %s, which ended without notice.", seen.of, seen.last)
        append_nothing(spark, scores_path, Transaction(_app(seen.market), lease.fence))
    lease.is_settled = True


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
    needs_fence: bool
    """Whether a commit of it may still be on its way."""

    @classmethod
    def read(cls, folder: Folder, number: int) -> "_Holder":
        content = _read_values(folder, f"{number}.lease", _LEASE_VALUES)
        given_back = folder.read(f"{number}.given_back")
        beat = _read_values(folder, f"{number}.beat", {"at": int | float})
        return cls(
            content.get("owner", "a run"),
            content.get("host", "an unknown host"),
            content.get("pid", 0),
            content.get("seconds", LEASE_SECONDS),
            content.get("fence", 0),
            time.time() - beat.get("at", content.get("at", 0)),
            given_back is not None,
            given_back is None or given_back == _FENCE,
        )

    @property
    def holds(self) -> bool:
        """Whether it may be alive. A sign of life from the future was left before the clock was put right."""
        return not self.gave_back and -self.seconds <= self.silent_s <= self.seconds

    def __str__(self) -> str:
        return f"{self.owner} (process {self.pid} on {self.host})"


@contextmanager
def _beating(leases: Mapping[str, Lease], interval_s: float) -> Iterator[None]:
    """Renew the leases, also those that are added while the block runs."""
    stopped = threading.Event()

    def renew(lease: Lease) -> None:
        try:
            lease.beat()
        except Exception as error:  # whatever it is, the next beat may get through
            logger.warning("%s: the lease could not be renewed: %s", lease.of, error)

    def beat() -> None:
        with ThreadPoolExecutor(_CALLS_AT_ONCE, thread_name_prefix="csrm-beats") as pool:
            while not stopped.wait(interval_s):
                list(pool.map(renew, list(leases.values())))

    thread = threading.Thread(target=beat, name="csrm-leases", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _app(market: str) -> str:
    return f"csrm-publish/{market}"


def _newest(folder: Folder) -> int:
    """Number of the newest lease; files of other names are not leases'."""
    found = (_FILE_NAME.match(name) for name in folder.names())
    return max((int(name[1]) for name in found if name and name[2] == "lease" and name[0] == name.string), default=0)


def forget_leases(spark: SparkSession, tables_dir: str, run_ids: Collection[str]) -> None:
    """Delete what leases of the ids of runs left behind that ended long ago."""
    gone = {f"run={name}" for run_id in run_ids for name in (run_id, quote(run_id, safe=""))}
    for name in open_folder(spark, f"{tables_dir.rstrip('/')}/_leases").names():
        if name in gone:
            delete_table(spark, f"{absolute_path(tables_dir)}/_leases/{name}")


def _described(folder: Folder, number: int) -> str:
    return str(_Holder.read(folder, number))


def _read_values(folder: Folder, name: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a lease's file; none where there is no such file.

    Hadoop's storages show a file before its text. An empty one is being written, or its writer died at it: it is a
    sign of life of when it was created. So is one that cannot be read, or whose writer's clock runs ahead.

    Args:
        folder: where the file is.
        name: of the file.
        kinds: key to the type that its value must have; `at` is one of them.
    """
    try:
        text = folder.read(name)
        if text is None:
            return {}
        values = json.loads(text)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        values = None
    if not isinstance(values, dict):
        values = {}
    known = {key: values[key] for key, kind in kinds.items() if isinstance(values.get(key), kind)}
    seconds = known.get("seconds", LEASE_SECONDS)
    if "at" not in known or known["at"] > time.time() + seconds:  # a clock that runs ahead says nothing
        known["at"] = folder.modified_at(name)
    return known
