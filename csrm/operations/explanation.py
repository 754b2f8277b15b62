"""Why the products of a query have their scores, read back from the tables and asked of the bundle."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import pandas as pd
from delta.tables import DeltaTable
from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pydantic import Field
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, Row, SparkSession, Window
from pyspark.sql import functions as F

from csrm.config import InputSpec, LocalPath, Markets, Settings, TablesSettings
from csrm.errors import ConfigError, InputError
from csrm.night.published import require_unique_pairs
from csrm.night.runs import PUBLISHED
from csrm.operations.texts import spec_at
from csrm.retrieval.lexical import bm25_scores, product_terms, query_terms
from csrm.schemas import (
    CATALOG,
    JUDGMENTS,
    QUERIES,
    REJECTED_PAIRS,
    RELEVANCE_SCORES,
    RETRIEVAL_TABLE,
    SCORING_RUNS,
    Table,
)
from csrm.scoring.explanation import explain, label_probabilities
from csrm.scoring.prompts import is_shown
from csrm.scoring.scorer import PairScorer
from csrm.spark.inputs import read_rows
from csrm.spark.session import persisted
from csrm.spark.tables import open_table, read_changes, read_table, table_exists, table_path
from csrm.spark.text import text_key_udf
from csrm.text import text_key

_NUM_NAMED_QUERIES = 5
_MOST_MOVE = 0.01
"""Between a published score and what the bundle gives now; packs and precisions move a score less."""
_PRODUCT_FIELDS = ["title", "brand", "category", "attributes"]
_ID = "product_id"


class ExplanationInputs(Settings):
    """The tables that a night reads."""

    catalog: InputSpec
    queries: InputSpec
    retrieval_table: InputSpec | None = None
    """Default: the table that build_retrieval_table wrote into `tables`."""
    judgments: InputSpec | None = None
    """Human grades, to show beside the scores. Default: none are shown."""


class ExplanationConfig(TablesSettings):
    """Settings of the page about a query."""

    markets: Markets
    """Market to the language of its queries, as in score_catalog.yaml."""
    inputs: ExplanationInputs
    bundle: str
    """Folder or URI of the bundle that scores, as in score_catalog.yaml."""
    bundle_digest: str | None = None
    """Digest that the bundle must have, or its first characters. Default: any."""
    device: str = "cpu"
    """cpu, cuda or cuda:<number>."""
    output: LocalPath
    """Local folder for the pages."""
    num_products: Annotated[int, Field(ge=1, le=1_000)] = 50
    """Best products of the query to show."""


@dataclass(frozen=True)
class QueryExplanation:
    """A query, its products with their scores, and why one of them has its score."""

    query: Mapping[str, Any]
    """market, query_id, query, language."""
    run: Mapping[str, Any] | None
    """Row of scoring_runs of the run that published the market last; None where there is none any more."""
    version: int
    """Of relevance_scores."""
    num_scored: int
    """Products of the query that have a score."""
    products: pd.DataFrame
    """Best first: rank (1 is best; NaN without a published score), product_id, relevance_score, predicted_grade,
    bundle_digest, title, brand, category, attributes, score_now, bm25_rank (in the market's whole catalog) and grade
    (a person's); NaN or None where there is none."""
    probabilities: pd.DataFrame
    """Of each label, on the index of products; NaN where the model is not asked: the query or the title has no text."""
    titles: pd.DataFrame
    """That augmented the query: rank, product_id, title, similarity, source."""
    product_id: str | None
    """The product that is explained; None where the query has none."""
    parts: pd.DataFrame | None
    """Of its prompt, see csrm.explain; None where the model is not asked."""
    history: pd.DataFrame
    """Its published scores, oldest first: version, change (insert, update, delete), relevance_score, predicted_grade,
    run_id, scored_at."""
    notes: list[str] = field(default_factory=list)
    """What is missing or odd, one sentence each."""


def explain_query(
    spark: SparkSession,
    config: ExplanationConfig,
    scorer: PairScorer,
    *,
    market: str,
    query: str | None = None,
    query_id: str | None = None,
    product_id: str | None = None,
) -> QueryExplanation:
    """Read what the tables hold of a query, and ask the bundle for the rest.

    Texts are those that the last published run read, where its places can still be read; else those of today.

    Args:
        spark: the session.
        config: settings of the job.
        scorer: of the bundle.
        market: of the query.
        query: its text; another case, Unicode form or spacing is the same text.
        query_id: its id; needed where several queries have one text, or no text.
        product_id: the product to explain. Default: the best one.

    Raises:
        ConfigError: an unknown market, or neither text nor id.
        InputError: no such query or product, no published scores, a pair is published twice, or an input cannot be
            read.
    """
    if market not in config.markets:
        raise ConfigError(f"--market {market!r}: expected one of {sorted(config.markets)}, those of the configuration.")
    if query is None and query_id is None:
        raise ConfigError("expected --query or --query-id, got neither. Name the query by its text or by its id.")
    notes: list[str] = []
    scores_path = table_path(config.tables, RELEVANCE_SCORES)
    _, version = open_table(spark, scores_path)
    run = _last_published(spark, config.tables, market)
    places = {} if run is None else run["inputs"]
    queries_df = _rows(spark, QUERIES, config.inputs.queries, places, notes).where(F.col("market") == market)
    found = _find_query(queries_df, market, query, query_id, notes)
    language = found["language"] or config.markets[market]
    catalog_df = _rows(spark, CATALOG, config.inputs.catalog, places, notes).where(F.col("market") == market)
    of_query = (F.col("market") == market) & (F.col("query_id") == found["query_id"])

    scored_df = read_table(spark, RELEVANCE_SCORES, scores_path, version).where(of_query)
    require_unique_pairs(spark, scored_df, scores_path)
    best_first = scored_df.orderBy(F.desc("relevance_score"), _ID)
    columns = [_ID, "relevance_score", "predicted_grade", "bundle_digest"]
    products = best_first.select(*columns).limit(config.num_products).toPandas()
    num_scored = scored_df.count()
    products.insert(0, "rank", pd.Series(range(1, len(products) + 1), dtype="float64"))
    if product_id is not None and product_id not in set(products[_ID]):
        products = pd.concat([products, _other_product(scored_df, product_id)], ignore_index=True)
    explained = product_id or (products[_ID].iloc[0] if len(products) else None)
    if not num_scored:
        notes.append(f"No product has a published score for this query.{_why_none(spark, config, run, of_query)}")

    products = products.merge(_texts(catalog_df, products[_ID]), on=_ID, how="left")
    if product_id is not None:
        is_pair = of_query & (F.col(_ID) == product_id)
        notes += _notes_of_product(products, market, product_id, lambda: _why_none(spark, config, run, is_pair))
    products["bm25_rank"] = products[_ID].map(_bm25_ranks(catalog_df, queries_df, found["query_id"]))
    products["grade"] = None
    if config.inputs.judgments is not None:
        judged_df = read_rows(spark, JUDGMENTS, config.inputs.judgments).where(of_query)
        products["grade"] = products[_ID].map({row[_ID]: row["grade"] for row in judged_df.collect()})

    titles = _titles(spark, config, places, of_query, notes) if _uses_titles(run) else _no_titles()
    pair = {"market": market, "language": language, "query": found["query"], "retrieved_titles": list(titles["title"])}
    pairs = products[_PRODUCT_FIELDS].assign(**{name: [value] * len(products) for name, value in pair.items()})
    # as a night does, which sets aside what has no text
    is_asked = products["title"].map(_has_text).astype(bool) & _has_text(found["query"])
    scored = scorer.score_or_reject(pairs[is_asked])
    failed = scored["reason"].dropna()
    failed_ids = products.loc[failed.index, _ID]
    notes += [f"The model gives product {id_} no score: {why}." for id_, why in zip(failed_ids, failed, strict=True)]
    is_asked[failed.index] = False
    probabilities = label_probabilities(scorer, pairs[is_asked]).reindex(products.index)
    products["score_now"] = scored["relevance_score"].reindex(products.index)
    _compare(products, scorer, notes)
    parts = None
    if explained is not None:
        (place,) = products.index[products[_ID] == explained]
        parts = explain(scorer, pairs.loc[place].to_dict()) if is_asked[place] else None
    return QueryExplanation(
        query={"market": market, "query_id": found["query_id"], "query": found["query"], "language": language},
        run=run,
        version=version,
        num_scored=num_scored,
        products=products,
        probabilities=probabilities,
        titles=titles,
        product_id=explained,
        parts=parts,
        history=_history(spark, scores_path, of_query & (F.col(_ID) == explained), notes),
        notes=notes,
    )


def _last_published(spark: SparkSession, tables_dir: str, market: str) -> dict[str, Any] | None:
    path = table_path(tables_dir, SCORING_RUNS)
    if not table_exists(spark, path):
        return None
    runs_df = read_table(spark, SCORING_RUNS, path).where(F.col("verdict").isin(*PUBLISHED))
    row = runs_df.where(F.array_contains("markets", market)).orderBy(F.desc("started_at")).head()
    return None if row is None else row.asDict(recursive=True)


def _uses_titles(run: Mapping[str, Any] | None) -> bool:
    return run is None or RETRIEVAL_TABLE.name in run["inputs"]


def _rows(spark: SparkSession, table: Table, spec: InputSpec, places: Mapping[str, str], notes: list[str]) -> DataFrame:
    """Rows of an input as the run read them; of today where its place is gone."""
    place = places.get(table.name, spec.path)
    at_run, version = spec_at(spec, place)
    try:
        rows_df = read_rows(spark, table, at_run, version)
        rows_df.isEmpty()  # files that are gone are missed here
        return rows_df
    except (InputError, PySparkException, Py4JJavaError):
        if place == spec.path:
            raise
        notes.append(f"{table.name} is read from {spec.path} as it is now: what the last run read, {place}, is gone.")
        return read_rows(spark, table, spec)


def _find_query(queries_df: DataFrame, market: str, query: str | None, query_id: str | None, notes: list[str]) -> Row:
    """The query's row.

    Raises:
        InputError: there is none; the message names similar ones.
    """
    if query_id is not None:
        row: Row | None = queries_df.where(F.col("query_id") == query_id).head()
        if row is None:
            raise InputError(f"--query-id {query_id!r}: market {market!r} has no such query. Is it another market's?")
        return row
    assert query is not None
    same_df = queries_df.where(text_key_udf("query") == text_key(query))
    rows = same_df.orderBy(F.desc_nulls_last("frequency"), "query_id").limit(_NUM_NAMED_QUERIES).collect()
    if not rows:
        distance = F.levenshtein(F.lower(F.substring("query", 1, 100)), F.lit(text_key(query)[:100]))
        near = queries_df.where("query IS NOT NULL").orderBy(distance, "query_id").limit(3).collect()
        named = "; ".join(f"{row['query']!r:.80} ({row['query_id']})" for row in near)
        raise InputError(
            f"--query {query!r:.200}: market {market!r} has no query of this text. "
            + (f"Similar ones: {named}." if near else "It has no queries.")
        )
    if len(rows) > 1:
        ids = ", ".join(row["query_id"] for row in rows[1:])
        notes.append(f"Other queries have the same text: {ids}. Name one by --query-id.")
    return rows[0]


def _other_product(scored_df: DataFrame, product_id: str) -> pd.DataFrame:
    """The row of a product that is not among the best, with its rank; only its id where it has no score."""
    row = scored_df.where(F.col(_ID) == product_id).head()
    if row is None:
        return pd.DataFrame({_ID: [product_id]})
    score = row["relevance_score"]
    is_better = (F.col("relevance_score") > score) | ((F.col("relevance_score") == score) & (F.col(_ID) < product_id))
    values = {name: [row[name]] for name in (_ID, "relevance_score", "predicted_grade", "bundle_digest")}
    return pd.DataFrame({"rank": [float(scored_df.where(is_better).count() + 1)], **values})


def _texts(catalog_df: DataFrame, product_ids: pd.Series) -> pd.DataFrame:
    """product_id and the fields of products, of those that the catalog has."""
    spark = catalog_df.sparkSession
    ids_df = spark.createDataFrame([(product_id,) for product_id in product_ids], f"{_ID} string")
    texts_df = catalog_df.join(F.broadcast(ids_df), _ID).select(_ID, *_PRODUCT_FIELDS).dropDuplicates([_ID])
    return pd.DataFrame(texts_df.collect(), columns=texts_df.columns)


def _why_none(spark: SparkSession, config: ExplanationConfig, run: Mapping[str, Any] | None, of_query: Column) -> str:
    """Why a query, or a pair, has no score, as the last run knows it: a sentence with a space before it, or nothing."""
    path = table_path(config.tables, REJECTED_PAIRS)
    if run is None or not table_exists(spark, path):
        return ""
    rejected_df = read_table(spark, REJECTED_PAIRS, path).where((F.col("run_id") == run["run_id"]) & of_query)
    counts = {row["reason"]: row["count"] for row in rejected_df.groupBy("reason").count().collect()}
    if not counts:
        why = "it was no candidate, or its score was taken back"
        return f" Run {run['run_id']}, the last one, rejected no such pair: {why}."
    listed = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()))
    return f" Run {run['run_id']}, the last one, rejected: {listed}."


