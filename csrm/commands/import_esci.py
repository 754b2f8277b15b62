"""Import the ESCI files (products, and examples with labels) as catalog, queries, candidates and judgments tables."""

from collections.abc import Sequence
from typing import Any

from pydantic import model_validator
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from csrm.cli import job_parser, job_settings
from csrm.config import InputSpec, Markets, Settings, TablesDir
from csrm.errors import InputError
from csrm.schemas import CANDIDATES, CATALOG, JUDGMENTS, PAIR_KEY, QUERIES, Column, Table
from csrm.spark.catalogs import tables_folder
from csrm.spark.inputs import read_inputs
from csrm.spark.session import build_session
from csrm.spark.tables import overwrite_table, table_path

GRADE_OF_LABEL = {"Exact": "E", "Substitute": "S", "Complement": "C", "Irrelevant": "I"}


GRADE_OF_LABEL |= {grade: grade for grade in GRADE_OF_LABEL.values()}


class EsciFiles(Settings):
    """The two files; their paths start at `data`, and `columns` maps the public files' column names to other ones."""

    products: InputSpec
    """product_id, product_locale; optional product_title, product_brand, product_color, product_category."""
    examples: InputSpec
    """query_id, query, product_id, product_locale, esci_label; optional split, small_version."""


class ImportConfig(Settings):
    """Settings of the import."""

    data: str
    """Folder that holds the files."""
    inputs: EsciFiles
    markets: Markets
    """Market to language."""
    locales: dict[str, str]
    """Locale in the files to market; rows of other locales are left out."""
    default_locale: str | None = None
    """Locale of all rows, for files that have no locale column."""
    small_version_only: bool = False
    """Keep only examples of the small version (harder queries)."""
    splits: tuple[str, ...] = ()
    """Splits of the examples to keep; empty: all."""
    output: TablesDir
    """Folder for the four tables, any URI, or a schema as of `tables`."""

    @model_validator(mode="after")
    def _check_locales(self) -> "ImportConfig":
        if sorted(self.locales.values()) != sorted(set(self.markets) & set(self.locales.values())):
            raise ValueError("each locale needs a market of its own that 'markets' names")
        if self.default_locale is not None and self.default_locale not in self.locales:
            raise ValueError("default_locale is not among the keys of 'locales'")
        return self


def esci_products(has_locale: bool) -> Table:
    """What the product file must hold."""
    locale = (Column("product_locale", "string", "us, es or jp"),) if has_locale else ()
    return Table(
        name="esci_products",
        comment="The public product file",
        columns=(
            *locale,
            Column("product_id", "string", "Id, unique within its locale"),
            Column("product_title", "string", "Title", required=False),
            Column("product_brand", "string", "Brand", required=False),
            Column("product_color", "string", "Color", required=False),
            Column("product_category", "string", "Category, in files that were enriched with it", required=False),
        ),
        key=(*(column.name for column in locale), "product_id"),
    )


def esci_examples(has_locale: bool, needs_split: bool, needs_small_version: bool) -> Table:
    """What the example file must hold."""
    locale = (Column("product_locale", "string", "us, es or jp"),) if has_locale else ()
    return Table(
        name="esci_examples",
        comment="The public example file: judged pairs",
        columns=(
            *locale,
            Column("query_id", "string", "Query's id"),
            Column("query", "string", "Query's text"),
            Column("product_id", "string", "Judged product"),
            Column("esci_label", "string", "E, S, C, I or the word"),
            Column("split", "string", "train or test", required=needs_split),
            Column("small_version", "bigint", "1 where the small version has it", required=needs_small_version),
        ),
        key=(*(column.name for column in locale), "query_id", "product_id"),
    )


def read_files(config: ImportConfig) -> tuple[DataFrame, DataFrame]:
    """Products and the chosen examples, with their market; checked.

    Raises:
        InputError: the files have problems; all of them in one message where they can be seen together.
    """
    spark = build_session("csrm-import-esci")
    has_locale = config.default_locale is None
    tables = (
        esci_products(has_locale),
        esci_examples(has_locale, bool(config.splits), config.small_version_only),
    )
    specs = [
        spec.model_copy(update={"path": f"{config.data.rstrip('/')}/{spec.path}"})
        for spec in (config.inputs.products, config.inputs.examples)
    ]
    market_of_locale = F.create_map(*(F.lit(text) for pair in config.locales.items() for text in pair))
    locale = F.col("product_locale") if has_locale else F.lit(config.default_locale)
    inputs = read_inputs(spark, dict(zip(tables, specs, strict=True)))
    products_df, examples_df = (
        inputs[table.name].df.withColumn("market", market_of_locale[locale]).where("market IS NOT NULL")
        for table in tables
    )
    if config.splits:
        examples_df = examples_df.where(F.col("split").isin(*config.splits))
    if config.small_version_only:
        examples_df = examples_df.where("small_version = 1")
    for df, spec in zip((products_df, examples_df), specs, strict=True):
        if df.isEmpty():
            raise InputError(
                f"{spec.path!r}: expected rows of locales {sorted(config.locales)}, "
                f"splits {list(config.splits) or 'any'}, small_version_only {config.small_version_only}; got none. "
                "Are these settings right for the file?"
            )
    _check_examples(examples_df, products_df, specs[1].path, specs[0].path)
    return products_df, examples_df


