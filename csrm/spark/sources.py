"""Files and tables as Spark reads them: their columns with their types, of all files, before any is converted."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, DataFrameReader, Row, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import BinaryType, DataType, MapType, StringType, StructField, StructType

from csrm.config import InputSpec
from csrm.conversions import JSON, TEXT, Found, Kind, problem_of_records
from csrm.errors import InputError
from csrm.spark.conversions import found_in_spark, is_json_null
from csrm.spark.storage import AS_IT_IS, PATTERN_CHARACTERS, parquet_schemas, path_options
from csrm.spark.tables import open_table, sql_literal

_BAD, _TEXT, _FILE, _RECORD = "_csrm_bad_record", "_csrm_text", "_csrm_file", "_csrm_record"
"""Names of columns beside those of a file."""
_MOST_EXAMPLE = 500
_QUOTE_IT = "Put fields that hold a separator, a quote or a line break in quotes, and double the quotes inside."


@dataclass(frozen=True)
class Source:
    """Rows of one layout: a table, or the files whose columns have one type."""

    df: DataFrame
    names: Sequence[str]
    """All columns."""
    columns: Mapping[str, Found]
    """Types of those that are needed."""

    def value(self, name: str) -> Column:
        """A column that is needed; null where JSON has null."""
        value = F.col(f"`{name.replace('`', '``')}`")
        return F.when(~is_json_null(value), value) if self.columns[name].kind == Kind.JSON else value


def open_sources(
    spark: SparkSession, spec: InputSpec, needed: Sequence[str], where: str, version: int | None = None
) -> tuple[list[Source], int | None, list[str]]:
    """Open an input; only the columns that are needed will be read.

    Args:
        spark: the session.
        spec: where it is, its format and options.
        needed: names of columns there.
        where: what messages begin with.
        version: of a Delta table; None: the newest.

    Returns:
        Its rows; the version of a Delta table; problems of rows that are not what the format says.

    Raises:
        InputError: it cannot be read.
    """
    if spec.format == "delta":
        asked = _version_asked_for(spec, where) if version is None else version
        table_df, version = open_table(spark, spec.path, asked)
        return [_source(table_df, needed)], version, []
    try:
        if spec.format == "table":
            return [_source(spark.read.options(**spec.options).table(spec.path), needed)], None, []
        if spec.format == "parquet":
            return _parquet_sources(spark, spec, needed), None, []
        if spec.format in ("csv", "json"):
            read = _csv_source if spec.format == "csv" else _json_source
            source, problems = read(spark, spec, needed)
            return [source], None, problems
        options = {"mergeSchema": "true", **spec.options} if spec.format == "orc" else spec.options
        reader = spark.read.format(spec.format).options(**path_options(spark, spec.path), **options)
        return [_source(reader.load(spec.path), needed)], None, []
    except (PySparkException, Py4JJavaError) as error:
        why = reason(error)
        way_out = _QUOTE_IT if "CSV field" in why else "Are the path and the format right, and its files complete?"
        raise InputError(f"{where}: cannot be read: {why}. {way_out}") from error


def located(spark: SparkSession, spec: InputSpec, where: str) -> InputSpec:
    """An input with a Delta table's folder in place of its name in Spark's catalog; any other input as it is.

    By its folder, a night reads the version that it has planned with, and later jobs find what the night has read.

    Args:
        spark: the session, with the catalogs that it was started with.
        spec: where the input is.
        where: what messages begin with.

    Raises:
        InputError: the catalog has no such table.
    """
    if spec.format != "table":
        return spec
    try:
        rows = spark.sql(f"DESCRIBE TABLE EXTENDED IDENTIFIER({sql_literal(spec.path)})").collect()
    except (PySparkException, Py4JJavaError) as error:
        raise InputError(
            f"{where}: cannot be found: {reason(error)}. Expected the name of a table or view in Spark's catalog "
            f"{spark.catalog.currentCatalog()!r} (database {spark.catalog.currentDatabase()!r}), or one with its "
            "catalog in front, such as main.shop.products. Catalogs are named when Spark is started "
            "(spark.sql.catalog.NAME, spark.sql.catalogImplementation=hive)."
        ) from error
    details = {row["col_name"]: row["data_type"] for row in rows[_num_columns(rows) :]}
    if details.get("Provider", "").lower() != "delta":
        return spec
    return spec.model_copy(update={"path": details["Location"], "format": "delta"})


def _num_columns(rows: Sequence[Row]) -> int:
    """Rows of DESCRIBE before the blank one that ends the columns: a column may be called Provider too."""
    return next((number for number, row in enumerate(rows) if not row["col_name"]), len(rows))


def _version_asked_for(spec: InputSpec, where: str) -> int | None:
    """The version of a Delta table that the options name; None: the newest.

    Raises:
        InputError: other options, which would have no effect, or no version.
    """
    given = {name.lower(): value for name, value in spec.options.items()}
    version = given.pop("versionasof", None)
    if given or not (version is None or re.fullmatch("[0-9]{1,18}", version)):
        raise InputError(
            f"{where}: expected no option of a Delta table but versionAsOf, a whole number; got options "
            f"{spec.options}. Name the version, or leave them out: the newest is read."
        )
    return None if version is None else int(version)


def reason(error: Exception) -> str:
    """What an error of Spark says, in one line: its own first line, and that of its first cause."""
    java = error.java_exception if isinstance(error, Py4JJavaError) else getattr(error, "_origin", None)
    lines = [] if isinstance(error, Py4JJavaError) else [_first_line(error)]
    in_csv = None
    while java is not None:
        if message := java.getMessage():
            lines.append(_first_line(message))
            in_csv = re.search(r"\bline=(\d+), column=", message) or in_csv
        java = java.getCause()
    shown = list(dict.fromkeys(line for line in (lines[0], lines[-1]) if line)) if lines else [_first_line(error)]
    return ": ".join(shown) + (f" (line {int(in_csv[1]) + 1})" if in_csv else "")


def _first_line(text: object) -> str:
    return (str(text).strip().splitlines() or [""])[0].rstrip(". ")


def _source(df: DataFrame, needed: Sequence[str]) -> Source:
    columns = {field.name: found_in_spark(field.dataType) for field in df.schema if field.name in needed}
    return Source(df, df.columns, columns)


def _folders(spark: SparkSession, spec: InputSpec) -> tuple[list[str], list[str]]:
    """Columns that name folders (market=kr), whose values stay text, and the files; nothing of them is read."""
    listed_df = _reader(spark, spec).format(spec.format).schema(f"{_BAD} string").load(spec.path)
    return listed_df.columns[1:], listed_df.inputFiles()


def _reader(spark: SparkSession, spec: InputSpec, **defaults: str) -> DataFrameReader:
    return spark.read.options(**defaults, **path_options(spark, spec.path)).options(**spec.options)


def _text_fields(names: Sequence[str]) -> list[StructField]:
    return [StructField(name, StringType()) for name in names]


def _parquet_sources(spark: SparkSession, spec: InputSpec, needed: Sequence[str]) -> list[Source]:
    """Files by the types of the columns that are needed, from their footers: Spark reads no other column's type."""
    folders, files = _folders(spark, spec)
    is_binary_text = {key.lower(): value for key, value in spec.options.items()}.get("binaryasstring") == "true"
    footers = _parquet_footers(spark, files)
    names = [
        name for name in dict.fromkeys(name for footer in footers.values() for name in footer) if name not in folders
    ]
    layouts: dict[tuple[tuple[str, Found, DataType | None], ...], list[str]] = {}
    for file, footer in footers.items():
        wanted = ((name, *footer[name]) for name in names if name in needed and name in footer)
        if is_binary_text:
            wanted = ((name, *_as_text(found, type_)) for name, found, type_ in wanted)
        layouts.setdefault(tuple(wanted), []).append(file)
    sources = []
    for layout, chosen in layouts.items():
        columns = {name: found for name, found, _ in layout} | {name: TEXT for name in folders if name in needed}
        fields = [StructField(name, type_) for name, _, type_ in layout if type_ is not None]
        schema = StructType([*fields, *_text_fields([name for name in folders if name in needed])])
        reader = _reader(spark, spec).schema(schema)
        if len(layouts) == 1:
            df = reader.parquet(spec.path)
        else:
            reader = reader.options(basePath=_base_path(spark, spec), **AS_IT_IS)
            df = reader.parquet(*map(unquote, chosen))
        sources.append(Source(df, [*names, *folders], columns))
    return sources or [Source(spark.createDataFrame([], StructType([])), folders, {})]


