"""Each way to use relevance_scores, as the pages show it: the same rows, one whole state while a publish runs."""

import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession

from csrm.bundle.loading import load_scorer
from csrm.operations.maintenance import cluster_market, set_retention
from csrm.schemas import RELEVANCE_SCORES
from csrm.spark.tables import table_path
from tests.consumers.publishing import HOSTILE_MARKET, START, Changes, publish
from tests.docs.pages import ROOT, python_blocks

pd = pytest.importorskip("pandas")
pa = pytest.importorskip("pyarrow")
pl = pytest.importorskip("polars")
duckdb = pytest.importorskip("duckdb")
deltalake = pytest.importorskip("deltalake")

pytestmark = [pytest.mark.spark, pytest.mark.slow]

BLOCKS = python_blocks("docs/read-scores.md")
NAMES, STREAM, FEED = BLOCKS["Reading scores"], BLOCKS["With Spark"], BLOCKS["Without Spark"]
READERS = {name: BLOCKS[name] for name in ("PySpark", "deltalake", "pandas", "DuckDB", "Polars")}

COLUMNS = ["market", "query_id", "query", "product_id", "title"]
FIRST: dict[str, Changes] = {
    HOSTILE_MARKET: {("q1", "p1"): 0.25, ("q1", "p2"): 0.75, ("q'2", "p1"): 0.5},
    "kr": {("q1", "p1"): 0.125},
}


def run(block: str, path: str, market: str, query_id: str, **names: Any) -> Any:
    """What a block of the page calls rows, with the names of its first block replaced."""
    scope: dict[str, Any] = {}
    exec(NAMES, scope)
    assert {"path", "market", "query_id"} <= scope.keys()
    scope |= {"path": path, "market": market, "query_id": query_id, **names}
    exec(block, scope)
    return scope.get("rows")


def as_dicts(rows: Any) -> list[dict[str, Any]]:
    """Rows of any of the libraries, sorted by key, times in UTC."""
    if isinstance(rows, pa.Table):
        dicts = rows.to_pylist()
    elif isinstance(rows, pl.DataFrame):
        dicts = rows.to_dicts()
    else:
        dicts = rows.to_dict("records")
    for row in dicts:
        at = pd.Timestamp(row["scored_at"])
        row["scored_at"] = (at.tz_localize("UTC") if at.tzinfo is None else at.tz_convert("UTC")).to_pydatetime()
    return sorted(dicts, key=lambda row: [row[name] for name in RELEVANCE_SCORES.key])


