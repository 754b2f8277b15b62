"""Pairs that end their process, again and again: found by what earlier attempts were at when they died.

A flaw in native code kills or hangs a process without a word. Nothing is noted while all goes well. An attempt that
follows one that died notes the pairs of each step, in a folder that all machines share, before it scores them; a note
that is still there was left by a process that died at it. Its pairs are scored one by one by the next attempt, each
with a note; a pair that was alone in a note that was left is not tried again in this run.
"""

import json
import logging
import uuid
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.fs as pa_fs

from csrm.scoring.scorer import PairScorer

PROCESS_DIED = "process_died"
"""Reason of a pair at which its process died, or was silent for too long, more than once."""
logger = logging.getLogger(__name__)


class Attempts:
    """The notes of a run's attempts, for one of them."""

    def __init__(self, folder: str) -> None:
        """Read what earlier attempts noted.

        Args:
            folder: a path, or a URI of a storage that pyarrow.fs reaches; made where there is none.

        Raises:
            OSError, pa.ArrowException: it cannot be made or read.
        """
        self._files, self._folder = _open(folder)
        self._files.create_dir(self._folder)
        self._own = f"{self._folder}/{uuid.uuid4().hex}.json"
        self._guilty: set[int] = set()
        self._suspects: set[int] = set()
        for info in self._files.get_file_info(pa_fs.FileSelector(self._folder)):
            keys = self._read(info.path)
            (self._guilty if len(keys) == 1 else self._suspects).update(keys)

    def score(self, scorer: PairScorer, pairs: pd.DataFrame, *, label_probabilities: bool = False) -> pd.DataFrame:
        """As PairScorer.score_or_reject, for pairs with their pair_key; also gives the reason PROCESS_DIED."""
        is_guilty = pairs["pair_key"].isin(self._guilty).to_numpy()
        is_suspect = pairs["pair_key"].isin(self._suspects).to_numpy() & ~is_guilty
        guilty = pairs.loc[is_guilty]
        for query, title in zip(guilty["query"], guilty["title"], strict=True):
            logger.warning("rejected, %s: query %.80r, product %.80r", PROCESS_DIED, query, title)
        no_score = {"relevance_score": np.float32("nan"), "predicted_grade": None, "reason": PROCESS_DIED}
        no_score |= {"label_probabilities": None} if label_probabilities else {}
        scored = [pd.DataFrame(no_score, index=guilty.index)]
        for rows in (np.flatnonzero(~is_guilty & ~is_suspect), *np.flatnonzero(is_suspect)[:, np.newaxis]):
            if len(rows):
                step = pairs.iloc[rows]
                self._note(step["pair_key"])
                scored.append(scorer.score_or_reject(step, label_probabilities=label_probabilities))
        return pd.concat([frame for frame in scored if len(frame)]).loc[pairs.index]

    def close(self) -> None:
        """Take back this attempt's note: its process lives."""
        if self._files.get_file_info(self._own).type != pa_fs.FileType.NotFound:
            self._files.delete_file(self._own)

    def _note(self, pair_keys: Sequence[int]) -> None:
        with self._files.open_output_stream(self._own) as stream:
            stream.write(json.dumps(sorted({int(key) for key in pair_keys})).encode())

    def _read(self, path: str) -> list[int]:
        try:
            with self._files.open_input_stream(path) as stream:
                return list(json.loads(stream.read()))
        except (FileNotFoundError, json.JSONDecodeError):  # taken back meanwhile; died while it wrote
            return []


def open_attempts(folder: str) -> Attempts | None:
    """The notes, or None, with a warning, on a storage where there can be none."""
    try:
        return Attempts(folder)
    except (OSError, pa.ArrowException) as error:
        logger.warning("a pair that ends its process every time will not be found: %s: %s", folder, error)
        return None


def forget_attempts(folder: str) -> None:
    """Delete the notes of a run: all its pairs have a score or a reason."""
    try:
        files, path = _open(folder)
        if files.get_file_info(path).type != pa_fs.FileType.NotFound:
            files.delete_dir(path)
    except (OSError, pa.ArrowException) as error:
        logger.warning("notes of attempts are left behind: %s: %s", folder, error)


def _open(folder: str) -> tuple[pa_fs.FileSystem, str]:
    found: tuple[pa_fs.FileSystem, str] = pa_fs.FileSystem.from_uri(folder.replace("s3a://", "s3://", 1))
    return found
