"""Compare two tables of scores on the same pairs, query by query: two bundles or two nights, before a switch."""

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime

from csrm.cli import job_parser, job_settings
from csrm.config import make_folder
from csrm.extras import import_eval
from csrm.operations.comparison import ComparisonConfig, compare_scores
from csrm.operations.comparison_page import comparison_html, comparison_text
from csrm.spark.session import build_session


def build_parser() -> argparse.ArgumentParser:
    return job_parser(__doc__, "conf/compare.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = job_settings(args, ComparisonConfig)
    for module in ("jinja2", "matplotlib"):
        import_eval(module)  # before the work, not after it
    output = make_folder(config.output)
    comparison = compare_scores(build_session("csrm-compare"), config)
    page = output / "comparison.html"
    page.write_text(comparison_html(comparison, config.markets, datetime.now(UTC)), encoding="utf-8")
    comparison.queries.to_parquet(output / "queries.parquet", index=False)
    print(comparison_text(comparison))
    print(f"written: {page}, {output / 'queries.parquet'}")
    return 0
