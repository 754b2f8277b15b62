"""Judged pairs of the published table, with their scores and those of other rankings."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Annotated, Any

import pandas as pd
from pydantic import AfterValidator, Field
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

import csrm
from csrm.config import InputSpec, LocalPath, Markets, Settings, TablesSettings
from csrm.errors import InputError
from csrm.evaluation.calibration import calibration, threshold_metrics
from csrm.evaluation.examples import (
    false_friends,
    first_and_best,
    missing_products,
    moved_queries,
    ranks_among_judged,
    worst_queries,
)
from csrm.evaluation.metrics import RANDOM, Evaluation, evaluate_scores
from csrm.evaluation.report import BM25, ENCODER, SCORE
from csrm.operations.findings import Key, Text
from csrm.operations.texts import collect_texts
from csrm.retrieval.lexical import bm25_scores, product_terms, query_terms
from csrm.retrieval.semantic import cosine_scores
from csrm.schemas import CATALOG, COMPARED_SCORES, JUDGMENTS, PAIR_KEY, QUERIES, RELEVANCE_SCORES
from csrm.spark.inputs import Input, read_inputs
from csrm.spark.session import persisted
from csrm.spark.tables import open_table, read_table, table_path

_QUERY = ["market", "query_id"]
_JUDGED_COLUMNS = ("grade", SCORE, "bundle_digest", "rank", "num_ranked", "has_product", "has_query", "query")


def _ranking_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        raise ValueError("is no name for a ranking: expected letters, digits, - and _, such as search_engine")
    if name in (*PAIR_KEY, *_JUDGED_COLUMNS, BM25, ENCODER, RANDOM):
        raise ValueError("is a name that the evaluation uses itself; choose another one, such as search_engine")
    return name


RankingName = Annotated[str, AfterValidator(_ranking_name)]
"""Name of a ranking that is measured beside the published scores."""


class EvaluationInputs(Settings):
    """The judgments, and the tables that their ids name."""

    judgments: InputSpec
    catalog: InputSpec
    queries: InputSpec
    compare: dict[RankingName, InputSpec] = Field(default_factory=dict)
    """Other scores of the same pairs: a name to a table with market, query_id, product_id and score. It may be a search
    engine's, an embedding's, or relevance_scores of another bundle or version."""


class EvaluationConfig(TablesSettings):
    """Settings of the evaluation."""

    markets: Markets
    """Market to language; other markets' judgments are not looked at."""
    inputs: EvaluationInputs
    output: LocalPath
    """Local folder for evaluation.html, metrics.json and queries.parquet."""
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
    baseline_encoder: str | None = None
    """Folder or URI of an encoder, whose cosines of query and title are measured on the same pairs."""
    device: str = "cpu"
    """Device that embeds: cpu; cuda, which is the GPU that Spark gives a task, or the first one; or cuda:<number>."""
    num_resamples: Annotated[int, Field(ge=100)] = 1000
    """Bootstrap resamples for the intervals."""
    seed: int = 0
    """Of the resamples, the random order and the order of ties."""
    num_examples: Annotated[int, Field(ge=1)] = 10
    """Queries or pairs of each market in each list of the page."""


@dataclass(frozen=True)
class PublishedEvaluation:
    """How well the published scores rank, where they do worst, and what that was measured on."""

    evaluation: Evaluation
    queries: pd.DataFrame
    """Evaluation.queries with the query's text."""
    judged: pd.DataFrame
    """The judged pairs with their scores; see collect_judged."""
    curves: pd.DataFrame
    """What the published score means in each market; see calibration."""
    thresholds: pd.DataFrame
    """What stays at a threshold; see threshold_metrics."""
    worst: pd.DataFrame
    """See worst_queries and first_and_best."""
    moved: Mapping[str, pd.DataFrame]
    """Ranking to the queries that lose and gain most against it; see moved_queries and first_and_best."""
    false_friends: pd.DataFrame
    """See false_friends; "rank by NAME" is the place among judged products by a ranking."""
    missing: pd.DataFrame
    """See missing_products; the same."""
    titles: Mapping[Key, Text]
    """Of the products that are named."""
    provenance: dict[str, Any]
    """Inputs with their versions, bundles, packages and settings."""


