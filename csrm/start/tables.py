"""Tables as they are: their columns, and some of their values."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.dataset as pa_dataset
import pyarrow.fs as pa_fs

from csrm.errors import InputError
from csrm.extras import import_eval

NUM_SAMPLED = 300
"""Values of each market that are looked at."""
_TRIED = 2_000
"""Rows whose values say whether text is JSON."""


@dataclass(frozen=True)
class FoundTable:
    """A table that was opened, before anything is known of its columns."""

    path: str
    format: str
    """delta, parquet, csv or json."""
    dataset: Any
    """pyarrow's dataset."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Options of the format, as an input names them."""
    numbers: Mapping[str, pa.DataType] = field(default_factory=dict)
    """Types of the columns of CSV that hold numbers; their values stay the text that they are, as jobs read them."""

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Type of each column."""
        return {**dict(zip(self.dataset.schema.names, self.dataset.schema.types, strict=True)), **self.numbers}

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """All rows of some columns.

        Raises:
            InputError: a file is damaged, or its columns are not those of the others.
        """
        try:
            yield from self.dataset.scanner(columns=list(columns), batch_size=16_384).to_batches()
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self.path!r}: cannot be read: {error}. Are its files complete?") from error

    def counts(self, column: str) -> Counter[str]:
        """Each value of a column as text, with its number of rows; nulls are left out."""
        counts: Counter[str] = Counter()
        for batch in self.batches([column]):
            for row in batch.column(0).value_counts().to_pylist():
                if row["values"] is not None:
                    counts[as_text(row["values"])] += row["counts"]
        return counts

    def sample(self, market: str, column: str, num_values: int = NUM_SAMPLED) -> dict[str, list[str]]:
        """The first values of a column in each market, nulls and blanks left out.

        Args:
            market: name of the market's column.
            column: name of the column.
            num_values: of each market; the scan ends when all markets that were seen have so many.
        """
        found: dict[str, list[str]] = {}
        wanted = {as_text(value) for value in self.counts(market)}
        for batch in self.batches(list(dict.fromkeys([market, column]))):
            for of_market, value in zip(batch[market].to_pylist(), batch[column].to_pylist(), strict=True):
                if of_market is None or value is None or not str(value).strip():
                    continue
                values = found.setdefault(as_text(of_market), [])
                if len(values) < num_values:
                    values.append(as_text(value))
                else:
                    wanted.discard(as_text(of_market))
            if not wanted:
                break
        return found

    def is_json_objects(self, column: str) -> bool:
        """Whether the first values of a column of text are objects in JSON; where there is none, nothing says so."""
        values = [value for value in self.dataset.head(_TRIED, columns=[column])[column].to_pylist() if value]
        try:
            return bool(values) and all(isinstance(json.loads(value), dict) for value in values)
        except (ValueError, TypeError):
            return False


def as_text(value: Any) -> str:
    """A value as CSRM reads it where it wants text.

    >>> as_text(7.0), as_text("7"), as_text(b"us")
    ('7', '7', 'us')
    """
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, Decimal):
        return str(int(value)) if value == int(value) else str(value)
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def open_found(path: str, name: str) -> FoundTable:
    """Open a table; its format is told by its files.

    Args:
        path: a Delta table, a file, or a folder of files: Parquet, CSV (also .tsv, .gz) or JSON lines.
        name: what it is, for messages.

    Raises:
        InputError: there is no such table, its files are of several formats, or it cannot be read.
        MissingDependencyError: it is Delta, and deltalake is not installed.
    """
    place = path.replace("s3a://", "s3://", 1)  # the name that Spark has for it
    try:
        files = _files(place)
        if any("_delta_log" in PurePosixPath(file).parts for file in files):
            return FoundTable(path, "delta", _delta_dataset(place, f"{name} {path!r}"))
        endings = sorted({_ending(file) for file in files})
        kinds = {_KINDS[ending] for ending in endings if ending in _KINDS}
        if len(kinds) != 1:
            raise InputError(
                f"{name} {path!r}: expected a Delta table, or Parquet, CSV or JSON files, got files that end in "
                f"{endings}. Name the folder of the table itself."
            )
        (kind,) = kinds
        delimiter = "\t" if set(endings) <= {".tsv"} else ","
        kept = [file for file in files if _KINDS.get(_ending(file))]
        format_ = _csv(delimiter) if kind == "csv" else kind
        filesystem = pa_fs.FileSystem.from_uri(place)[0] if "://" in place else None
        folders = sorted({part.partition("=")[0] for file in kept for part in file.split("/")[:-1] if "=" in part})
        hive = pa_dataset.partitioning(pa.schema([(folder, pa.string()) for folder in folders]), flavor="hive")
        open_files = partial(pa_dataset.dataset, kept, format=format_, filesystem=filesystem, partitioning=hive)
        dataset = open_files()
        if kind != "csv":
            return FoundTable(path, kind, dataset)
        numbers = {part.name: part.type for part in dataset.schema if part.type in (pa.int64(), pa.float64())}
        texts = open_files(schema=pa.schema([(name, pa.string()) for name in dataset.schema.names]))
        return FoundTable(path, kind, texts, {"header": "true", "sep": delimiter}, numbers)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{name} {path!r}: cannot be read: {error}. Is the path right?") from error


_KINDS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json"}


def _ending(file: str) -> str:
    return PurePosixPath(file.removesuffix(".gz").lower()).suffix


def _csv(delimiter: str) -> pa_dataset.CsvFileFormat:
    """CSV in which nothing but an empty field is null."""
    return pa_dataset.CsvFileFormat(
        parse_options=pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(null_values=[""], strings_can_be_null=True),
    )


def _delta_dataset(path: str, where: str) -> Any:
    """pyarrow's dataset of a Delta table.

    Raises:
        InputError: it is damaged, or has features that deltalake does not support.
    """
    delta_table, delta_error = import_eval("deltalake").DeltaTable, import_eval("deltalake.exceptions").DeltaError
    try:
        return delta_table(path).to_pyarrow_dataset()
    except delta_error as error:
        raise InputError(
            f"{where}: cannot be read as Delta: {error}. Where it names features that deltalake does not support, such "
            "as deletion vectors or column mapping, write the table as Parquet with Spark and name that."
        ) from error


def _files(path: str) -> list[str]:
    """Files of a table, without those that begin with a dot or an underscore; of Delta, one file of its log.

    Raises:
        FileNotFoundError: there are none.
    """
    filesystem, inside = pa_fs.FileSystem.from_uri(path) if "://" in path else (pa_fs.LocalFileSystem(), path)
    info = filesystem.get_file_info(inside)
    if info.is_file:
        return [info.path]
    if info.type == pa_fs.FileType.NotFound:
        raise FileNotFoundError("there is no such file or folder")
    log = f"{inside.rstrip('/')}/_delta_log"
    if filesystem.get_file_info(log).type == pa_fs.FileType.Directory:
        return [log]
    found = filesystem.get_file_info(pa_fs.FileSelector(inside, recursive=True))
    names = sorted(part.path for part in found if part.is_file and part.size)
    below = {name: PurePosixPath(name.removeprefix(inside)).parts for name in names}
    shown = [name for name in names if not any(part[0] in "._" and "=" not in part for part in below[name] if part)]
    if not shown:
        raise FileNotFoundError("the folder has no files")
    return shown
