"""Teachers' scores from a table: for sets too large for one machine, scored on a cluster by jobs/score_catalog.py."""

import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa

from csrm.config import InputSpec
from csrm.errors import InputError
from csrm.schemas import PAIR_KEY, RELEVANCE_SCORES, Table
from csrm.scoring.labels import Label
from csrm.training.data.database import add_table, open_database
from csrm.training.data.judged import JudgedPairs

_COLUMNS = (*PAIR_KEY, "relevance_score", "bundle_digest")
_SCORES = Table(
    name="teacher_scores",
    comment="What is read of relevance_scores",
    columns=tuple(column for column in RELEVANCE_SCORES.columns if column.name in _COLUMNS),
    key=RELEVANCE_SCORES.key,
)
_PAIRS = pa.schema([(name, pa.string()) for name in (*PAIR_KEY, "grade", "split")])


def label_probabilities(scores: np.ndarray, labels: Sequence[Label]) -> np.ndarray:
    """The most concentrated distribution over the labels that has this expected gain.

    It mixes the two labels whose gains surround the score; with gains 0 and 1 only, it is the model's own answer. With
    more labels the score does not tell a doubt between E and I from a likely S; a mixture of the least and the most
    relevant label would have the same expected gain too, but would believe no given S or C. Of labels with the same
    gain, the first is taken.

    Args:
        scores: expected gains, shape (num_pairs,).

    Returns:
        Shape (num_pairs, num_labels).
    """
    gains, places = np.unique([label.gain for label in labels], return_index=True)
    probabilities = np.zeros((len(scores), len(labels)))
    for place, peak in zip(places, np.eye(len(gains)), strict=True):
        probabilities[:, place] = np.interp(scores, gains, peak)
    return probabilities


def teacher_scores(
    spec: InputSpec, pairs: JudgedPairs, splits: Sequence[str], labels: Sequence[Label]
) -> Iterator[tuple[pd.DataFrame, np.ndarray]]:
    """Pairs of some splits (key, grade, split), in batches, with label probabilities from their scores.

    Raises:
        InputError: the table cannot be read, scores of several bundles are in it, or pairs have no score.
    """

    def keys() -> Iterator[pa.RecordBatch]:
        for split in splits:
            for batch in pairs.batches(split):
                yield pa.RecordBatch.from_pandas(batch[_PAIRS.names], schema=_PAIRS, preserve_index=False)

    with tempfile.TemporaryDirectory(prefix="csrm-scores-") as folder, open_database(folder) as database:
        add_table(database, _SCORES, spec)
        digests = [row[0] for row in database.execute("SELECT DISTINCT bundle_digest FROM teacher_scores").fetchall()]
        if len(digests) != 1:
            raise InputError(
                f"teacher_scores {spec.path!r}: expected scores of one bundle, got {len(digests)}: {sorted(digests)}. "
                "Score all pairs with the teacher's bundle."
            )
        database.register("asked", pa.RecordBatchReader.from_batches(_PAIRS, keys()))
        scored = database.sql(
            """SELECT asked.*, relevance_score FROM asked LEFT JOIN teacher_scores USING (market, query_id, product_id)
            ORDER BY market, query_id, product_id"""
        )
        for batch in scored.to_arrow_reader(8_192):
            frame = batch.to_pandas()
            missing = frame[frame["relevance_score"].isna()]
            if len(missing):
                raise InputError(
                    f"teacher_scores {spec.path!r}: pairs have no score, for example "
                    f"{' '.join(missing.iloc[0][[*PAIR_KEY]])}. Score them with "
                    "jobs/score_catalog.py: name the judged and unlabelled pairs as its candidates."
                )
            yield frame, label_probabilities(frame["relevance_score"].to_numpy(), labels)
