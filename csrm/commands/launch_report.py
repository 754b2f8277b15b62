"""Write the page about a market that is to be opened: which queries find no good product, which products no query.

Nothing of the market need be judged: the page shows what the published scores say.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Self
from urllib.parse import quote

from pydantic import Field, model_validator

from csrm.cli import job_parser, job_settings
from csrm.config import InputSpec, LocalPath, MarketName, Markets, Settings, TablesSettings, make_folder
from csrm.extras import import_eval
from csrm.operations.launch import LaunchLimits, find_launch, open_market, require_scores
from csrm.operations.launch_report import launch_report_html, launch_summary
from csrm.operations.live_queries import LiveQueries, live_queries
from csrm.schemas import BEHAVIOUR, CATALOG, PARALLEL_TEXT, QUERIES, QUERY_TRANSLATIONS
from csrm.spark.catalogs import located_tables
from csrm.spark.inputs import read_inputs, require_markets
from csrm.spark.session import build_session


class LaunchReportInputs(Settings):
    """Tables of the markets, and of the live ones whose queries stand for those that nobody has asked here yet."""

    catalog: InputSpec
    queries: InputSpec
    behaviour: InputSpec | None = None
    """Clicks or purchases: the frequency of queries that name none."""
    live_queries: InputSpec | None = None
    """Queries of live markets."""
    query_translations: InputSpec | None = None
    """These queries in the market's language; those that it lacks are put into it by parallel_text."""
    parallel_text: InputSpec | None = None
    """Translations of phrases, by which queries of live markets are put into the market's language."""


class LaunchReportConfig(TablesSettings):
    """Settings of the page."""

    markets: Markets
    """Market that is to be opened to its language; each has a page of its own."""
    live_markets: dict[MarketName, str] = Field(default_factory=dict)
    """Live market to its language."""
    inputs: LaunchReportInputs
    output: LocalPath
    """Local folder for the pages; the page of market M is launch-M.html."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Score from which a product is good for a query; the page's curve helps to choose it."""
    num_best: Annotated[int, Field(ge=1)] = 5
    """Good titles of a query, best first, of which one at least should be in its language."""
    num_examples: Annotated[int, Field(ge=1)] = 10
    """Queries, terms and products of each list; the table launch_findings has all."""

    @model_validator(mode="after")
    def _live_markets_have_queries(self) -> Self:
        inputs = self.inputs
        if both := sorted(set(self.markets) & set(self.live_markets)):
            raise ValueError(f"live_markets: {both} are in 'markets' too: a market is to be opened, or live")
        if (inputs.live_queries is None) != (not self.live_markets):
            raise ValueError("live_markets and inputs.live_queries go together: the markets, and their queries")
        languages = {language.lower() for language in [*self.markets.values(), *self.live_markets.values()]}
        is_untranslated = inputs.query_translations is None and inputs.parallel_text is None
        if inputs.live_queries is not None and is_untranslated and len(languages) > 1:
            raise ValueError(
                "inputs.live_queries: expected inputs.parallel_text or inputs.query_translations beside it, to put "
                "them into the market's language"
            )
        if inputs.query_translations is not None and len(self.markets) > 1:
            raise ValueError("inputs.query_translations: is in one language; give 'markets' one market")
        return self


def build_parser() -> argparse.ArgumentParser:
    return job_parser(__doc__, "conf/launch_report.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = job_settings(args, LaunchReportConfig)
    for module in ("jinja2", "matplotlib"):
        import_eval(module)  # before the work, not after it
    folder = make_folder(config.output)
    spark = build_session("csrm-launch-report")
    config = located_tables(spark, config)
    given = config.inputs
    specs = {CATALOG: given.catalog, QUERIES: given.queries}
    inputs = read_inputs(spark, specs | ({BEHAVIOUR: given.behaviour} if given.behaviour else {}), config.markets)
    live: dict[str, LiveQueries] = {}
    if given.live_queries is not None:
        specs = {replace(QUERIES, name="live_queries"): given.live_queries}
        specs |= {QUERY_TRANSLATIONS: given.query_translations} if given.query_translations else {}
        specs |= {PARALLEL_TEXT: given.parallel_text} if given.parallel_text else {}
        live_inputs = read_inputs(spark, specs, config.live_markets)
        live = {
            market: live_queries(live_inputs, config.live_markets, language)
            for market, language in config.markets.items()
        }
    opened = {market: open_market(spark, config.tables, market, config.markets, inputs) for market in config.markets}
    require_scores(opened, live, config.markets, config.tables)
    require_markets(inputs, config.markets)
    limits = LaunchLimits(config.threshold, config.num_best, config.num_examples)
    languages = config.live_markets | config.markets
    for market, market_inputs in opened.items():
        findings = find_launch(
            market, languages, market_inputs, live=live.get(market), limits=limits, tables=config.tables
        )
        page = folder / f"launch-{quote(market, safe=' ')}.html"
        page.write_text(launch_report_html(findings, datetime.now(UTC)), encoding="utf-8")
        print(launch_summary(findings))
        print(f"launch report of market {market}: {page}")
    return 0
