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
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote, urlsplit

from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark.sql import SparkSession

from csrm.errors import LeaseError
from csrm.schemas import RELEVANCE_SCORES
from csrm.spark.tables import Transaction, append_nothing, require_one_place, table_exists, table_path

logger = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
"""A holder that gave no sign of life for so long has lost its lease."""
_BEATS_PER_LEASE = 6
_ATOMIC_SCHEMES = ("hdfs", "viewfs", "abfs", "abfss", "gs")
"""Storages of Hadoop's that create a file only where there is none, as one step."""


class Lease:
    """A market's lease that this process holds."""

    def __init__(self, folder: "_Folder", market: str, number: int, fence: int, seconds: float) -> None:
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
    folder = _open_folder(spark, f"{tables_dir.rstrip('/')}/_leases/market={quote(market, safe='')}")
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
    def read(cls, folder: "_Folder", number: int) -> "_Holder":
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


def _newest(folder: "_Folder") -> int:
    return max((int(name.removesuffix(".lease")) for name in folder.names() if name.endswith(".lease")), default=0)


def _described(folder: "_Folder", number: int) -> str:
    return str(_Holder.read(folder, number))


def _read_values(folder: "_Folder", name: str) -> dict[str, Any]:
    """Values of a lease's file; none where there is no such file.

    Hadoop's storages show a file before its text. An empty one is being written, or its writer died at it: it is a
    sign of life of when it was created.
    """
    text = folder.read(name)
    if text is None:
        return {}
    return dict(json.loads(text)) if text else {"at": folder.modified_at(name)}


class _Folder(Protocol):
    """The few things that leases need of a storage."""

    def create(self, name: str, text: str) -> bool:
        """Create a file; False where there is one. Of several processes that try, one succeeds."""

    def write(self, name: str, text: str) -> None: ...

    def read(self, name: str) -> str | None:
        """A file's text; None where there is none."""

    def modified_at(self, name: str) -> float:
        """When a file was created or last written, in seconds since 1970."""

    def names(self) -> list[str]: ...

    def delete(self, name: str) -> None: ...


def _open_folder(spark: SparkSession, uri: str) -> _Folder:
    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        return _LocalFolder(Path(unquote(parts.path) if parts.scheme else uri))
    if parts.scheme not in _ATOMIC_SCHEMES:
        logger.warning(
            "tables on %s://: this storage is not known to create a file only once, so leases do not keep two runs "
            "apart there. Let one scheduler start them, one at a time. Known to do so: a local folder, %s.",
            parts.scheme,
            ", ".join(_ATOMIC_SCHEMES),
        )
    return _HadoopFolder(spark, uri)


class _LocalFolder:
    """A folder of this machine, or one that is mounted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir(parents=True, exist_ok=True)

    def create(self, name: str, text: str) -> bool:
        written = self._path / f"{name}.{uuid.uuid4().hex}"
        written.write_text(text, encoding="utf-8")
        try:
            (self._path / name).hardlink_to(written)  # one step, and the text is there with the name
        except FileExistsError:
            return False
        finally:
            written.unlink()
        return True

    def write(self, name: str, text: str) -> None:
        partial = self._path / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self._path / name)

    def read(self, name: str) -> str | None:
        try:
            return (self._path / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def modified_at(self, name: str) -> float:
        return (self._path / name).stat().st_mtime

    def names(self) -> list[str]:
        return [path.name for path in self._path.iterdir()]

    def delete(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)


class _HadoopFolder:
    """A folder on a storage that Spark reaches."""

    def __init__(self, spark: SparkSession, uri: str) -> None:
        jvm = spark.sparkContext._jvm
        assert jvm is not None
        self._path: Any = jvm.org.apache.hadoop.fs.Path
        self._io: Any = jvm.org.apache.commons.io.IOUtils
        self._uri = uri
        self._files = self._path(uri).getFileSystem(spark.sparkContext._jsc.hadoopConfiguration())
        self._files.mkdirs(self._path(uri))

    def create(self, name: str, text: str) -> bool:
        try:
            self._put(name, text, overwrite=False)
        except Py4JJavaError:
            if self.read(name) is None:
                raise
            return False
        return True

    def write(self, name: str, text: str) -> None:
        self._put(name, text, overwrite=True)

    def read(self, name: str) -> str | None:
        path = self._at(name)
        if not self._files.exists(path):
            return None
        stream = self._files.open(path)
        try:
            return str(self._io.toString(stream, "UTF-8"))
        finally:
            stream.close()

    def modified_at(self, name: str) -> float:
        return float(self._files.getFileStatus(self._at(name)).getModificationTime() / 1000)

    def names(self) -> list[str]:
        return [str(status.getPath().getName()) for status in self._files.listStatus(self._path(self._uri))]

    def delete(self, name: str) -> None:
        self._files.delete(self._at(name), False)

    def _at(self, name: str) -> Any:
        return self._path(self._path(self._uri), name)

    def _put(self, name: str, text: str, overwrite: bool) -> None:
        stream = self._files.create(self._at(name), overwrite)
        try:
            stream.write(bytearray(text.encode()))
        finally:
            stream.close()
