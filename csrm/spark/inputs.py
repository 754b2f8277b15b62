"""Input tables: read in any format, columns mapped to CSRM's names, everything checked before use."""

import logging
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce

from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from csrm.config import InputSpec
from csrm.conversions import (
    BLANK_TEXT,
    REPLACEMENT,
    Found,
    Kind,
    is_kept,
    problem_of_values,
    problems_of_columns,
    warning_of_blank_languages,
    warning_of_replaced,
)
from csrm.errors import InputError
from csrm.schemas import JUDGMENTS, Table
from csrm.spark.conversions import converted, json_example
from csrm.spark.session import require_names, require_names_on_executors
from csrm.spark.sources import Source, located, open_sources, reason
from csrm.spark.storage import FileState, file_states
from csrm.spark.text import is_blank

logger = logging.getLogger(__name__)
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
    content: tuple[int, int] | None = None
    """Of formats with neither versions nor files, such as jdbc: number and hash of the rows when it was opened."""


def read_input(spark: SparkSession, table: Table, spec: InputSpec, markets: Collection[str] | None = None) -> Input:
    """Read and check one input table.

    Only its declared columns are read. Required columns must exist and hold no null; the key, where the table has one,
    must be unique. An optional column that is absent becomes null. No type is inferred from values; types that are not
    the declared ones convert as the table of csrm.conversions says. Files whose columns differ are read together. Of
    CSV and JSON, every row and line must be one. Bytes that are no UTF-8 become U+FFFD and are counted in a warning;
    not those of a market, by which files are found.

    Args:
        spark: the session.
        table: what is expected.
        spec: where it is and how its columns are called there.
        markets: keep only rows of these; the checks of values look at nothing else.

    Raises:
        InputError: cannot be read, or has problems; all of them in one message.
    """
    where = f"input {table.name} at {spec.path!r} ({spec.format})"
    spec = located(spark, spec, where)
    rows_df, version = _open_rows(spark, table, spec, where)
    files = file_states(spark, rows_df.inputFiles()) if version is None else {}
    if markets is not None and "market" in table.column_names:
        rows_df = rows_df.where(F.col("market").isNull() | F.col("market").isin(*sorted(markets)))
    try:
        problems = _problems_of_values(rows_df, table, spec, where)
    except (PySparkException, Py4JJavaError) as error:
        raise InputError(f"{where}: cannot be read: {reason(error)}. Are its files complete?") from error
    if problems:
        raise InputError(_message(where, problems))
    df = rows_df.select(*table.column_names)
    return Input(df, spec.path, version, files, _content(df) if version is None and not files else None)


def read_rows(spark: SparkSession, table: Table, spec: InputSpec, version: int | None = None) -> DataFrame:
    """The declared columns of an input table as read_input gives them, without checks of their values.

    Args:
        spark: the session.
        table: what is expected.
        spec: where it is and how its columns are called there.
        version: of a Delta table; None: the newest.

    Raises:
        InputError: cannot be read, or its columns have problems.
    """
    rows_df, _ = _open_rows(spark, table, spec, f"input {table.name} at {spec.path!r} ({spec.format})", version)
    return rows_df.select(*table.column_names)


def read_inputs(
    spark: SparkSession, specs: Mapping[Table, InputSpec], markets: Collection[str] | None = None
) -> dict[str, Input]:
    """Read and check several input tables; see read_input.

    Returns:
        Name of each table to its input.

    Raises:
        ConfigError: a path or a market has letters that the driver's or an executor's JVM cannot write in file names.
        InputError: the problems of all tables in one message.
    """
    names = [*(spec.path for spec in specs.values()), *(markets or ())]
    require_names(spark, names)
    require_names_on_executors(spark, names)
    with ThreadPoolExecutor() as pool:  # Spark runs their scans side by side
        reads = {table.name: pool.submit(read_input, spark, table, spec, markets) for table, spec in specs.items()}
    errors = [error for read in reads.values() if (error := read.exception()) is not None]
    for error in errors:
        if not isinstance(error, InputError):
            raise error
    if errors:
        raise InputError("\n".join(map(str, errors)))
    return {name: read.result() for name, read in reads.items()}


