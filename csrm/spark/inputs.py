"""Input tables: read in any format, columns mapped to CSRM's names, everything checked before use."""

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import (
    ByteType,
    DataType,
    DoubleType,
    FloatType,
    IntegerType,
    LongType,
    MapType,
    ShortType,
    StringType,
    StructType,
)

from csrm.config import InputSpec
from csrm.errors import InputError
from csrm.schemas import Column as TableColumn
from csrm.schemas import Table
from csrm.spark.storage import FileState, file_states
from csrm.spark.tables import open_table

_INTEGRAL = (ByteType, ShortType, IntegerType, LongType)
_NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Input:
    """An input table that passed its checks."""

    df: DataFrame
    """The declared columns, in their order, with their types."""
    path: str
    version: int | None
    """Version of a Delta table that df is pinned to; None for other formats."""
    files: Mapping[str, FileState | None] = field(default_factory=dict)
    """Of formats without versions: the files that df reads, as they were when it was opened."""


def read_input(spark: SparkSession, table: Table, spec: InputSpec, markets: Collection[str] | None = None) -> Input:
    """Read and check one input table.

    Required columns must exist and hold no null; the key must be unique. An optional column that is absent becomes
    null. Types must match, or convert without loss: integers to wider integers and to string (ids), text to numbers
    (csv; a value that is no number is a problem), a struct or JSON text to a map. Bytes that are no UTF-8, which
    Parquet and Spark let pass and Arrow does not, become U+FFFD; not those of a market, by which files are found. The
    checks take one scan.

    Args:
        spark: the session.
        table: what is expected.
        spec: where it is and how its columns are called there.
        markets: keep only rows of these; the checks look at nothing else.

    Raises:
        InputError: cannot be read, or has problems; all of them in one message.
    """
    where = f"input {table.name} at {spec.path!r} ({spec.format})"
    source_df, version = _load(spark, spec, where)
    files = file_states(spark, source_df.inputFiles()) if version is None else {}
    problems = [
        f"'columns' maps {name!r}, which is no column of {table.name}; it has {table.column_names}"
        for name in spec.columns
        if name not in table.column_names
    ]
    values: list[Column] = []
    failures: dict[str, Column] = {}
    for column in table.columns:
        value, failed, problem = _converted(source_df, column, spec)
        if problem:
            problems.append(problem)
        values.append((value if column.name == "market" else _valid_text(value, column.type)).alias(column.name))
        if failed is not None:
            failures[column.name] = failed
    if problems:
        raise InputError(_message(where, problems))
    checked_df = source_df.select(*values, *(failed.alias(f"_failed_{name}") for name, failed in failures.items()))
    if markets is not None and "market" in table.column_names:
        checked_df = checked_df.where(F.col("market").isNull() | F.col("market").isin(*sorted(markets)))
    try:
        problems = _value_problems(checked_df, table, list(failures))
    except (PySparkException, Py4JJavaError) as error:
        raise InputError(f"{where}: cannot be read: {_reason(error)}. Are its files complete?") from error
    if problems:
        raise InputError(_message(where, problems))
    return Input(checked_df.select(*table.column_names), spec.path, version, files)


def read_inputs(
    spark: SparkSession, specs: Mapping[Table, InputSpec], markets: Collection[str] | None = None
) -> dict[str, Input]:
    """Read and check several input tables; see read_input.

    Returns:
        Name of each table to its input.

    Raises:
        InputError: the problems of all tables in one message.
    """
    with ThreadPoolExecutor() as pool:  # Spark runs their scans side by side
        reads = {table.name: pool.submit(read_input, spark, table, spec, markets) for table, spec in specs.items()}
    errors = [error for read in reads.values() if (error := read.exception()) is not None]
    for error in errors:
        if not isinstance(error, InputError):
            raise error
    if errors:
        raise InputError("\n".join(map(str, errors)))
    return {name: read.result() for name, read in reads.items()}


def require_unchanged(spark: SparkSession, inputs: Mapping[str, Input]) -> None:
    """Check that the files of inputs without versions are those that were opened; later files are not read.

    Raises:
        InputError: some were replaced or deleted; all of them in one message.
    """
    problems = []
    for name, read in inputs.items():
        now = file_states(spark, list(read.files))
        changed = sorted(file for file, state in read.files.items() if now[file] != state)
        if changed:
            problems.append(
                f"input {name} at {read.path!r}: {len(changed)} of its {len(now)} files were replaced or deleted while "
                f"the run read them, for example {changed[0]}"
            )
    if problems:
        listed = "\n".join(problems)
        raise InputError(
            f"{listed}\nNothing was published. Run it again once they are complete; write them to a new folder each "
            "time, or as Delta tables, whose versions stay as they are."
        )


@contextmanager
def errors_of_inputs(spark: SparkSession, inputs: Mapping[str, Input]) -> Iterator[None]:
    """Where Spark fails in the block, see first whether an input is the cause.

    Raises:
        InputError: see require_unchanged; or files of a Delta table's version are gone.
    """
    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        require_unchanged(spark, inputs)
        for name, read in inputs.items():
            if read.version is None:
                continue
            states = file_states(spark, read.df.inputFiles())
            gone = sorted(file for file, state in states.items() if state is None)
            if gone:
                raise InputError(
                    f"input {name} at {read.path!r}: {len(gone)} of the {len(states)} files of its version "
                    f"{read.version} are gone, for example {gone[0]}: the table was vacuumed while the run read it. "
                    "Nothing was published. Run it again, and let VACUUM keep files for longer than a run takes."
                ) from error
        raise


