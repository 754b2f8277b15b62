"""Markets that are scored no more."""

from pathlib import Path

import pytest
from delta.tables import DeltaTable
from pyspark.sql import SparkSession

from csrm.cli import Console, setting_arguments
from csrm.commands import retire, rollback
from csrm.errors import ConfigError, InputError
from csrm.night.published import published_markets
from csrm.night.runs import check_same_run, read_newest
from csrm.operations.review import PublishConfig, discard_run
from csrm.schemas import RELEVANCE_SCORES, SCORING_RUNS
from csrm.spark.tables import read_table, sql_path, table_id, table_path, table_version
from tests.consumers.publishing import HOSTILE_MARKET, publish, record

pytestmark = [pytest.mark.spark, pytest.mark.slow]


def test_a_retired_market_leaves_in_one_commit_and_can_be_brought_back(
    spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = str(tmp_path)
    path = table_path(tables, RELEVANCE_SCORES)
    scores = {("q1", "p1"): 0.1, ("q1", "p2"): 0.2}
    version = publish(spark, tables, "r1", {HOSTILE_MARKET: scores, "kr": {("q1", "p1"): 0.5}}, day=1)
    known = {"published_version": version, "table_id": table_id(spark, path)}
    record(spark, tables, "r1", [HOSTILE_MARKET, "kr"], "published", 1, **known)
    arguments = ["--market", HOSTILE_MARKET, *setting_arguments(tables=tables)]

    with pytest.raises(ConfigError, match="--reason: expected why"):
        retire.main([*arguments, "--reason", " "])
    assert retire.main([*arguments, "--reason", "closed"]) == 0

    assert f"2 rows deleted from relevance_scores, in version {version + 1}" in capsys.readouterr().out
    assert published_markets(spark, tables) == ["kr"]
    commit = DeltaTable.forPath(spark, path).history(1).head()
    assert (commit["version"], "closed" in commit["userMetadata"]) == (version + 1, True)
    (run,) = read_newest(spark, SCORING_RUNS, tables).where("verdict = 'retired'").collect()
    assert (run["markets"], run["published_version"], run["changes"]) == ([HOSTILE_MARKET], version + 1, {"delete": 2})
    assert (run["intervention"]["reason"], run["data_date"], run["bundle_digest"]) == ("closed", None, None)
    config = PublishConfig(tables=tables)
    with pytest.raises(ConfigError, match="is a rollback or a retirement, which has no scores to discard"):
        discard_run(spark, config, run["run_id"], console=Console())
    with pytest.raises(ConfigError, match=r"names a rollback or a retirement of .*Choose another"):
        check_same_run(run, [HOSTILE_MARKET], "d")
    with pytest.raises(ConfigError, match=r"nothing of it is published; relevance_scores has \['kr'\]"):
        retire.main([*arguments, "--reason", "closed"])

    assert rollback.main([*arguments, "--to-run", "r1"]) == 0
    rows = read_table(spark, RELEVANCE_SCORES, path).where("market != 'kr'").collect()
    assert {row["product_id"]: round(row["relevance_score"], 3) for row in rows} == {"p1": 0.1, "p2": 0.2}


def test_a_market_with_a_pair_that_something_else_wrote_twice_is_neither_rolled_back_nor_retired(
    spark: SparkSession, tmp_path: Path
) -> None:
    tables = str(tmp_path)
    path = table_path(tables, RELEVANCE_SCORES)
    version = publish(spark, tables, "r1", {"kr": {("q1", "p1"): 0.5, ("q1", "p2"): 0.4}}, day=1)
    known = {"published_version": version, "table_id": table_id(spark, path)}
    record(spark, tables, "r1", ["kr"], "published", 1, **known)
    read_table(spark, RELEVANCE_SCORES, path).where("product_id = 'p1'").write.format("delta").mode("append").save(path)
    arguments = ["--market", "kr", *setting_arguments(tables=tables)]

    refused = rf"1 pairs are there more than once.*Nothing was changed.*TO VERSION AS OF {version}"
    with pytest.raises(InputError, match=refused):
        rollback.main([*arguments, "--to-run", "r1"])
    with pytest.raises(InputError, match=refused):
        retire.main([*arguments, "--reason", "closed"])
    assert read_table(spark, RELEVANCE_SCORES, path).count() == 3


def test_a_market_is_neither_rolled_back_nor_retired_where_the_change_feed_was_taken_away(
    spark: SparkSession, tmp_path: Path
) -> None:
    """Readers of the feed would never learn of it."""
    tables = str(tmp_path)
    path = table_path(tables, RELEVANCE_SCORES)
    version = publish(spark, tables, "r1", {"kr": {("q1", "p1"): 0.5}}, day=1)
    record(spark, tables, "r1", ["kr"], "published", 1, published_version=version, table_id=table_id(spark, path))
    publish(spark, tables, "r2", {"kr": {("q1", "p1"): 0.6}}, day=2)
    spark.sql(f"ALTER TABLE {sql_path(path)} SET TBLPROPERTIES ('delta.enableChangeDataFeed' = 'false')")
    before = table_version(spark, path)
    arguments = ["--market", "kr", *setting_arguments(tables=tables)]

    refused = r"They were changed since. Nothing was written. Put them back with Spark: ALTER TABLE"
    with pytest.raises(InputError, match=refused):
        rollback.main([*arguments, "--to-run", "r1"])
    with pytest.raises(InputError, match=refused):
        retire.main([*arguments, "--reason", "closed"])
    assert read_newest(spark, SCORING_RUNS, tables).count() == 1  # of r1
    assert table_version(spark, path) == before
