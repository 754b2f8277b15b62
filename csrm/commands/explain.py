"""Write the page about a query: its products with their scores, and why one of them has its score."""

import argparse
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from urllib.parse import quote

from csrm.bundle.loading import load_scorer
from csrm.cli import job_parser, job_settings
from csrm.config import make_folder
from csrm.extras import import_eval
from csrm.operations.explanation import ExplanationConfig, explain_query
from csrm.operations.explanation_page import explanation_html, explanation_text
from csrm.spark.catalogs import located_tables
from csrm.spark.session import build_session, require_names

_LONGEST_NAME = 120


def build_parser() -> argparse.ArgumentParser:
    parser = job_parser(__doc__, "conf/explain.yaml")
    parser.add_argument("--market", required=True, help="market of the query")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--query", help="text of the query; case, Unicode form and spacing do not matter")
    which.add_argument("--query-id", help="id of the query")
    parser.add_argument("--product", help="id of the product to explain; without it, the best one")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = job_settings(args, ExplanationConfig)
    import_eval("jinja2")  # before the work, not after it
    folder = make_folder(config.output)
    scorer = load_scorer(config.bundle, config.device, digest=config.bundle_digest)
    spark = build_session("csrm-explain")
    config = located_tables(spark, config)
    require_names(spark, [*config.markets, config.tables])
    explanation = explain_query(
        spark,
        config,
        scorer,
        market=args.market,
        query=args.query,
        query_id=args.query_id,
        product_id=args.product,
    )
    names = [args.market, explanation.query["query_id"], *([args.product] if args.product else [])]
    page = folder / f"{_file_name(names)}.html"
    page.write_text(explanation_html(explanation, datetime.now(UTC)), encoding="utf-8")
    print(explanation_text(explanation))
    print(f"page: {page}")
    return 0


def _file_name(names: Sequence[str]) -> str:
    """A name for a file: that of the query, cut where it is too long for one, and then unique by a digest."""
    name = ".".join(quote(part, safe=" ") for part in names)
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME]}.{hashlib.sha256(name.encode()).hexdigest()[:12]}"
