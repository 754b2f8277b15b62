"""Measure the published relevance scores against human grades, beside BM25 and a random order."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from pyspark.sql import functions as F

import csrm
from csrm.cli import job_parser
from csrm.config import load_config
from csrm.errors import InputError
from csrm.evaluation.metrics import evaluate_scores
from csrm.evaluation.report import BM25, SCORE, format_evaluation, plot_evaluation, write_metrics
from csrm.extras import import_eval
from csrm.operations.evaluation import EvaluationConfig, collect_judged, read_all, unknown_ids
from csrm.spark.session import build_session


def build_parser() -> argparse.ArgumentParser:
    return job_parser(__doc__ or "", "conf/evaluate.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = load_config(args.config, EvaluationConfig, args.overrides)
    for module in ("ir_measures", "sklearn", "matplotlib"):
        import_eval(module)  # before the work, not after it
    inputs = read_all(build_session("csrm-evaluate"), config)
    judgments_df = inputs["judgments"].df
    if config.splits:
        judgments_df = judgments_df.where(F.col("split").isin(*config.splits))
    judged = collect_judged(
        judgments_df,
        inputs["relevance_scores"].df,
        inputs["catalog"].df,
        inputs["queries"].df,
        config.baseline_bm25,
    )
    if judged.empty:
        raise InputError(
            f"input judgments at {config.inputs.judgments.path!r}: expected rows of markets {sorted(config.markets)} "
            f"and splits {list(config.splits) or 'any'}, got none. Are 'markets' and 'splits' right?"
        )
    evaluation = evaluate_scores(
        judged,
        [SCORE, BM25] if config.baseline_bm25 else [SCORE],
        config.gains,
        config.relevant_grades,
        config.irrelevant_grades,
        config.num_resamples,
        config.seed,
    )
    evaluation = replace(evaluation, notes=(*unknown_ids(judged), *evaluation.notes))
    packages = ("ir-measures", "scikit-learn", "numpy", "pandas", "pyspark")
    provenance = {
        "inputs": {name: {"path": table.path, "version": table.version} for name, table in inputs.items()},
        "bundle_digests": sorted(judged["bundle_digest"].dropna().unique()),
        "versions": {"csrm": csrm.__version__, **{package: version(package) for package in packages}},
        "config": config.model_dump(mode="json"),
    }
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    write_metrics(evaluation, provenance, output / "metrics.json")
    plot_evaluation(evaluation, judged, list(config.gains), output / "metrics.png")
    print(format_evaluation(evaluation))
    print(f"\nwritten: {output / 'metrics.json'}, {output / 'metrics.png'}")
    return 0
