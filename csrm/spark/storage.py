"""Files and folders wherever the tables are. The only module that reaches Hadoop's file system."""

import errno
import logging
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark.sql import SparkSession

from csrm.errors import ConfigError

logger = logging.getLogger(__name__)

_FOOTERS_AT_ONCE = 32
"""Of Parquet files. Reading one is waiting, mostly."""
_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_ATOMIC_SCHEMES = ("hdfs", "viewfs", "abfs", "abfss", "gs")
"""Storages of Hadoop's that create a file only where there is none, as one step."""


class Folder(Protocol):
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


def open_folder(spark: SparkSession, uri: str) -> Folder:
    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        return LocalFolder(Path(unquote(parts.path) if parts.scheme else uri))
    if parts.scheme not in _ATOMIC_SCHEMES:
        logger.warning(
            "tables on %s://: this storage is not known to create a file only once, so leases do not keep two runs "
            "apart there. Let one scheduler start them, one at a time. Known to do so: a local folder, %s.",
            parts.scheme,
            ", ".join(_ATOMIC_SCHEMES),
        )
    return HadoopFolder(spark, uri)


class LocalFolder:
    """A folder of this machine, or one that is mounted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir(parents=True, exist_ok=True)

    def create(self, name: str, text: str) -> bool:
        written = self._path / f"{name}.{uuid.uuid4().hex}"
        try:
            written.write_text(text, encoding="utf-8")
            (self._path / name).hardlink_to(written)  # one step, and the text is there with the name
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            return self._create_empty_first(name, text)
        finally:
            written.unlink(missing_ok=True)
        return True

    def _create_empty_first(self, name: str, text: str) -> bool:
        """For mounts without hard links: for a moment the file is there without its text."""
        try:
            with (self._path / name).open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
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


class HadoopFolder:
    """A folder on a storage that Spark reaches."""

    def __init__(self, spark: SparkSession, uri: str) -> None:
        jvm = _jvm(spark)
        self._path: Any = jvm.org.apache.hadoop.fs.Path
        self._io: Any = jvm.org.apache.commons.io.IOUtils
        self._uri = uri
        folder, self._files = _hadoop_path(spark, uri)
        self._files.mkdirs(folder)

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


def attempts_path(tables_dir: str, run_id: str) -> str:
    """Folder beside the tables for what attempts of a run are at; see csrm.scoring.attempts."""
    return f"{absolute_path(tables_dir)}/_attempts/{run_id}"


def require_one_place(spark: SparkSession, path: str) -> None:
    """Refuse a path that Spark finds on one storage, and leases and notes of attempts on the driver's disk.

    Raises:
        ConfigError: the path has no scheme, and Hadoop's default file system is not this machine's.
    """
    default = str(_jvm(spark).org.apache.hadoop.fs.FileSystem.getDefaultUri(_hadoop_configuration(spark)))
    if not urlsplit(path).scheme and urlsplit(default).scheme != "file":
        there, here = default.rstrip("/") + absolute_path(path), f"file://{absolute_path(path)}"
        raise ConfigError(
            f"tables at {path!r}: expected a URI, as fs.defaultFS is {default}; got a path without a scheme, which is "
            f"another place for Spark than for leases. Name the scheme: {there}, or {here}."
        )


PATTERN_CHARACTERS = frozenset("*?[]{}\\")
"""Spark's readers take a path with one of these for a pattern."""
AS_IT_IS = {"__globPaths__": "false"}
"""Option of Spark's readers that takes a path as it is, whatever characters it has."""


def path_options(spark: SparkSession, path: str) -> dict[str, str]:
    """Options of Spark's readers for a path: one that exists as it is written is no pattern."""
    if PATTERN_CHARACTERS.isdisjoint(path):
        return {}
    hadoop_path, files = _hadoop_path(spark, path)
    return AS_IT_IS if files.exists(hadoop_path) else {}


def delete_table(spark: SparkSession, path: str) -> None:
    """Delete a table's folder and all that is in it, where there is one."""
    folder, files = _hadoop_path(spark, path)
    files.delete(folder, True)


def folder_size(spark: SparkSession, path: str) -> tuple[int, int]:
    """Number of all files in a folder and the folders in it, and their bytes."""
    folder, files = _hadoop_path(spark, path)
    summary = files.getContentSummary(folder)
    return summary.getFileCount(), summary.getLength()


def absolute_path(path: str) -> str:
    """Delta takes a relative location for the name of a table; URIs stay as they are."""
    return path.rstrip("/") if urlsplit(path).scheme else str(Path(path).absolute())


class FileState(NamedTuple):
    """What tells one content of a file from another."""

    num_bytes: int
    changed_at: int
    """Milliseconds since 1970."""


def file_states(spark: SparkSession, files: Collection[str]) -> dict[str, FileState | None]:
    """Each file's state; None where it is gone. One listing for each folder."""
    return {
        file: None if status is None else FileState(status.getLen(), status.getModificationTime())
        for file, status in _file_statuses(spark, files).items()
    }


def parquet_schemas(spark: SparkSession, files: Collection[str]) -> dict[str, Any]:
    """What the footer of each Parquet file says of its columns, as Parquet's MessageType.

    Raises:
        Py4JJavaError: a file is no Parquet file.
    """
    statuses = {file: status for file, status in _file_statuses(spark, files).items() if status is not None}
    listed = _jvm(spark).java.util.ArrayList()
    for status in statuses.values():
        listed.add(status)
    configuration = _jvm(spark).org.apache.hadoop.conf.Configuration(_hadoop_configuration(spark))
    configuration.setInt("parquet.metadata.read.parallelism", _FOOTERS_AT_ONCE)
    reader = _jvm(spark).org.apache.parquet.hadoop.ParquetFileReader
    footers = reader.readAllFootersInParallel(configuration, listed, True)
    schemas = {str(one.getFile()): one.getParquetMetadata().getFileMetaData().getSchema() for one in footers}
    return {file: schemas[str(status.getPath())] for file, status in statuses.items()}


def _file_statuses(spark: SparkSession, files: Collection[str]) -> dict[str, Any]:
    """Hadoop's status of each file; None where it is gone. One listing for each folder."""
    jvm = _jvm(spark)
    paths = {file: jvm.org.apache.hadoop.fs.Path(jvm.java.net.URI(file)) for file in files}
    folders = {path.getParent().toString(): path for path in paths.values()}
    statuses = {}
    for path in folders.values():
        try:
            listed = path.getFileSystem(_hadoop_configuration(spark)).listStatus(path.getParent())
        except Py4JJavaError:  # the folder is gone, and with it its files
            continue
        for status in listed:
            statuses[path.getParent().toString(), status.getPath().getName()] = status
    return {file: statuses.get((path.getParent().toString(), path.getName())) for file, path in paths.items()}


def _jvm(spark: SparkSession) -> Any:
    jvm = spark.sparkContext._jvm
    assert jvm is not None
    return jvm


def _hadoop_configuration(spark: SparkSession) -> Any:
    return spark.sparkContext._jsc.hadoopConfiguration()


def _hadoop_path(spark: SparkSession, path: str) -> tuple[Any, Any]:
    """A path as Hadoop's, and the file system that it is on."""
    hadoop_path = _jvm(spark).org.apache.hadoop.fs.Path(path)
    return hadoop_path, hadoop_path.getFileSystem(_hadoop_configuration(spark))