def evaluate_published(spark: SparkSession, config: EvaluationConfig) -> PublishedEvaluation:
    """Measure the published scores against the judgments, beside other scores.

    Raises:
        InputError: an input has problems, there is no judged pair, or none has a score of each ranking.
    """
    inputs = read_all(spark, config)
    judgments_df = inputs[JUDGMENTS.name].df
    if config.splits:
        judgments_df = judgments_df.where(F.col("split").isin(*config.splits))
    compared = {name: inputs[_input_name(name)].df for name in config.inputs.compare}
    scores_df, catalog_df, queries_df = (inputs[table.name].df for table in (RELEVANCE_SCORES, CATALOG, QUERIES))
    cosines = {}
    if config.baseline_encoder is not None:
        encoder, device = config.baseline_encoder, config.device
        cosines = {ENCODER: cosine_scores(judgments_df, catalog_df, queries_df, encoder=encoder, device=device)}
    others = {**cosines, **compared}
    judged = collect_judged(judgments_df, scores_df, catalog_df, queries_df, others, with_bm25=config.baseline_bm25)
    if judged.empty:
        raise InputError(
            f"input judgments at {config.inputs.judgments.path!r}: expected rows of markets {sorted(config.markets)} "
            f"and splits {list(config.splits) or 'any'}, got none. Are 'markets' and 'splits' right?"
        )
    rankings = [SCORE, *([BM25] if config.baseline_bm25 else []), *others]
    left_out = pairs_left_out(judged, config)
    evaluation = evaluate_scores(
        judged,
        rankings,
        gains=config.gains,
        relevant_grades=config.relevant_grades,
        irrelevant_grades=config.irrelevant_grades,
        num_resamples=config.num_resamples,
        seed=config.seed,
    )
    unjudged = sorted(set(config.markets) - set(judged["market"]))
    unmeasured = [f"{market}: is not measured, it has no judgments of these splits." for market in unjudged]
    evaluation = replace(evaluation, notes=(*unmeasured, *left_out, *unknown_ids(judged), *evaluation.notes))
    num, queries = config.num_examples, evaluation.queries
    worst = first_and_best(judged, worst_queries(queries, SCORE, num), config.gains)
    moved = {
        name: first_and_best(judged, moved_queries(queries, SCORE, name, num), config.gains) for name in rankings[1:]
    }
    ranked = judged.join(ranks_among_judged(judged, rankings).add_prefix("rank by "))
    friends = false_friends(ranked, SCORE, config.irrelevant_grades, num)
    missing = missing_products(ranked, config.relevant_grades, num)
    titles = {
        (row[0], row[1])
        for frame, column in _named_products(worst, moved, friends, missing)
        for row in frame.dropna(subset=[column])[["market", column]].itertuples(index=False)
    }
    packages = ("ir-measures", "scikit-learn", "numpy", "pandas", "pyspark")
    return PublishedEvaluation(
        evaluation=evaluation,
        queries=queries.merge(judged.drop_duplicates(_QUERY)[[*_QUERY, "query"]], on=_QUERY, how="left"),
        judged=judged,
        curves=calibration(judged, SCORE, relevant_grades=config.relevant_grades, seed=config.seed),
        thresholds=threshold_metrics(
            judged,
            SCORE,
            relevant_grades=config.relevant_grades,
            num_resamples=config.num_resamples,
            seed=config.seed,
        ),
        worst=worst,
        moved=moved,
        false_friends=friends,
        missing=missing,
        titles=collect_texts(catalog_df, "product_id", "title", titles),
        provenance={
            "inputs": {name: {"path": table.path, "version": table.version} for name, table in inputs.items()},
            "bundle_digests": sorted(judged["bundle_digest"].dropna().unique()),
            "versions": {"csrm": csrm.__version__, **{package: version(package) for package in packages}},
            "config": config.model_dump(mode="json"),
        },
    )


