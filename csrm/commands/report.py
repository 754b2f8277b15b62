"""Write the page about one scoring run: its verdict, the audit, what changed, rejected pairs, the last runs."""

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated
from urllib.parse import quote

from pydantic import Field

from csrm.cli import job_parser, job_settings
from csrm.config import InputSpec, LocalPath, Markets, Settings, TablesSettings, make_folder, require_file_place
from csrm.extras import import_eval
from csrm.operations.history import Limits, read_findings
from csrm.operations.report import night_report_html
from csrm.operations.run_metrics import write_run_metrics
from csrm.spark.catalogs import tables_folder
from csrm.spark.session import build_session


class ReportInputs(Settings):
    """Where texts are now; a page shows those that its run had read, as far as they can still be read."""

    catalog: InputSpec
    queries: InputSpec


class ReportConfig(TablesSettings):
    """Settings of the page."""

    markets: Markets
    """Market to the language of its texts, by which a browser draws them. All markets of a run are shown."""
    inputs: ReportInputs
    output: LocalPath
    """Local folder for the pages; the page of run R is R.html."""
    metrics_file: LocalPath | None = None
    """File that gets the run's row as metrics for Prometheus, such as csrm.prom in the folder of node_exporter's
    textfile collector; replaced as a whole. Without it, none is written."""
    num_runs: Annotated[int, Field(ge=1)] = 30
    """Runs in the history."""
    num_moved: Annotated[int, Field(ge=1)] = 10
    """Queries, and products, whose scores moved most."""
    num_samples: Annotated[int, Field(ge=1)] = 5
    """Rejected pairs of each reason."""


def build_parser() -> argparse.ArgumentParser:
    parser = job_parser(__doc__, "conf/report.yaml")
    parser.add_argument("--run-id", help="the run; without it, the run that started last")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = job_settings(args, ReportConfig)
    for module in ("jinja2", "matplotlib", *(["prometheus_client"] if config.metrics_file else [])):
        import_eval(module)  # before the work, not after it
    folder = make_folder(config.output)
    metrics_file = None if config.metrics_file is None else require_file_place(config.metrics_file, "metrics_file")
    limits = Limits(config.num_runs, config.num_moved, config.num_samples)
    inputs = config.inputs
    spark = build_session("csrm-report")
    tables = tables_folder(spark, config.tables)
    findings = read_findings(spark, tables, args.run_id, inputs.catalog, inputs.queries, config.markets, limits)
    page = folder / f"{quote(findings.runs[0]['run_id'], safe=' ')}.html"
    page.write_text(night_report_html(findings, datetime.now(UTC)), encoding="utf-8")
    if metrics_file is not None:
        is_taken_back = findings.runs[0]["run_id"] in findings.taken_back
        write_run_metrics(findings.runs, metrics_file, is_taken_back=is_taken_back)
    print(f"report of run {findings.runs[0]['run_id']}: {page}")
    return 0