def _check_examples(examples_df: DataFrame, products_df: DataFrame, path: str, products_path: str) -> None:
    problems = []
    unknown_df = examples_df.where(~F.col("esci_label").isin(*GRADE_OF_LABEL)).groupBy("esci_label").count()
    if unknown := {row["esci_label"]: row["count"] for row in unknown_df.orderBy("esci_label").limit(10).collect()}:
        problems.append(
            f"unknown labels (with their rows) {unknown}; expected {sorted(GRADE_OF_LABEL)}. "
            "Is the right column mapped to esci_label?"
        )
    texts_df = examples_df.groupBy("market", "query_id").agg(F.sort_array(F.collect_set("query")).alias("texts"))
    for num_rows, example in _count_and_example(texts_df.where(F.size("texts") > 1), ["market", "query_id"]):
        problems.append(
            f"{num_rows} query ids have more than one text, for example {example['market']} {example['query_id']}: "
            f"{example['texts'][:2]}; expected one. Make the ids unique"
        )
    orphans_df = examples_df.join(products_df, ["market", "product_id"], "left_anti")
    for num_rows, example in _count_and_example(orphans_df, list(PAIR_KEY)):
        problems.append(
            f"{num_rows} judged pairs have no product in {products_path!r}, for example market {example['market']}, "
            f"query {example['query_id']}, product {example['product_id']}; expected every product there. "
            "Are both files complete and of one release?"
        )
    if problems:
        raise InputError(
            f"input esci_examples at {path!r}: {len(problems)} problem{'s' * (len(problems) > 1)}:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )


def _count_and_example(problem_df: DataFrame, order: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """Number of rows and the first of them; empty where there are none."""
    num_rows = problem_df.count()
    return [(num_rows, row.asDict()) for row in problem_df.orderBy(*order).limit(1).collect()]


def build_tables(
    products_df: DataFrame, examples_df: DataFrame, markets: dict[str, str]
) -> list[tuple[Table, DataFrame]]:
    """The four tables with their rows."""
    language = F.create_map(*(F.lit(text) for pair in markets.items() for text in pair))[F.col("market")]
    color = F.trim("product_color")
    catalog_df = products_df.select(
        "market",
        "product_id",
        F.col("product_title").alias("title"),
        F.col("product_brand").alias("brand"),
        F.col("product_category").alias("category"),
        F.when(color != "", F.create_map(F.lit("color"), color)).alias("attributes"),
        language.alias("language"),
    )
    queries_df = examples_df.select(
        "market", "query_id", "query", F.lit(None).cast("bigint").alias("frequency"), language.alias("language")
    ).distinct()
    grade = F.create_map(*(F.lit(text) for pair in GRADE_OF_LABEL.items() for text in pair))[F.col("esci_label")]
    return [
        (CATALOG, catalog_df),
        (QUERIES, queries_df),
        (CANDIDATES, examples_df.select(*PAIR_KEY, F.lit("given").alias("source"))),
        (
            JUDGMENTS,
            examples_df.select(
                *(*PAIR_KEY, grade.alias("grade"), "split"),
                F.lit(None).cast("string").alias("true_grade"),
            ),
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    args = job_parser(__doc__, "conf/import_esci.yaml").parse_args(argv)
    config = job_settings(args, ImportConfig)
    products_df, examples_df = read_files(config)
    tables = tables_folder(products_df.sparkSession, config.output)
    for table, df in build_tables(products_df, examples_df, config.markets):
        path = table_path(tables, table)
        version = overwrite_table(df, table, path)
        rows = df.sparkSession.read.format("delta").load(path).groupBy("market").count().orderBy("market").collect()
        by_market = ", ".join(f"{row['market']} {row['count']:,}" for row in rows)
        print(f"{table.name}: {by_market} rows -> {path} (version {version})")
    return 0
