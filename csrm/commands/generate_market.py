"""Makes the input tables of invented markets as Parquet files, among them parallel text where languages differ.

Relevance is known by construction. The words come from a built-in lexicon, or from a folder of a product taxonomy.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from csrm.cli import job_parser, job_settings
from csrm.config import LocalPath, Markets, Settings
from csrm.market.files import write_tables
from csrm.market.generator import Market, generate_market
from csrm.market.lexicon import builtin_lexicon
from csrm.market.parallel import parallel_text
from csrm.market.taxonomy import read_taxonomy_lexicon
from csrm.schemas import BEHAVIOUR, CANDIDATES, CATALOG, JUDGMENTS, PARALLEL_TEXT, QUERIES


class MarketConfig(Settings):
    """Settings of this job."""

    seed: int = Field(default=7, ge=0)
    """The same seed and settings give the same tables."""
    markets: Markets
    """Market to its language: en, ko or zh-TW; with a taxonomy also ja or es."""
    listed: dict[str, str] = Field(default_factory=dict)
    """Market to the language of the products that are listed there from abroad, untranslated."""
    products_per_market: int = Field(default=1200, ge=1)
    """Products of each market."""
    queries_per_market: int = Field(default=100, ge=1)
    """Queries of each market, all different."""
    label_noise: float = Field(default=0.0, ge=0, le=1)
    """Probability that a judged grade is replaced by another one, in all splits; true_grade beside it stays right."""
    taxonomy: str | None = None
    """Folder with categories, values, attributes and category_attributes (.tsv.gz); null: the built-in lexicon."""
    output: LocalPath
    """Local folder for the Parquet files; existing ones are replaced."""


def main(argv: Sequence[str] | None = None) -> int:
    args = job_parser(__doc__, "conf/generate_market.yaml").parse_args(argv)
    config = job_settings(args, MarketConfig)
    lexicons = {
        language: builtin_lexicon(language)
        if config.taxonomy is None
        else read_taxonomy_lexicon(config.taxonomy, language)
        for language in dict.fromkeys([*config.markets.values(), *config.listed.values()])
    }
    market = generate_market(
        config.seed,
        config.markets,
        num_products=config.products_per_market,
        num_queries=config.queries_per_market,
        label_noise=config.label_noise,
        lexicons=lexicons,
        listed=config.listed,
    )
    tables = {
        CATALOG: market.catalog,
        QUERIES: market.queries,
        BEHAVIOUR: market.behaviour,
        CANDIDATES: market.candidates,
        JUDGMENTS: market.judgments,
    }
    if len(lexicons) > 1:
        tables[PARALLEL_TEXT] = parallel_text(config.seed, list(lexicons.values()))
    write_tables(tables, Path(config.output))
    for name in config.markets:
        print(_summary(market, name))
    print(f"wrote {', '.join(table.name for table in tables)} to {config.output}")
    return 0


def _summary(market: Market, name: str) -> str:
    catalog, queries, behaviour, judgments = (
        frame[frame["market"] == name] for frame in (market.catalog, market.queries, market.behaviour, market.judgments)
    )
    grades = ", ".join(f"{grade} {count:,}" for grade, count in judgments["grade"].value_counts().items())
    return (
        f"{name}: {len(catalog):,} products, {len(queries):,} queries, {len(behaviour):,} clicked pairs, "
        f"{len(judgments):,} judged pairs ({grades})\n"
        f"  product: {catalog['title'].dropna().iloc[0] if catalog['title'].notna().any() else None}\n"
        f"  query:   {queries['query'].iloc[0]}"
    )
