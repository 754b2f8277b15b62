"""What the builds before a night make of faulty parallel text and encoders: the right tables, or those from before."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
from pyspark.sql import SparkSession

from csrm.cli import run_job, setting_arguments
from csrm.commands import build_candidates, build_retrieval_table, embed_catalog
from csrm.embedding import load_encoder
from csrm.embedding.contents import TextKind
from csrm.retrieval import vectors
from csrm.schemas import CANDIDATES, RETRIEVAL_TABLE, TEXT_VECTORS, UNCOVERED_PRODUCTS
from csrm.spark.embedding import embed_udf
from csrm.spark.tables import read_table, table_exists, table_path, table_version
from csrm.text import has_text
from tests.faults.cluster import ROOT, wait_for

pytestmark = [pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(900)]

HUGE = "".join(chr(0xAC00 + n * 7919 % 11_172) for n in range(20_000))
"""Sixty kilobytes in UTF-8, which are 20,000 terms, 11,172 of them different."""
TITLES = {"p1": "등산 재킷", "p2": "防水登山外套", "p3": None, "p4": HUGE, "p5": "\u200b"}
MEGABYTE = "등산 재킷 " * 80_000
"""1.1 MB in UTF-8."""
LISTED = {"p1": "ko", "p2": "zh-TW", "p3": "ko", "p4": "ko", "p5": "ko"}
PHRASES = [("ko", "zh-TW", "등산", "登山"), ("zh-TW", "ko", "外套", "재킷")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    catalog = [("tw", name, title, LISTED[name]) for name, title in TITLES.items()]
    save(tmp_path, "catalog", catalog, "market product_id title language")
    queries = [("tw", "q1", "登山外套"), ("tw", "q2", None), ("tw", "q3", HUGE)]
    save(tmp_path, "queries", queries, "market query_id query")
    save_phrases(tmp_path, PHRASES)
    return tmp_path


def save(folder: Path, name: str, rows: list[tuple[Any, ...]], columns: str) -> None:
    names = columns.split()
    pd.DataFrame(rows, columns=names).astype(dict.fromkeys(names, "string")).to_parquet(folder / f"{name}.parquet")


def save_phrases(folder: Path, rows: list[tuple[Any, ...]]) -> None:
    save(folder, "parallel_text", rows, "source_language target_language source_text target_text")


KINDS: tuple[TextKind, ...] = ("passage", "query")


def arguments(folder: Path, encoder: Path | None = None, *, phrases: bool = True, **settings: object) -> list[str]:
    names = ("catalog", "queries", *(["parallel_text"] if phrases else []))
    inputs = {name: {"path": folder / f"{name}.parquet", "format": "parquet"} for name in names}
    values = {"inputs": inputs, "tables": folder / "tables", "markets": {"tw": "zh-TW"}, "max_term_share": 1.0}
    found = {} if encoder is None else {"semantic": {"encoder": encoder, "k": 2, "min_similarity": -1}}
    return setting_arguments(**{**values, **found, **settings})


def embedding_arguments(folder: Path, encoder: Path, **settings: object) -> list[str]:
    inputs = {name: {"path": folder / f"{name}.parquet", "format": "parquet"} for name in ("catalog", "queries")}
    values = {"inputs": inputs, "tables": folder / "tables", "markets": {"tw": "zh-TW"}, "encoder": encoder}
    return setting_arguments(**values, **settings)


def rows_of(spark: SparkSession, folder: Path, *tables: str) -> dict[str, list[tuple[Any, ...]]]:
    of_name = {table.name: table for table in (CANDIDATES, UNCOVERED_PRODUCTS, RETRIEVAL_TABLE, TEXT_VECTORS)}
    read = {
        name: read_table(spark, of_name[name], table_path(str(folder / "tables"), of_name[name])) for name in tables
    }
    return {name: sorted(map(tuple, table_df.collect()), key=str) for name, table_df in read.items()}


def test_parallel_text_that_translates_nothing_is_refused_and_the_tables_stay(
    spark: SparkSession, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job(build_candidates.main, arguments(folder, phrases=False)) == 0
    path = table_path(str(folder / "tables"), CANDIDATES)
    version = table_version(spark, path)
    save_phrases(folder, [])
    capsys.readouterr()
    assert run_job(build_candidates.main, arguments(folder)) == 2
    assert "It has texts in: none" in capsys.readouterr().err
    assert table_version(spark, path) == version


def vectors_of(spark: SparkSession, folder: Path) -> pd.DataFrame:
    return pd.DataFrame(rows_of(spark, folder, "text_vectors")["text_vectors"], columns=TEXT_VECTORS.column_names)


@pytest.mark.fault("texts to embed are null, blank, invisible, or a megabyte long")
def test_texts_that_are_null_blank_or_huge_cost_no_other_text_its_vector(
    spark: SparkSession, folder: Path, tiny_encoder: Path, capsys: pytest.CaptureFixture[str], shown: set[str]
) -> None:
    texts = [
        None,
        "",
        " \u3000",
        "\u200b",
        "\x00",
        MEGABYTE,
        MEGABYTE + "!",
        "a" * 1_000_000,
        "\u0301" * 300_000,
        "재킷",
    ]
    save(folder, "catalog", [("tw", f"p{n}", text) for n, text in enumerate(texts)], "market product_id title")
    save(folder, "queries", [("tw", f"q{n}", text) for n, text in enumerate(texts)], "market query_id query")
    encoder = load_encoder(tiny_encoder)
    has_vector = [text for text in texts if text is not None and has_text(text)]
    assert len(has_vector) >= 5
    expected = {kind: encoder.embed(has_vector, kind) for kind in KINDS}

    texts_df = spark.createDataFrame(list(enumerate(texts)), "n int, text string").repartition(3)
    rows = texts_df.select("n", embed_udf(str(tiny_encoder))("text").alias("vector")).orderBy("n").collect()
    assert [row["vector"] is not None for row in rows] == [text in has_vector for text in texts]
    found = [row["vector"] for row in rows if row["vector"] is not None]
    np.testing.assert_allclose(found, expected["passage"], atol=1e-5)

    assert run_job(embed_catalog.main, embedding_arguments(folder, tiny_encoder)) == 0
    assert f"catalog: {len(has_vector)} new texts embedded" in capsys.readouterr().out
    stored = vectors_of(spark, folder).set_index(["kind", "text_sha256"])["vector"]
    assert len(stored) == 2 * len(has_vector)
    for kind in KINDS:
        found = [stored[kind, hashlib.sha256(text.encode()).hexdigest()] for text in has_vector]
        np.testing.assert_allclose(found, expected[kind], atol=1e-5)
    shown |= {"complete", "no duplicates", "equal scores"}


@pytest.mark.fault("another encoder lies at the path on the next night")
def test_an_encoder_that_is_replaced_between_nights_embeds_all_texts_again_and_its_vectors_alone_are_compared(
    spark: SparkSession, folder: Path, encoder_at: Callable[..., Path], shown: set[str]
) -> None:
    encoder = encoder_at(folder / "encoder")
    first = load_encoder(encoder).digest
    assert run_job(build_candidates.main, arguments(folder, encoder)) == 0
    shutil.rmtree(encoder)
    encoder_at(encoder, dimensions=8, pooling="cls")  # other vectors, of another length
    second = load_encoder(encoder).digest
    assert run_job(build_candidates.main, arguments(folder, encoder)) == 0

    rows = vectors_of(spark, folder)
    assert rows.groupby("encoder_digest").size().to_dict() == {first: 5, second: 5}  # blank texts have none
    assert {len(vector) for vector in rows.loc[rows["encoder_digest"] == second, "vector"]} == {8}
    candidates = rows_of(spark, folder, "candidates")["candidates"]
    assert "semantic" in {row[3] for row in candidates}
    fresh = arguments(folder, encoder, tables=folder / "fresh" / "tables")
    assert run_job(build_candidates.main, fresh) == 0
    assert candidates == rows_of(spark, folder / "fresh", "candidates")["candidates"]
    shown |= {"complete", "no duplicates", "equal scores"}


@pytest.mark.fault("the encoder is replaced while a build runs")
def test_an_encoder_that_is_replaced_while_a_build_runs_writes_no_vector(
    spark: SparkSession,
    folder: Path,
    encoder_at: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    shown: set[str],
) -> None:
    encoder, other = encoder_at(folder / "encoder"), encoder_at(folder / "other", pooling="cls")
    embed_new_texts = vectors.embed_new_texts

    def replaced(*args: Any, **settings: Any) -> int:
        shutil.rmtree(encoder)
        shutil.copytree(other, encoder)
        return embed_new_texts(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(vectors, "embed_new_texts", replaced)
        assert run_job(build_candidates.main, arguments(folder, encoder)) == 2
    assert "expected digest" in capsys.readouterr().err
    assert rows_of(spark, folder, "text_vectors") == {"text_vectors": []}
    assert not table_exists(spark, table_path(str(folder / "tables"), CANDIDATES))
    assert run_job(build_candidates.main, arguments(folder, encoder)) == 0
    shown.add("exit code and message")


@pytest.mark.fault("an encoder is damaged or none")
@pytest.mark.parametrize("fault", ["missing", "a file is missing", "one byte flipped", "another kind"])
def test_an_encoder_that_is_no_encoder_is_refused_before_a_text_is_embedded(
    spark: SparkSession,
    folder: Path,
    tiny_encoder: Path,
    fault: str,
    capsys: pytest.CaptureFixture[str],
    shown: set[str],
) -> None:
    encoder = folder / "encoder"
    if fault == "another kind":
        encoder = ROOT / "conf" / "demo_bundle"
    elif fault != "missing":
        shutil.copytree(tiny_encoder, encoder)
        if fault == "a file is missing":
            (encoder / "tokenizer.json").unlink()
        else:
            content = bytearray((encoder / "model.onnx").read_bytes())
            content[len(content) // 2] ^= 1
            (encoder / "model.onnx").write_bytes(content)
    for main, words in (
        (build_retrieval_table.main, arguments(folder, encoder)),
        (embed_catalog.main, embedding_arguments(folder, encoder)),
    ):
        assert run_job(main, words) == 2, main
        assert "encoder '" in capsys.readouterr().err
    assert not table_exists(spark, table_path(str(folder / "tables"), TEXT_VECTORS))
    shown.add("exit code and message")


SMALL_COMMITS = """
import sys
from csrm.cli import run_job
from csrm.commands import embed_catalog
from csrm.retrieval import vectors
vectors.TEXTS_PER_COMMIT = 200
sys.exit(run_job(embed_catalog.main, sys.argv[1:]))
"""


@pytest.fixture
def embedding(folder: Path, tiny_encoder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The job embed_catalog with many commits, in a process group of its own."""
    titles = [("tw", f"p{number}", f"텐트 {number}", "ko") for number in range(4_000)]
    save(folder, "catalog", titles, "market product_id title language")
    words = embedding_arguments(folder, tiny_encoder, num_partitions=2)
    process = subprocess.Popen(
        [sys.executable, "-c", SMALL_COMMITS, *words],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.fault("an embedding is killed between two of its commits")
def test_a_killed_embedding_leaves_whole_commits_and_the_next_one_embeds_what_is_left(
    spark: SparkSession,
    folder: Path,
    tiny_encoder: Path,
    embedding: subprocess.Popen[bytes],
    capsys: pytest.CaptureFixture[str],
    shown: set[str],
) -> None:
    log = folder / "tables" / "text_vectors" / "_delta_log"
    wait_for(lambda: len([*log.glob("*.json")]) > 3, "three commits of vectors")
    children = psutil.Process(embedding.pid).children(recursive=True)
    os.killpg(embedding.pid, signal.SIGKILL)
    assert embedding.wait() == -signal.SIGKILL
    psutil.wait_procs(children, timeout=60)
    left = vectors_of(spark, folder)
    assert 0 < len(left) < 4_000

    assert run_job(embed_catalog.main, embedding_arguments(folder, tiny_encoder)) == 0
    assert f"catalog: {4_000 - len(left):,} new texts embedded" in capsys.readouterr().out
    found = vectors_of(spark, folder)
    assert len(found) == len(found.drop_duplicates([*TEXT_VECTORS.key])) == 4_002  # two queries have a text
    assert set(left["vector"].map(tuple)) <= set(found["vector"].map(tuple))
    texts = [f"텐트 {number}" for number in range(4_000)]
    by_text = found[found["kind"] == "passage"].set_index("text_sha256")["vector"]
    stored = [by_text[hashlib.sha256(text.encode()).hexdigest()] for text in texts]
    np.testing.assert_allclose(stored, load_encoder(tiny_encoder).embed(texts), atol=1e-5)
    shown |= {"complete", "no duplicates", "equal scores", "bounded rework"}
