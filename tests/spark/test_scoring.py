"""Scoring inside Spark: the same scores as the core gives, however the pairs are laid out."""

import dataclasses
import doctest
import io
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pyspark.errors import PythonException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from csrm.artefacts.manifest import GOLDEN_NAME, MANIFEST_NAME, write_manifest
from csrm.bundle.contents import BUNDLE_KIND
from csrm.bundle.golden import GoldenPairs
from csrm.bundle.loading import load_bundle, load_scorer
from csrm.cli import Console
from csrm.embedding import load_encoder
from csrm.errors import BundleError, ConfigError, DeviceError, InputError, ScoringError
from csrm.export.bundle import export_bundle
from csrm.export.vote import VoteSettings
from csrm.night.messages import say_host_limit
from csrm.schemas import SCORES_STAGING
from csrm.scoring.explanation import label_probabilities
from csrm.scoring.scorer import PAIR_COLUMNS, pair_texts
from csrm.scoring.vote import named_share
from csrm.spark.progress import ScoringProgress
from csrm.spark.scoring import ScorerPlace, probe_scorer, relevance_score_udf, score_pair_batches, with_relevance_score
from csrm.spark.workers import errors_of_workers, scoring_profile
from csrm.training.distillation.teacher import text_cosines
from tests.disks import small_disk

TITLES = ["캠핑 텐트 4인용", "帳篷", "camping tent, green", "tent 🏕 peg", "毛巾"]


class LengthScorer:
    """Scores a pair by the length of its title; counts ten tokens a pair, and twenty in prompts."""

    def __init__(self) -> None:
        self.num_tokens = self.num_prompt_tokens = self.num_halved_packs = 0
        self.call_sizes: list[int] = []

    def prepare(self, pairs: pd.DataFrame) -> str:
        return f"{len(pairs)} pairs"

    def score_or_reject(self, pairs: pd.DataFrame, prepared: str, **asked: bool) -> pd.DataFrame:
        assert prepared == f"{len(pairs)} pairs"
        self.num_tokens += 10 * len(pairs)
        self.num_prompt_tokens += 20 * len(pairs)
        self.call_sizes.append(len(pairs))
        scores = pairs["title"].str.len().to_numpy(dtype=np.float32) / 10_000
        return pd.DataFrame({"relevance_score": scores, "predicted_grade": "yes", "reason": None}, index=pairs.index)


def pairs_pdf(num_pairs: int = 30) -> pd.DataFrame:
    rows = [
        {
            "market": "kr" if n % 3 else "tw",
            "query_id": f"q{n % 4}",
            "product_id": str(n),
            "pair_key": n,
            "language": "ko" if n % 3 else "zh-TW",
            "query": f"query {n % 4}",
            "retrieved_titles": TITLES[: n % 4],
            "title": f"{TITLES[n % 5]} {n}",
            "brand": None if n % 2 else "brand",
            "category": "camping",
            "attributes": {"color": "red"} if n % 5 else None,
        }
        for n in range(num_pairs)
    ]
    return pd.DataFrame(rows)


def pairs_df(spark: SparkSession, pdf: pd.DataFrame) -> DataFrame:
    schema = (
        "market string, query_id string, product_id string, pair_key bigint, language string, query string, "
        "retrieved_titles array<string>, title string, brand string, category string, attributes map<string,string>"
    )
    return spark.createDataFrame(list(pdf.itertuples(index=False, name=None)), schema)


def test_batches_are_scored_in_steps_of_1024_in_their_order_and_counted() -> None:
    scorer, counts = LengthScorer(), []
    sizes = (1_500, 0, 10)
    batches = [pairs_pdf(size) if size else pairs_pdf(1).iloc[:0] for size in sizes]

    scored = pd.concat(score_pair_batches(iter(batches), scorer, lambda *numbers: counts.append(numbers)))

    assert scorer.call_sizes == [1_024, 476, 10]
    assert [found[:4] for found in counts] == [(1_024, 10_240, 20_480, 0), (476, 4_760, 9_520, 0), (10, 100, 200, 0)]
    assert scored["product_id"].tolist() == [str(n) for n in itertools.chain(range(1_500), range(10))]
    assert scored["relevance_score"].tolist()[7] == np.float32(len("camping tent, green 7") / 10_000)
    assert scored.columns.tolist() == [
        "market",
        "query_id",
        "product_id",
        "pair_key",
        "relevance_score",
        "predicted_grade",
        "reason",
    ]


