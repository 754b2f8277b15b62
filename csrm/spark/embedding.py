"""Vectors of texts: an Arrow UDF for any DataFrame."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql.pandas.functions import arrow_udf

from csrm.embedding.contents import TextKind
from csrm.embedding.encoder import Encoder, load_encoder, read_encoder
from csrm.spark.workers import task_device
from csrm.text import has_text


@lru_cache(maxsize=1)
def _loaded_encoder(folder: str, device: str, threads: int, digest: str) -> Encoder:
    """Load once per Python worker process.

    The digest is part of the key: workers outlive an encoder that is replaced at its path.

    Raises:
        BundleError: the encoder at the path has another digest.
    """
    return load_encoder(folder, device, threads=threads, digest=digest)


def embed_udf(
    folder: str,
    kind: TextKind = "passage",
    *,
    device: str = "cpu",
    threads: int = 1,
    digest: str | None = None,
) -> Any:
    """UDF from a column of texts to a column of vectors, arrays of floats.

    Args:
        folder: of the encoder, the same path on every machine; or its URI.
        kind: passage for what is found, such as titles; query for what is searched for.
        device: cpu; cuda, which is the GPU that Spark gives the task, or the first one; or cuda:<number>.
        threads: threads of one forward pass on the CPU.
        digest: of the encoder, where the caller has read it; None: all its files are read here.

    Returns:
        The UDF. A text that is null or blank has null.

    Raises:
        BundleError: no encoder there; also in workers whose machine has another one.

    Example:
        vectors_df = catalog_df.withColumn("vector", embed_udf("/models/encoder")("title"))
    """
    wanted = read_encoder(folder)[1] if digest is None else digest

    @arrow_udf("array<float>")  # type: ignore[call-overload]  # the stubs want what is inferred
    def embed(batches: Iterator[pa.Array]) -> Iterator[pa.Array]:
        encoder = _loaded_encoder(folder, task_device(device), threads, wanted)
        for batch in batches:
            texts = batch.to_pylist()
            is_shown = np.array([has_text(text) for text in texts], bool)
            vectors = encoder.embed([text for text in texts if has_text(text)], kind)
            offsets = np.concatenate([[0], np.cumsum(is_shown * encoder.settings.dimensions)]).astype(np.int32)
            yield pa.ListArray.from_arrays(offsets, pa.array(vectors.ravel()), mask=pa.array(~is_shown))

    return embed.asNondeterministic()  # so that a filter after the column does not compute it twice
