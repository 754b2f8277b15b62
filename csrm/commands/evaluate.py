"""Measure the published relevance scores against human grades, beside BM25 and a random order."""

import argparse
from collections.abc import Sequence

from csrm.cli import job_parser, job_settings
from csrm.config import make_folder
from csrm.evaluation.report import format_evaluation, plot_evaluation, write_metrics
from csrm.extras import import_eval
from csrm.operations.evaluation import EvaluationConfig, evaluate_published
from csrm.spark.session import build_session


def build_parser() -> argparse.ArgumentParser:
    return job_parser(__doc__, "conf/evaluate.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = job_settings(args, EvaluationConfig)
    for module in ("ir_measures", "sklearn", "matplotlib"):
        import_eval(module)  # before the work, not after it
    output = make_folder(config.output)
    measured = evaluate_published(build_session("csrm-evaluate"), config)
    write_metrics(measured.evaluation, measured.provenance, output / "metrics.json")
    plot_evaluation(measured.evaluation, measured.judged, list(config.gains), output / "metrics.png")
    print(format_evaluation(measured.evaluation))
    print(f"\nwritten: {output / 'metrics.json'}, {output / 'metrics.png'}")
    return 0
