"""Judged pairs of the published table, with their scores and those of baselines."""

from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Annotated, Any

import pandas as pd
from pydantic import Field
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

import csrm
from csrm.config import InputSpec, LocalPath, Markets, Settings, TablesDir
from csrm.errors import InputError
from csrm.evaluation.metrics import Evaluation, evaluate_scores
from csrm.evaluation.report import BM25, SCORE
from csrm.retrieval.lexical import bm25_scores, product_terms, query_terms
from csrm.schemas import CATALOG, JUDGMENTS, PAIR_KEY, QUERIES, RELEVANCE_SCORES
from csrm.spark.inputs import Input, read_inputs
from csrm.spark.session import persisted
from csrm.spark.tables import open_table, read_table, table_path


class EvaluationInputs(Settings):
    """The judgments, and the tables that their ids name."""

    judgments: InputSpec
    catalog: InputSpec
    queries: InputSpec


class EvaluationConfig(Settings):
    """Settings of the evaluation."""

    markets: Markets
    """Market to language; other markets' judgments are not looked at."""
    inputs: EvaluationInputs
    tables: TablesDir
    """Folder with the published relevance_scores table."""
    output: LocalPath
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


@dataclass(frozen=True)
class PublishedEvaluation:
    """How well the published scores rank, and what that was measured on."""

    evaluation: Evaluation
    judged: pd.DataFrame
    """The judged pairs with their scores; see collect_judged."""
    provenance: dict[str, Any]
    """Inputs with their versions, bundles, packages and settings."""


def evaluate_published(spark: SparkSession, config: EvaluationConfig) -> PublishedEvaluation:
    """Measure the published scores against the judgments.

    Raises:
        InputError: an input has problems, or there is no judged pair.
    """
    inputs = read_all(spark, config)
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
        gains=config.gains,
        relevant_grades=config.relevant_grades,
        irrelevant_grades=config.irrelevant_grades,
        num_resamples=config.num_resamples,
        seed=config.seed,
    )
    evaluation = replace(evaluation, notes=(*unknown_ids(judged), *evaluation.notes))
    packages = ("ir-measures", "scikit-learn", "numpy", "pandas", "pyspark")
    provenance = {
        "inputs": {name: {"path": table.path, "version": table.version} for name, table in inputs.items()},
        "bundle_digests": sorted(judged["bundle_digest"].dropna().unique()),
        "versions": {"csrm": csrm.__version__, **{package: version(package) for package in packages}},
        "config": config.model_dump(mode="json"),
    }
    return PublishedEvaluation(evaluation, judged, provenance)


def collect_judged(
    judgments_df: DataFrame, scores_df: DataFrame, catalog_df: DataFrame, queries_df: DataFrame, baseline_bm25: bool
) -> pd.DataFrame:
    """The judged pairs with their scores; only they come to the driver.

    Returns:
        market, query_id, product_id, grade, relevance_score (NaN where the pair has none), bundle_digest, has_product
        and has_query (whether the id is known); with baseline_bm25 also bm25, 0 for pairs that share no term.
    """
    key = list(PAIR_KEY)
    known_products_df = catalog_df.select("market", "product_id", F.lit(True).alias("has_product"))
    known_queries_df = queries_df.select("market", "query_id", F.lit(True).alias("has_query"))
    judged_df = (
        judgments_df.select(*key, "grade")
        .join(scores_df.select(*key, SCORE, "bundle_digest"), key, "left")
        .join(known_products_df, ["market", "product_id"], "left")
        .join(known_queries_df, ["market", "query_id"], "left")
        .withColumns({name: F.coalesce(name, F.lit(False)) for name in ("has_product", "has_query")})
    )
    if not baseline_bm25:
        return judged_df.toPandas()
    judged_queries_df = queries_df.join(judgments_df.select("market", "query_id").distinct(), ["market", "query_id"])
    with persisted(product_terms(catalog_df)) as products_df, persisted(query_terms(judged_queries_df)) as terms_df:
        return judged_df.join(bm25_scores(products_df, terms_df), key, "left").fillna({BM25: 0.0}).toPandas()


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