def require_markets(inputs: Mapping[str, Input], markets: Collection[str]) -> None:
    """Check that catalog and queries have rows of each market, before what an earlier job wrote of it is replaced.

    Args:
        inputs: as of read_inputs; catalog and queries are among them.
        markets: the markets.

    Raises:
        InputError: a market has no rows in one of them; all problems in one message.
    """
    problems = []
    for name in ("catalog", "queries"):
        found = {row["market"] for row in inputs[name].df.select("market").distinct().collect()}
        if empty := sorted(set(markets) - found):
            problems.append(
                f"input {name} at {inputs[name].path!r}: no rows for the markets {empty}; it has {sorted(found)}"
            )
    if problems:
        listed = "\n".join(problems)
        raise InputError(
            f"{listed}\nNothing was written. Are 'markets' spelled as in the tables, and the tables complete?"
        )


def require_unchanged(spark: SparkSession, inputs: Mapping[str, Input]) -> None:
    """Check that the files of inputs without versions are those that were opened; later files are not read.

    Of inputs without files, the rows must be the same.

    Raises:
        InputError: some were replaced or deleted; all of them in one message.
    """
    problems = []
    for name, read in inputs.items():
        if read.content is not None and _content(read.df) != read.content:
            problems.append(f"input {name} at {read.path!r}: its rows were changed while the run read them")
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


def _content(df: DataFrame) -> tuple[int, int]:
    """Number of rows, and a hash of them in any order."""
    row_hash = F.xxhash64(F.to_json(F.struct(*df.columns)))
    row = df.agg(F.count("*").alias("num_rows"), F.coalesce(F.bit_xor(row_hash), F.lit(0)).alias("hash")).head()
    assert row is not None
    return row["num_rows"], row["hash"]


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


def _open_rows(
    spark: SparkSession, table: Table, spec: InputSpec, where: str, version: int | None = None
) -> tuple[DataFrame, int | None]:
    """The declared columns, and `_failed_<name>` with the source's text where a value did not convert; the version."""
    spec = located(spark, spec, where)
    names = _source_names(table, spec)
    needed = [name for name in names.values() if name is not None]
    sources, version, problems = open_sources(spark, spec, needed, where, version)
    problems += _problems_of_columns(table, spec, sources)
    if problems:
        raise InputError(_message(where, problems))
    rows_dfs = [_converted_rows(table, names, source, spec.market) for source in sources]
    return reduce(DataFrame.unionByName, rows_dfs), version


def _source_names(table: Table, spec: InputSpec) -> dict[str, str | None]:
    return {column.name: spec.name_there(column.name) for column in table.columns}


def _problems_of_columns(table: Table, spec: InputSpec, sources: list[Source]) -> list[str]:
    present = list(dict.fromkeys(name for source in sources for name in source.names))
    return problems_of_columns(table, spec, present, [source.columns for source in sources])


def _converted_rows(table: Table, names: Mapping[str, str | None], source: Source, market: str | None) -> DataFrame:
    """The columns, and `_failed_<name>`; the market, where it is that of all rows."""
    values, failures = [], []
    for column in table.columns:
        name = names[column.name]
        found = None if name is None else source.columns.get(name)
        failed: Column = F.lit(None).cast("string")
        if column.name == "market" and market is not None:
            value = F.lit(market)
        elif name is None or found is None or found.kind == Kind.NOTHING:
            value = F.lit(None).cast(column.type)
        else:
            there = source.value(name)
            value = converted(there, found, column.type)
            if column.name != "market":
                value = _valid_text(value, column.type)
            if not is_kept(found, column.type):
                is_failed = value.isNull() & ~_is_nothing(there, found, column.type)
                failed = F.when(is_failed, json_example(there) if found.kind == Kind.JSON else there.cast("string"))
        values.append(value.alias(column.name))
        failures.append(failed.alias(f"_failed_{column.name}"))
    return source.df.select(*values, *failures)


def _is_nothing(value: Column, found: Found, wanted: str) -> Column:
    """Whether a value stands for null, so that it need not convert."""
    if wanted != "map<string,string>" or found.kind not in (Kind.TEXT, Kind.JSON):
        return value.isNull()
    text = value if found.kind == Kind.TEXT else F.try_variant_get(value, "$", "string")
    return value.isNull() | F.coalesce(text, F.lit("-")).rlike(BLANK_TEXT)