def _load(spark: SparkSession, spec: InputSpec, where: str) -> tuple[DataFrame, int | None]:
    if spec.format == "delta":
        return open_table(spark, spec.path)
    try:
        return spark.read.format(spec.format).options(**spec.options).load(spec.path), None
    except (PySparkException, Py4JJavaError) as error:
        raise InputError(f"{where}: cannot be read: {_reason(error)}. Are the path and the format right?") from error


def _converted(source_df: DataFrame, column: TableColumn, spec: InputSpec) -> tuple[Column, Column | None, str | None]:
    """The column's value; whether a row's value could not be converted (None: cannot happen); a problem, if any."""
    wanted = DataType.fromDDL(column.type)
    nothing = F.lit(None).cast(wanted)
    source = spec.columns.get(column.name, column.name)
    if source not in source_df.columns:
        if not column.required and column.name not in spec.columns:
            return nothing, None, None
        return (
            nothing,
            None,
            (
                f"missing column {source!r} for {column.name}; it has {source_df.columns}. "
                f"Name the right one under columns: {{{column.name}: ...}}"
            ),
        )
    value = F.col(f"`{source.replace('`', '``')}`")
    found = source_df.schema[source].dataType
    if _converts_always(found, wanted):
        return value.cast(wanted), None, None
    converted = _try_convert(value, found, wanted)
    if converted is None:
        return (
            nothing,
            None,
            (f"column {source!r} for {column.name}: expected {wanted.simpleString()}, got {found.simpleString()}"),
        )
    return converted, value.isNotNull() & converted.isNull(), None


def _converts_always(found: DataType, wanted: DataType) -> bool:
    if isinstance(wanted, MapType) and isinstance(found, MapType):
        return _converts_always(found.keyType, wanted.keyType) and _converts_always(found.valueType, wanted.valueType)
    if found == wanted or (isinstance(wanted, StringType) and isinstance(found, StringType)):
        return True
    if isinstance(found, _INTEGRAL):
        if isinstance(wanted, _INTEGRAL):
            return _INTEGRAL.index(type(found)) < _INTEGRAL.index(type(wanted))
        return isinstance(wanted, StringType) or (isinstance(wanted, DoubleType) and not isinstance(found, LongType))
    return isinstance(found, FloatType) and isinstance(wanted, DoubleType)


def _try_convert(value: Column, found: DataType, wanted: DataType) -> Column | None:
    """The value where it converts, null where it does not; None where the types never fit."""
    if isinstance(wanted, MapType):
        if isinstance(found, StructType):
            return F.from_json(F.to_json(value), wanted.simpleString())
        return F.from_json(value, wanted.simpleString()) if isinstance(found, StringType) else None
    if isinstance(wanted, (*_INTEGRAL, FloatType, DoubleType)) and isinstance(found, (*_INTEGRAL, StringType)):
        return value.try_cast(wanted)
    return None


def _valid_text(value: Column, wanted: str) -> Column:
    """Text whose bytes are UTF-8; of a map, entries whose name is not are left out."""
    if wanted == "string":
        return F.make_valid_utf8(value)
    if wanted == "map<string,string>":
        valid = F.transform_values(value, lambda _, text: F.make_valid_utf8(text))
        return F.map_filter(valid, lambda name, _: F.is_valid_utf8(name))
    return value


def _value_problems(checked_df: DataFrame, table: Table, converted: list[str]) -> list[str]:
    """Nulls, failed conversions and duplicate keys, counted in one scan."""
    null_key = F.lit(False)
    for name in table.key:
        null_key = null_key | F.col(name).isNull()
    required = [column.name for column in table.columns if column.required]
    counters = {f"null_{name}": F.col(name).isNull() for name in required}
    counters |= {f"failed_{name}": F.col(f"_failed_{name}") for name in converted}
    by_key_df = checked_df.groupBy(*table.key).agg(
        F.count("*").alias("num_rows"), *(F.count_if(condition).alias(name) for name, condition in counters.items())
    )
    duplicate = ~null_key & (F.col("num_rows") > 1)
    row = by_key_df.agg(
        F.coalesce(F.sum("num_rows"), F.lit(0)).alias("num_rows"),
        F.count_if(duplicate).alias("duplicate_keys"),
        *(F.coalesce(F.sum(name), F.lit(0)).alias(name) for name in counters),
    ).head()
    assert row is not None
    problems = []
    for name in required:
        # a value that failed to convert is reported as that, not as null as well
        num_nulls = row[f"null_{name}"] - (row[f"failed_{name}"] if name in converted else 0)
        if num_nulls:
            kind = "key column" if name in table.key else "required column"
            problems.append(f"{kind} {name} is null in {num_nulls} of {row['num_rows']} rows")
    for name in converted:
        if row[f"failed_{name}"]:
            wanted = next(column.type for column in table.columns if column.name == name)
            problems.append(f"column {name}: {row[f'failed_{name}']} of {row['num_rows']} values are no {wanted}")
    if row["duplicate_keys"]:
        examples = by_key_df.where(duplicate).orderBy(*table.key).limit(_NUM_EXAMPLES).collect()
        listed = "; ".join(
            ", ".join(f"{name}={example[name]!r}" for name in table.key) + f" ({example['num_rows']} rows)"
            for example in examples
        )
        problems.append(f"{row['duplicate_keys']} keys ({', '.join(table.key)}) are not unique, for example {listed}")
    return problems


def _message(where: str, problems: list[str]) -> str:
    return f"{where}: {len(problems)} problem{'s' * (len(problems) > 1)}:\n" + "\n".join(
        f"  - {problem}" for problem in problems
    )


def _reason(error: Exception) -> str:
    cause = error.java_exception.getMessage() if isinstance(error, Py4JJavaError) else str(error)
    return str(cause).strip().splitlines()[0].rstrip(".")
