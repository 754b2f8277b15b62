"""Rolling one market back to what a run left, and rebuilding any published state, on a real Delta."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from delta.tables import DeltaTable
from pyspark.sql import Row, SparkSession
from pyspark.sql import functions as F

from csrm.cli import setting_arguments
from csrm.commands import rollback
from csrm.errors import ConfigError, InputError
from csrm.night import publish as night_publish
from csrm.night.published import is_still_published
from csrm.night.runs import read_newest, require_run
from csrm.operations import interventions as interventions_of
from csrm.operations import rollback as rollback_of
from csrm.operations.history import interventions, read_runs, taken_back
from csrm.operations.maintenance import remove_old_files, set_retention
from csrm.operations.rollback import RollbackConfig, published_runs, read_published_state, roll_back
from csrm.schemas import RELEVANCE_SCORES, SCORING_RUNS, Column
from csrm.spark.migration import migrate_table
from csrm.spark.storage import delete_table
from csrm.spark.tables import overwrite_table, read_table, sql_path, table_id, table_path, table_version
from tests.consumers.publishing import HOSTILE_MARKET, publish, record
from tests.docs.pages import python_blocks

pytestmark = [pytest.mark.spark, pytest.mark.slow]

BOTH = [HOSTILE_MARKET, "kr"]


def publish_nights(spark: SparkSession, tables_dir: str) -> None:
    """Three nights; the third finds nothing to publish in kr, and a fourth is rejected."""
    first = {("q1", "p1"): 0.1, ("q1", "p2"): 0.2, ("q2", "p1"): 0.3}
    second = {("q1", "p1"): 0.9, ("q1", "p2"): None, ("q1", "p3"): 0.8}
    version = publish(spark, tables_dir, "r1", {HOSTILE_MARKET: first, "kr": {("q1", "p1"): 0.5}}, day=1)
    known = {"table_id": table_id(spark, table_path(tables_dir, RELEVANCE_SCORES))}
    record(spark, tables_dir, "r1", BOTH, "published", 1, published_version=version, **known)
    version = publish(spark, tables_dir, "r2", {HOSTILE_MARKET: second, "kr": {("q1", "p1"): 0.75}}, day=2)
    record(spark, tables_dir, "r2", BOTH, "published", 2, published_version=version, **known)
    record(spark, tables_dir, "r3", ["kr"], "already_published", 3, published_version=version, **known)
    record(spark, tables_dir, "r4", BOTH, "rejected", 4)


def market_rows(spark: SparkSession, path: str, market: str, version: int | None = None) -> list[Row]:
    table_df = read_table(spark, RELEVANCE_SCORES, path, version).where(F.col("market") == market)
    return table_df.orderBy(*RELEVANCE_SCORES.key).collect()


def intervention_rows(spark: SparkSession, tables_dir: str) -> list[Row]:
    runs_df = read_newest(spark, SCORING_RUNS, tables_dir).where("intervention IS NOT NULL")
    return runs_df.orderBy("started_at").collect()


def test_a_rollback_is_one_commit_that_restores_one_market_to_the_last_bit(
    spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables_dir = str(tmp_path / "tables [old] {a,b}*")  # no pattern
    path = table_path(tables_dir, RELEVANCE_SCORES)
    publish_nights(spark, tables_dir)
    wanted, kr, version = market_rows(spark, path, HOSTILE_MARKET, 2), market_rows(spark, path, "kr"), 4
    arguments = ["--market", HOSTILE_MARKET, "--to-run", "r1", *setting_arguments(tables=tables_dir)]
    assert table_version(spark, path) == version

    assert rollback.main(arguments) == 0

    assert "as run r1 left it, in version 5: 1 delete, 1 insert, 1 update" in capsys.readouterr().out
    assert table_version(spark, path) == 5
    assert market_rows(spark, path, HOSTILE_MARKET) == wanted
    assert {(row["run_id"], row["scored_at"].day) for row in wanted} == {("r1", 3)}
    assert market_rows(spark, path, "kr") == kr
    feed = spark.read.format("delta").option("readChangeFeed", "true").option("startingVersion", 5).load(path)
    assert sorted((row["query_id"], row["product_id"], row["_change_type"]) for row in feed.collect()) == [
        ("q1", "p1", "update_postimage"),
        ("q1", "p1", "update_preimage"),
        ("q1", "p2", "insert"),
        ("q1", "p3", "delete"),
    ]
    commit = DeltaTable.forPath(spark, path).history(1).head()
    carried = json.loads(commit["userMetadata"])
    assert (commit["operation"], carried["rollback_to"], carried["market"]) == ("MERGE", "r1", HOSTILE_MARKET)
    pytest.importorskip("deltalake")
    exec(python_blocks("docs/read-scores.md")["Was a row rolled back?"], {"path": path})
    assert capsys.readouterr().out == f"5 {HOSTILE_MARKET} is again as after run r1\n"

    runs, _ = read_runs(spark, tables_dir, None, 9)
    assert [run["run_id"] for run in runs] == ["r4", "r3", "r2", "r1"]
    (sentence,) = taken_back(spark, tables_dir, runs).pop("r2")  # r1 is what it went back to; r3 has no such market
    assert sentence.startswith(
        f"Market {HOSTILE_MARKET} was rolled back to run r1 in version 5 of relevance_scores, 20"
    )
    assert taken_back(spark, tables_dir, runs).keys() == {"r2"}

    (row,) = intervention_rows(spark, tables_dir)
    assert (row["verdict"], row["markets"], row["changes"]) == (
        *("rolled_back", [HOSTILE_MARKET]),
        {"delete": 1, "insert": 1, "update": 1},
    )
    assert (row["base_version"], row["published_version"]) == (4, 5)
    assert (row["intervention"]["rollback_to"], row["inputs"]["relevance_scores"][-3:]) == ("r1", "@v2")
    assert row["started_at"] <= row["finished_at"]
    with pytest.raises(ConfigError, match="expected a run that was published, it is rolled_back"):
        rollback.main(["--market", HOSTILE_MARKET, "--to-run", row["run_id"], *arguments[4:]])

    assert rollback.main(arguments) == 0
    assert "is as run r1 left it already; nothing changed" in capsys.readouterr().out
    assert table_version(spark, path) == 5
    assert len(intervention_rows(spark, tables_dir)) == 1

    assert rollback.main(["--market", "kr", "--to-run", "r3", *arguments[4:]]) == 0
    assert "is as run r3 left it already" in capsys.readouterr().out

    spark.sql(f"DELETE FROM {sql_path(path)} WHERE market = 'kr'")
    found = taken_back(spark, tables_dir, runs)
    assert [len(found[run_id]) for run_id in ("r1", "r2", "r3")] == [1, 2, 1]
    of_other_table = [{**run, "table_id": "another"} for run in runs]
    assert taken_back(spark, tables_dir, of_other_table) == {}
    assert rollback.main(["--market", HOSTILE_MARKET, "--to-run", "r2", *arguments[4:]]) == 0
    assert taken_back(spark, tables_dir, runs)["r2"] == found["r2"][1:]  # its own market is as it left it again
    assert found["r3"][0].startswith("Something else than CSRM changed the table in version 6 of relevance_scores, ")
    assert found["r3"][0].endswith(" UTC: DELETE.")

    events = interventions(spark, tables_dir, runs)
    assert [sentence.split(" version ")[1][0] for _, sentence in events] == ["7", "6", "5"]
    assert [at for at, _ in events] == sorted((at for at, _ in events), reverse=True)
    assert events[-1][1] == sentence
    assert interventions(spark, tables_dir, of_other_table) == []
    runs_df = read_newest(spark, SCORING_RUNS, tables_dir)
    runs_path = table_path(tables_dir, SCORING_RUNS)
    own_df = spark.createDataFrame(runs_df.where("intervention IS NULL").collect(), runs_df.schema)
    overwrite_table(own_df, SCORING_RUNS, runs_path)  # as before there were such rows
    older = interventions(spark, tables_dir, runs)
    assert [sentence for _, sentence in older] == [sentence for _, sentence in events]


def test_any_published_state_within_the_retention_can_be_rebuilt_from_the_runs(
    spark: SparkSession, tmp_path: Path
) -> None:
    tables_dir = str(tmp_path)
    publish_nights(spark, tables_dir)

    states = {}
    for market in BOTH:
        for run_id, _ in published_runs(spark, tables_dir, market):
            run = require_run(spark, tables_dir, run_id)
            rows = read_published_state(spark, tables_dir, run, market).collect()
            states[market, run_id] = {
                row["query_id"] + row["product_id"]: (round(row["relevance_score"], 3), row["run_id"]) for row in rows
            }

    assert states == {
        (HOSTILE_MARKET, "r1"): {"q1p1": (0.1, "r1"), "q1p2": (0.2, "r1"), "q2p1": (0.3, "r1")},
        (HOSTILE_MARKET, "r2"): {"q1p1": (0.9, "r2"), "q1p3": (0.8, "r2"), "q2p1": (0.3, "r1")},
        ("kr", "r1"): {"q1p1": (0.5, "r1")},
        ("kr", "r2"): {"q1p1": (0.75, "r2")},
        ("kr", "r3"): {"q1p1": (0.75, "r2")},
    }


def test_what_cannot_be_rolled_back_to_is_said_with_the_way_out(spark: SparkSession, tmp_path: Path) -> None:
    tables_dir = str(tmp_path)
    path = table_path(tables_dir, RELEVANCE_SCORES)
    publish_nights(spark, tables_dir)

    def roll_back(market: str, run_id: str) -> int:
        return rollback.main(["--market", market, "--to-run", run_id, *setting_arguments(tables=tables_dir)])

    with pytest.raises(InputError, match=r"'r9': no run of this name .*the newest are \['r4', 'r3', 'r2', 'r1'\]"):
        roll_back("kr", "r9")
    with pytest.raises(ConfigError, match=r"'r4': expected a run that was published, it is rejected.*r3 \(version 4\)"):
        roll_back("kr", "r4")
    with pytest.raises(ConfigError, match=r"'r3': has no market '東京', it has \['kr'\]"):
        roll_back("東京", "r3")

    set_retention(spark, path, hours=0)
    remove_old_files(spark, path)
    gone = r"'r1': its state of market 'kr'.*was removed. The oldest that is left: "
    with pytest.raises(InputError, match=gone + "none"):  # Delta refuses all versions but the newest
        roll_back("kr", "r1")
    set_retention(spark, path, hours=168)
    with pytest.raises(InputError, match=gone + r"r2 \(version 4\)"):  # Delta would try, and the files are gone
        roll_back("kr", "r1")
    assert {row["run_id"] for row in market_rows(spark, path, "kr")} == {"r2"}


def test_a_run_is_not_rolled_back_to_in_a_table_that_was_made_anew(spark: SparkSession, tmp_path: Path) -> None:
    tables_dir = str(tmp_path)
    path = table_path(tables_dir, RELEVANCE_SCORES)
    publish_nights(spark, tables_dir)
    record(spark, tables_dir, "before table_id was there", ["kr"], "published", 2, published_version=4)
    delete_table(spark, path)
    for day in range(1, 5):
        publish(spark, tables_dir, f"n{day}", {"kr": {("q1", "p1"): day / 10}}, day=day)

    for run_id in ("r1", "before table_id was there"):
        with pytest.raises(InputError, match=r"is not the table that the run published to.*Nothing was changed"):
            rollback.main(["--market", "kr", "--to-run", run_id, *setting_arguments(tables=tables_dir)])

    assert {row["run_id"] for row in market_rows(spark, path, "kr")} == {"n4"}


def test_a_market_is_rolled_back_across_a_migration(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables_dir = str(tmp_path)
    path = table_path(tables_dir, RELEVANCE_SCORES)
    publish_nights(spark, tables_dir)
    wanted, other = market_rows(spark, path, HOSTILE_MARKET, 2), market_rows(spark, path, "kr")
    *columns, last = RELEVANCE_SCORES.columns
    note, version = Column("note", "string", "New", required=False), RELEVANCE_SCORES.schema_version + 1
    newer = replace(RELEVANCE_SCORES, columns=(*columns, note, last), schema_version=version)
    assert migrate_table(spark, newer, path) == ["note"]
    DeltaTable.forPath(spark, path).update("product_id = 'p1'", {"note": "'written since'"})
    for module in (rollback_of, interventions_of, night_publish):
        monkeypatch.setattr(module, "RELEVANCE_SCORES", newer)

    publication = roll_back(spark, RollbackConfig(tables=tables_dir), HOSTILE_MARKET, run_id="r1")

    assert publication.totals == {"delete": 1, "insert": 1, "update": 2}
    assert market_rows(spark, path, HOSTILE_MARKET) == wanted
    notes_df = read_table(spark, newer, path).select("market", "note")
    assert {tuple(row) for row in notes_df.collect()} == {(HOSTILE_MARKET, None), ("kr", "written since")}
    assert market_rows(spark, path, "kr") == other


def test_what_was_published_is_not_proven_where_the_log_since_was_cleaned_up(
    spark: SparkSession, tmp_path: Path
) -> None:
    tables_dir = str(tmp_path)
    path = table_path(tables_dir, RELEVANCE_SCORES)
    publish_nights(spark, tables_dir)
    assert is_still_published(spark, tables_dir, require_run(spark, tables_dir, "r1"))
    roll_back(spark, RollbackConfig(tables=tables_dir), "kr", run_id="r1")
    spark.sql(f"ALTER TABLE {sql_path(path)} SET TBLPROPERTIES ('delta.checkpointInterval' = '1')")
    version = publish(spark, tables_dir, "r5", {"kr": {("q1", "p1"): 0.9}}, day=5)
    record(spark, tables_dir, "r5", ["kr"], "published", 5, published_version=version, table_id=table_id(spark, path))
    log = Path(path, "_delta_log")
    for file in [*log.glob("0*"), *log.glob(".0*")]:
        if int(file.name.lstrip(".").partition(".")[0]) < version:
            file.unlink()
    spark.sparkContext._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()

    (run,), _ = read_runs(spark, tables_dir, "r2", 1)
    ((_, sentence),) = interventions(spark, tables_dir, [run])  # its row is left
    assert "market kr was rolled back to run r1 in version 5 " in sentence.lower()
    assert not is_still_published(spark, tables_dir, require_run(spark, tables_dir, "r1"))
    assert is_still_published(spark, tables_dir, require_run(spark, tables_dir, "r5"))
    with pytest.raises(InputError, match=r"'r2': its state of market 'kr'.*was removed. The oldest that is left: r5"):
        rollback.main(["--market", "kr", "--to-run", "r2", *setting_arguments(tables=tables_dir)])
    assert len(market_rows(spark, path, "kr")) == 1
