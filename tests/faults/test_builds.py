"""What the builds before a night make of faulty parallel text and encoders: the right tables, or those from before."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pyspark.sql import SparkSession

from csrm.cli import run_job, setting_arguments
from csrm.commands import build_candidates, build_retrieval_table, embed_catalog
from csrm.retrieval import vectors
from csrm.schemas import CANDIDATES, RETRIEVAL_TABLE, TEXT_VECTORS, UNCOVERED_PRODUCTS
from csrm.spark.tables import read_table, table_exists, table_path, table_version
from tests.faults.cluster import ROOT

pytestmark = [pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(900)]

HUGE = "".join(chr(0xAC00 + n * 7919 % 11_172) for n in range(20_000))
"""Sixty kilobytes in UTF-8, which are 20,000 terms, 11,172 of them different."""
TITLES = {"p1": "등산 재킷", "p2": "防水登山外套", "p3": None, "p4": HUGE, "p5": "\u200b"}
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


def test_an_encoder_that_is_replaced_while_a_build_runs_writes_no_vector(
    spark: SparkSession,
    folder: Path,
    encoder_at: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
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


@pytest.mark.parametrize("fault", ["missing", "a file is missing", "one byte flipped", "another kind"])
def test_an_encoder_that_is_no_encoder_is_refused_before_a_text_is_embedded(
    spark: SparkSession, folder: Path, tiny_encoder: Path, fault: str, capsys: pytest.CaptureFixture[str]
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
