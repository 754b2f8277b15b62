"""How long search by meaning takes and what it needs, for catalogs that nobody has embedded yet.

    csrm capacity ... --products 10000000 --encoder FOLDER
    ... --texts-per-second 4000      # of the encoder on one GPU, or on one core

With P products and Q queries in M markets of one size, vectors of d numbers, a share x of texts that are new, and k
products of a query and j queries of a product that are kept,

    embedding   x (P + Q) / rate / slots
    search      P Q / M d / 384 / SIMILARITIES_PER_S / cores

for every product is compared with every query of its market. Queries are broadcast QUERIES_PER_CHUNK at a time, so
that a worker holds no more of them however many there are, and the products' vectors are read once for each chunk. A
task gives the best of its own, so that the rows that are shuffled grow with tasks, queries and products, not with
their product. tests/benchmarks/semantic_search.py measures the constant.
"""

import math
import time
from dataclasses import dataclass

from csrm.artefacts.manifest import GOLDEN_NAME
from csrm.capacity.formula import Machines
from csrm.embedding.contents import QUERIES_PER_CHUNK, GoldenTexts
from csrm.embedding.encoder import open_encoder, read_encoder

SIMILARITIES_PER_S = 50e6
"""Pairs of vectors of 384 numbers that one core compares in a second of processor time."""
BYTES_PER_NUMBER = 4
BYTES_PER_ROW = 60.0
"""Bytes of a shuffled pair: ids, market, similarity. Estimated, not measured."""
_SECONDS_TO_MEASURE = 2.0


@dataclass(frozen=True)
class SearchNeeds:
    """What one search of a catalog takes."""

    num_products: float
    num_queries: float
    embed_s: float
    """Seconds to embed the new texts."""
    search_s: float
    """Seconds to compare all products with all queries."""
    broadcast_bytes: float
    """Bytes of the queries that a worker holds at once."""
    num_chunks: int
    """Chunks of queries, each of which is broadcast once."""
    read_bytes: float
    """Bytes of vectors that are read."""
    shuffled_bytes: float
    """Bytes of the pairs that tasks give."""
    table_bytes: float
    """Bytes of text_vectors."""


@dataclass(frozen=True)
class SearchPlan:
    """Searches of any catalog with one encoder, on the same machines."""

    dimensions: int
    texts_per_s: float
    """Texts that one slot embeds in a second."""
    machines: Machines
    share_new: float = 1.0
    """Share of the texts that have no vector yet."""
    num_markets: int = 1
    products_per_query: int = 50
    """`k` of the settings."""
    queries_per_product: int = 2

    def needs(self, num_products: float, num_queries: float) -> SearchNeeds:
        """What one search takes: the formula above."""
        num_texts = num_products + num_queries
        vector_bytes = float(self.dimensions * BYTES_PER_NUMBER)
        num_chunks = max(1, math.ceil(num_queries / QUERIES_PER_CHUNK))
        rate = SIMILARITIES_PER_S * 384 / self.dimensions
        best = self.machines.cores * num_queries * self.products_per_query
        num_rows = min(best, num_products * num_queries) + num_chunks * num_products * self.queries_per_product
        return SearchNeeds(
            num_products=num_products,
            num_queries=num_queries,
            embed_s=self.share_new * num_texts / self.texts_per_s / self.machines.slots,
            search_s=num_products * num_queries / self.num_markets / rate / self.machines.cores,
            broadcast_bytes=min(num_queries, QUERIES_PER_CHUNK) * vector_bytes,
            num_chunks=num_chunks,
            read_bytes=(num_chunks * num_products + num_queries) * vector_bytes,
            shuffled_bytes=num_rows * BYTES_PER_ROW,
            table_bytes=num_texts * vector_bytes,
        )


def encoder_rate(folder: str) -> float:
    """Texts a second that one core of this machine embeds: golden texts, which are real ones, over and over.

    Raises:
        BundleError: see csrm.embedding.load_encoder.
    """
    settings, digest, path = read_encoder(folder)
    encoder, golden = open_encoder(settings, digest, path, threads=1), GoldenTexts.read(path / GOLDEN_NAME)
    texts = (golden.texts * 64)[:64]
    encoder.embed(texts)
    start, num_texts = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < _SECONDS_TO_MEASURE:
        encoder.embed(texts)
        num_texts += len(texts)
    return num_texts / seconds
