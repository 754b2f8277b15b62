"""Measure the published relevance scores against human grades, beside BM25, a random order and scores of your own."""

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime

from csrm.cli import job_parser, job_settings
from csrm.config import make_folder
from csrm.evaluation.report import format_calibration, format_evaluation, write_metrics
from csrm.extras import import_eval
from csrm.operations.evaluation import EvaluationConfig, evaluate_published
from csrm.operations.evaluation_page import evaluation_html
from csrm.spark.catalogs import located_tables
from csrm.spark.session import build_session


def build_parser() -> argparse.ArgumentParser:
    return job_parser(__doc__, "conf/evaluate.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = job_settings(args, EvaluationConfig)
    for module in ("ir_measures", "sklearn", "matplotlib", "jinja2"):
        import_eval(module)  # before the work, not after it
    output = make_folder(config.output)
    spark = build_session("csrm-evaluate")
    measured = evaluate_published(spark, located_tables(spark, config))
    page = output / "evaluation.html"
    page.write_text(evaluation_html(measured, config.markets, datetime.now(UTC)), encoding="utf-8")
    write_metrics(
        measured.evaluation, measured.curves, measured.thresholds, measured.provenance, output / "metrics.json"
    )
    measured.queries.to_parquet(output / "queries.parquet", index=False)
    print(format_evaluation(measured.evaluation))
    print(f"\n{format_calibration(measured.curves)}")
    print(f"\nwritten: {page}, {output / 'metrics.json'}, {output / 'queries.parquet'}")
    return 0