def test_the_next_pairs_are_prepared_while_some_are_scored() -> None:
    class PatientScorer(LengthScorer):
        num_prepared = 0
        is_second_prepared = threading.Event()

        def prepare(self, pairs: pd.DataFrame) -> str:
            self.num_prepared += 1
            if self.num_prepared == 2:
                self.is_second_prepared.set()
            return super().prepare(pairs)

        def score_or_reject(self, pairs: pd.DataFrame, prepared: str, **asked: bool) -> pd.DataFrame:
            assert self.is_second_prepared.wait(60)
            return super().score_or_reject(pairs, prepared, **asked)

    scorer = PatientScorer()

    scored = pd.concat(score_pair_batches(iter([pairs_pdf(1_500)]), scorer, lambda *_: None))

    assert len(scored) == 1_500
    assert scorer.call_sizes == [1_024, 476]


def test_time_in_which_the_model_waits_for_its_pairs_is_counted_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    class SlowHost(LengthScorer):
        def prepare(self, pairs: pd.DataFrame) -> str:
            time.sleep(0.3)
            return super().prepare(pairs)

    counts: list[tuple[int, ...]] = []
    list(score_pair_batches(iter([pairs_pdf(5_000)]), SlowHost(), lambda *numbers: counts.append(numbers)))
    waited, scored = (sum(found[place] for found in counts) for place in (4, 5))
    assert counts[0][4] == 0  # behind the first pairs nothing can be scored
    assert waited > 250
    assert scored < waited
    say_host_limit(Console(), 0.19)
    assert capsys.readouterr().out == ""
    say_host_limit(Console(), waited / (waited + scored))
    assert "the host is the limit: the model waited " in capsys.readouterr().out


@pytest.mark.spark
@pytest.mark.parametrize("num_partitions", [1, 3])
def test_spark_gives_the_scores_of_the_core(
    spark: SparkSession, tiny_bundle: Path, tmp_path: Path, num_partitions: int
) -> None:
    pdf = pairs_pdf()
    scorer = load_scorer(str(tiny_bundle), "cpu", threads=1)
    expected = scorer.score(pdf)
    shuffled_df = pairs_df(spark, pdf.sample(frac=1, random_state=num_partitions)).repartition(num_partitions)

    scores_df = with_relevance_score(
        shuffled_df, ScorerPlace(str(tiny_bundle)), bundle_digest=scorer.digest, run_id="run"
    )
    scored = scores_df.toPandas().astype({"product_id": int}).sort_values("product_id").reset_index(drop=True)

    assert scores_df.columns == SCORES_STAGING.column_names
    assert expected["relevance_score"].std() > 0.01
    np.testing.assert_allclose(scored["relevance_score"], expected["relevance_score"], atol=1e-5)
    assert scored["predicted_grade"].tolist() == expected["predicted_grade"].tolist()
    assert scored["pair_key"].tolist() == list(range(30))
    assert set(scored["bundle_digest"]) == {scorer.digest}
    assert set(scored["run_id"]) == {"run"}
    assert scored["label_probabilities"].isna().all()
    asked_df = with_relevance_score(
        shuffled_df,
        ScorerPlace(str(tiny_bundle)),
        bundle_digest=scorer.digest,
        run_id="run",
        label_probabilities=True,
        attempts_dir=str(tmp_path / "attempts"),
        is_repeated=num_partitions == 3,
    )
    asked = asked_df.toPandas().astype({"product_id": int}).sort_values("product_id")
    found = pd.DataFrame(asked["label_probabilities"].map(dict).tolist())
    np.testing.assert_allclose(found, label_probabilities(scorer, pdf), atol=1e-5)
    gains = np.array([label.gain for label in scorer.labels])
    np.testing.assert_allclose(found.to_numpy() @ gains, asked["relevance_score"], atol=1e-5)


@pytest.mark.spark
def test_progress_counts_pairs_and_tokens_and_prints_plain_lines_off_a_terminal(
    spark: SparkSession, tiny_bundle: Path
) -> None:
    stream = io.StringIO()
    scorer = load_scorer(str(tiny_bundle), "cpu", threads=1)
    scorer.score(pairs_pdf())

    with ScoringProgress(spark, 30, interval_s=0.05, stream=stream) as progress:
        with_relevance_score(
            pairs_df(spark, pairs_pdf()).coalesce(1),
            ScorerPlace(str(tiny_bundle)),
            bundle_digest=scorer.digest,
            run_id="run",
            progress=progress,
        ).collect()
        time.sleep(0.2)

    assert progress.num_pairs.value == 30
    assert progress.num_tokens.value == scorer.num_tokens
    assert progress.num_prompt_tokens.value == scorer.num_prompt_tokens > scorer.num_tokens
    assert stream.getvalue().splitlines()[-1].startswith("scored 30 of 30 pairs, ")
    assert "\r" not in stream.getvalue()


