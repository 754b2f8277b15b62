"""Nights in a row: what is scored, what is published, what a rejection leaves, who may work on a market."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import deltalake
import pandas as pd
import pytest
import yaml
from delta.tables import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from csrm.bundle import load_bundle
from csrm.cli import setting_arguments
from csrm.commands import publish, rollback, score_catalog
from csrm.errors import AuditError, ConfigError, InputError, LeaseError
from csrm.night import run
from csrm.night.first_look import look_at_texts
from csrm.night.leases import hold_leases
from csrm.night.runs import read_run_rows, record_run, require_run, write_run_rows
from csrm.schemas import RUN_PAIRS, SCORES_STAGING
from csrm.spark.tables import spark_schema

pytestmark = [pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
KR, TW = "kr", "台灣 'b'/ $x"
KEY = ["market", "query_id", "product_id"]
PRODUCTS = ["캠핑 텐트", "수건 세트", "등산화 270", "露營帳篷", "防水登山外套", "Wireless Mouse"]
QUERIES = ["텐트", "신발", "帳篷", "mouse"]


class Market:
    """Input tables of two markets on disk, and the jobs on them."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        self.folder, self.bundle = folder, bundle
        markets = (KR, TW)
        self.catalog = pd.DataFrame(
            [(market, f"p{n}", title) for market in markets for n, title in enumerate(PRODUCTS)],
            columns=["market", "product_id", "title"],
        )
        self.queries = pd.DataFrame(
            [(market, f"q{n}", query) for market in markets for n, query in enumerate(QUERIES)],
            columns=["market", "query_id", "query"],
        )
        self.candidates = self.queries[["market", "query_id"]].merge(self.catalog[["market", "product_id"]])
        titles = [(market, f"q{n}", 1, "p0", "캠핑 텐트", 1.0, "lexical") for market in markets for n in range(4)]
        names = ["market", "query_id", "rank", "product_id", "title", "similarity", "source"]
        self.retrieval_table = pd.DataFrame(titles, columns=names).astype({"rank": "int32"})

    def arguments(self, **settings: Any) -> list[str]:
        """Command line of the scoring job, after the tables were written."""
        values: dict[str, Any] = {
            "markets": {KR: "ko", TW: "zh-TW"},
            "inputs": {},
            "tables": str(self.folder / "tables"),
            "bundle": str(self.bundle),
            "canary_pairs": 5,
            "lease_seconds": 3,
            **settings,
        }
        for name in ("catalog", "queries", "candidates", "retrieval_table"):
            path = self.folder / f"{name}.parquet"
            getattr(self, name).to_parquet(path)
            values["inputs"][name] = {"path": str(path), "format": "parquet"}
        config = self.folder / "score_catalog.yaml"
        config.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        return ["--config", str(config), "--log-format", "json"]

    def score(self, run_id: str, **settings: Any) -> None:
        assert score_catalog.main([*self.arguments(**settings), "--run-id", run_id]) == 0

    def publish(self, *arguments: str) -> int:
        config = self.folder / "publish.yaml"
        config.write_text(yaml.safe_dump({"tables": str(self.folder / "tables"), "lease_seconds": 3}))
        return publish.main(["--config", str(config), *arguments])

    def table(self, name: str) -> pd.DataFrame:
        return deltalake.DeltaTable(str(self.folder / "tables" / name)).to_pandas()

    def scores(self) -> pd.DataFrame:
        return self.table("relevance_scores").sort_values(KEY, ignore_index=True)

    def version(self) -> int:
        return deltalake.DeltaTable(str(self.folder / "tables" / "relevance_scores")).version()

    def run(self, run_id: str) -> dict[str, Any]:
        (row,) = self.table("scoring_runs").query("run_id == @run_id").to_dict("records")
        return {**row, **{name: dict(row[name] or {}) for name in ("rejected", "changes", "seconds")}}

    def states(self, run_id: str) -> dict[tuple[str, ...], str]:
        pairs = self.table("run_pairs").query("run_id == @run_id")
        return {tuple(row[:3]): row[3] for row in pairs[[*KEY, "state"]].itertuples(index=False)}


