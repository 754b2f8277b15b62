"""Measure the published relevance scores against human grades, beside BM25 and a random order."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import Field
from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

import csrm
from csrm.cli import job_parser, run_job
from csrm.config import InputSpec, Settings, load_config
from csrm.errors import InputError
from csrm.metrics import Evaluation, evaluate_scores, format_evaluation, import_eval
from csrm.schemas import CATALOG, JUDGMENTS, QUERIES, RELEVANCE_SCORES
from csrm.spark.inputs import Input, read_inputs
from csrm.spark.lexical import bm25_scores, product_terms, query_terms
from csrm.spark.session import build_session
from csrm.spark.tables import open_table, read_table, table_path

SCORE = "relevance_score"
BM25 = "bm25"
_COLORS = ("#1f5fa8", "#d9822b", "#8a8a8a")


class EvaluationInputs(Settings):
    """The judgments, and the tables that their ids name."""

    judgments: InputSpec
    catalog: InputSpec
    queries: InputSpec


class EvaluationConfig(Settings):
    """Settings of the evaluation."""

    markets: dict[str, str] = Field(min_length=1)
    """Market to language; other markets' judgments are not looked at."""
    inputs: EvaluationInputs
    tables: str
    """Folder with the published relevance_scores table."""
    output: str
    """Local folder for metrics.json and metrics.png."""
    splits: tuple[str, ...] = ()
    """Splits of the judgments to measure on; empty: all."""
    gains: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    """Grade to gain in nDCG."""
    relevant_grades: tuple[str, ...]
    """Grades that count as relevant for MRR, ROC-AUC and average precision."""
    irrelevant_grades: tuple[str, ...]
    """Grades that count as defects."""
    baseline_bm25: bool = True
    """Measure BM25 (over each market's whole catalog) on the same pairs."""
    num_resamples: Annotated[int, Field(ge=100)] = 1000
    """Bootstrap resamples for the intervals."""
    seed: int = 0
    """Of the resamples, the random order and the order of ties."""


def collect_judged(
    judgments_df: DataFrame, scores_df: DataFrame, catalog_df: DataFrame, queries_df: DataFrame, baseline_bm25: bool
) -> pd.DataFrame:
    """The judged pairs with their scores; only they come to the driver.

    Returns:
        market, query_id, product_id, grade, relevance_score (NaN where the pair has none), bundle_digest, has_product
        and has_query (whether the id is known); with baseline_bm25 also bm25, 0 for pairs that share no term.
    """
    key = ["market", "query_id", "product_id"]
    products_df = catalog_df.select("market", "product_id", F.lit(True).alias("has_product"))
    known_queries_df = queries_df.select("market", "query_id", F.lit(True).alias("has_query"))
    judged_df = (
        judgments_df.select(*key, "grade")
        .join(scores_df.select(*key, SCORE, "bundle_digest"), key, "left")
        .join(products_df, ["market", "product_id"], "left")
        .join(known_queries_df, ["market", "query_id"], "left")
        .withColumns({name: F.coalesce(name, F.lit(False)) for name in ("has_product", "has_query")})
    )
    if not baseline_bm25:
        return judged_df.toPandas()
    judged_queries_df = queries_df.join(judgments_df.select("market", "query_id").distinct(), ["market", "query_id"])
    products_terms_df = product_terms(catalog_df).persist(StorageLevel.MEMORY_AND_DISK)
    queries_terms_df = query_terms(judged_queries_df).persist(StorageLevel.MEMORY_AND_DISK)
    try:
        return (
            judged_df.join(bm25_scores(products_terms_df, queries_terms_df), key, "left").fillna({BM25: 0.0}).toPandas()
        )
    finally:
        products_terms_df.unpersist()
        queries_terms_df.unpersist()


