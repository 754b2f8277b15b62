"""Files and tables as training reads them: their columns with their types, of all files, before any is converted."""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import duckdb
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.dataset as pa_dataset
import pyarrow.fs as pa_fs

from csrm.config import InputSpec
from csrm.conversions import JSON, TEXT, Found, Kind, found_in_arrow, problem_of_records
from csrm.errors import InputError
from csrm.extras import open_delta
from csrm.training.data.conversions import as_bytes

_LINE_BYTES = 16 * 2**20
"""A line of JSON is shorter than this."""
_LINES = pa.schema([("line", pa.binary())])
_LINE_FORMAT = pa_dataset.CsvFileFormat(
    parse_options=pa_csv.ParseOptions(delimiter="\x01", quote_char=False, double_quote=False),
    read_options=pa_csv.ReadOptions(column_names=_LINES.names, block_size=_LINE_BYTES),
    convert_options=pa_csv.ConvertOptions(column_types=_LINES, strings_can_be_null=False),
)
"""Files whose lines are the values of one column. JSON has no \\x01 but as an escape."""


@dataclass(frozen=True)
class Source:
    """Rows of one layout: a Delta table, the lines of JSON files, or the Parquet files whose columns have one type."""

    relation: str
    """The rows, in SQL."""
    names: Sequence[str]
    """All columns."""
    columns: dict[str, Found]
    """Types of those that are needed."""
    sql: dict[str, str]
    """The values of those that are needed; text is bytes but for the market's."""
    problems: list[str] = field(default_factory=list)


def open_sources(
    database: duckdb.DuckDBPyConnection, spec: InputSpec, needed: Sequence[str], market: str | None, where: str
) -> list[Source]:
    """Open a table; only the columns that are needed will be read.

    Args:
        database: where the rows are registered.
        spec: Delta, Parquet or JSON lines.
        needed: names of columns there.
        market: name there of the market's column. Its text stays text: files are chosen by it.
        where: what messages begin with.

    Raises:
        InputError: it cannot be read.
    """
    prefix = f"{where.split()[0]}_source"
    is_binary_text = spec.format == "parquet" and spec.options.get("binaryAsString", "").lower() == "true"
    if spec.format not in ("delta", "parquet", "json") or len(spec.options) > is_binary_text:
        raise InputError(
            f"{where}: training reads delta, parquet and json (an object a line), with no options but binaryAsString "
            f"of parquet; got format {spec.format!r} with options {spec.options}. Write it as one of these with Spark, "
            "whose reader takes the others; of a table in a catalog, name the folder (Location of DESCRIBE TABLE "
            "EXTENDED)."
        )
    try:
        if spec.format == "json":
            return [_json_source(database, _files(spec.path, _LINE_FORMAT), needed, market, prefix, where)]
        if spec.format == "delta":
            table, dataset = open_delta(spec.path, where)
            partitions = list(table.metadata().partition_columns)
            schemas = dict.fromkeys(dataset.get_fragments(), dataset.schema)
        else:
            dataset, partitions = _files(spec.path, pa_dataset.ParquetFileFormat())
            schemas = _schemas(dataset, partitions)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{where}: cannot be read: {error}. Is the path right? Are its files complete?") from error
    names = list(dict.fromkeys(name for schema in schemas.values() for name in schema.names))
    layouts: dict[pa.Schema, list[pa_dataset.Fragment]] = {}
    for fragment, schema in schemas.items():
        fields = [pa.field(name, schema.field(name).type) for name in names if name in needed and name in schema.names]
        layouts.setdefault(pa.schema(fields), []).append(fragment)
    sources = []
    for number, (layout, fragments) in enumerate(layouts.items()):
        types = {name: as_text(type_) if is_binary_text else type_ for name, type_ in _types(layout).items()}
        as_they_are = {*partitions, market}
        read = pa.schema([(name, type_ if name in as_they_are else as_bytes(type_)) for name, type_ in types.items()])
        found = {name: found_in_arrow(type_) for name, type_ in types.items()}
        columns = {name: type_ for name, type_ in found.items() if type_.kind != Kind.NOTHING}
        readable = pa.schema([part for part in read if found[part.name].kind not in (Kind.OTHER, Kind.NOTHING)])
        relation = f"{prefix}_{number}"
        database.register(
            relation, pa_dataset.FileSystemDataset(fragments, readable, dataset.format, dataset.filesystem)
        )
        sql = {name: _folder(name, market) if name in partitions else _quoted(name) for name in columns}
        sources.append(Source(relation, names, columns, sql))
    return sources


def _types(schema: pa.Schema) -> dict[str, pa.DataType]:
    return dict(zip(schema.names, schema.types, strict=True))


def as_text(type_: pa.DataType) -> pa.DataType:
    """A type of Arrow with text for bytes that nothing marks as text."""
    types = pa.types
    if types.is_map(type_):
        return pa.map_(as_text(type_.key_type), as_text(type_.item_type))
    if types.is_struct(type_):
        return pa.struct([part.with_type(as_text(part.type)) for part in type_])
    is_bytes = types.is_binary(type_) or types.is_large_binary(type_) or types.is_binary_view(type_)
    return pa.string() if is_bytes else type_