@pytest.fixture
def market(spark: SparkSession, tmp_path: Path, tiny_bundle: Path) -> Market:
    return Market(tmp_path, tiny_bundle)


@pytest.fixture(scope="module")
def first_night(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Path:
    """Folder of a market after its first night."""
    market = Market(tmp_path_factory.mktemp("first"), tiny_bundle)
    market.score("first")
    assert market.run("first")["changes"] == {"insert": 48}
    return market.folder


@pytest.fixture
def scored_market(market: Market, first_night: Path, said: Callable[[], object]) -> Market:
    """A market after its first night."""
    shutil.copytree(first_night, market.folder, dirs_exist_ok=True)
    said()
    return market


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], dict[str, dict[str, Any]]]:
    """What the job has printed since the last call: event to its fields."""

    def read() -> dict[str, dict[str, Any]]:
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
        return {line["event"]: line for line in lines}

    return read


def test_a_first_look_warns_of_a_market_whose_texts_the_training_never_saw(
    market: Market, pairs_pdf: pd.DataFrame, capfd: pytest.CaptureFixture[str]
) -> None:
    """One market has texts that the tiny bundle was trained on, the other has Thai ones."""
    thai = (["เต็นท์", "ผ้าขนหนู", "รองเท้าเดินป่า", "เสื้อกันฝน", "เมาส์ไร้สาย", "กระเป๋าเป้"], ["เต็นท์", "รองเท้า", "ผ้า", "เมาส์"])
    known = ([*pairs_pdf["title"].unique()] * 2, [*pairs_pdf["query"].unique()])
    for name, (titles, queries) in ((KR, known), (TW, thai)):
        market.catalog.loc[market.catalog["market"] == name, "title"] = titles[:6]
        market.queries.loc[market.queries["market"] == name, "query"] = queries[:4]
    assert look_at_texts(load_bundle(market.bundle), known[1], known[0]).num_unseen == 0

    market.score("first")

    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    found = {(line["market"], line["name"]) for line in lines if line["event"] == "warning" and "name" in line}
    assert (TW, "unseen_tokens") in found
    assert (KR, "unseen_tokens") not in found
    results = json.loads(market.run("first")["audit"])
    assert {(result["market"], result["name"]) for result in results if result["name"] == "unseen_tokens"} == {
        (KR, "unseen_tokens"),
        (TW, "unseen_tokens"),
    }
    capfd.readouterr()
    market.score("second")
    assert "unseen_tokens" not in market.run("second")["audit"]


def test_label_probabilities_are_filled_once_where_they_are_asked_for(
    scored_market: Market, said: Callable[[], dict[str, dict[str, Any]]]
) -> None:
    market = scored_market
    first = market.scores()
    assert first["label_probabilities"].isna().all()

    market.score("asked", label_probabilities=True)

    asked = market.scores()
    assert said()["plan"]["num_to_score"] == 48
    assert market.run("asked")["changes"] == {"update": 48}
    assert asked[[*KEY, "pair_key", "predicted_grade"]].equals(first[[*KEY, "pair_key", "predicted_grade"]])
    assert (asked["relevance_score"] - first["relevance_score"]).abs().max() < 1e-5
    for probabilities, grade in zip(asked["label_probabilities"].map(dict), asked["predicted_grade"], strict=True):
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert max(probabilities, key=probabilities.__getitem__) == grade

    market.score("again", label_probabilities=True)
    printed = said()
    assert (printed["plan"]["num_unchanged"], printed["plan"]["num_to_score"]) == (48, 0)
    assert "already_published" in printed

    is_renamed = (market.catalog["market"] == KR) & (market.catalog["product_id"] == "p1")
    market.catalog.loc[is_renamed, "title"] = "목욕 수건"
    market.score("without")
    assert said()["plan"]["num_to_score"] == 4
    assert market.scores()["label_probabilities"].isna().sum() == 4

    tables = setting_arguments(tables=market.folder / "tables", lease_seconds=3)
    assert rollback.main(["--market", KR, "--to-run", "asked", *tables]) == 0
    assert market.scores().equals(asked)


