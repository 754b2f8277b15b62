"""Tables as they are: their columns, and some of their values."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.dataset as pa_dataset
import pyarrow.fs as pa_fs

from csrm.conversions import NotConvertibleError, converted, found_in_python
from csrm.errors import InputError
from csrm.extras import open_delta

NUM_SAMPLED = 300
"""Values of each market that are looked at."""
_MARKET = "market"
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
    market: str | None = None
    """Market of all rows, of a table that has no column for it: it is as if column `market` had it in each."""

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Type of each column."""
        types = {**dict(zip(self.dataset.schema.names, self.dataset.schema.types, strict=True)), **self.numbers}
        return types if self.market is None else {**types, _MARKET: pa.string()}

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """All rows of some columns.

        Raises:
            InputError: a file is damaged, or its columns are not those of the others.
        """
        there = [name for name in columns if self.market is None or name != _MARKET]
        try:
            for batch in self.dataset.scanner(columns=there, batch_size=16_384).to_batches():
                if len(there) < len(columns):
                    batch = batch.append_column(_MARKET, pa.repeat(pa.scalar(self.market), batch.num_rows))
                yield batch.select(list(columns))
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self.path!r}: cannot be read: {error}. Are its files complete?") from error

    def counts(self, column: str) -> Counter[str]:
        """Each value of a column as text, with its number of rows; nulls are left out."""
        counts: Counter[str] = Counter()
        for batch in self.batches([column]):
            for row in batch.column(0).value_counts().to_pylist():
                if row["values"] is not None:
                    counts[self._text(column, row["values"])] += row["counts"]
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
                    values.append(self._text(column, value))
                else:
                    wanted.discard(as_text(of_market))
            if not wanted:
                break
        return found

    def present(self, market: str, column: str, ids: Set[tuple[str, str]]) -> set[tuple[str, str]]:
        """Those of some ids that are in a column.

        Args:
            market: name of the market's column.
            column: name of the column.
            ids: market and id of each.
        """
        wanted = pa.array(sorted({id_ for _, id_ in ids}), pa.string())
        found: set[tuple[str, str]] = set()
        for batch in self.batches(list(dict.fromkeys([market, column]))):
            rows = batch.filter(pc.is_in(_arrow_texts(batch[column]), value_set=wanted))
            pairs = zip(rows[market].to_pylist(), rows[column].to_pylist(), strict=True)
            found |= {
                (as_text(of_market), self._text(column, id_)) for of_market, id_ in pairs if of_market is not None
            }
            if len(found & ids) == len(ids):
                break
        return found & ids

    def _text(self, column: str, value: Any) -> str:
        """A value of a column as text.

        Raises:
            InputError: jobs would refuse it.
        """
        try:
            return as_text(value)
        except NotConvertibleError as error:
            raise InputError(
                f"{self.path!r}: column {column!r} is read as text, and {value!r} does not become any: {error}. Cast "
                "the column to text where it is written, or name another one: --column TABLE.NAME=THERE."
            ) from error

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

    Raises:
        NotConvertibleError: jobs would refuse it, as they do 0.5 or true.
    """
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(converted(value, found_in_python(value), "string"))


def _arrow_texts(values: pa.Array) -> pa.Array:
    """A column as text, as `as_text` makes it of whole numbers; what else it makes of others finds nothing."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_floating(values.type) or pa.types.is_decimal(values.type):
        values = values.cast(pa.int64(), safe=False)
    return values.cast(pa.string())


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
            return FoundTable(path, "delta", open_delta(place, f"{name} {path!r}")[1])
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
