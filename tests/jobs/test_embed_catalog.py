from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import Row, SparkSession

from csrm.cli import setting_arguments
from csrm.commands import build_candidates, build_retrieval_table
from csrm.commands.embed_catalog import main
from csrm.embedding import Encoder, load_encoder
from csrm.errors import BundleError
from csrm.retrieval.vectors import read_vectors, text_digest
from csrm.schemas import CANDIDATES, RETRIEVAL_TABLE, TEXT_VECTORS, UNCOVERED_PRODUCTS
from csrm.spark.embedding import embed_udf
from csrm.spark.tables import read_table, table_path, table_version

pytestmark = pytest.mark.spark


def test_the_udf_gives_the_encoders_vectors_and_null_for_no_text(spark: SparkSession, tiny_encoder: Path) -> None:
    titles = ["red shoe", None, "藍牙耳機", " \u3000", "캠핑 텐트"]
    titles_df = spark.createDataFrame(list(enumerate(titles)), "n int, title string").repartition(2)
    rows = titles_df.select("n", embed_udf(str(tiny_encoder), "query")("title").alias("vector")).collect()
    found = {row["n"]: row["vector"] for row in rows}
    assert found[1] is None
    assert found[3] is None
    expected = load_encoder(tiny_encoder).embed(["red shoe", "藍牙耳機", "캠핑 텐트"], "query")
    np.testing.assert_allclose([found[n] for n in (0, 2, 4)], expected, atol=1e-6)


def test_the_udf_names_what_is_wrong_with_an_encoder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json cannot be read"):
        embed_udf(str(tmp_path / "nothing"))


def write_inputs(spark: SparkSession, folder: Path, *titles: str | None) -> None:
    products = [("us", f"p{number}", title) for number, title in enumerate(titles)]
    catalog_df = spark.createDataFrame(
        [*products, ("kr", "p0", "운동화")], "market string, product_id string, title string"
    )
    queries_df = spark.createDataFrame([("us", "q1", "shoe")], "market string, query_id string, query string")
    for name, df in (("catalog", catalog_df), ("queries", queries_df)):
        df.coalesce(1).write.mode("overwrite").parquet(str(folder / f"{name}.parquet"))


def arguments(folder: Path, encoder: Path) -> list[str]:
    values = [f"inputs.{name}={{path: {folder}/{name}.parquet, format: parquet}}" for name in ("catalog", "queries")]
    values += [f"tables={folder}", f"encoder={encoder}", 'markets={"us": "en"}', "num_partitions=2"]
    return ["--config", "conf/embed_catalog.yaml", *(part for value in values for part in ("--set", value))]