def test_a_right_score_stays_where_its_probabilities_cannot_be_had(spark: SparkSession, scored_market: Market) -> None:
    market = scored_market
    path = str(market.folder / "tables" / "scores_staging")
    is_pair = (F.col("market") == KR) & (F.col("query_id") == "q0") & (F.col("product_id") == "p0")
    bare_df = spark.read.format("delta").load(path).where(is_pair).withColumn("run_id", F.lit("not published"))
    assert bare_df.count() == 1
    nothing = {name: F.lit(None) for name in ("relevance_score", "predicted_grade")}
    failed_df = bare_df.withColumns({**nothing, "run_id": F.lit("asked"), "reason": F.lit("model_error")})
    rows = [*bare_df.collect(), *failed_df.collect()]
    spark.createDataFrame(rows, spark_schema(SCORES_STAGING)).write.format("delta").mode("append").save(path)

    market.score("asked", label_probabilities=True)

    assert market.run("asked")["rejected"] == {}
    assert market.run("asked")["changes"] == {"update": 47}
    scores = market.scores()
    assert scores["relevance_score"].notna().all()
    assert scores["label_probabilities"].isna().sum() == 1


def test_a_night_scores_what_changed_and_the_change_feed_holds_exactly_that(
    spark: SparkSession, scored_market: Market, said: Callable[[], dict[str, dict[str, Any]]], tmp_path: Path
) -> None:
    market = scored_market
    first = market.scores()
    assert len(first) == 48

    market.score("second")
    printed = said()
    assert (printed["plan"]["num_unchanged"], printed["plan"]["num_to_score"]) == (48, 0)
    assert "already_published" in printed
    assert market.scores().equals(first)
    assert market.run("second")["published_version"] == market.run("first")["published_version"]

    before = market.version()
    is_renamed = (market.catalog["market"] == KR) & (market.catalog["product_id"] == "p1")
    market.catalog.loc[is_renamed, "title"] = "목욕 수건"
    is_retitled = (market.retrieval_table["market"] == TW) & (market.retrieval_table["query_id"] == "q3")
    market.retrieval_table.loc[is_retitled, "title"] = "滑鼠"
    gone = (market.candidates["market"] == KR) & (market.candidates["query_id"] == "q0")
    gone &= market.candidates["product_id"] == "p5"
    market.catalog.loc[len(market.catalog)] = (TW, "p9", "滑鼠墊")
    market.candidates = pd.concat(
        [
            market.candidates[~gone],
            pd.DataFrame([(TW, "q0", "p9")], columns=KEY),
            pd.DataFrame([(TW, "q1", "p8")], columns=KEY),
        ]
    )
    market.score("third", audit={"rejected_share": 0.1})

    of_product = {(KR, f"q{n}", "p1") for n in range(4)}
    of_query = {(TW, "q3", f"p{n}") for n in range(6)}
    assert {pair for pair, state in market.states("third").items() if state == "to_score"} == {
        *of_product,
        *of_query,
        (TW, "q0", "p9"),
    }
    assert market.run("third")["changes"] == {"update": 10, "insert": 1, "delete": 1}
    assert market.run("third")["rejected"] == {"no_product": 1}
    feed = (
        spark.read.format("delta")
        .option("readChangeFeed", "true")
        .option("startingVersion", before + 1)
        .load(str(market.folder / "tables" / "relevance_scores"))
        .where("_change_type != 'update_preimage'")
        .toPandas()
    )
    assert {(*row[:3], row[3]) for row in feed[[*KEY, "_change_type"]].itertuples(index=False)} == {
        *((*pair, "update_postimage") for pair in of_product | of_query),
        (TW, "q0", "p9", "insert"),
        (KR, "q0", "p5", "delete"),
    }
    assert feed.groupby("market")["_commit_version"].nunique().to_dict() == {KR: 1, TW: 1}
    third = market.scores()
    assert set(third.loc[third["run_id"] == "third", KEY].itertuples(index=False, name=None)) == {
        *of_product,
        *of_query,
        (TW, "q0", "p9"),
    }
    untouched = third[third["run_id"] == "first"]
    assert len(untouched) == 48 - 11
    assert untouched.merge(first, on=list(first.columns)).shape == untouched.shape

    version = int(market.run("first")["published_version"])
    rebuilt = deltalake.DeltaTable(str(market.folder / "tables" / "relevance_scores"), version=version)
    assert rebuilt.to_pandas().sort_values(KEY, ignore_index=True).equals(first)

    said()
    market.score("scratch", tables=str(tmp_path / "scratch"), audit={"rejected_share": 0.1})
    assert said()["plan"]["num_to_score"] == 48
    scratch = deltalake.DeltaTable(str(tmp_path / "scratch" / "relevance_scores")).to_pandas()
    scratch = scratch.sort_values(KEY, ignore_index=True)
    assert third[[*KEY, "pair_key"]].equals(scratch[[*KEY, "pair_key"]])
    assert (third["relevance_score"] - scratch["relevance_score"]).abs().max() <= 1e-5