@pytest.fixture(scope="module")
def path(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> str:
    tables_dir = str(tmp_path_factory.mktemp("readers"))
    publish(spark, tables_dir, "r1", FIRST, day=0)
    publish(spark, tables_dir, "r2", {HOSTILE_MARKET: {("q1", "p2"): 0.875}}, day=1)
    return table_path(tables_dir, RELEVANCE_SCORES)


@pytest.mark.parametrize("reader", READERS)
def test_each_reader_returns_the_same_rows(spark: SparkSession, path: str, reader: str) -> None:
    rows = as_dicts(run(READERS[reader], path, HOSTILE_MARKET, "q1", spark=spark))

    fixed = {"market": HOSTILE_MARKET, "query_id": "q1", "bundle_digest": "digest", "label_probabilities": None}
    assert rows == [
        {**fixed, "product_id": "p1", "relevance_score": 0.25, "predicted_grade": "E", "pair_key": 250}
        | {"scored_at": START, "run_id": "r1"},
        {**fixed, "product_id": "p2", "relevance_score": 0.875, "predicted_grade": "E", "pair_key": 875}
        | {"scored_at": START + timedelta(days=1), "run_id": "r2"},
    ]
    assert list(rows[0]) == RELEVANCE_SCORES.column_names
    assert len(as_dicts(run(READERS[reader], path, HOSTILE_MARKET, "q'2", spark=spark))) == 1


@pytest.mark.parametrize("heading", ["As a view", "As a query of DuckDB"])
def test_scores_are_read_with_the_texts_of_their_query_and_product(
    spark: SparkSession, path: str, tmp_path: Path, heading: str
) -> None:
    queries = [(HOSTILE_MARKET, "q1", "신발"), ("kr", "q1", "another market's")]
    pd.DataFrame(queries, columns=["market", "query_id", "query"]).to_parquet(tmp_path / "queries.parquet")
    products = [(HOSTILE_MARKET, "p2", "빨간 신발"), ("kr", "p1", "another market's")]
    pd.DataFrame(products, columns=["market", "product_id", "title"]).to_parquet(tmp_path / "catalog.parquet")
    block = BLOCKS[heading].replace("build/demo/inputs", str(tmp_path))
    try:
        rows = run(block, path, HOSTILE_MARKET, "q1", spark=spark)
    finally:
        spark.sql("DROP VIEW IF EXISTS relevance_scores_readable")

    assert list(rows) == [*COLUMNS, "relevance_score", "predicted_grade", "run_id"]
    found = rows.sort_values("product_id").astype(object).where(rows.notna(), None)
    assert found[[*COLUMNS, "relevance_score"]].to_numpy().tolist() == [
        [HOSTILE_MARKET, "q1", "신발", "p1", None, 0.25],
        [HOSTILE_MARKET, "q1", "신발", "p2", "빨간 신발", 0.875],
    ]


def test_the_readme_prints_the_best_products_of_a_query(
    spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(spark, str(tmp_path), "r1", {"tw": {("q000001", "worse"): 0.25, ("q000001", "better"): 0.75}}, day=0)
    block = python_blocks("README.md")["Use the scores"]

    exec(block.replace("build/demo/tables/relevance_scores", table_path(str(tmp_path), RELEVANCE_SCORES)), {})

    printed = capsys.readouterr().out
    assert printed.index("better") < printed.index("worse")


def test_the_udf_of_the_page_scores_each_pair(
    spark: SparkSession, pairs_pdf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    pairs = pairs_pdf[["market", "language", "query", "retrieved_titles", "title"]]
    schema = "market string, language string, query string, retrieved_titles array<string>, title string"
    rows = [tuple(row) for row in pairs.itertuples(index=False)]
    scope: dict[str, Any] = {"df": spark.createDataFrame(rows, schema)}

    exec(BLOCKS["Score in your own Spark program"], scope)

    found = scope["scored_df"].toPandas()
    absent = {"brand": None, "category": None, "attributes": None}
    expected = load_scorer("conf/demo_bundle", "cpu").score(pairs.assign(**absent))["relevance_score"]
    assert found["title"].tolist() == pairs["title"].tolist()
    assert found["relevance_score"].to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-5)


def open_spark(spark: SparkSession, path: str) -> Callable[[], int]:
    rows = spark.read.format("delta").load(path).toLocalIterator()
    next(rows)
    return lambda: 1 + sum(1 for _ in rows)


def open_duckdb(spark: SparkSession, path: str) -> Callable[[], int]:
    connection = duckdb.connect()
    connection.register("scores", deltalake.DeltaTable(path).to_pyarrow_dataset())
    cursor = connection.execute("SELECT * FROM scores")
    cursor.fetchone()
    return lambda: 1 + len(cursor.fetchall())


def open_polars(spark: SparkSession, path: str) -> Callable[[], int]:
    frame = pl.scan_delta(deltalake.DeltaTable(path))
    return lambda: len(frame.collect())


def open_deltalake(spark: SparkSession, path: str) -> Callable[[], int]:
    table = deltalake.DeltaTable(path)
    return lambda: table.to_pyarrow_table().num_rows


def open_pandas(spark: SparkSession, path: str) -> Callable[[], int]:
    table = deltalake.DeltaTable(path)
    return lambda: len(table.to_pandas())


OPENED = {
    "PySpark": open_spark,
    "deltalake": open_deltalake,
    "pandas": open_pandas,
    "DuckDB": open_duckdb,
    "Polars": open_polars,
}


def test_a_reader_that_was_open_before_a_publish_reads_the_old_state_to_its_end(
    spark: SparkSession, tmp_path: Path
) -> None:
    path = table_path(str(tmp_path), RELEVANCE_SCORES)
    publish(spark, str(tmp_path), "r1", FIRST, day=0)
    readers = {name: open_(spark, path) for name, open_ in OPENED.items()}

    changes: Changes = {**dict.fromkeys(FIRST[HOSTILE_MARKET]), ("q1", "p9"): 1.0}
    publish(spark, str(tmp_path), "r2", {HOSTILE_MARKET: changes}, day=1)
    cluster_market(spark, path, HOSTILE_MARKET, file_mb=1)

    assert {name: finish() for name, finish in readers.items()} == dict.fromkeys(OPENED, 4)
    assert {name: open_(spark, path)() for name, open_ in OPENED.items()} == dict.fromkeys(OPENED, 2)


@pytest.fixture
def many_files(spark: SparkSession) -> Iterator[None]:
    """MERGE writes a market into several files, as it does where a market is large."""
    settings = {
        "spark.databricks.delta.merge.repartitionBeforeWrite.enabled": "false",
        "spark.sql.adaptive.coalescePartitions.enabled": "false",
        "spark.sql.shuffle.partitions": "4",
    }
    before = {key: spark.conf.get(key, None) for key in settings}
    for key, value in settings.items():
        spark.conf.set(key, value)
    yield
    for key, value in before.items():
        spark.conf.unset(key) if value is None else spark.conf.set(key, value)


@pytest.mark.usefixtures("many_files")
def test_no_reader_sees_half_of_a_publish(spark: SparkSession, tmp_path: Path) -> None:
    path = table_path(str(tmp_path), RELEVANCE_SCORES)
    num_products, rounds = 40, [0.1, 0.9, 0.2]
    states: list[Changes] = [{("q1", f"p{i}"): score for i in range(num_products)} for score in rounds]
    publish(spark, str(tmp_path), "r0", {HOSTILE_MARKET: states[0]}, day=0)
    files = spark.read.format("delta").load(path).inputFiles()
    assert len(files) > 1

    failures: list[BaseException] = []

    def publish_all() -> None:
        try:
            for number, state in enumerate(states[1:], start=1):
                publish(spark, str(tmp_path), f"r{number}", {HOSTILE_MARKET: state}, day=number)
        except BaseException as error:
            failures.append(error)

    publisher = threading.Thread(target=publish_all)
    publisher.start()
    seen: dict[str, list[float]] = {name: [] for name in READERS}
    while True:
        is_last = not publisher.is_alive()
        for name, block in READERS.items():
            rows = as_dicts(run(block, path, HOSTILE_MARKET, "q1", spark=spark))
            (score,) = {round(row["relevance_score"], 3) for row in rows}
            assert len(rows) == num_products
            if seen[name][-1:] != [score]:
                seen[name].append(score)
        if is_last:
            break
    publisher.join()

    assert not failures
    for name, scores in seen.items():
        assert scores[-1] == rounds[-1], name
        assert scores == [score for score in rounds if score in scores], name  # states in their order
    assert max(map(len, seen.values())) > 1  # some reader did read while the publishes went on


CHANGE = ("market", "query_id", "product_id", "relevance_score", "_change_type", "_commit_version")


def changes_of(rows: Any) -> list[tuple[Any, ...]]:
    return sorted(tuple(row[name] for name in CHANGE) for row in rows)


def test_the_change_feed_without_spark_holds_exactly_what_publishes_changed(
    spark: SparkSession, tmp_path: Path
) -> None:
    publish(spark, str(tmp_path), "r1", {"kr": {("q1", "p1"): 0.25, ("q1", "p2"): 0.5}}, day=0)
    publish(spark, str(tmp_path), "r2", {"kr": {("q1", "p1"): 0.75, ("q1", "p2"): None}}, day=1)

    rows = run(FEED, table_path(str(tmp_path), RELEVANCE_SCORES), "kr", "q1")

    assert changes_of(pa.table(rows).to_pylist()) == [
        ("kr", "q1", "p1", 0.25, "insert", 1),
        ("kr", "q1", "p1", 0.25, "update_preimage", 2),
        ("kr", "q1", "p1", 0.75, "update_postimage", 2),
        ("kr", "q1", "p2", 0.5, "delete", 2),
        ("kr", "q1", "p2", 0.5, "insert", 1),
    ]


def test_a_stream_that_runs_now_and_then_gets_each_change_once(spark: SparkSession, tmp_path: Path) -> None:
    tables_dir = str(tmp_path / "tables")
    path = table_path(tables_dir, RELEVANCE_SCORES)
    block = STREAM.replace("build/demo", str(tmp_path))
    publish(spark, tables_dir, "r1", FIRST, day=0)  # versions 1 and 2
    publish(spark, tables_dir, "r2", {"kr": {("q1", "p1"): 0.25}}, day=1)  # version 3
    run(block, path, "kr", "q1", spark=spark)
    publish(spark, tables_dir, "r3", {"kr": {("q1", "p1"): None, ("q1", "p2"): 0.5}}, day=2)  # version 4
    run(block, path, "kr", "q1", spark=spark)
    run(block, path, "kr", "q1", spark=spark)

    rows = spark.read.parquet(str(tmp_path / "changes")).collect()
    assert changes_of(rows) == sorted(
        [(HOSTILE_MARKET, *pair, score, "insert", 3) for pair, score in FIRST[HOSTILE_MARKET].items()]
        + [("kr", "q1", "p1", 0.25, "insert", 3)]
        + [("kr", "q1", "p1", 0.25, "delete", 4), ("kr", "q1", "p2", 0.5, "insert", 4)]
    )


def test_a_stream_that_was_stopped_in_the_middle_goes_on_without_loss_or_repetition(
    spark: SparkSession, tmp_path: Path
) -> None:
    tables_dir, changes, checkpoint = str(tmp_path / "tables"), str(tmp_path / "changes"), str(tmp_path / "checkpoint")
    path = table_path(tables_dir, RELEVANCE_SCORES)
    for day in range(3):  # versions 1 to 3
        publish(spark, tables_dir, f"r{day}", {"kr": {("q1", f"p{day}"): 0.5}}, day)

    def stream(df: DataFrame) -> Any:
        return df.writeStream.format("parquet").option("checkpointLocation", checkpoint)

    feed = spark.readStream.format("delta").option("readChangeFeed", "true").option("startingVersion", 1)
    feed_df = feed.option("maxFilesPerTrigger", 1).load(path)  # one commit a batch
    running = stream(feed_df).start(changes)
    while not any(progress["numInputRows"] for progress in running.recentProgress):
        time.sleep(0.05)
    running.stop()
    num_before = spark.read.parquet(changes).count()

    publish(spark, tables_dir, "r3", {"kr": {("q1", "p0"): 1.0, ("q1", "p1"): None}}, day=3)
    cluster_market(spark, path, "kr", file_mb=1)
    set_retention(spark, path, hours=168)
    stream(feed_df).trigger(availableNow=True).start(changes).awaitTermination()

    assert 1 <= num_before < 3
    assert [(row[2], row[3], row[4]) for row in changes_of(spark.read.parquet(changes).collect())] == [
        *(("p0", 0.5, "insert"), ("p0", 0.5, "update_preimage"), ("p0", 1.0, "update_postimage")),
        *(("p1", 0.5, "delete"), ("p1", 0.5, "insert")),
        ("p2", 0.5, "insert"),
    ]