def collect_judged(
    judgments_df: DataFrame,
    scores_df: DataFrame,
    catalog_df: DataFrame,
    queries_df: DataFrame,
    compared: Mapping[str, DataFrame],
    *,
    with_bm25: bool,
) -> pd.DataFrame:
    """The judged pairs with their scores; only they come to the driver.

    Args:
        judgments_df: market, query_id, product_id, grade.
        scores_df: the published scores.
        catalog_df: the products.
        queries_df: the queries.
        compared: ranking to its rows of COMPARED_SCORES.
        with_bm25: add BM25 over each market's whole catalog.

    Returns:
        market, query_id, product_id, grade, relevance_score (NaN where the pair has none), bundle_digest, rank (place
        among all published products of the query, from 1) and num_ranked (how many these are), query (the text),
        has_product and has_query (whether the id is known), a column for each compared ranking; with with_bm25 also
        bm25, 0 for pairs that share no term.
    """
    key = list(PAIR_KEY)
    judged_queries_df = judgments_df.select(*_QUERY).distinct()
    of_query = Window.partitionBy(*_QUERY)
    best_first = of_query.orderBy(F.desc(SCORE), "product_id")
    ranked_df = (
        scores_df.select(*key, SCORE, "bundle_digest")
        .join(judged_queries_df, _QUERY, "left_semi")
        .withColumns({"rank": F.row_number().over(best_first), "num_ranked": F.count("*").over(of_query)})
    )
    known_products_df = catalog_df.select("market", "product_id", F.lit(True).alias("has_product"))
    known_queries_df = queries_df.select(*_QUERY, "query", F.lit(True).alias("has_query"))
    judged_df = (
        judgments_df.select(*key, "grade")
        .join(ranked_df, key, "left")
        .join(known_products_df, ["market", "product_id"], "left")
        .join(known_queries_df, _QUERY, "left")
        .withColumns({name: F.coalesce(name, F.lit(False)) for name in ("has_product", "has_query")})
    )
    for name, other_df in compared.items():
        judged_df = judged_df.join(other_df.select(*key, F.col("score").alias(name)), key, "left")
    if not with_bm25:
        return _to_pandas(judged_df, compared)
    asked_df = queries_df.join(judged_queries_df, _QUERY)
    with persisted(product_terms(catalog_df)) as products_df, persisted(query_terms(asked_df)) as terms_df:
        return _to_pandas(judged_df.join(bm25_scores(products_df, terms_df), key, "left").fillna({BM25: 0.0}), compared)


def _to_pandas(judged_df: DataFrame, compared: Collection[str]) -> pd.DataFrame:
    """Numbers as floats, also where a column has none at all."""
    return judged_df.toPandas().astype(dict.fromkeys((SCORE, "rank", "num_ranked", *compared), "float64"))


def _named_products(
    worst: pd.DataFrame, moved: Mapping[str, pd.DataFrame], friends: pd.DataFrame, missing: pd.DataFrame
) -> list[tuple[pd.DataFrame, str]]:
    of_queries = [(frame, column) for frame in (worst, *moved.values()) for column in ("first_id", "best_id")]
    return [*of_queries, (friends, "product_id"), (missing, "product_id")]


def pairs_left_out(judged: pd.DataFrame, config: EvaluationConfig) -> list[str]:
    """How many pairs are left out because another ranking has no score for them, one sentence for each.

    Args:
        judged: as of collect_judged.
        config: names the rankings.

    Raises:
        InputError: a ranking has none of the pairs that are published.
    """
    published = judged.dropna(subset=[SCORE])
    others = {
        name: (f"input {_input_name(name)} at {spec.path!r}", "Are its markets and ids those of the judgments?")
        for name, spec in config.inputs.compare.items()
    }
    if config.baseline_encoder is not None:
        way_out = "It needs their texts: are catalog and queries those of the judgments?"
        others[ENCODER] = (f"baseline_encoder {config.baseline_encoder!r}", way_out)
    notes = []
    for name, (where, way_out) in others.items():
        num_lacking = int(published[name].isna().sum())
        if num_lacking and num_lacking == len(published):
            raise InputError(
                f"{where}: expected scores of judged pairs, it has none of the {num_lacking:,} that are published. "
                f"{way_out}"
            )
        if num_lacking:
            notes.append(
                f"{name} has no score for {num_lacking:,} of {len(published):,} judged pairs; they are left out of all "
                "rankings."
            )
    return notes


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


def _input_name(ranking: str) -> str:
    return f"compare.{ranking}"


def read_all(spark: SparkSession, config: EvaluationConfig) -> dict[str, Input]:
    """The checked input tables and the published scores, each at one version."""
    specs = {
        JUDGMENTS: config.inputs.judgments,
        CATALOG: config.inputs.catalog,
        QUERIES: config.inputs.queries,
        **{replace(COMPARED_SCORES, name=_input_name(name)): spec for name, spec in config.inputs.compare.items()},
    }
    inputs = read_inputs(spark, specs, config.markets)
    path = table_path(config.tables, RELEVANCE_SCORES)
    _, scores_version = open_table(spark, path)
    inputs[RELEVANCE_SCORES.name] = Input(
        read_table(spark, RELEVANCE_SCORES, path, scores_version), path, scores_version
    )
    return inputs