def _base_path(spark: SparkSession, spec: InputSpec) -> str:
    """The folder below which names of folders are columns: the path up to its first pattern."""
    if "basePath" in spec.options:
        return spec.options["basePath"]
    if path_options(spark, spec.path):
        return spec.path
    parts = spec.path.split("/")
    fixed = next((place for place, part in enumerate(parts) if not PATTERN_CHARACTERS.isdisjoint(part)), len(parts))
    return "/".join(parts[:fixed])


def _as_text(found: Found, type_: DataType | None) -> tuple[Found, DataType | None]:
    """Bytes that nothing marks as text, as text."""
    if isinstance(type_, BinaryType):
        return TEXT, StringType()
    if isinstance(type_, MapType):
        key, value = (
            StringType() if isinstance(part, BinaryType) else part for part in (type_.keyType, type_.valueType)
        )
        return found_in_spark(MapType(key, value)), MapType(key, value)
    return found, type_


def _parquet_footers(spark: SparkSession, files: Sequence[str]) -> dict[str, dict[str, tuple[Found, DataType | None]]]:
    """Each file's columns with their types; no type of Spark for those that it cannot read."""
    known: dict[str, dict[str, tuple[Found, DataType | None]]] = {}
    footers = {}
    for file, schema in parquet_schemas(spark, files).items():
        text = schema.toString()
        if text not in known:
            known[text] = _parquet_columns(spark, schema)
        footers[file] = known[text]
    return footers


