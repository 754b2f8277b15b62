"""Care of the tables, on a real Delta: readers see the same rows before and after."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from py4j.protocol import Py4JJavaError
from pyspark.sql import Row, SparkSession
from pyspark.sql import functions as F

from csrm.errors import InputError
from csrm.operations.maintenance import (
    cluster_market,
    count_old_files,
    ended_runs,
    is_clustered,
    market_files,
    missing_files,
    published_markets,
    remove_old_files,
    run_markets,
    set_retention,
    table_size,
)
from csrm.schemas import RELEVANCE_SCORES
from csrm.spark.tables import open_table, table_path, table_version
from tests.consumers.publishing import HOSTILE_MARKET, START, publish, record

pytestmark = [pytest.mark.spark, pytest.mark.slow]


def all_rows(spark: SparkSession, path: str) -> list[Row]:
    return spark.read.format("delta").load(path).orderBy(*RELEVANCE_SCORES.key).collect()


def test_clustering_brings_a_querys_rows_together_and_is_not_done_again_until_the_market_changes(
    spark: SparkSession, tmp_path: Path
) -> None:
    path = table_path(str(tmp_path), RELEVANCE_SCORES)
    pairs = {(f"q{query}", f"p{product}"): 0.5 for query in range(200) for product in range(5)}
    publish(spark, str(tmp_path), "r1", {HOSTILE_MARKET: pairs, "kr": {("q1", "p1"): 0.5}}, day=0)
    before, kr_files = all_rows(spark, path), market_files(spark, path, "kr")
    assert not is_clustered(spark, path, HOSTILE_MARKET)

    cluster_market(spark, path, HOSTILE_MARKET, file_mb=0.001)

    version = table_version(spark, path)
    market_df = spark.read.format("delta").load(path).where(F.col("market") == HOSTILE_MARKET)
    assert len(market_df.inputFiles()) > 3
    assert market_df.select("query_id", F.input_file_name()).distinct().count() == 200  # no query lies in two files
    assert all_rows(spark, path) == before
    assert is_clustered(spark, path, HOSTILE_MARKET)
    assert not is_clustered(spark, path, "kr")
    assert market_files(spark, path, "kr") == kr_files
    assert published_markets(spark, str(tmp_path)) == [HOSTILE_MARKET, "kr"]

    publish(spark, str(tmp_path), "r2", {HOSTILE_MARKET: {("q1", "p1"): 0.75}}, day=1)

    assert not is_clustered(spark, path, HOSTILE_MARKET)
    feed = spark.read.format("delta").option("readChangeFeed", "true").option("startingVersion", version).load(path)
    assert sorted((row["_change_type"], row["relevance_score"]) for row in feed.collect()) == [
        ("update_postimage", 0.75),
        ("update_preimage", 0.5),
    ]


def test_old_files_go_and_change_feed_and_versions_within_the_retention_stay(
    spark: SparkSession, tmp_path: Path
) -> None:
    path = table_path(str(tmp_path), RELEVANCE_SCORES)
    publish(spark, str(tmp_path), "r1", {HOSTILE_MARKET: {("q1", "p1"): 0.25, ("q1", "p2"): 0.5}}, day=0)
    publish(spark, str(tmp_path), "r2", {HOSTILE_MARKET: {("q1", "p1"): 0.75}}, day=1)
    old_files = market_files(spark, path, HOSTILE_MARKET, version=1) - market_files(spark, path, HOSTILE_MARKET)
    assert old_files
    rows = all_rows(spark, path)
    feed_df = spark.read.format("delta").option("readChangeFeed", "true").option("startingVersion", 1).load(path)

    set_retention(spark, path, hours=168)
    version = table_version(spark, path)
    set_retention(spark, path, hours=168)
    assert table_version(spark, path) == version
    remove_old_files(spark, path)

    assert feed_df.count() == 4
    assert not missing_files(spark, path, old_files)
    assert open_table(spark, path, 1)[0].where("product_id = 'p1'").head()["relevance_score"] == 0.25
    before = table_size(spark, path)
    assert count_old_files(spark, path, hours=168) == "0"
    assert count_old_files(spark, path, hours=0) == "2"  # one of the first version, one of the change feed

    set_retention(spark, path, hours=0)
    remove_old_files(spark, path)

    after = table_size(spark, path)
    assert (before.num_files, after.num_files) == (2, 2)
    assert after.num_stored_bytes < before.num_stored_bytes + 20_000  # the log grew by three commits
    assert missing_files(spark, path, old_files) == old_files
    assert all_rows(spark, path) == rows
    with pytest.raises(InputError, match=r"version 1 cannot be read.*deletedFileRetentionDuration"):
        open_table(spark, path, 1)
    with pytest.raises(Py4JJavaError, match="FileNotFound"):
        feed_df.collect()


def test_a_run_ended_when_it_says_so_or_where_it_died_when_it_was_started(spark: SparkSession, tmp_path: Path) -> None:
    tables_dir = str(tmp_path)
    record(spark, tables_dir, "published", ["kr", HOSTILE_MARKET], "published", day=0)
    record(spark, tables_dir, "rejected", ["kr"], "rejected", day=5)
    record(spark, tables_dir, "died", ["tw"], "running", day=0, finished_at=None)
    record(spark, tables_dir, "runs", ["kr"], "running", day=5, finished_at=None)

    now = START + timedelta(days=5, hours=2)

    assert ended_runs(spark, tables_dir, now, days=3) == ["died", "published"]
    assert ended_runs(spark, tables_dir, START + timedelta(days=3, minutes=30), days=3) == ["died"]
    assert ended_runs(spark, tables_dir, datetime.now(UTC), days=1) == ["died", "published", "rejected", "runs"]
    assert run_markets(spark, tables_dir) == [HOSTILE_MARKET, "kr", "tw"]
