"""Vectors of titles and queries, kept in a table: a night embeds only texts that are new."""

import math
import uuid

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from csrm.embedding.contents import TextKind
from csrm.embedding.encoder import read_encoder
from csrm.schemas import TEXT_VECTORS
from csrm.spark.commits import Transaction, append_rows
from csrm.spark.embedding import embed_udf
from csrm.spark.tables import create_table, read_table
from csrm.spark.text import is_blank
from csrm.spark.workers import errors_of_workers, task_threads

TEXTS_PER_COMMIT = 100_000
"""Texts whose vectors are written in one commit: what a job that dies has to embed again at most."""


def text_digest(column: str) -> str:
    """SQL of the digest that a text has in the table."""
    return f"sha2({column}, 256)"


def missing_texts(texts_df: DataFrame, known_df: DataFrame) -> DataFrame:
    """Different texts that have no vector yet: text, text_sha256. Blank ones are left out.

    Args:
        texts_df: text (string).
        known_df: text_sha256 of texts that have one.
    """
    return (
        texts_df.where(~is_blank(F.col("text")))
        .select("text", F.expr(text_digest("text")).alias("text_sha256"))
        .dropDuplicates(["text_sha256"])
        .join(known_df, "text_sha256", "left_anti")
    )


def read_vectors(spark: SparkSession, path: str, digest: str, kind: TextKind) -> DataFrame:
    """Vectors that an encoder gave texts of a kind: text_sha256, vector; each text once.

    Two jobs that embed at the same time may both have written a text, with vectors that are the same but for rounding;
    one of them is read.
    """
    is_asked = (F.col("encoder_digest") == digest) & (F.col("kind") == kind)
    vectors_df = read_table(spark, TEXT_VECTORS, path).where(is_asked)
    return vectors_df.groupBy("text_sha256").agg(F.min("vector").alias("vector"))


def embed_catalog_and_queries(
    spark: SparkSession,
    catalog_df: DataFrame,
    queries_df: DataFrame,
    path: str,
    *,
    encoder: str,
    device: str = "cpu",
    num_partitions: int | None = None,
) -> tuple[str, dict[str, int]]:
    """Embed the titles and queries that the table has no vector of yet; see embed_new_texts.

    Args:
        spark: the session.
        catalog_df: columns of `schemas.CATALOG`.
        queries_df: columns of `schemas.QUERIES`.
        path: the table's folder.
        encoder: folder of the encoder, or its URI.
        device: see csrm.spark.embedding.embed_udf.
        num_partitions: tasks that embed; None: Spark's default parallelism.

    Returns:
        Digest of the encoder; kind to the number of texts that were embedded, passage first.

    Raises:
        BundleError: no encoder there, or another one on a worker's machine.
    """
    digest = read_encoder(encoder)[1]
    texts: dict[TextKind, DataFrame] = {
        "passage": catalog_df.selectExpr("title AS text"),
        "query": queries_df.selectExpr("query AS text"),
    }
    num_new = {}
    for kind, texts_df in texts.items():
        with errors_of_workers():
            num_new[str(kind)] = embed_new_texts(
                spark,
                texts_df,
                path,
                encoder=encoder,
                digest=digest,
                kind=kind,
                device=device,
                threads=task_threads(spark),
                num_partitions=num_partitions,
            )
    return digest, num_new


def embed_new_texts(
    spark: SparkSession,
    texts_df: DataFrame,
    path: str,
    *,
    encoder: str,
    digest: str,
    kind: TextKind,
    device: str = "cpu",
    threads: int = 1,
    num_partitions: int | None = None,
) -> int:
    """Embed the texts that the table has no vector of yet, and append these, TEXTS_PER_COMMIT in a commit.

    A job that dies leaves whole commits, so the next one embeds the rest alone.

    Args:
        spark: the session.
        texts_df: text (string).
        path: the table's folder; the table is created where there is none.
        encoder: folder of the encoder, or its URI.
        digest: of the encoder, as read_encoder gives it.
        kind: what the texts are.
        device: see csrm.spark.embedding.embed_udf.
        threads: see csrm.spark.embedding.embed_udf.
        num_partitions: tasks that embed; None: Spark's default parallelism.

    Returns:
        Texts that were embedded.
    """
    create_table(spark, TEXT_VECTORS, path)
    known_df = (
        read_table(spark, TEXT_VECTORS, path)
        .where((F.col("encoder_digest") == digest) & (F.col("kind") == kind))
        .select("text_sha256")
    )
    new_df = missing_texts(texts_df, known_df).persist()
    try:
        num_new = new_df.count()
        num_commits = math.ceil(num_new / TEXTS_PER_COMMIT)
        embed, job = embed_udf(encoder, kind, device=device, threads=threads, digest=digest), uuid.uuid4().hex
        for number in range(num_commits):
            vectors_df = (
                new_df.where(F.pmod(F.xxhash64("text_sha256"), F.lit(num_commits)) == number)
                .repartition(num_partitions or spark.sparkContext.defaultParallelism)
                .select("text_sha256", embed("text").alias("vector"))
                .withColumns({"encoder_digest": F.lit(digest), "kind": F.lit(kind)})
            )
            append_rows(vectors_df, TEXT_VECTORS, path, Transaction(f"csrm-embed-{job}", number))
        return num_new
    finally:
        new_df.unpersist()
