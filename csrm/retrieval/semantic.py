"""What is near a query in meaning: vectors of titles and queries, compared exactly."""

from typing import Annotated

from pydantic import Field
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from csrm.config import Settings
from csrm.embedding.contents import TextKind
from csrm.embedding.encoder import read_encoder
from csrm.retrieval.expansion import compared_vectors
from csrm.retrieval.nearest import near_pairs
from csrm.retrieval.vectors import embed_catalog_and_queries, read_vectors, text_digest
from csrm.schemas import PAIR_KEY
from csrm.spark.embedding import embed_udf
from csrm.spark.session import persisted
from csrm.spark.text import is_blank


class SemanticSettings(Settings):
    """Retrieval by meaning, with an encoder."""

    encoder: str
    """Folder of the encoder, the same path on every machine; or its URI."""
    k: Annotated[int, Field(ge=1)] = 50
    """Nearest products of each query."""
    min_similarity: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """Smallest cosine at which a product counts as near, seen from the market's centre: 0 is as near as any product."""
    device: str = "cpu"
    """Device that embeds: cpu; cuda, which is the GPU that Spark gives a task, or the first one; or cuda:<number>. With
    cuda, tasks also compare vectors on the GPU where their Python has torch."""


def semantic_scores(
    spark: SparkSession,
    catalog_df: DataFrame,
    queries_df: DataFrame,
    words_df: DataFrame,
    *,
    vectors_path: str,
    settings: SemanticSettings,
    queries_per_product: int = 0,
) -> DataFrame:
    """Cosines of the products and queries of each market that are nearest to each other; new texts are embedded first.

    What is compared are the vectors of expansion.compared_vectors.

    Args:
        spark: the session.
        catalog_df: columns of `schemas.CATALOG`; products without a title are never near.
        queries_df: columns of `schemas.QUERIES`.
        words_df: market, query_id, product_id, strength of what queries find by their words; two of a query are used.
        vectors_path: folder of the table `text_vectors`.
        settings: the encoder, and how many products a query gets.
        queries_per_product: nearest queries of each product, >= 0.

    Returns:
        As `nearest.near_pairs`.

    Raises:
        BundleError: no encoder there, or another one on a worker's machine.
    """
    texts = {
        "passage": catalog_df.where(~is_blank(F.col("title"))).selectExpr("market", "product_id", "title AS text"),
        "query": queries_df.where(~is_blank(F.col("query"))).selectExpr("market", "query_id", "query AS text"),
    }
    digest, _ = embed_catalog_and_queries(
        spark, catalog_df, queries_df, vectors_path, encoder=settings.encoder, device=settings.device
    )
    kinds: tuple[TextKind, ...] = ("passage", "query")
    products_df, asked_df = (
        texts[kind]
        .withColumn("text_sha256", F.expr(text_digest("text")))
        .join(read_vectors(spark, vectors_path, digest, kind), "text_sha256", "inner")
        .drop("text", "text_sha256")
        for kind in kinds
    )
    products_df, moved_df = compared_vectors(products_df, asked_df, words_df)
    with persisted(moved_df) as asked_df:  # while near_pairs collects them
        return near_pairs(
            products_df,
            asked_df,
            products_per_query=settings.k,
            queries_per_product=queries_per_product,
            min_similarity=settings.min_similarity,
            device=settings.device,
        )


def cosine_scores(
    judgments_df: DataFrame, catalog_df: DataFrame, queries_df: DataFrame, *, encoder: str, device: str
) -> DataFrame:
    """How near the titles of judged products are to their queries, by an encoder's vectors as they are.

    Args:
        judgments_df: market, query_id, product_id.
        catalog_df: the products.
        queries_df: the queries.
        encoder: folder of the encoder, the same path on every machine; or its URI.
        device: that embeds.

    Returns:
        market, query_id, product_id, score: the cosine, in [-1, 1]; null where a text is null or blank.

    Raises:
        BundleError: no encoder there, or another one on a worker's machine.
    """
    digest = read_encoder(encoder)[1]
    vector = {kind: embed_udf(encoder, kind, device=device, digest=digest) for kind in ("passage", "query")}
    products, queries = ["market", "product_id"], ["market", "query_id"]
    titles_df = catalog_df.join(judgments_df.select(*products).distinct(), products, "left_semi").select(
        *products, vector["passage"]("title").alias("passage")
    )
    asked_df = queries_df.join(judgments_df.select(*queries).distinct(), queries, "left_semi").select(
        *queries, vector["query"]("query").alias("asked")
    )
    return (
        judgments_df.select(*PAIR_KEY)
        .join(titles_df, products)
        .join(asked_df, queries)
        .select(*PAIR_KEY, _cosine("passage", "asked").alias("score"))
    )


def _cosine(one: str, other: str) -> Column:
    """Null where a vector is null; -1 where one has no length, as csrm.scoring.vote.cosine."""
    lengths = f"sqrt({_dot(one, one)} * {_dot(other, other)})"
    return F.expr(f"CASE WHEN {lengths} = 0 THEN -1D ELSE {_dot(one, other)} / {lengths} END")


def _dot(one: str, other: str) -> str:
    """Summed in double."""
    return f"aggregate(zip_with({one}, {other}, (x, y) -> double(x) * y), 0D, (sum, x) -> sum + x)"
