"""Leases: one holder at a time, and none that comes back from the dead."""

import errno
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from csrm.errors import ConfigError, LeaseError
from csrm.night import leases
from csrm.night.leases import RUN_ID, Lease, hold_leases
from csrm.schemas import RELEVANCE_SCORES
from csrm.spark import storage
from csrm.spark.commits import merge_changes
from csrm.spark.migration import migrate_table
from csrm.spark.storage import HadoopFolder, LocalFolder, open_folder
from csrm.spark.tables import create_table, read_table, spark_schema, table_path, table_version
from tests.disks import small_disk

pytestmark = pytest.mark.spark


def changes(spark: SparkSession, score: float, run_id: str) -> DataFrame:
    row = ("tw", "q", "p", score, "E", "digest", 1, datetime(2026, 1, 2, tzinfo=UTC), run_id, None)
    rows_df = spark.createDataFrame([row], spark_schema(RELEVANCE_SCORES))
    return rows_df.selectExpr("*", "'update' AS operation")


def test_a_lease_is_held_by_one_and_given_back(spark: SparkSession, tmp_path: Path) -> None:
    tables = str(tmp_path)
    with hold_leases(spark, tables, ["tw", "kr"], "run a") as held:
        refused = pytest.raises(LeaseError, match=rf"market 'kr': run a \(process {os.getpid()} on ")
        with refused as caught, hold_leases(spark, tables, ["us", "kr"], "run b"):
            pass
        assert caught.value.exit_code == 5
        with hold_leases(spark, tables, ["us"], "run b"):  # all or none: it was not kept
            held["kr"].require()

    with hold_leases(spark, tables, ["kr"], "run b") as again:
        assert again["kr"].fence > held["kr"].fence + 1