def test_a_rejected_run_is_repeated_reused_and_published_by_a_person(
    scored_market: Market, said: Callable[[], dict[str, dict[str, Any]]]
) -> None:
    market = scored_market
    before = market.scores()
    market.candidates = market.candidates[market.candidates["product_id"] != "p0"]
    market.catalog.loc[market.catalog["product_id"] == "p1", "title"] = "목욕 수건"
    strict = {"audit": {"deleted_share": 0.1}}
    with pytest.raises(AuditError, match=r"deleted_share: 0\.1667, expected <= 0\.1\. 4 of 24 published rows would be"):
        market.score("second", **strict)
    assert said()["plan"]["num_to_score"] == 8
    assert {result["name"] for result in json.loads(market.run("second")["audit"]) if not result["passed"]} == {
        "deleted_share"
    }
    assert market.scores().equals(before)

    with pytest.raises(
        AuditError, match=r"csrm publish --config FOLDER/publish.yaml --run-id second --accept deleted_share --reason"
    ):
        market.score("second", **strict)
    assert (said()["plan"]["num_to_score"], market.run("second")["num_reused"]) == (0, 8)

    with pytest.raises(ConfigError, match=r"no failed check is called so; those of this run are \['deleted_share'\]"):
        market.publish("--run-id", "second", "--accept", "drift", "--reason", "because")
    assert market.publish("--run-id", "second", "--accept", "deleted_share", "--reason", "season is over") == 0
    run = market.run("second")
    assert (run["verdict"], run["changes"]) == ("published", {"update": 8, "delete": 8})
    assert "season is over" in run["audit"]
    after = market.scores()
    assert len(after) == 40
    assert set(after["run_id"]) == {"first", "second"}
    with pytest.raises(ConfigError, match="expected a run that its audit rejected, it is published"):
        market.publish("--run-id", "second", "--accept", "deleted_share", "--reason", "again")

    market.score("third", **strict)
    assert said()["plan"]["num_unchanged"] == 40


def test_discarded_scores_are_never_used_again(market: Market, said: Callable[[], dict[str, dict[str, Any]]]) -> None:
    strict = {"audit": {"product_coverage": {"limit": 1.1, "severity": "error"}}}
    with pytest.raises(AuditError, match="product_coverage"):
        market.score("bad", **strict)
    assert len(market.table("scores_staging")) == 48

    assert market.publish("--run-id", "bad", "--discard") == 0
    assert market.run("bad")["verdict"] == "discarded"
    said()
    market.score("good")
    assert said()["plan"]["num_to_score"] == 48
    with pytest.raises(ConfigError, match="was published, which discarding would not undo"):
        market.publish("--run-id", "good", "--discard")