@pytest.mark.spark
def test_a_progress_line_has_rates_and_the_time_left(spark: SparkSession) -> None:
    progress = ScoringProgress(spark, 3_000)

    assert progress.line(5.0) == progress.line(15.0)
    assert progress.line(5.0) == "scoring 3,000 pairs: workers start; counts come with each task that ends"
    progress.num_pairs.add(1_000)
    progress.num_tokens.add(50_000)
    progress.num_prompt_tokens.add(200_000)
    assert progress.line(5.0) == (
        "scored 1,000 of 3,000 pairs, 200 pairs/s, 10,000 tokens/s, 75% saved by shared prefixes, 10 s left"
    )


@pytest.mark.spark
def test_a_worker_with_another_bundle_stops_the_run(spark: SparkSession, tiny_bundle: Path) -> None:
    scores_df = with_relevance_score(
        pairs_df(spark, pairs_pdf(1)), ScorerPlace(str(tiny_bundle)), bundle_digest="another", run_id="run"
    )

    with pytest.raises(PythonException, match="expected digest another, this worker has"):
        scores_df.collect()


@pytest.mark.spark
def test_an_error_of_ours_in_a_worker_is_that_error_in_the_driver(spark: SparkSession, tiny_bundle: Path) -> None:
    scores_df = with_relevance_score(
        pairs_df(spark, pairs_pdf(1)), ScorerPlace(str(tiny_bundle)), bundle_digest="another", run_id="run"
    )

    with pytest.raises(BundleError, match=r"^bundle .*: expected digest another, this worker has"), errors_of_workers():
        scores_df.collect()
    with pytest.raises(BundleError, match=r"^bundle .*: expected digest another, this worker has"), errors_of_workers():
        scores_df.write.format("noop").mode("overwrite").save()