def _parquet_columns(spark: SparkSession, schema: Any) -> dict[str, tuple[Found, DataType | None]]:
    jvm = spark.sparkContext._jvm
    assert jvm is not None
    parquet = jvm.org.apache.spark.sql.execution.datasources.parquet
    converter = parquet.ParquetToSparkSchemaConverter(spark._jsparkSession.sessionState().conf())
    columns: dict[str, tuple[Found, DataType | None]] = {}
    for place in range(schema.getFieldCount()):
        field = schema.getType(place)
        alone = jvm.java.util.ArrayList()
        alone.add(field)
        annotation = str(field.getLogicalTypeAnnotation() or "")
        try:
            converted = converter.convert(jvm.org.apache.parquet.schema.MessageType("column", alone))
        except PySparkException:
            kind = Kind.UUID if annotation == "UUID" else Kind.TIME if "TIME" in annotation else Kind.OTHER
            name = str(field.toString()).partition(f" {field.getName()}")[0].partition(" ")[2]
            columns[field.getName()] = Found(kind, annotation or name), None
            continue
        type_ = StructType.fromJson(json.loads(converted.json()))[0].dataType
        is_nothing = annotation == "UNKNOWN"  # as Arrow writes a column without any value
        found = Found(Kind.NOTHING, "null") if is_nothing else found_in_spark(type_)
        columns[field.getName()] = found, None if is_nothing else type_
    return columns


def _csv_source(spark: SparkSession, spec: InputSpec, needed: Sequence[str]) -> tuple[Source, list[str]]:
    """CSV as RFC 4180 has it, all of it text: line breaks may stand in quotes, and quotes in quotes are doubled."""
    given = {key.lower(): value for key, value in spec.options.items()}
    quote = given.get("quote", '"')
    defaults = {"multiLine": str(bool(quote)).lower(), "quote": quote, "escape": quote}
    defaults["unescapedQuoteHandling"] = "RAISE_ERROR"  # else a stray quote takes rows into a field
    folders, files = _folders(spark, spec)
    # Spark takes paths for patterns once more, and splits them at commas, where a header may have line breaks.
    is_odd = any(not (PATTERN_CHARACTERS | {","}).isdisjoint(unquote(file)) for file in files)
    header = _reader(spark, spec, **defaults).options(inferSchema="false", **({"multiLine": "false"} if is_odd else {}))
    names = [name for name in header.csv(spec.path).columns if name not in folders]
    fields = [*_text_fields([*names, _BAD]), *_text_fields([name for name in folders if name in needed])]
    reader = _reader(spark, spec, **defaults).options(columnNameOfCorruptRecord=_BAD, enforceSchema="false")
    df = reader.schema(StructType(fields)).csv(spec.path)
    problems = _problems_of_csv(df, names, quote) if names else []
    columns = {name: TEXT for name in (*names, *folders) if name in needed}
    return Source(df, [*names, *folders], columns), problems


def _problems_of_csv(df: DataFrame, names: Sequence[str], quote: str) -> list[str]:
    ends_in_lines = F.coalesce(_column(names[-1]).contains("\n"), F.lit(False))
    records_df = df.select(
        F.col(_BAD).alias("bad"),
        F.input_file_name().alias("file"),
        _column(names[0]).alias("first"),
        ends_in_lines.alias("ends_in_lines"),
        F.monotonically_increasing_id().alias("place"),
    )
    files_df = records_df.groupBy("file").agg(
        F.max("place").alias("last"), F.max(F.when(F.col("ends_in_lines"), F.col("place"))).alias("last_in_lines")
    )
    what = f"rows have another number of fields than the header, which has {len(names)}"
    problems = _problems_of_records(records_df, what, _QUOTE_IT)
    doubtful = [row["file"] for row in files_df.where("last = last_in_lines").collect()]
    open_ended = [file for file in doubtful if not _ends_with(df.sparkSession, file, quote)]
    return problems + [
        f"the last quote of {file} is never closed, so that one field holds the rest of the file. {_QUOTE_IT}"
        for file in open_ended
    ]