def test_only_texts_that_have_no_vector_of_this_encoder_are_embedded(
    spark: SparkSession,
    tiny_encoder: Path,
    encoder_at: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = table_path(str(tmp_path), TEXT_VECTORS)

    def run(encoder: Path) -> list[str]:
        assert main(arguments(tmp_path, encoder)) == 0
        return [line for line in capsys.readouterr().out.splitlines() if "embedded" in line]

    def vectors(encoder: Encoder, kind: str) -> dict[str, Row]:
        texts_df = spark.createDataFrame([("red shoe",), ("blue shoe",), ("green hat",), ("shoe",)], "text string")
        by_digest_df = texts_df.selectExpr("text", f"{text_digest('text')} AS text_sha256")
        rows = read_vectors(spark, path, encoder.digest, kind).join(by_digest_df, "text_sha256", "left").collect()  # type: ignore[arg-type]
        return {row["text"]: row["vector"] for row in rows}

    write_inputs(spark, tmp_path, "red shoe", "blue shoe", "red shoe", None, " ")
    assert run(tiny_encoder) == ["catalog: 2 new texts embedded", "queries: 1 new texts embedded"]
    encoder = load_encoder(tiny_encoder)
    found = vectors(encoder, "passage")
    assert set(found) == {"red shoe", "blue shoe"}
    np.testing.assert_allclose(found["red shoe"], encoder.embed(["red shoe"])[0], atol=1e-6)
    assert set(vectors(encoder, "query")) == {"shoe"}

    write_inputs(spark, tmp_path, "blue shoe", "green hat")
    assert run(tiny_encoder) == ["catalog: 1 new texts embedded", "queries: 0 new texts embedded"]
    assert set(vectors(encoder, "passage")) == {"red shoe", "blue shoe", "green hat"}
    version = table_version(spark, path)
    assert run(tiny_encoder) == ["catalog: 0 new texts embedded", "queries: 0 new texts embedded"]
    assert table_version(spark, path) == version

    other_dir = encoder_at(tmp_path / "other", pooling="cls")
    assert run(other_dir) == ["catalog: 2 new texts embedded", "queries: 1 new texts embedded"]
    other = load_encoder(other_dir)
    found = vectors(other, "passage")
    assert set(found) == {"blue shoe", "green hat"}
    np.testing.assert_allclose(found["green hat"], other.embed(["green hat"])[0], atol=1e-6)


FOREIGN = [("us", "p1", "red shoe"), ("us", "p2", "캠핑 텐트"), ("us", "p3", "藍牙耳機"), ("us", "p4", "red hat")]
ASKED = [("us", "q1", "red shoe"), ("us", "q2", "tent"), ("us", "q3", "headphones")]


@pytest.fixture
def semantic_inputs(spark: SparkSession, tmp_path: Path) -> Path:
    frames = {
        "catalog": (FOREIGN, "market string, product_id string, title string"),
        "queries": (ASKED, "market string, query_id string, query string"),
    }
    for name, (rows, schema) in frames.items():
        spark.createDataFrame(rows, schema).coalesce(1).write.parquet(str(tmp_path / f"{name}.parquet"))
    return tmp_path


def semantic(folder: Path, encoder: Path, **settings: object) -> list[str]:
    inputs = {name: {"path": folder / f"{name}.parquet", "format": "parquet"} for name in ("catalog", "queries")}
    values = {"inputs": inputs, "tables": folder, "markets": {"us": "en"}, "max_term_share": 1.0}
    return setting_arguments(**values, semantic={"encoder": encoder, **settings})


def cosines(tiny_encoder: Path) -> np.ndarray:
    """Of each query and each product, from the centre of the products; the first query's words find p1 and p4."""
    encoder = load_encoder(tiny_encoder)
    queries = encoder.embed([query for _, _, query in ASKED], "query")
    products = encoder.embed([title for _, _, title in FOREIGN])
    centre = units(products).sum(axis=0) / 5
    queries, products = units(units(queries) - centre), units(units(products) - centre)
    queries[0] += (products[0] + products[3]) / 2
    return units(queries) @ products.T


def units(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_candidates_are_also_found_by_meaning(
    spark: SparkSession, tiny_encoder: Path, semantic_inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    near = cosines(tiny_encoder)
    arguments = semantic(semantic_inputs, tiny_encoder, k=1, min_similarity=-1)
    assert build_candidates.main([*arguments, *setting_arguments(products_per_query=1, queries_per_product=1)]) == 0
    candidates_df = read_table(spark, CANDIDATES, table_path(str(semantic_inputs), CANDIDATES))
    found = {(row["query_id"], row["product_id"]): row["source"] for row in candidates_df.collect()}
    nearest = {(f"q{query + 1}", f"p{near[query].argmax() + 1}") for query in range(3)}
    nearest |= {(f"q{near[:, product].argmax() + 1}", f"p{product + 1}") for product in range(4)}
    by_words = {("q1", "p1"): "query", ("q1", "p4"): "product"}
    assert found == {**dict.fromkeys(nearest, "semantic"), **by_words}
    assert "us      en                     4           2           0           2           0           0" in (
        capsys.readouterr().out
    )

    bound = (near[:, 1].max() + near[:, 2].max()) / 2
    arguments = semantic(semantic_inputs, tiny_encoder, k=4, min_similarity=float(bound))
    assert build_candidates.main([*arguments, *setting_arguments(products_per_query=1, queries_per_product=1)]) == 0
    path = table_path(str(semantic_inputs), UNCOVERED_PRODUCTS)
    rows = [tuple(row) for row in read_table(spark, UNCOVERED_PRODUCTS, path).collect()]
    assert rows == [("us", "p2" if near[:, 1].max() < bound else "p3", "too_dissimilar")]


def test_titles_of_words_and_meaning_are_fused(spark: SparkSession, tiny_encoder: Path, semantic_inputs: Path) -> None:
    near = cosines(tiny_encoder)
    arguments = semantic(semantic_inputs, tiny_encoder, k=4, min_similarity=-1)
    assert build_retrieval_table.main([*arguments, *setting_arguments(num_titles=4)]) == 0
    titles_df = read_table(spark, RETRIEVAL_TABLE, table_path(str(semantic_inputs), RETRIEVAL_TABLE))
    found = {query_id: [] for _, query_id, _ in ASKED}
    for row in titles_df.orderBy("query_id", "rank").collect():
        found[row["query_id"]].append((row["product_id"], row["source"]))
    order = {query: [f"p{place + 1}" for place in np.argsort(-near[query], kind="stable")] for query in range(3)}
    # no product has a word of the last two queries
    assert found["q2"] == [(product, "semantic") for product in order[1]]
    assert found["q3"] == [(product, "semantic") for product in order[2]]
    words = {"p1": 1, "p4": 2}
    strength = {
        product: 1 / (60 + place) + (1 / (60 + words[product]) if product in words else 0)
        for place, product in enumerate(order[0], start=1)
    }
    assert [product for product, _ in found["q1"]] == sorted(
        strength, key=lambda product: (-strength[product], product)
    )
    assert dict(found["q1"])["p1"] == "lexical"