def test_a_published_score_that_is_wrong_fails_the_canary(spark: SparkSession, scored_market: Market) -> None:
    market = scored_market
    path = str(market.folder / "tables" / "relevance_scores")
    DeltaTable.forPath(spark, path).update(f"market = '{KR}'", {"relevance_score": "relevance_score * 0.5"})

    with pytest.raises(AuditError, match="another model, device or driver than that of the published scores"):
        market.score("second")

    (failed,) = [result for result in json.loads(market.run("second")["audit"]) if not result["passed"]]
    assert (failed["market"], failed["name"]) == (KR, "canary")


def test_what_a_run_staged_whose_canary_failed_is_scored_again(
    spark: SparkSession, scored_market: Market, said: Callable[[], dict[str, dict[str, Any]]]
) -> None:
    market = scored_market
    market.catalog.loc[market.catalog["product_id"] == "p1", "title"] = "목욕 수건"
    path, version = str(market.folder / "tables" / "relevance_scores"), market.version()
    DeltaTable.forPath(spark, path).update(f"market = '{KR}'", {"relevance_score": "relevance_score * 0.5"})
    with pytest.raises(AuditError, match="canary"):
        market.score("second")
    said()

    with pytest.raises(AuditError, match="canary"):
        market.score("second")
    printed = said()
    assert printed["distrusted"]["num_rows"] == 8
    assert (printed["plan"]["num_reused"], printed["plan"]["num_to_score"]) == (0, 8)

    DeltaTable.forPath(spark, path).restoreToVersion(version)
    market.score("third")
    assert (said()["plan"]["num_reused"], market.run("third")["num_scored"]) == (0, 8)


def test_reused_scores_are_in_the_canary_and_are_discarded_with_the_run_that_would_publish_them(
    spark: SparkSession, scored_market: Market, said: Callable[[], dict[str, dict[str, Any]]]
) -> None:
    market, strict = scored_market, {"product_coverage": {"limit": 1.1, "severity": "error"}}
    market.catalog.loc[market.catalog["product_id"] == "p1", "title"] = "목욕 수건"
    with pytest.raises(AuditError, match="product_coverage"):
        market.score("second", audit=strict)
    staging = DeltaTable.forPath(spark, str(market.folder / "tables" / "scores_staging"))
    staging.update("run_id = 'second'", {"relevance_score": "1 - relevance_score"})

    with pytest.raises(AuditError, match=r"canary_reused: .* than that of the reused scores") as caught:
        market.score("third")

    assert "--run-id third --discard" in str(caught.value)
    assert market.run("third")["num_reused"] == 8
    said()
    assert market.publish("--run-id", "third", "--discard", "--log-format", "json") == 0
    assert said()["discarded"]["num_rows"] == 8
    with pytest.raises(InputError, match="found 0 of the 8 scores that it had staged or reused"):
        market.publish("--run-id", "second", "--discard")
    market.score("fourth")
    assert (said()["plan"]["num_reused"], market.run("fourth")["num_scored"]) == (0, 8)


def test_scores_that_a_discarding_which_died_left_do_not_come_back_under_the_run_id(
    spark: SparkSession, scored_market: Market, said: Callable[[], dict[str, dict[str, Any]]]
) -> None:
    market, strict = scored_market, {"product_coverage": {"limit": 1.1, "severity": "error"}}
    market.catalog.loc[market.catalog["product_id"] == "p1", "title"] = "목욕 수건"
    with pytest.raises(AuditError, match="product_coverage"):
        market.score("second", audit=strict)
    tables = str(market.folder / "tables")
    record_run(spark, tables, require_run(spark, tables, "second") | {"verdict": "discarded"})
    said()

    market.score("second")

    events = said()
    assert (events["distrusted"]["num_rows"], events["plan"]["num_reused"]) == (8, 0)
    assert market.run("second")["num_scored"] == 8


def test_a_run_id_that_was_published_before_is_published_again_where_its_state_is_gone(
    spark: SparkSession, scored_market: Market, said: Callable[[], dict[str, dict[str, Any]]]
) -> None:
    market = scored_market
    market.catalog.loc[market.catalog["product_id"] == "p1", "title"] = "목욕 수건"
    market.score("second")
    after = market.scores()
    said()
    market.score("second")
    assert "plan" not in said()
    for name in (KR, TW):
        rollback.main(["--market", name, "--to-run", "first", *setting_arguments(tables=str(market.folder / "tables"))])
    assert set(market.scores()["run_id"]) == {"first"}

    market.score("second")

    assert said()["plan"]["num_reused"] == 8
    assert market.scores()[[*KEY, "pair_key", "run_id"]].equals(after[[*KEY, "pair_key", "run_id"]])


