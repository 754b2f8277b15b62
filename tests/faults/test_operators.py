"""What operators and sellers do between nights: jobs that are killed, tables restored by hand, products that move."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pyspark.sql import SparkSession

from csrm.cli import setting_arguments
from csrm.commands import rollback, score_catalog
from csrm.errors import AuditError
from csrm.operations.history import read_runs, taken_back
from tests.faults.cluster import ROOT, clean_environment
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


KILLED = """
import importlib, os, signal, sys, threading
from csrm.cli import run_job

def die(*_):
    os.killpg(0, signal.SIGKILL)

def dying(*arguments, **named):
    if {seconds} is not None:
        threading.Timer({seconds}, die).start()
    sound(*arguments, **named)
    die()

place = importlib.import_module({module!r})
sound = place.{function}
place.{function} = dying
sys.exit(run_job(importlib.import_module("csrm.commands.{job}").main))
"""
"""A job that is killed with its JVM while it calls a function, or after that where no seconds are given."""


def run_until_killed(folder: Path, job: str, function: str, seconds: float | None, arguments: list[str]) -> None:
    module = f"csrm.operations.{job}"
    path = folder / f"{job}_{function}.py"
    path.write_text(KILLED.format(job=job, module=module, function=function, seconds=seconds))
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT), "PYSPARK_PYTHON": sys.executable}
    command = [sys.executable, str(path), *arguments]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, start_new_session=True)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    time.sleep(LEASE_SECONDS)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.fault("the rollback job is killed in its commit, and after it")
def test_a_rollback_killed_anywhere_is_whole_or_did_not_happen(
    spark: SparkSession, night: Night, tmp_path: Path
) -> None:
    score(night, "first")
    old = scores_of(night, KR)
    rename(night, "p001", "수건 세트, 흰색")
    score(night, "second")
    new, other = scores_of(night, KR), scores_of(night, TW)
    arguments = ["--market", KR, "--to-run", "first", *tables(night, lease_seconds=LEASE_SECONDS)]

    for function, seconds in (("publish_changes", 1.0), ("publish_changes", None)):
        run_until_killed(tmp_path, "rollback", function, seconds, arguments)
        found = scores_of(night, KR)
        assert found.equals(old) or (seconds is not None and found.equals(new)), function
        assert scores_of(night, TW).equals(other)

    assert rollback.main(["--market", KR, "--to-run", "first", *tables(night)]) == 0
    assert scores_of(night, KR)[KEY].equals(old[KEY])
    score(night, "third")  # what was wrong is still in the inputs: it is published again
    run = night.run("third")
    assert (run["changes"], run["num_scored"]) == ({"update": 4}, 4)
    night.check_scores({"first", "second", "third"})
    night.shown.add("bounded rework")
