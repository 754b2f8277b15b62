"""Make markets of a product taxonomy, in which queries are broad categories and products are of narrow ones.

Writes catalog, queries, judgments and parallel_text as Parquet files. What is relevant follows from the tree; judged
pairs share no search term, so words alone do not tell it.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from pydantic import Field

from csrm.cli import job_parser, job_settings
from csrm.config import LocalPath, Markets, Settings
from csrm.market.categories import Storefront, category_markets
from csrm.market.files import write_tables
from csrm.schemas import CATALOG, JUDGMENTS, PARALLEL_TEXT, QUERIES


class TaxonomyConfig(Settings):
    """Settings of the import."""

    taxonomy: str
    """Folder with categories, values, attributes and category_attributes (.tsv.gz); each has a column split."""
    markets: Markets
    """Market to the language of its queries and products: en, ko, zh-TW, ja or es."""
    listed: dict[str, str] = Field(default_factory=dict)
    """Market to the language of products that are listed there from abroad, untranslated; they are judged too."""
    parallel_languages: tuple[str, ...] = ()
    """Languages of the parallel text; empty: those of the markets."""
    label_noise: float = Field(default=0.0, ge=0, le=1)
    """Probability that a grade of split train is the wrong one; true_grade beside it stays right."""
    seed: int = Field(default=0, ge=0)
    output: LocalPath
    """Local folder for the Parquet files; existing ones are replaced."""


def main(argv: Sequence[str] | None = None) -> int:
    args = job_parser(__doc__, "conf/import_taxonomy.yaml").parse_args(argv)
    config = job_settings(args, TaxonomyConfig)
    languages = config.parallel_languages or tuple(dict.fromkeys(config.markets.values()))
    made = category_markets(
        Path(config.taxonomy),
        [Storefront(market, language, config.listed.get(market)) for market, language in config.markets.items()],
        languages,
        config.label_noise,
        config.seed,
    )
    tables = {
        CATALOG: made.catalog,
        QUERIES: made.queries,
        JUDGMENTS: made.judgments,
        PARALLEL_TEXT: made.parallel_text,
    }
    write_tables(tables, Path(config.output))
    for market in config.markets:
        print(_summary(market, made.queries, made.judgments, made.catalog))
    print(f"{len(made.parallel_text):,} parallel texts in {', '.join(languages)}; wrote {config.output}")
    return 0


def _summary(market: str, queries: pd.DataFrame, judgments: pd.DataFrame, catalog: pd.DataFrame) -> str:
    of_market = judgments[judgments["market"] == market]
    counts = of_market.groupby("split").agg(queries=("query_id", "nunique"), pairs=("grade", "size"))
    splits = ", ".join(f"{split} {row.queries:,} queries {row.pairs:,} pairs" for split, row in counts.iterrows())
    shown = of_market[of_market["grade"] == "yes"].head(1)
    example = shown.merge(queries, on=["market", "query_id"]).merge(catalog, on=["market", "product_id"]).iloc[0]
    return f"{market}: {splits}\n  {example['query']}  |  {example['title']}: {example['grade']}"