def test_pairs_that_something_else_wrote_twice_are_named_with_the_way_out(
    spark: SparkSession, scored_market: Market
) -> None:
    market = scored_market
    path, version = str(market.folder / "tables" / "relevance_scores"), market.version()
    spark.read.format("delta").load(path).limit(1).write.format("delta").mode("append").save(path)

    with pytest.raises(InputError, match=rf"1 pairs are there more than once.*TO VERSION AS OF {version}"):
        market.score("second")

    spark.sql(f"RESTORE TABLE delta.`{path}` TO VERSION AS OF {version}")
    market.score("second")


def test_a_plan_that_a_sleeper_of_the_same_run_id_writes_meanwhile_is_not_used(
    spark: SparkSession, scored_market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    market, stage_scores = scored_market, run.stage_scores
    market.catalog.loc[market.catalog["product_id"] == "p1", "title"] = "목욕 수건"
    tables = str(market.folder / "tables")

    def stage_after_the_sleeper_woke(*arguments: Any) -> int:
        old_df = read_run_rows(spark, RUN_PAIRS, tables, "first").withColumn("run_id", F.lit("second"))
        write_run_rows(old_df, RUN_PAIRS, tables, "second")
        return stage_scores(*arguments)

    monkeypatch.setattr(run, "stage_scores", stage_after_the_sleeper_woke)
    market.score("second")

    assert market.run("second")["changes"] == {"update": 8}


def test_a_run_that_lost_a_lease_writes_no_plan(
    spark: SparkSession, scored_market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    market, plan_pairs = scored_market, run.plan_pairs
    folder = market.folder / "tables" / "_leases" / f"market={KR}"

    def plan_while_another_run_takes_the_lease(*arguments: Any) -> DataFrame:
        newest = max(int(path.stem) for path in folder.glob("*.lease"))
        (folder / f"{newest + 1}.lease").write_text(json.dumps({"owner": "run other", "at": time.time()}))
        return plan_pairs(*arguments)

    monkeypatch.setattr(run, "plan_pairs", plan_while_another_run_takes_the_lease)
    with pytest.raises(LeaseError, match="lost its lease"):
        market.score("second")

    assert market.table("run_pairs").query("run_id == 'second'").empty
    assert market.run("second")["verdict"] == "superseded"


def test_a_run_that_lost_its_lease_to_a_successor_of_its_id_leaves_the_row_of_that_one(
    spark: SparkSession, scored_market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    market, plan_pairs = scored_market, run.plan_pairs
    tables = str(market.folder / "tables")

    def plan_while_the_successor_begins(*arguments: Any) -> DataFrame:
        row = require_run(spark, tables, "second")
        record_run(spark, tables, {**row, "started_at": row["started_at"] + timedelta(hours=1)})
        folder = market.folder / "tables" / "_leases" / f"market={KR}"
        newest = max(int(path.stem) for path in folder.glob("*.lease"))
        (folder / f"{newest + 1}.lease").write_text(json.dumps({"owner": "run second", "at": time.time()}))
        return plan_pairs(*arguments)

    monkeypatch.setattr(run, "plan_pairs", plan_while_the_successor_begins)
    with pytest.raises(LeaseError, match="lost its lease"):
        market.score("second")

    assert market.run("second")["verdict"] == "running"


def test_queries_that_name_a_market_s_language_otherwise_are_said(
    market: Market, capfd: pytest.CaptureFixture[str]
) -> None:
    """`ko-KR` makes another prompt than `ko`, and other scores."""
    market.queries["language"] = ["ko-KR", None, "ko", "en"] * 2
    market.score("n1")
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    said = [line["sentence"] for line in lines if line["event"] == "warning"]
    (sentence,) = [text for text in said if "queries name languages" in text]
    assert sentence.startswith(
        "2 queries name languages that the bundle was not proven on, such as 'ko-KR' (2); it was"
    )


def test_a_language_that_the_bundle_was_not_proven_on_is_said_and_an_empty_catalog_publishes_nothing(
    market: Market, capfd: pytest.CaptureFixture[str]
) -> None:
    def said(event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    markets = {KR: "ko", TW: "fr"}
    market.score("first", markets=markets)
    assert said("warning")[0]["sentence"].startswith(f"market {TW!r} is in fr; the bundle was proven on pairs in en")
    before = market.scores()
    market.catalog = market.catalog.iloc[:0]

    with pytest.raises(AuditError, match=r"rejected_share: 1, expected <= 0\.\d+\. 24 of 24 candidate pairs"):
        market.score("second", markets=markets)

    assert said("rejected_pairs")[0]["no_product"] == 48
    assert market.scores().equals(before)


def test_a_new_bundle_scores_everything_and_is_judged_by_its_order(scored_market: Market) -> None:
    market = scored_market

    with pytest.raises(AuditError, match=r"drift\.rank_agreement"):
        market.score(
            "second",
            bundle=str(ROOT / "conf" / "demo_bundle"),
            audit={"fewest_pairs": 1, "rank_agreement": 0.999},
        )

    run = market.run("second")
    assert (run["num_scored"], run["num_unchanged"]) == (48, 0)
    assert not any(result["name"].startswith("drift.changed") for result in json.loads(run["audit"]))


def test_a_second_run_at_once_ends_with_the_name_of_the_first(spark: SparkSession, market: Market) -> None:
    tables = str(market.folder / "tables")
    with hold_leases(spark, tables, [TW], "run other", seconds=30), pytest.raises(LeaseError) as caught:
        market.score("first")

    assert caught.value.exit_code == 5
    assert "run other (process" in str(caught.value)
    with hold_leases(spark, tables, ["us"], "run first", run_id="first"), pytest.raises(LeaseError) as caught:
        market.score("first")
    assert "run id 'first': run first (process" in str(caught.value)
    assert not (market.folder / "tables" / "relevance_scores").exists()


def test_a_run_that_was_killed_goes_on_where_it_stopped(
    market: Market, said: Callable[[], dict[str, dict[str, Any]]]
) -> None:
    arguments = market.arguments(chunk_minutes=1e-6, num_partitions=1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYSPARK_PYTHON": sys.executable}
    command = [sys.executable, str(ROOT / "jobs" / "score_catalog.py"), *arguments, "--run-id", "killed"]
    killed = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        staging, deadline = market.folder / "tables" / "scores_staging", time.monotonic() + 200
        while not (staging / "_delta_log" / f"{2:020}.json").exists():
            assert killed.poll() is None, killed.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.communicate()
    assert market.run("killed")["verdict"] == "running"
    num_staged = len(market.table("scores_staging"))
    assert 0 < num_staged < 48
    time.sleep(3.5)  # until its lease has ended

    market.score("killed")

    printed = said()
    assert (printed["plan"]["num_reused"], printed["plan"]["num_to_score"]) == (num_staged, 48 - num_staged)
    assert len(market.scores()) == 48
    assert market.run("killed")["verdict"] == "published"
    assert len(market.table("scores_staging").drop_duplicates(KEY)) == 48


def test_a_rejected_run_is_not_published_over_a_later_one(scored_market: Market) -> None:
    market = scored_market
    market.catalog.loc[market.catalog["product_id"] == "p1", "title"] = "목욕 수건"
    with pytest.raises(AuditError):
        market.score("second", audit={"product_coverage": {"limit": 1.1, "severity": "error"}})
    market.catalog.loc[market.catalog["product_id"] == "p1", "title"] = "행주"
    market.score("third")

    with pytest.raises(LeaseError, match="run 'third' was started after it and published the same market"):
        market.publish("--run-id", "second", "--accept", "product_coverage", "--reason", "late")
