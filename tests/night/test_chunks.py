"""Chunks of a night's work."""

import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import DataFrame, SparkSession

from csrm.night.chunks import Chunk, canary_pairs, next_chunk, stage_scores
from csrm.night.runs import create_output_tables
from csrm.night.settings import NUM_BUCKETS
from csrm.schemas import RELEVANCE_SCORES, RUN_PAIRS, SCORES_STAGING
from csrm.spark.tables import read_table, spark_schema, table_path, table_version

PAIRS_IN_BUCKET = np.array([0, 3, 0, 5, 2, 0, 0, 4])


@pytest.mark.parametrize(
    ("low", "num_pairs", "expected"),
    [
        (0, 1, (0, 2, 3)),
        (0, 3, (0, 2, 3)),
        (0, 3.5, (0, 4, 8)),
        (2, 0, (2, 4, 5)),
        (4, 6, (4, 8, 6)),
        (5, 1_000, (5, 8, 4)),
    ],
)
def test_a_chunk_has_as_many_buckets_as_it_takes(low: int, num_pairs: float, expected: tuple[int, int, int]) -> None:
    assert next_chunk(7, low, PAIRS_IN_BUCKET, num_pairs) == Chunk(7, *expected)


@pytest.mark.spark
def test_a_night_is_staged_in_chunks_of_the_measured_length(spark: SparkSession, tmp_path: Path) -> None:
    tables = str(tmp_path)
    create_output_tables(spark, tables)
    pairs_in_bucket = np.zeros(NUM_BUCKETS, dtype=int)
    pairs_in_bucket[10:20] = 1
    chunks: list[Chunk] = []

    def score(chunk: Chunk) -> DataFrame:
        chunks.append(chunk)
        time.sleep(0.2)
        row = ("tw", "q", f"p{chunk.number}", 0.5, "E", "d", 1, datetime(2026, 1, 2, tzinfo=UTC), "r", None, None)
        return spark.createDataFrame([row], spark_schema(SCORES_STAGING))

    num_chunks = stage_scores(spark, tables, "app", pairs_in_bucket, score, chunk_seconds=1e-3, pairs_per_s=4_000)

    assert [chunk.num_pairs for chunk in chunks] == [4, 1, 1, 1, 1, 1, 1]  # expected 4 in a chunk; then far fewer were
    assert [(chunk.low, chunk.high) for chunk in chunks[:2]] == [(0, 14), (14, 15)]
    assert num_chunks == 7
    path = table_path(tables, SCORES_STAGING)
    assert read_table(spark, SCORES_STAGING, path).count() == 7

    before = table_version(spark, path)
    stage_scores(spark, tables, "app", pairs_in_bucket, score, chunk_seconds=1e9, pairs_per_s=1)
    assert table_version(spark, path) == before, "the same attempt's chunk 0 was committed before"
    stage_scores(spark, tables, "another attempt", pairs_in_bucket, score, chunk_seconds=1e9, pairs_per_s=1)
    assert table_version(spark, path) == before + 1


@pytest.mark.spark
def test_the_canary_is_a_sample_of_each_market_that_its_seed_chooses(spark: SparkSession) -> None:
    planned = [
        (market, "q", f"p{n}", n, ("to_score", "unchanged", "staged")[n % 3], None, 0, "r")
        for market in ("kr", "tw")
        for n in range(40)
    ]
    planned_df = spark.createDataFrame(planned, spark_schema(RUN_PAIRS))
    at = datetime(2026, 1, 2, tzinfo=UTC)
    scores = [(market, "q", product, n / 40, "E", "d", n, at, "r", None) for market, _, product, n, *_ in planned]
    published_df = spark.createDataFrame(scores, spark_schema(RELEVANCE_SCORES))
    staged = [
        (market, "q", product, score, "E", "d", n, scored_at, "r", None, None)
        for market, _, product, n, *_ in planned
        for score, scored_at in ((0.5, at.replace(year=2025)), (1 - n / 40, at))
    ]
    staged_df = spark.createDataFrame(staged, spark_schema(SCORES_STAGING))

    samples = [
        {
            (row["market"], row["state"], row["product_id"], row["earlier_score"])
            for row in canary_pairs(planned_df, published_df, staged_df, num_pairs=5, seed=seed).collect()
        }
        for seed in ("a", "a", "b")
    ]

    assert samples[0] == samples[1] != samples[2]
    assert Counter((market, state) for market, state, *_ in samples[0]) == {
        (market, state): 5 for market in ("kr", "tw") for state in ("unchanged", "staged")
    }
    for _, state, product, score in samples[0]:
        number = int(product[1:])
        assert number % 3 == ["to_score", "unchanged", "staged"].index(state)
        assert score == pytest.approx(number / 40 if state == "unchanged" else 1 - number / 40)