def unknown_ids(judged: pd.DataFrame) -> list[str]:
    """Judged pairs whose product or query the tables do not have, one sentence for each kind and market."""
    notes = []
    for flag, column, table in (("has_product", "product_id", "catalog"), ("has_query", "query_id", "queries")):
        for market, rows in judged[~judged[flag]].groupby("market"):
            examples = ", ".join(sorted(rows[column].unique())[:3])
            notes.append(
                f"{market}: {len(rows):,} judged pairs name a {column} that {table} does not have, such as {examples}."
            )
    return notes


def plot_evaluation(evaluation: Evaluation, judged: pd.DataFrame, grades: Sequence[str], path: Path) -> None:
    """nDCG@10 of each market and ranking with its interval, and the scores of each grade's pairs."""
    import_eval("matplotlib").use("Agg")
    pyplot = import_eval("matplotlib.pyplot")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")

    ndcg = evaluation.metrics[evaluation.metrics["metric"] == "nDCG@10"]
    markets = list(ndcg["market"].unique())
    rankings = list(ndcg["ranking"].unique())
    for index, ranking in enumerate(rankings):
        rows = ndcg[ndcg["ranking"] == ranking].set_index("market").loc[markets]
        values, lows, highs = (rows[name].to_numpy() for name in ("value", "low", "high"))
        places = [place + (index - (len(rankings) - 1) / 2) * 0.16 for place in range(len(markets))]
        errors = [(values - lows).clip(0), (highs - values).clip(0)]
        color = _COLORS[0] if ranking == SCORE else _COLORS[-1] if index == len(rankings) - 1 else _COLORS[1]
        left.errorbar(places, values, yerr=errors, fmt="o", ms=6, capsize=3, color=color, label=ranking)
    left.set_xticks(range(len(markets)), markets)
    left.set_xlim(-0.6, len(markets) - 0.4)
    left.set_ylim(0, 1.02)
    left.set_title("nDCG@10 over judged pairs, 95% bootstrap interval", fontsize=10, loc="left")
    left.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(rankings), fontsize=9)

    scored = judged.dropna(subset=[SCORE])
    by_grade = {grade: scored.loc[scored["grade"] == grade, SCORE] for grade in grades}
    by_grade = {grade: values for grade, values in by_grade.items() if len(values)}
    right.boxplot(
        list(by_grade.values()),
        whis=(5, 95),
        showfliers=False,
        widths=0.5,
        patch_artist=True,
        boxprops={"facecolor": "#c9dcf2", "edgecolor": _COLORS[0]},
        medianprops={"color": _COLORS[0], "linewidth": 2},
        whiskerprops={"color": _COLORS[0]},
        capprops={"color": _COLORS[0]},
    )
    labels = [f"{grade}\n{len(values):,} pairs" for grade, values in by_grade.items()]
    right.set_xticks(range(1, len(labels) + 1), labels)
    right.set_ylim(-0.02, 1.02)
    right.set_title(f"{SCORE} by judged grade (box 25-75%, whiskers 5-95%)", fontsize=10, loc="left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e4e4")
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write_metrics(evaluation: Evaluation, provenance: dict[str, Any], path: Path) -> None:
    """The result and where it comes from, as JSON; what is undefined is null."""
    content = {
        "metrics": json.loads(evaluation.metrics.to_json(orient="records", double_precision=15)),
        "counts": json.loads(evaluation.counts.to_json(orient="records")),
        "notes": list(evaluation.notes),
        **provenance,
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_all(spark: SparkSession, config: EvaluationConfig) -> dict[str, Input]:
    """The checked input tables and the published scores, each at one version."""
    specs = {
        JUDGMENTS: config.inputs.judgments,
        CATALOG: config.inputs.catalog,
        QUERIES: config.inputs.queries,
    }
    inputs = read_inputs(spark, specs, config.markets)
    path = table_path(config.tables, RELEVANCE_SCORES)
    _, scores_version = open_table(spark, path)
    inputs["relevance_scores"] = Input(read_table(spark, RELEVANCE_SCORES, path, scores_version), path, scores_version)
    return inputs


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


if __name__ == "__main__":
    sys.exit(run_job(main))