def _notes_of_product(products: pd.DataFrame, market: str, product_id: str, why: Callable[[], str]) -> list[str]:
    """Why a product has no published score, where it has none.

    Raises:
        InputError: it can have none: the catalog has no such product, or it has no title.
    """
    (row,) = products[products[_ID] == product_id].to_dict("records")
    if pd.notna(row["relevance_score"]):
        return []
    if not _has_text(row["title"]):
        raise InputError(
            f"--product {product_id!r}: it has no score for this query, and in market {market!r} the catalog has no "
            f"such product with a title.{why()} Is the id right?"
        )
    return [f"Product {product_id} has no published score for this query.{why()}"]


def _has_text(text: object) -> bool:
    return isinstance(text, str) and is_shown(text)


def _bm25_ranks(catalog_df: DataFrame, queries_df: DataFrame, query_id: str) -> dict[str, int]:
    """Product to its place among all of the catalog that share a term with the query, from 1."""
    one_query_df = queries_df.where(F.col("query_id") == query_id)
    place = F.row_number().over(Window.partitionBy("query_id").orderBy(F.desc("bm25"), _ID))
    with persisted(product_terms(catalog_df)) as terms_df:
        ranked_df = bm25_scores(terms_df, query_terms(one_query_df)).withColumn("bm25_rank", place)
        return {row[_ID]: row["bm25_rank"] for row in ranked_df.select(_ID, "bm25_rank").collect()}