def test_a_block_that_raises_gives_its_leases_back(spark: SparkSession, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hold_leases(spark, str(tmp_path), ["tw"], "run a"):
        raise ZeroDivisionError
    with hold_leases(spark, str(tmp_path), ["tw"], "run b"):
        pass


def test_a_holder_that_lives_keeps_its_lease_and_a_silent_one_loses_it(spark: SparkSession, tmp_path: Path) -> None:
    tables = str(tmp_path)
    with hold_leases(spark, tables, ["tw"], "run a", seconds=1.5) as held:
        time.sleep(3)
        held["tw"].require()
        with pytest.raises(LeaseError), hold_leases(spark, tables, ["tw"], "run b", seconds=1.5):
            pass

    asleep = take(spark, tables, "tw", "run a", 1.0)  # no beats
    time.sleep(1.2)
    lost = pytest.raises(LeaseError, match=r"was silent for over 1 s and lost its lease to run b \(process")
    with hold_leases(spark, tables, ["tw"], "run b", seconds=1.0), lost:
        asleep.require()


def test_who_slept_past_its_lease_cannot_publish_over_its_successor(
    spark: SparkSession, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables, slice_ = str(tmp_path / "it's"), {"market": "tw"}
    path = table_path(tables, RELEVANCE_SCORES)
    create_table(spark, RELEVANCE_SCORES, path)
    asleep = take(spark, tables, "tw", "run a", 1.0)
    time.sleep(1.2)

    with caplog.at_level(logging.WARNING), hold_leases(spark, tables, ["tw"], "run b", seconds=30) as held:
        assert "took over the lease of run a" in caplog.text
        version = table_version(spark, path)
        late = merge_changes(
            changes(spark, 0.1, "a"), RELEVANCE_SCORES, path, slice_, {"run_id": "a"}, asleep.transaction
        )
        assert (late, table_version(spark, path)) == (None, version)

        committed = merge_changes(
            changes(spark, 0.9, "b"), RELEVANCE_SCORES, path, slice_, {"run_id": "b"}, held["tw"].transaction
        )
        assert committed == version + 1
        again = merge_changes(
            changes(spark, 0.1, "a"), RELEVANCE_SCORES, path, slice_, {"run_id": "a"}, asleep.transaction
        )
        assert again is None

    assert [row["run_id"] for row in read_table(spark, RELEVANCE_SCORES, path).collect()] == ["b"]


def test_a_lost_folder_of_leases_does_not_block_the_table(spark: SparkSession, tmp_path: Path) -> None:
    tables, path = str(tmp_path), table_path(str(tmp_path), RELEVANCE_SCORES)
    create_table(spark, RELEVANCE_SCORES, path)
    for run_id in ("a", "b"):
        with hold_leases(spark, tables, ["tw"], run_id) as held:
            transaction = held["tw"].transaction
            market_df = changes(spark, 0.5, run_id)
            assert merge_changes(market_df, RELEVANCE_SCORES, path, {"market": "tw"}, {}, transaction)
        for file in (tmp_path / "_leases" / "market=tw").iterdir():
            file.unlink()
        time.sleep(0.01)


def take(spark: SparkSession, tables: str, market: str, owner: str, seconds: float) -> Lease:
    """A lease that is not renewed, as of a process that sleeps."""
    seen = leases._look(spark, tables, market)
    lease = leases._create(seen, owner, seconds)
    leases._settle(spark, tables, seen, lease)
    return lease


@pytest.mark.parametrize("empty", ["1.lease", "1.beat"])
def test_a_file_that_is_being_written_is_a_sign_of_life_and_one_left_empty_ends_the_lease(
    spark: SparkSession, tmp_path: Path, empty: str
) -> None:
    market, hour_ago = tmp_path / "_leases" / "market=tw", time.time() - 3600
    market.mkdir(parents=True)
    lease = {"owner": "run a", "host": "h", "pid": 1, "at": hour_ago, "seconds": 60, "fence": 7}
    (market / "1.lease").write_text(json.dumps(lease))
    (market / empty).write_text("")
    through_hadoop = HadoopFolder(spark, f"file://{market}")

    assert leases._Holder.read(through_hadoop, 1).holds
    with pytest.raises(LeaseError, match="works on it"), hold_leases(spark, str(tmp_path), ["tw"], "run b"):
        pass

    os.utime(market / empty, (hour_ago, hour_ago))
    assert not leases._Holder.read(through_hadoop, 1).holds
    with hold_leases(spark, str(tmp_path), ["tw"], "run b") as held:
        held["tw"].require()


@pytest.mark.parametrize("market", ["..", "a/b", "台灣 'x'", "no"])
def test_any_market_name_has_a_folder_of_its_own(spark: SparkSession, tmp_path: Path, market: str) -> None:
    with hold_leases(spark, str(tmp_path / "tables"), [market], "run a"):
        assert len(list((tmp_path / "tables" / "_leases").iterdir())) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"tables"}


def test_storage_through_hadoop_keeps_leases_too(spark: SparkSession, tmp_path: Path) -> None:
    folder = HadoopFolder(spark, f"file://{tmp_path}/leases")

    assert folder.create("1.lease", "Ä") is True
    assert folder.create("1.lease", "B") is False
    assert (folder.read("1.lease"), folder.read("2.lease")) == ("Ä", None)
    folder.write("1.beat", "1")
    folder.write("1.beat", "2")
    assert folder.read("1.beat") == "2"
    assert sorted(folder.names()) == ["1.beat", "1.lease"]
    folder.delete("1.beat")
    assert folder.names() == ["1.lease"]


def test_a_storage_that_cannot_keep_two_runs_apart_is_named(
    spark: SparkSession, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "HadoopFolder", lambda spark, uri: uri)  # there is no bucket here

    with caplog.at_level(logging.WARNING):
        open_folder(spark, "s3a://bucket/tables/_leases/market=tw")

    assert "tables on s3a://: this storage is not known to create a file only once" in caplog.text


def test_a_path_that_is_one_place_for_spark_and_another_for_leases_is_refused(
    spark: SparkSession, tmp_path: Path
) -> None:
    hadoop, path = spark.sparkContext._jsc.hadoopConfiguration(), table_path(str(tmp_path), RELEVANCE_SCORES)
    here, message = hadoop.get("fs.defaultFS"), rf"got a path without a scheme, .* hdfs://cluster{tmp_path}.* file://"
    hadoop.set("fs.defaultFS", "hdfs://cluster/")
    try:
        with pytest.raises(ConfigError, match=message), hold_leases(spark, str(tmp_path), ["tw"], "run a"):
            pass
        with pytest.raises(ConfigError, match=message):
            create_table(spark, RELEVANCE_SCORES, path)
        with pytest.raises(ConfigError, match=message):
            migrate_table(spark, RELEVANCE_SCORES, path)
        assert not list(tmp_path.iterdir())
        with hold_leases(spark, f"file://{tmp_path}", ["tw"], "run a"):
            pass
    finally:
        hadoop.set("fs.defaultFS", here)


def _create(path: Path, barrier: object, created: object) -> None:
    folder = LocalFolder(path)
    barrier.wait()  # type: ignore[attr-defined]
    if folder.create("1.lease", str(os.getpid())):
        created.put(os.getpid())  # type: ignore[attr-defined]


def test_of_many_processes_that_take_a_lease_at_once_one_gets_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, created = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_create, args=(tmp_path, barrier, created)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    winner = created.get(timeout=10)
    assert created.empty()
    assert LocalFolder(tmp_path).read("1.lease") == str(winner)
    assert [path.name for path in tmp_path.iterdir()] == ["1.lease"]


@pytest.mark.parametrize(
    "name", [".DS_Store", "_SUCCESS", ".nfs0001", "1 (copy).lease", "lease", "9.lease.0f3a", "x.beat"]
)
def test_files_of_other_names_beside_the_leases_are_left_alone(spark: SparkSession, tmp_path: Path, name: str) -> None:
    with hold_leases(spark, str(tmp_path), ["tw"], "run a"):
        pass
    (tmp_path / "_leases" / "market=tw" / name).write_bytes(b"\xff")

    with hold_leases(spark, str(tmp_path), ["tw"], "run b") as held:
        held["tw"].require()


@pytest.mark.parametrize(
    "content", [b"{", b"null", b"[1]", b'{"at": "now", "seconds": "60", "fence": null}', b"\xff\xfe", b"[" * 9000]
)
@pytest.mark.parametrize("name", ["1.lease", "1.beat"])
def test_a_damaged_file_of_a_lease_is_a_sign_of_life_of_when_it_was_written(
    spark: SparkSession, tmp_path: Path, name: str, content: bytes
) -> None:
    market, hour_ago = tmp_path / "_leases" / "market=tw", time.time() - 3600
    market.mkdir(parents=True)
    lease = {"owner": "run a", "host": "h", "pid": 1, "at": hour_ago, "seconds": 60, "fence": 7}
    (market / "1.lease").write_text(json.dumps(lease))
    (market / name).write_bytes(content)
    with pytest.raises(LeaseError, match="works on it"), hold_leases(spark, str(tmp_path), ["tw"], "run b"):
        pass
    os.utime(market / name, (hour_ago, hour_ago))
    with hold_leases(spark, str(tmp_path), ["tw"], "run b") as held:
        held["tw"].require()


def test_the_clock_of_a_holder_that_ran_a_day_ahead_does_not_block_the_market(
    spark: SparkSession, tmp_path: Path
) -> None:
    market, hour_ago = tmp_path / "_leases" / "market=tw", time.time() - 3600
    market.mkdir(parents=True)
    lease = {"owner": "run a", "host": "h", "pid": 1, "at": hour_ago, "seconds": 60, "fence": 7}
    (market / "1.lease").write_text(json.dumps(lease))
    (market / "1.beat").write_text(json.dumps({"at": time.time() + 86_400}))
    with pytest.raises(LeaseError, match="works on it"), hold_leases(spark, str(tmp_path), ["tw"], "run b"):
        pass  # the storage's own clock says that it was written just now
    os.utime(market / "1.beat", (hour_ago, hour_ago))

    with hold_leases(spark, str(tmp_path), ["tw"], "run b") as held:
        held["tw"].require()


def test_many_markets_on_a_slow_storage_are_held_while_others_are_taken(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SlowFolder(LocalFolder):
        def create(self, name: str, text: str) -> bool:
            time.sleep(0.06)
            return super().create(name, text)

        def write(self, name: str, text: str) -> None:
            time.sleep(0.06)
            super().write(name, text)

        def names(self) -> list[str]:
            time.sleep(0.06)
            return super().names()

    def open_slow(spark: SparkSession, uri: str) -> LocalFolder:
        return SlowFolder(Path(uri))

    monkeypatch.setattr(leases, "open_folder", open_slow)
    markets = [f"m{n:03}" for n in range(120)]
    with hold_leases(spark, str(tmp_path), markets, "run a", seconds=5.0) as held:  # taking them takes longer
        time.sleep(6)
        for lease in held.values():
            lease.require()
        refused = pytest.raises(LeaseError, match="market 'm000': run a")
        with refused, hold_leases(spark, str(tmp_path), markets[:1], "run b", seconds=5.0):
            pass


def test_a_sleeper_stays_shut_out_where_its_successor_got_no_further_than_to_ask(
    spark: SparkSession, tmp_path: Path
) -> None:
    tables, path = str(tmp_path), table_path(str(tmp_path), RELEVANCE_SCORES)
    create_table(spark, RELEVANCE_SCORES, path)
    asleep = take(spark, tables, "kr", "run a", 1.0)
    time.sleep(1.2)
    with hold_leases(spark, tables, ["tw"], "run b", seconds=30):
        refused = pytest.raises(LeaseError, match="market 'tw': run b")
        with refused, hold_leases(spark, tables, ["kr", "tw"], "run c", seconds=30):
            pass

    with hold_leases(spark, tables, ["kr"], "run d", seconds=30):
        late_df = changes(spark, 0.1, "a").withColumn("market", F.lit("kr"))
        late = merge_changes(late_df, RELEVANCE_SCORES, path, {"market": "kr"}, {"run_id": "a"}, asleep.transaction)

    assert late is None
    assert read_table(spark, RELEVANCE_SCORES, path).count() == 0


def test_after_a_signal_or_an_unknown_error_the_next_holder_fences(spark: SparkSession, tmp_path: Path) -> None:
    tables, path = str(tmp_path), table_path(str(tmp_path), RELEVANCE_SCORES)
    create_table(spark, RELEVANCE_SCORES, path)
    for error, num_fences in ((SystemExit(143), 1), (ZeroDivisionError(), 1), (ConfigError("ours"), 0)):
        with pytest.raises(type(error)), hold_leases(spark, tables, ["tw"], "run a"):
            raise error
        version = table_version(spark, path)
        with hold_leases(spark, tables, ["tw"], "run b"):
            assert table_version(spark, path) == version + num_fences


def test_what_keeps_a_lease_from_being_given_back_does_not_hide_the_error_of_the_block(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("storage down")

    def fail_with_the_storage() -> None:
        with hold_leases(spark, str(tmp_path), ["tw"], "run a"):
            monkeypatch.setattr(LocalFolder, "write", fail)
            raise ConfigError("ours")

    with pytest.raises(ConfigError, match="ours"):
        fail_with_the_storage()


def test_a_folder_that_cannot_be_written_is_an_error_with_the_way_out(spark: SparkSession, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        with hold_leases(spark, str(disk), ["tw"], "run a"):
            pass
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        refused = pytest.raises(ConfigError, match=r"cannot be written in _leases: Read-only file system .*writable")
        with refused, hold_leases(spark, str(disk), ["tw"], "run b"):
            pass
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        with suppress(OSError), (disk / "full").open("wb") as file:
            while True:
                file.write(b"0" * 4096)
                file.flush()
        with (
            pytest.raises(ConfigError, match="No space left on device"),
            hold_leases(spark, str(disk), ["tw"], "run b"),
        ):
            pass
        (disk / "full").unlink()
        with hold_leases(spark, str(disk), ["tw"], "run b"):
            pass


def test_a_lease_is_taken_once_on_a_mount_without_hard_links(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with hold_leases(spark, str(tmp_path), ["tw"], "run a"):
        with pytest.raises(LeaseError, match="run a"), hold_leases(spark, str(tmp_path), ["tw"], "run b"):
            pass
        assert not LocalFolder(tmp_path / "_leases" / "market=tw").create("1.lease", "other")
    assert not list(tmp_path.rglob("1.lease.*"))


def test_one_run_at_a_time_has_an_id_whatever_its_markets(spark: SparkSession, tmp_path: Path) -> None:
    tables = str(tmp_path)
    with hold_leases(spark, tables, ["tw"], "run a:1", run_id="a:1") as held:
        refused = pytest.raises(LeaseError, match=r"run id 'a:1': run a:1 .*of other markets needs another --run-id")
        with refused, hold_leases(spark, tables, ["kr"], "run a:1", run_id="a:1"):
            pass
        with hold_leases(spark, tables, ["kr"], "run b", run_id="b"):
            held[RUN_ID].require()

    with hold_leases(spark, tables, ["kr"], "run a:1", run_id="a:1"):
        pass
    leases.forget_leases(spark, tables, ["a:1", "c"])
    assert sorted(path.name for path in (tmp_path / "_leases").iterdir()) == ["market=kr", "market=tw", "run=b"]


def test_a_run_whose_folder_of_leases_is_deleted_ends_with_the_way_out(spark: SparkSession, tmp_path: Path) -> None:
    with hold_leases(spark, str(tmp_path), ["tw"], "run a") as held:
        shutil.rmtree(tmp_path / "_leases")
        with pytest.raises(
            LeaseError, match=r"market 'tw': its lease in _leases cannot be read any more: No such file"
        ):
            held["tw"].require()
