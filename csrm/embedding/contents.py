"""What `manifest.json` of an encoder says under `about`, and what its files hold."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from csrm.artefacts.manifest import read_golden, write_golden
from csrm.config import Settings

ENCODER_KIND = "encoder"
FORMAT_VERSION = 1
QUERIES_PER_CHUNK = 50_000
"""Queries whose vectors a search broadcasts at once: 77 MB of 384 dimensions. Products are read once for each chunk."""
Pooling = Literal["mean", "cls", "last"]
"""How the vectors of a text's tokens become one: their mean, the first, or the last."""
TextKind = Literal["query", "passage"]
"""What a text is: encoders may put another prefix before what is searched for than before what is found."""


class Recall(Settings):
    """What a precision loses, on judged pairs."""

    value: float
    """Recall@10 of the encoder."""
    of_torch: float
    """Recall@10 of the model in torch, in float32."""
    num_queries: int
    """Queries that it was measured with."""
    recipe: str
    """How the graph was made."""


class EncoderSettings(Settings):
    """What `manifest.json` says about an encoder, under `about`."""

    format_version: int = FORMAT_VERSION
    model: str
    """Name of the model that was exported."""
    model_files: dict[str, str]
    """File of its weights to sha256."""
    model_type: str
    """Family, as transformers calls it, such as bert."""
    pooling: Pooling
    normalize: bool
    """Whether vectors have length 1."""
    dimensions: int = Field(ge=1)
    """Numbers of a vector: the first so many of the model's."""
    query_prefix: str
    """Text before each query."""
    passage_prefix: str
    """Text before each product title."""
    max_tokens: int = Field(ge=1)
    """Most tokens of a text, with its prefix and special tokens; the rest is cut off."""
    pad_id: int = Field(ge=0)
    """Token that fills a batch; the model does not attend to it."""
    golden_cosine: float
    """Smallest cosine of a golden vector and its counterpart here."""
    smallest_cosine: float
    """Smallest cosine of the graph's vectors and torch's at the export."""
    precision: str = "fp32"
    """Precision of the graph."""
    recall: Recall | None = None
    """Of another precision than fp32: what it loses."""
    versions: dict[str, str]
    """Package to version that made the encoder."""

    def prefix(self, kind: TextKind) -> str:
        return self.query_prefix if kind == "query" else self.passage_prefix


class _GoldenText(Settings):
    kind: TextKind
    text: str
    token_ids: list[int]
    vector: list[float]


class _GoldenFile(Settings):
    source: str
    texts: list[_GoldenText] = Field(min_length=1)


@dataclass(frozen=True)
class GoldenTexts:
    """Real texts with the vectors that the encoder must give: what `golden.json` holds."""

    source: str
    """What computed the vectors, for example torch 2.6."""
    kinds: list[TextKind]
    texts: list[str]
    token_ids: list[list[int]]
    vectors: np.ndarray
    """Shape (num_texts, dimensions), float32."""

    def write(self, path: Path) -> None:
        """One line a text."""
        rows = zip(self.kinds, self.texts, self.token_ids, self.vectors.astype(float).tolist(), strict=True)
        names = ("kind", "text", "token_ids", "vector")
        write_golden(path, self.source, "texts", (dict(zip(names, row, strict=True)) for row in rows))

    @classmethod
    def read(cls, path: Path) -> "GoldenTexts":
        """Read a `golden.json`.

        Raises:
            BundleError: the file does not hold golden texts.
        """
        file = read_golden(path, _GoldenFile, "encoder", "golden texts")
        return cls(
            source=file.source,
            kinds=[entry.kind for entry in file.texts],
            texts=[entry.text for entry in file.texts],
            token_ids=[entry.token_ids for entry in file.texts],
            vectors=np.array([entry.vector for entry in file.texts], np.float32),
        )