@pytest.mark.spark
def test_what_spark_gives_up_on_is_said_in_one_line(spark: SparkSession) -> None:
    def leave(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        os._exit(3)
        yield from batches

    left_df = spark.range(1).mapInPandas(leave, "id bigint")

    said = r"^Spark gave up: .*Python worker exited unexpectedly.*\nEach market is as it was or published whole"
    with pytest.raises(ScoringError, match=said), errors_of_workers():
        left_df.collect()


@pytest.mark.spark
def test_a_disk_that_is_full_is_said_in_one_line(spark: SparkSession, tmp_path: Path) -> None:
    rows_df = spark.range(200_000).select("id", F.sha2(F.col("id").cast("string"), 256).alias("text"))
    full = pytest.raises(ScoringError, match=r"^Spark gave up: .*No space left on device")
    with small_disk(tmp_path / "disk", "2m") as disk, full, errors_of_workers():
        rows_df.write.format("delta").save(str(disk / "table"))


@pytest.mark.spark
def test_a_gpu_for_each_task_needs_executors_that_have_some(spark: SparkSession) -> None:
    assert scoring_profile(spark, "cuda") is None
    with pytest.raises(ConfigError, match=r"found none\. Submit the job with --conf spark\.executor\.resource\.gpu"):
        scoring_profile(spark, "cpu", one_task_per_gpu=True)


@pytest.mark.spark
def test_the_bundle_is_loaded_in_a_worker_and_its_errors_come_back(
    spark: SparkSession, tiny_bundle: Path, tmp_path: Path
) -> None:
    info = probe_scorer(spark, ScorerPlace(str(tiny_bundle)))

    assert (info.digest, info.provider) == (load_scorer(str(tiny_bundle), "cpu").digest, "CPUExecutionProvider")
    with pytest.raises(BundleError, match=r"manifest\.json cannot be read"):
        probe_scorer(spark, ScorerPlace(str(tmp_path / "nothing")))


@pytest.mark.spark
def test_a_device_that_is_not_there_is_an_error_never_another_device(spark: SparkSession, tiny_bundle: Path) -> None:
    with pytest.raises(DeviceError, match="cuda:9"):
        probe_scorer(spark, ScorerPlace(str(tiny_bundle), "cuda:9"))


@pytest.mark.spark
def test_what_votes_in_a_bundle_votes_in_spark_too(
    spark: SparkSession, tiny_bundle: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    queries = [f"red {n % 24}" for n in range(120)]  # five products each, of which some are red
    pdf = pairs_pdf(120).assign(market="kr", language="ko", query=queries)
    scores = load_scorer(tiny_bundle, "cpu").score(pdf)["relevance_score"]
    cosines = pd.Series(text_cosines(load_encoder(tiny_encoder), pdf), index=pdf.index)
    shares = pd.Series([named_share(query.query, product) for query, product in pair_texts(pdf)], index=pdf.index)
    sums = sum(values.groupby(pdf["query"]).rank() for values in (scores, cosines, cosines, shares, shares, shares))
    places = sums.groupby(pdf["query"]).rank(method="first")
    judged = pdf.assign(query_id=pdf["query"], grade=["E" if place > 3 else "I" for place in places])
    folder = tmp_path / "both"
    model, vote = str(tiny_bundle.with_name("model")), VoteSettings(words=True, encoder=str(tiny_encoder))
    export_bundle(model, folder, pdf, judged, vote=vote)
    vote = load_bundle(folder).settings.vote
    assert vote is not None
    assert len(vote.weights) == 3
    udf = relevance_score_udf(str(folder))
    rows = pairs_df(spark, pdf).select(F.col("product_id").cast("int").alias("n"), udf(F.struct(*PAIR_COLUMNS)))
    found = [score for _, score in rows.orderBy("n").collect()]
    np.testing.assert_allclose(found, load_scorer(folder, "cpu").score(pdf)["relevance_score"], atol=1e-5)
    alone = load_scorer(tiny_bundle, "cpu").score(pdf)["relevance_score"]
    assert np.abs(found - alone).max() > 0.01


@pytest.mark.spark
def test_the_udf_gives_the_scores_of_the_core_in_any_dataframe(spark: SparkSession, tiny_bundle: Path) -> None:
    pdf = pairs_pdf(6)
    scorer = load_scorer(str(tiny_bundle), "cpu", threads=1)
    udf = relevance_score_udf(str(tiny_bundle), tokens_per_call=400)
    few = ["title", "query", "language", "market"]

    rows = (
        pairs_df(spark, pdf)
        .select(
            F.col("product_id").cast("int").alias("n"),
            udf(F.struct(*PAIR_COLUMNS)).alias("score"),
            udf(F.struct(*few)).alias("few"),
        )
        .orderBy("n")
        .collect()
    )

    bare = pdf.assign(retrieved_titles=None, brand=None, category=None, attributes=None)
    np.testing.assert_allclose([row["score"] for row in rows], scorer.score(pdf)["relevance_score"], atol=1e-5)
    np.testing.assert_allclose([row["few"] for row in rows], scorer.score(bare)["relevance_score"], atol=1e-5)


@pytest.mark.spark
def test_a_bundle_replaced_at_its_path_is_loaded_by_workers_that_had_the_earlier_one(
    spark: SparkSession, tiny_bundle: Path, tmp_path: Path
) -> None:
    pdf, folder = pairs_pdf(6), tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)

    def scores() -> list[float]:
        score = relevance_score_udf(str(folder))(F.struct(*PAIR_COLUMNS))
        return [row["score"] for row in pairs_df(spark, pdf).coalesce(1).select(score.alias("score")).collect()]

    earlier_digest, earlier = probe_scorer(spark, ScorerPlace(str(folder))).digest, scores()
    bundle = load_bundle(folder)
    about = bundle.settings.model_dump(mode="json")
    about["labels"] = [{**label, "gain": 1 - label["gain"]} for label in about["labels"]]
    golden = bundle.golden_pairs()
    dataclasses.replace(golden, scores=1 - golden.scores).write(folder / GOLDEN_NAME)
    digest = write_manifest(folder, BUNDLE_KIND, about)

    assert digest != earlier_digest
    assert probe_scorer(spark, ScorerPlace(str(folder))).digest == digest
    np.testing.assert_allclose(scores(), 1 - np.array(earlier), atol=1e-5)


@pytest.mark.spark
def test_the_udf_hands_its_budget_to_the_workers(spark: SparkSession, tiny_bundle: Path) -> None:
    score = relevance_score_udf(str(tiny_bundle), tokens_per_call=0)

    with pytest.raises(PythonException, match=r"tokens_per_call"):
        pairs_df(spark, pairs_pdf(1)).select(score(F.struct(*PAIR_COLUMNS))).collect()


@pytest.mark.spark
def test_the_udf_names_the_fields_that_it_misses(spark: SparkSession, tiny_bundle: Path) -> None:
    score = relevance_score_udf(str(tiny_bundle))

    with pytest.raises(
        InputError, match=r"missing fields \['language', 'title'\]; the struct has \['market', 'query'\]"
    ):
        score(F.struct("market", F.col("text").alias("query")))
    pair_df = pairs_df(spark, pairs_pdf(1)).select(F.struct("market", "query").alias("pair"))
    with pytest.raises(PythonException, match=r"missing fields \['language', 'title'\]; the struct has"):
        pair_df.select(score("pair")).collect()


@pytest.mark.spark
def test_the_udf_refuses_what_is_no_struct_and_fields_that_it_does_not_know(
    spark: SparkSession, tiny_bundle: Path
) -> None:
    score, pair = relevance_score_udf(str(tiny_bundle)), ["market", "language", "query", "title"]

    with pytest.raises(InputError, match=r"expected one struct, got 4 columns\. Pass F\.struct of \['market'"):
        score(*pair)
    with pytest.raises(InputError, match=r"unknown fields \['retrieved_title'\]\. Pass F\.struct"):
        score(F.struct(*pair, F.lit("x").alias("retrieved_title")))
    with pytest.raises(InputError, match=r"fields that are there twice: \['title'\]"):
        score(F.struct(*pair, F.lit("x").alias("title")))
    with pytest.raises(PythonException, match=r"InputError: relevance_score_udf: expected one struct, got string"):
        pairs_df(spark, pairs_pdf(1)).select(score("title")).collect()
    with pytest.raises(PythonException, match=r"unknown fields \['query_id', 'product_id', 'pair_key'\]"):
        pairs_df(spark, pairs_pdf(1)).select(score(F.struct("*"))).collect()


@pytest.mark.spark
def test_the_udf_gives_null_where_a_night_rejects_the_pair(spark: SparkSession, tiny_bundle: Path) -> None:
    pdf = pairs_pdf(8)
    pdf["title"] = [None, "", "\u3000\u200b", "tent", "tent", "tent", "tent", "tent"]
    pdf["query"] = ["tent", "tent", "tent", None, " ", "tent", "tent", "tent"]
    pdf.loc[5, "market"], pdf.loc[6, "language"] = None, None
    score = relevance_score_udf(str(tiny_bundle))
    pair = F.struct(*PAIR_COLUMNS)

    rows = (
        pairs_df(spark, pdf)
        .select("pair_key", score(pair).alias("score"), score(F.when(F.col("pair_key") < 0, pair)).alias("none"))
        .orderBy("pair_key")
        .collect()
    )

    assert [row["score"] is None for row in rows] == [True] * 7 + [False]
    assert [row["none"] for row in rows] == [None] * 8
    expected = load_scorer(str(tiny_bundle), "cpu").score(pdf.iloc[[7]])["relevance_score"].item()
    assert rows[7]["score"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.spark
def test_the_udf_converts_fields_as_tables_do(spark: SparkSession, tiny_bundle: Path) -> None:
    pdf = pairs_pdf(1).assign(
        title="55", category="7", brand="3", retrieved_titles=[["8", "x"]], attributes=[{"n": "1", "on": "true"}]
    )
    text_df = pairs_df(spark, pdf).select(F.struct(*PAIR_COLUMNS).alias("pair"))
    others_df = pairs_df(spark, pdf).select(
        F.struct(
            *("market", "language", "query", "retrieved_titles"),
            F.lit(55).cast("bigint").alias("title"),
            F.lit(3.0).alias("brand"),
            F.lit(7).cast("decimal(10,2)").alias("category"),
            F.lit('{"n": 1, "on": true}').alias("attributes"),
        ).alias("pair")
    )
    score = relevance_score_udf(str(tiny_bundle))("pair").alias("score")

    ((expected,),) = text_df.select(score).collect()
    assert others_df.select(score).collect() == [(expected,)]
    counts = F.struct(*PAIR_COLUMNS[:-1], F.create_map(F.lit("n"), F.lit(1)).alias("attributes"))
    ((counted,),) = pairs_df(spark, pdf).select(relevance_score_udf(str(tiny_bundle))(counts)).collect()
    only = load_scorer(str(tiny_bundle), "cpu").score(pdf.assign(attributes=[{"n": "1"}]))["relevance_score"].item()
    assert counted == pytest.approx(only, abs=1e-5)


@pytest.mark.spark
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("title", "cast('x' AS binary)", r"field 'title': expected string, got binary\. Cast it to text"),
        ("category", "true", r"field 'category': expected string, got bool\. Write it as text"),
        (
            "retrieved_titles",
            "'tent'",
            r"field 'retrieved_titles': expected array<string>, got string\. Write an array",
        ),
        ("attributes", "array('x')", r"field 'attributes': expected map<string,string>, got list<.*>\. Write a map"),
        ("title", "1.5D", r"field 'title': 1\.5 is no whole number, .*\. Cast it to string first"),
        ("attributes", "'red'", r"field 'attributes': 'red' is no JSON.*\. Cast it to map<string,string> first"),
    ],
)
def test_the_udf_names_a_field_of_another_type(
    spark: SparkSession, tiny_bundle: Path, name: str, value: str, message: str
) -> None:
    pair = F.struct(*(column for column in PAIR_COLUMNS if column != name), F.expr(value).alias(name))

    with pytest.raises(PythonException, match=message):
        pairs_df(spark, pairs_pdf(1)).select(relevance_score_udf(str(tiny_bundle))(pair)).collect()