def _titles(
    spark: SparkSession, config: ExplanationConfig, places: Mapping[str, str], of_query: Column, notes: list[str]
) -> pd.DataFrame:
    spec = config.inputs.retrieval_table or InputSpec(path=table_path(config.tables, RETRIEVAL_TABLE))
    rows_df = _rows(spark, RETRIEVAL_TABLE, spec, places, notes).where(of_query).orderBy("rank")
    return rows_df.select(*_no_titles().columns).toPandas()


def _no_titles() -> pd.DataFrame:
    return pd.DataFrame(columns=["rank", _ID, "title", "similarity", "source"])


def _compare(products: pd.DataFrame, scorer: PairScorer, notes: list[str]) -> None:
    """Notes where published scores are not what this bundle gives now."""
    others = sorted(set(products["bundle_digest"].dropna()) - {scorer.digest})
    if others:
        notes.append(
            f"Published scores are of bundle {', '.join(digest[:12] for digest in others)}; what is computed here is "
            f"of bundle {scorer.digest[:12]}."
        )
    moved = int((products["relevance_score"].astype("float64") - products["score_now"]).abs().gt(_MOST_MOVE).sum())
    if moved and not others:
        notes.append(
            f"{moved} of these products get another score now, by more than {_MOST_MOVE}: their texts, or the titles "
            "that augment the query, changed since they were scored."
        )


def _history(spark: SparkSession, scores_path: str, is_pair: Column, notes: list[str]) -> pd.DataFrame:
    """The changes of a pair, as far as the change feed of the table goes back."""
    columns = ["version", "change", "relevance_score", "predicted_grade", "run_id", "scored_at"]
    oldest = DeltaTable.forPath(spark, scores_path).history().agg(F.min("version")).head()
    assert oldest is not None
    for start in (0, max(0, oldest[0] - 1)):
        try:
            changes_df = read_changes(spark, RELEVANCE_SCORES, scores_path, start)
            changes_df = changes_df.where(is_pair & (F.col("change") != "update_preimage")).orderBy("version")
            changes = changes_df.select(*columns).toPandas()
        except (PySparkException, Py4JJavaError):
            continue
        return changes.assign(change=changes["change"].str.removesuffix("_postimage"))
    notes.append("The history of the pair cannot be read: the change feed was cleaned up.")
    return pd.DataFrame(columns=columns)
