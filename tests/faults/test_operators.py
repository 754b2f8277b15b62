"""What operators and sellers do between nights: jobs that are killed, tables restored by hand, products that move."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pyspark.sql import SparkSession

from csrm.cli import setting_arguments
from csrm.commands import maintain, rollback, score_catalog
from csrm.errors import AuditError, LeaseError
from csrm.operations.history import read_runs, taken_back
from tests.disks import small_disk
from tests.faults.gate import checksum_file, commit_file, held
from tests.faults.night import KEY, KR, LEASE_SECONDS, TW, Night

pytestmark = [pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(900)]


def score(night: Night, run_id: str, **settings: Any) -> None:
    """A night on the tables as they are now."""
    for name in ("catalog", "queries", "candidates"):
        (night.folder / f"{name}.parquet").unlink(missing_ok=True)
    night.check_ended(score_catalog.main(night.arguments(run_id, **settings)), "", 0)


def rename(night: Night, product_id: str, title: str) -> None:
    night.catalog.loc[night.catalog["product_id"] == product_id, "title"] = title


def scores_of(night: Night, market: str) -> pd.DataFrame:
    scores = night.scores()
    return scores[scores["market"] == market].reset_index(drop=True)


def tables(night: Night, **settings: Any) -> list[str]:
    return setting_arguments(tables=str(night.folder / "tables"), **settings)


@pytest.mark.fault("half of the candidates are gone; then they are back")
def test_half_of_the_candidates_gone_is_no_half_market(spark: SparkSession, night: Night) -> None:
    score(night, "first")
    whole, before = night.candidates, night.version("relevance_scores")
    night.candidates = whole[whole["query_id"].isin(["q0", "q1"])]

    with pytest.raises(AuditError) as caught:
        score(night, "half")

    sentence = "kr: deleted_share: 0.5, expected <= 0.2. 80 of 160 published rows would be deleted."
    night.check_ended(caught.value.exit_code, str(caught.value), 3, sentence)
    assert night.version("relevance_scores") == before
    night.candidates = whole
    score(night, "whole")
    run = night.run("whole")
    assert (run["verdict"], run["num_scored"], run["num_unchanged"]) == ("already_published", 0, len(whole))
    night.check_scores({"first"})
    night.check_staged_once()


@pytest.mark.fault("a product moves to another market")
def test_a_product_that_moves_is_deleted_here_and_scored_there(spark: SparkSession, night: Night) -> None:
    score(night, "first")
    night.catalog = night.catalog.query("market != 'tw' or product_id != 'p007'")
    night.candidates = night.candidates.query("market != 'tw' or product_id != 'p007'")
    score(night, "without")
    for name in ("catalog", "candidates"):
        table = getattr(night, name)
        moved = table.query("market == 'kr' and product_id == 'p007'")
        setattr(night, name, pd.concat([table.drop(moved.index), moved.assign(market=TW)], ignore_index=True))

    score(night, "moved")

    run = night.run("moved")
    assert (run["changes"], run["num_scored"]) == ({"insert": 4, "delete": 4}, 4)
    moved = night.scores().query("product_id == 'p007'")
    assert (set(moved["market"]), set(moved["run_id"])) == ({TW}, {"moved"})
    night.check_scores({"first", "moved"})
    night.shown.add("bounded rework")


@pytest.mark.fault("relevance_scores is restored to an older version by hand")
def test_a_table_that_was_restored_by_hand_is_right_after_the_next_night(spark: SparkSession, night: Night) -> None:
    score(night, "first")
    old, version = night.scores(), night.version("relevance_scores")
    rename(night, "p001", "수건 세트, 흰색")
    score(night, "second")
    path = night.folder / "tables" / "relevance_scores"
    spark.sql(f"RESTORE TABLE delta.`{path}` TO VERSION AS OF {version}")
    assert night.scores().equals(old)
    runs, _ = read_runs(spark, str(night.folder / "tables"), None, 9)
    (sentence,) = taken_back(spark, str(night.folder / "tables"), runs)["second"]
    assert sentence.startswith(f"Something else than CSRM changed the table in version {version + 3} of relevance")

    score(night, "third")

    run = night.run("third")
    assert (run["verdict"], run["changes"]) == ("published", {"update": 8})
    assert (run["num_unchanged"], run["num_scored"]) == (len(night.candidates) - 8, 8)
    night.check_scores({"first", "third"})


def killed_at(night: Night, pattern: str, *arguments: str) -> None:
    """A command that is killed, with its JVM, where it makes a file; then its leases run out."""
    with held(night.folder, pattern, *arguments) as command:
        command.wait()
        command.kill()
    time.sleep(LEASE_SECONDS)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.fault("the maintenance job is killed in a commit, between two markets, in VACUUM, between two tables")
def test_maintenance_killed_anywhere_changes_no_score_and_the_next_one_does_the_rest(
    spark: SparkSession, night: Night, capsys: pytest.CaptureFixture[str]
) -> None:
    score(night, "first")
    rename(night, "p001", "수건 세트, 흰색")
    score(night, "second")
    before, folder = night.scores(), night.folder / "tables"
    runs, month = f"delta.`{folder / 'scoring_runs'}`", "interval 30 days"
    spark.sql(f"UPDATE {runs} SET finished_at = finished_at - {month} WHERE run_id = 'first'")
    version, staged = night.version("relevance_scores"), night.version("scores_staging")

    def kill(pattern: str) -> None:
        killed_at(night, pattern, "maintain", *tables(night, lease_seconds=LEASE_SECONDS))
        assert night.scores().equals(before), pattern

    kill(commit_file("relevance_scores", version + 1))
    assert night.version("relevance_scores") == version
    kill(f"*/relevance_scores/market={TW}/part-*.parquet")
    assert night.version("relevance_scores") == version + 3  # two leases are taken over, kr is clustered
    lost = unknown_files(folder / "relevance_scores")
    assert {path.parent.name for path in lost} == {f"market={KR}", f"market={TW}"}
    for path in lost:
        os.utime(path, (0, 0))  # VACUUM removes none that a commit may still need
    kill(commit_file("relevance_scores", version + 9))  # VACUUM's end, after two leases, tw, retention and its start
    assert not any(path.exists() for path in lost)
    kill(commit_file("scores_staging", staged + 1))
    assert set(night.table("scores_staging")["run_id"]) == {"first", "second"}
    capsys.readouterr()

    assert maintain.main(tables(night)) == 0

    output = capsys.readouterr().out
    assert "clustered" not in output  # both markets were
    assert f"{len(before):,} rows of old runs deleted" in output
    assert set(night.table("scores_staging")["run_id"]) == {"second"}
    assert night.scores().equals(before)
    rename(night, "p002", "등산화 280")
    score(night, "third")
    assert night.run("third")["num_scored"] == 8
    night.check_scores({"first", "second", "third"})
    night.shown.add("bounded rework")


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.fault("relevance_scores is optimized and vacuumed, and maintained, while a market is published")
def test_a_night_publishes_beside_optimize_and_vacuum_of_others(spark: SparkSession, night: Night) -> None:
    score(night, "first")
    rename(night, "p001", "수건 세트, 흰색")
    version, path = night.version("relevance_scores"), f"delta.`{night.folder / 'tables' / 'relevance_scores'}`"
    for name in ("catalog", "queries", "candidates"):
        (night.folder / f"{name}.parquet").unlink()

    held_at = commit_file("relevance_scores", version + 1)
    with held(night.folder, held_at, "score-catalog", *night.arguments("second")) as command:
        command.wait()  # the files of a MERGE are written, of kr, and it is about to be committed
        spark.sql(f"OPTIMIZE {path} ZORDER BY (query_id)")
        spark.sql(f"VACUUM {path}")
        assert night.version("relevance_scores") == version + 3
        with pytest.raises(LeaseError, match="run second"):
            maintain.main(tables(night))
        ended = command.release()

    night.check_ended(ended.code, ended.output, 0, "published run second")
    run = night.run("second")
    assert (run["changes"], run["num_scored"]) == ({"update": 8}, 8)
    night.check_scores({"first", "second"})
    night.shown.add("bounded rework")


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.fault("relevance_scores is optimized while maintenance clusters a market")
def test_maintenance_goes_on_beside_optimize_of_others(spark: SparkSession, night: Night) -> None:
    score(night, "first")
    rename(night, "p001", "수건 세트, 흰색")
    score(night, "second")
    before, version = night.scores(), night.version("relevance_scores")

    with held(night.folder, commit_file("relevance_scores", version + 1), "maintain", *tables(night)) as command:
        command.wait()
        spark.sql(f"OPTIMIZE delta.`{night.folder / 'tables' / 'relevance_scores'}` ZORDER BY (query_id)")
        ended = command.release()

    night.check_ended(ended.code, ended.output, 0, f"clustered {KR}, {TW}")
    assert night.scores().equals(before)
    night.check_scores({"first", "second"})


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.fault("the disk of the tables is full in the commit of a publish")
def test_a_disk_that_is_full_in_a_publish_leaves_the_table_and_the_next_run_publishes(
    spark: SparkSession, night: Night
) -> None:
    with small_disk(night.folder / "tables", "64m") as disk:
        score(night, "first")
        rename(night, "p001", "수건 세트, 흰색")
        before, version = night.scores(), night.version("relevance_scores")
        for name in ("catalog", "queries", "candidates"):
            (night.folder / f"{name}.parquet").unlink()
        arguments = night.arguments("second", lease_seconds=LEASE_SECONDS)

        pattern = f"*/relevance_scores/market={KR}/part-*.parquet"
        with held(night.folder, pattern, "score-catalog", *arguments) as command:
            command.wait()  # the MERGE has opened its first file
            ballast = disk / "ballast"
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            ended = command.release()

        night.check_ended(ended.code, ended.output, 1, "No space left on device")
        ballast.unlink()
        assert night.scores().equals(before)
        assert night.version("relevance_scores") == version
        time.sleep(LEASE_SECONDS)
        score(night, "second")
        run = night.run("second")
        assert (run["verdict"], run["num_scored"], run["num_reused"]) == ("published", 0, 8)
        night.check_scores({"first", "second"})
        night.shown.add("bounded rework")


def unknown_files(path: Path) -> set[Path]:
    """Data files in the folder of a table that no version of it knows."""
    known = {
        path / action["add"]["path"]
        for log in (path / "_delta_log").glob("*.json")
        for action in map(json.loads, log.read_text().splitlines())
        if "add" in action
    }
    return {file for file in path.glob("market=*/*.parquet") if file not in known}


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.fault("the rollback job is killed in its commit, and after it")
def test_a_rollback_killed_anywhere_is_whole_or_did_not_happen(spark: SparkSession, night: Night) -> None:
    score(night, "first")
    old = scores_of(night, KR)
    rename(night, "p001", "수건 세트, 흰색")
    score(night, "second")
    new, other = scores_of(night, KR), scores_of(night, TW)
    arguments = ["--market", KR, "--to-run", "first", *tables(night, lease_seconds=LEASE_SECONDS)]
    version = night.version("relevance_scores")

    recorded: list[tuple[str, bool]] = []
    # The second one takes over a lease that was not given back, which is a commit, too.
    for file, made, expected in ((commit_file, version + 1, new), (checksum_file, version + 2, old)):
        killed_at(night, file("relevance_scores", made), "rollback", *arguments)
        assert scores_of(night, KR).equals(expected)
        assert scores_of(night, TW).equals(other)
        rows = night.table("scoring_runs").query("intervention.notna()").sort_values("started_at")
        recorded = [(row["verdict"], pd.isna(row["published_version"])) for _, row in rows.iterrows()]
    assert recorded == [("running", True)] * 2  # neither says that it was done
    runs, _ = read_runs(spark, str(night.folder / "tables"), None, 9)
    assert len(taken_back(spark, str(night.folder / "tables"), runs)["second"]) == 1  # the table's history knows it

    assert rollback.main(["--market", KR, "--to-run", "first", *tables(night)]) == 0
    assert scores_of(night, KR)[KEY].equals(old[KEY])
    score(night, "third")  # what was wrong is still in the inputs: it is published again
    run = night.run("third")
    assert (run["changes"], run["num_scored"]) == ({"update": 4}, 4)
    night.check_scores({"first", "second", "third"})
    night.shown.add("bounded rework")