def _files(path: str, format_: pa_dataset.FileFormat) -> tuple[pa_dataset.FileSystemDataset, list[str]]:
    """A file or the files of a folder, and the columns that name folders (market=kr), as of partitionBy, as text."""
    filesystem, inside = pa_fs.FileSystem.from_uri(path) if "://" in path else (pa_fs.LocalFileSystem(), path)
    info = filesystem.get_file_info(inside)
    if info.type == pa_fs.FileType.NotFound:
        raise FileNotFoundError(f"{path!r} does not exist")
    chosen = [info] if info.is_file else filesystem.get_file_info(pa_fs.FileSelector(inside, recursive=True))
    below = {one.path: one.path.removeprefix(inside).strip("/").split("/") for one in chosen if one.size}
    files = [
        file
        for file, parts in below.items()
        if not any(part.startswith(("_", ".")) and "=" not in part for part in parts)
    ]
    names = sorted({folder.partition("=")[0] for file in files for folder in below[file][:-1] if "=" in folder})
    hive = pa_dataset.partitioning(pa.schema([(name, pa.string()) for name in names]), flavor="hive")
    dataset = pa_dataset.dataset(
        files,
        schema=pa.schema([]),
        format=format_,
        filesystem=filesystem,
        partitioning=hive,
        exclude_invalid_files=False,
    )
    return dataset, names


def _schemas(dataset: pa_dataset.FileSystemDataset, partitions: Sequence[str]) -> dict[pa_dataset.Fragment, pa.Schema]:
    """What each file holds, and the columns that name its folders, which win."""
    fragments = list(dataset.get_fragments())
    with ThreadPoolExecutor() as pool:
        inside = list(pool.map(lambda fragment: fragment.physical_schema, fragments))
    folders = [pa.field(name, pa.string()) for name in partitions]
    return {
        fragment: pa.schema([*(part for part in schema if part.name not in partitions), *folders])
        for fragment, schema in zip(fragments, inside, strict=True)
    }


def _json_source(
    database: duckdb.DuckDBPyConnection,
    opened: tuple[pa_dataset.FileSystemDataset, list[str]],
    needed: Sequence[str],
    market: str | None,
    prefix: str,
    where: str,
) -> Source:
    """Lines that are parsed when they are read. The columns are the names in all records; no type is inferred."""
    dataset, partitions = opened
    lines = pa.schema([*_LINES, *(pa.field(name, pa.string()) for name in partitions)])
    dataset = pa_dataset.FileSystemDataset(list(dataset.get_fragments()), lines, dataset.format, dataset.filesystem)
    database.register(f"{prefix}_lines", dataset)
    folders = "".join(f", {_quoted(name)}" for name in partitions)
    database.execute(
        f"""CREATE TEMP VIEW {prefix} AS SELECT try_cast(text AS JSON) AS record, text{folders}
        FROM (SELECT text_of_bytes(line) AS text{folders} FROM {prefix}_lines)
        WHERE NOT regexp_matches(text, '^\\s*$')"""
    )
    is_bad = (
        "record IS NULL OR json_type(record) <> 'OBJECT' "
        "OR len(list_distinct(json_keys(record))) < len(json_keys(record))"
    )
    try:
        ((num_bad, example),) = database.execute(
            f"SELECT count(*) FILTER ({is_bad}), min(text) FILTER ({is_bad}) FROM {prefix}"
        ).fetchall()
        names = [
            name
            for (name,) in database.execute(
                f"SELECT DISTINCT unnest(json_keys(record)) AS name FROM {prefix} WHERE NOT ({is_bad}) ORDER BY name"
            ).fetchall()
        ]
    except duckdb.Error as error:
        raise InputError(
            f"{where}: cannot be read: {error}. Is it JSON, an object a line, of at most {_LINE_BYTES:,} bytes each?"
        ) from error
    names += [name for name in partitions if name not in names]
    columns = {name: TEXT if name in partitions else JSON for name in names if name in needed}
    sql = {}
    for name in columns:
        pointer = "/" + name.replace("~", "~0").replace("/", "~1")
        value = f"json_extract(record, {_literal(pointer)})"
        is_null = f"json_type({value}) = 'NULL'"
        sql[name] = _folder(name, market) if name in partitions else f"CASE WHEN NOT {is_null} THEN {value} END"
    problems = []
    if num_bad:
        problems.append(
            problem_of_records(
                "lines are no JSON objects",
                num_bad,
                example,
                _place_of(dataset, example),
                "Write one object a line, each name once.",
            )
        )
    return Source(prefix, names, columns, sql, problems)


def _place_of(dataset: pa_dataset.FileSystemDataset, text: str) -> str | None:
    """File and line of a line of text; None where it is not found."""
    wanted = text.encode()
    for file in sorted(dataset.files):
        with dataset.filesystem.open_input_stream(file) as stream, io.BufferedReader(stream) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip() == wanted.strip():
                    return f"{file}, line {number}"
    return None


def _folder(name: str, market: str | None) -> str:
    """SQL of a column that names folders: bytes, as all text, but for the market."""
    return _quoted(name) if name == market else f"encode({_quoted(name)})"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