def _valid_text(value: Column, wanted: str) -> Column:
    """Text whose bytes are UTF-8; of a map, entries whose name is not are left out."""
    if wanted == "string":
        return F.make_valid_utf8(value)
    if wanted == "map<string,string>":
        valid = F.transform_values(value, lambda _, text: F.make_valid_utf8(text))
        valid = F.map_filter(valid, lambda name, _: F.is_valid_utf8(name))
        every = F.concat_ws(" ", F.map_keys(value), F.map_values(value))  # a fraction of what the others cost
        return F.when(F.is_valid_utf8(every), value).otherwise(valid)
    return value


def _has_replacement(value: Column, wanted: str) -> Column:
    """Whether text has characters in place of bytes that were no UTF-8."""
    if wanted == "string":
        return F.contains(value, F.lit(REPLACEMENT))
    return F.contains(F.concat_ws(" ", F.map_values(value)), F.lit(REPLACEMENT))


def _problems_of_values(rows_df: DataFrame, table: Table, spec: InputSpec, where: str) -> list[str]:
    """Nulls, failed conversions and duplicate keys, counted in one scan; replaced bytes are counted in a warning."""
    null_key = F.lit(False)
    for name in table.key:
        null_key = null_key | F.col(name).isNull()
    texts = [column for column in table.columns if column.type in ("string", "map<string,string>")]
    counters = {f"null_{column.name}": F.col(column.name).isNull() for column in table.columns if column.required}
    counters |= {f"failed_{name}": F.col(f"_failed_{name}").isNotNull() for name in table.column_names}
    counters |= {f"replaced_{column.name}": _has_replacement(F.col(column.name), column.type) for column in texts}
    if "language" in table.column_names:
        counters["blank_language"] = F.col("language").isNotNull() & is_blank(F.col("language"))
    by_key_df = rows_df.groupBy(*table.key).agg(
        F.count("*").alias("num_rows"),
        *(F.count_if(condition).alias(name) for name, condition in counters.items()),
    )
    duplicate = ~null_key & (F.col("num_rows") > 1) if table.key else F.lit(False)
    row = by_key_df.agg(
        F.coalesce(F.sum("num_rows"), F.lit(0)).alias("num_rows"),
        F.count_if(duplicate).alias("duplicate_keys"),
        *(F.coalesce(F.sum(name), F.lit(0)).alias(name) for name in counters),
    ).head()
    assert row is not None
    problems, names = [], _source_names(table, spec)
    for column in table.columns:
        # a value that failed to convert is reported as that, not as null as well
        num_nulls = row[f"null_{column.name}"] - row[f"failed_{column.name}"] if column.required else 0
        if num_nulls:
            kind = "key column" if column.name in table.key else "required column"
            problems.append(f"{kind} {column.name} is null in {num_nulls} of {row['num_rows']} rows")
    for column in table.columns:
        num_failed, name = row[f"failed_{column.name}"], names[column.name] or ""
        if num_failed:
            example = rows_df.agg(F.min(f"_failed_{column.name}")).collect()[0][0]
            problems.append(problem_of_values(name, column.name, column.type, num_failed, row["num_rows"], example))
    if row["duplicate_keys"]:
        repeated = by_key_df.where(duplicate).orderBy(*table.key).limit(_NUM_EXAMPLES).collect()
        listed = "; ".join(
            ", ".join(f"{name}={example[name]!r}" for name in table.key) + f" ({example['num_rows']} rows)"
            for example in repeated
        )
        several = ". Labels of several judges are for training: name a table with one a pair here"
        way_out = several if table.name == JUDGMENTS.name else ""
        key = ", ".join(table.key)
        problems.append(f"{row['duplicate_keys']} keys ({key}) are not unique, for example {listed}{way_out}")
    num_blank = row["blank_language"] if "blank_language" in counters else 0
    for warning in (
        warning_of_replaced({column.name: row[f"replaced_{column.name}"] for column in texts}),
        warning_of_blank_languages(num_blank, row["num_rows"]),
    ):
        if warning is not None:
            logger.warning("%s: %s", where, warning)
    return problems


def _message(where: str, problems: list[str]) -> str:
    return f"{where}: {len(problems)} problem{'s' * (len(problems) > 1)}:\n" + "\n".join(
        f"  - {problem}" for problem in problems
    )