def _ends_with(spark: SparkSession, file: str, mark: str) -> bool:
    """Whether a mark is the last character of a file of text, but for white space."""
    lines_df = spark.read.options(**AS_IT_IS).text(unquote(file)).where("trim(value) <> ''")
    last = lines_df.select("value").withColumn("place", F.monotonically_increasing_id()).orderBy(F.desc("place")).head()
    return last is None or last["value"].rstrip().endswith(mark)


def _json_source(spark: SparkSession, spec: InputSpec, needed: Sequence[str]) -> tuple[Source, list[str]]:
    """JSON, whose values keep the type that JSON gives them: the columns are the names in all records.

    It is read as text, which is parsed here: Spark's reader leaves out what follows the first object of a line.
    """
    folders, _ = _folders(spark, spec)
    folders_needed = [name for name in folders if name in needed]
    is_whole = {key.lower(): value.lower() for key, value in spec.options.items()}.get("multiline") == "true"
    reader = _reader(spark, spec).schema(StructType(_text_fields(["value", *folders_needed])))
    texts_df = reader.text(spec.path, wholetext=is_whole)
    text = F.make_valid_utf8("value")
    texts_df = texts_df.select(text.alias(_TEXT), F.input_file_name().alias(_FILE), *map(_column, folders_needed))
    texts_df = texts_df.where(F.col(_TEXT).rlike(r"\S"))
    record = F.try_parse_json(_TEXT)
    if is_whole:  # a file may be an array of records
        items = F.coalesce(F.from_json(_TEXT, "array<variant>"), F.array(F.lit(None).cast("variant")))
        record = F.explode(F.when(F.ltrim(_TEXT).startswith("["), items).otherwise(F.array(record)))
    records_df = texts_df.withColumn(_RECORD, record)
    names_in = F.map_keys(F.try_variant_get(_RECORD, "$", "map<string,variant>"))
    is_one = F.coalesce(F.json_array_length(F.concat(F.lit("["), _TEXT, F.lit("]"))) == 1, F.lit(False))
    shown = F.coalesce(F.when(is_one & F.lit(is_whole), F.to_json(_RECORD)), F.col(_TEXT))
    bad = F.when(~is_one | names_in.isNull(), F.left(shown, F.lit(_MOST_EXAMPLE)))
    kinds_df = records_df.select(names_in.alias("first"), bad.alias("bad"), F.col(_FILE).alias("file"))
    found = kinds_df.groupBy("first").agg(F.lit(1)).select(F.explode("first").alias("name")).distinct().collect()
    names = sorted(row["name"] for row in found if row["name"] not in folders)
    way_out = (
        "A file is one object, or one array of them"
        if is_whole
        else "Write one object a line, each name once. One array, or an object over several lines, needs options: "
        "{multiLine: 'true'}"
    )
    problems = _problems_of_records(kinds_df, "records are no JSON objects", f"{way_out}.")
    fields = [_json_field(name).alias(name) for name in names if name in needed]
    columns = {name: JSON for name in names if name in needed} | dict.fromkeys(folders_needed, TEXT)
    df = records_df.select(*fields, *map(_column, folders_needed))
    return Source(df, [*names, *folders], columns), problems


def _json_field(name: str) -> Column:
    """A field of a record."""
    if '"' in name:
        return F.element_at(F.try_variant_get(_RECORD, "$", "map<string,variant>"), name)
    return F.try_variant_get(_RECORD, f'$["{name}"]', "variant")


def _problems_of_records(records_df: DataFrame, what: str, way_out: str) -> list[str]:
    """Records that are not what the format says.

    Args:
        records_df: bad, their text, null for others; file; first, some value of all records, which Spark wants.
        what: what they are.
        way_out: what to do.
    """
    example = F.struct("file", F.left("bad", F.lit(_MOST_EXAMPLE)).alias("text"))
    row = records_df.agg(
        F.count("bad").alias("num_bad"),
        F.min(F.when(F.col("bad").isNotNull(), example)).alias("example"),
        F.count("first"),
    ).head()
    assert row is not None
    if not row["num_bad"]:
        return []
    file, text = row["example"]
    place = _place(records_df.sparkSession, file, text)
    return [problem_of_records(what, row["num_bad"], text, place, way_out)]


def _place(spark: SparkSession, file: str, text: str) -> str | None:
    """File and line of a record of text; None where it is not found."""
    first = text.splitlines()[0] if text else ""
    try:
        lines = spark.read.options(**AS_IT_IS).text(unquote(file)).rdd.zipWithIndex()
        found = lines.filter(lambda line: line[0]["value"][:_MOST_EXAMPLE] == first).take(1)
    except (PySparkException, Py4JJavaError):
        return None
    return f"{file}, line {found[0][1] + 1}" if found else None


def _column(name: str) -> Column:
    return F.col(f"`{name.replace('`', '``')}`")