@pytest.mark.spark
def test_the_udf_can_be_registered_for_sql(spark: SparkSession, tiny_bundle: Path) -> None:
    spark.udf.register("relevance_score", relevance_score_udf(str(tiny_bundle)))
    pair = "named_struct('market', 'us', 'language', 'en', 'query', 'tent', 'title', 'green tent')"

    ((found,),) = spark.sql(f"SELECT relevance_score({pair})").collect()
    assert 0 < found < 1
    with pytest.raises(PythonException, match=r"expected one struct, got 2 columns"):
        spark.sql("SELECT relevance_score('us', 'en')").collect()


@pytest.mark.spark
def test_the_udf_scores_a_stream_and_stands_twice_in_a_plan_with_another_bundle(
    spark: SparkSession, tiny_bundle: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_bundle, tmp_path / "other"))
    about = json.loads((other / MANIFEST_NAME).read_text(encoding="utf-8"))["about"]
    golden = GoldenPairs.read(other / GOLDEN_NAME)
    dataclasses.replace(golden, scores=1 - golden.scores).write(other / GOLDEN_NAME)
    labels = [{**label, "gain": 1 - label["gain"]} for label in about["labels"]]
    write_manifest(other, BUNDLE_KIND, {**about, "labels": labels})
    columns = ["market", "language", "query", "title"]
    given_df = spark.createDataFrame([("kr", "ko", "텐트", title) for title in TITLES], columns)
    given_df.write.parquet(str(tmp_path / "in"))
    one, reverse = relevance_score_udf(tiny_bundle), relevance_score_udf(other)
    expected = load_scorer(tiny_bundle, "cpu").score(given_df.toPandas())["relevance_score"]

    stream_df = spark.readStream.schema(given_df.schema).parquet(str(tmp_path / "in"))
    scored_df = stream_df.withColumn("score", one(F.struct(*columns))).withColumn(
        "reverse", reverse(F.struct(*columns))
    )
    query = scored_df.withColumn("again", one(F.struct(*columns))).writeStream.trigger(availableNow=True)
    query.format("memory").queryName("scored_stream").start().awaitTermination()

    rows = {row["title"]: row for row in spark.table("scored_stream").collect()}
    np.testing.assert_allclose([rows[title]["score"] for title in TITLES], expected, atol=1e-5)
    assert all(rows[title]["again"] == rows[title]["score"] for title in TITLES)
    np.testing.assert_allclose([rows[title]["reverse"] for title in TITLES], 1 - expected, atol=1e-5)


def test_the_example_of_the_udf_gives_what_it_shows(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])  # the example names conf/demo_bundle
    names = {"spark": spark, "F": F, "relevance_score_udf": relevance_score_udf}
    (example,) = doctest.DocTestFinder(recurse=False).find(relevance_score_udf, "relevance_score_udf", globs=names)

    assert doctest.DocTestRunner().run(example) == (0, 5)
