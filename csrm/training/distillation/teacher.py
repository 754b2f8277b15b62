"""A teacher that costs no label: a ranker that exists scores pairs that nobody judged, and the student learns them."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator
from sklearn.metrics import roc_auc_score

from csrm.artefacts.cache import artefact_kind
from csrm.bundle.contents import BUNDLE_KIND
from csrm.bundle.loading import load_scorer
from csrm.config import InputSpec, Markets, Settings
from csrm.embedding.contents import ENCODER_KIND
from csrm.embedding.encoder import Encoder, load_encoder
from csrm.errors import BundleError, InputError
from csrm.schemas import COMPARED_SCORES, PAIR_KEY
from csrm.scoring.labels import Label
from csrm.scoring.prompts import neutralize
from csrm.scoring.vote import LabelMap, cosine
from csrm.training.data.database import add_table, open_database
from csrm.training.data.judged import TAUGHT, Fold, JudgedPairs, UnlabelledInputs
from csrm.training.distillation.label_map import assumed_label_map, fit_label_map, score_features
from csrm.training.distillation.soft_labels import TRAIN, TargetsOf

logger = logging.getLogger(__name__)
NUM_JUDGED = 5_000
"""Judged pairs, about, by which scores become label probabilities: enough for a handful of numbers."""
FEWEST_JUDGED = 20
"""With fewer judged pairs that have a score, the map is assumed; see assumed_label_map."""
_KEYS = pa.schema([(name, pa.string()) for name in (*PAIR_KEY, "grade", "split")])
_SCORED = _KEYS.append(pa.field("score", pa.float64()))
_LABELLED = pa.schema(
    [*((name, pa.string()) for name in PAIR_KEY), ("soft_label", pa.list_(pa.float32())), ("weight", pa.float32())]
)
Ranker = Callable[[pd.DataFrame], np.ndarray]
"""Scores of pairs (csrm.scoring.PAIR_COLUMNS), shape (pairs,); higher is better, NaN is none."""


class TeacherInputs(Settings):
    """Tables of the pairs that are scored, and their texts."""

    catalog: InputSpec
    queries: InputSpec
    retrieval_table: InputSpec | None = None
    """Titles that augment the queries; without it, queries are not augmented."""
    candidates: InputSpec | None = None
    """Pairs that `model` scores."""
    scores: InputSpec | None = None
    """Pairs with the scores of any ranker, higher is better: market, query_id, product_id, score. Pairs of it that are
    judged in split train tell how far its scores can be trusted."""


class Teacher(Settings):
    """Pairs that nobody judged, with the scores of a ranker that exists: they are learnt beside the judged ones."""

    model: str | None = None
    """Folder of an encoder, whose score is the cosine of query and title, or of a bundle. None: see inputs.scores."""
    inputs: TeacherInputs
    markets: Markets
    """Markets to take, each with the language of its text."""
    pairs_per_query: int = Field(default=8, ge=1)
    """Pairs of each query that are learnt, drawn at random; neighbouring ranks teach the same."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of such a pair, beside 1 for a given label."""
    device: str = "cpu"
    """Where `model` runs: cpu, cuda, or cuda:<number>."""

    @model_validator(mode="after")
    def _scores_come_from_one_place(self) -> "Teacher":
        given = [self.inputs.candidates is not None, self.inputs.scores is not None]
        if given != ([True, False] if self.model is not None else [False, True]):
            raise ValueError(
                "expected model with inputs.candidates, the pairs that it scores, or inputs.scores alone; got "
                f"model {self.model!r} with "
                + (" and ".join(name for name in ("candidates", "scores") if getattr(self.inputs, name)) or "neither")
            )
        return self

    @property
    def pair_inputs(self) -> UnlabelledInputs:
        """Tables of the pairs to learn, whoever scores them."""
        candidates = self.inputs.candidates or self.inputs.scores
        assert candidates is not None
        return UnlabelledInputs(
            catalog=self.inputs.catalog,
            queries=self.inputs.queries,
            candidates=candidates,
            retrieval_table=self.inputs.retrieval_table,
        )


@dataclass(frozen=True)
class TaughtPairs:
    """What a student learns of a teacher."""

    path: Path
    """Parquet file for JudgedPairs.groups."""
    num_pairs: int
    num_judged: int
    """Judged pairs that told how far scores can be trusted; 0 where there were too few and that is assumed."""
    auc: float | None
    """ROC-AUC of the scores on them, of labels of the largest gain; None where that is not known."""


def teach(
    teacher: Teacher, pairs: JudgedPairs, labels: Sequence[Label], targets_of: TargetsOf, folder: Path, *, seed: int = 0
) -> TaughtPairs:
    """Score the pairs of split TAUGHT, and write label probabilities for a student to learn.

    Scores of a model are kept in the folder, and not computed again while the model and the pairs stay the same.

    Args:
        teacher: who scores them.
        pairs: with those pairs, and judged ones of split train.
        labels: of the student.
        targets_of: grades to distributions over the labels.
        folder: gets the files.
        seed: of the judged pairs that tell how far scores can be trusted, where there are many.

    Raises:
        InputError: a market's pairs have no score, or one score alone, or higher scores do not go with better labels.
        BundleError: `model` cannot be opened.
    """
    folder.mkdir(parents=True, exist_ok=True)
    where = f"teacher {teacher.model!r}" if teacher.model is not None else "teacher.inputs.scores"
    scored = _with_numbers(where, _scored(teacher, pairs, folder, seed))
    is_taught = (scored["split"] == TAUGHT).to_numpy()
    features = np.empty((len(scored), 2))
    for part in (is_taught, ~is_taught):
        rows = scored[part]
        features[part] = score_features(rows["score"].to_numpy(), rows["market"].to_list(), rows["query_id"].to_list())
    gains = np.array([label.gain for label in labels])
    order = np.argsort(gains, kind="stable")
    judged = scored[~is_taught]
    given = np.argsort(order)[targets_of(judged["grade"]).argmax(axis=1)] if len(judged) else np.empty(0, np.int64)
    if len(judged) < FEWEST_JUDGED:
        logger.warning(
            "%s: %d judged pairs of split %s have a score, too few to tell how far scores can be trusted: that is "
            "assumed. Score judged pairs too, of any source market",
            where,
            len(judged),
            TRAIN,
        )
        label_map = assumed_label_map(features[is_taught], _label_shares(pairs, targets_of)[order])
        auc, num_judged = None, 0
    else:
        label_map, auc = _fitted(where, judged, features[~is_taught], given, gains[order])
        num_judged = len(judged)
    probabilities = np.empty((int(is_taught.sum()), len(labels)))
    probabilities[:, order] = label_map.probabilities(features[is_taught])
    path = folder / "teacher_labels.parquet"
    columns = [scored.loc[is_taught, name].to_list() for name in PAIR_KEY]
    weights = np.full(len(probabilities), teacher.weight, np.float32)
    _write(pa.table([*columns, probabilities.astype(np.float32).tolist(), weights], schema=_LABELLED), path)
    return TaughtPairs(path, len(probabilities), num_judged, auc)


def _with_numbers(where: str, scored: pd.DataFrame) -> pd.DataFrame:
    """The pairs whose score is a number; how many others there are to learn is logged as a warning.

    Raises:
        InputError: in a market, no pair to learn has one, or all have the same.
    """
    has_score = np.isfinite(scored["score"].to_numpy())
    is_taught = (scored["split"] == TAUGHT).to_numpy()
    num_different = scored[has_score & is_taught].groupby("market")["score"].nunique()
    if without := sorted({*scored["market"][is_taught]} - {*num_different.index}):
        raise InputError(
            f"{where}: no pair of markets {without} has a score that is a number. Score some there, or leave these "
            "markets out of teacher.markets."
        )
    if constant := sorted(num_different.index[num_different == 1]):
        raise InputError(
            f"{where}: expected scores that differ, got one score for all pairs of markets {constant}: there is "
            "nothing to learn from it. Leave these markets out of teacher.markets, or score their pairs again."
        )
    if num_left_out := int((is_taught & ~has_score).sum()):
        logger.warning(
            "%s: %d of %d pairs to learn have no score that is a number, and are left out",
            where,
            num_left_out,
            is_taught.sum(),
        )
    return scored[has_score].reset_index(drop=True)


def _fitted(
    where: str, judged: pd.DataFrame, features: np.ndarray, given: np.ndarray, gains: np.ndarray
) -> tuple[LabelMap, float | None]:
    """The map that judged pairs tell, and the ROC-AUC of their scores."""
    label_map = fit_label_map(features, given, len(gains))
    is_best = gains[given] == gains.max()
    auc = float(roc_auc_score(is_best, judged["score"])) if 0 < is_best.sum() < len(is_best) else None
    if label_map.slopes.max() < 1e-3:
        found = "" if auc is None else f", ROC-AUC {auc:.3f}"
        raise InputError(
            f"{where}: higher scores do not go with better labels on {len(judged)} judged pairs{found}, so there is "
            "nothing to learn from them. Is a higher score better there? Are the ids those of the judgments?"
        )
    return label_map, auc


def _label_shares(pairs: JudgedPairs, targets_of: TargetsOf) -> np.ndarray:
    """Shares of the labels of split train, in their order."""
    counts = sum(targets_of(batch["grade"]).sum(axis=0) for batch in pairs.batches(TRAIN))
    return np.asarray(counts) / np.sum(counts)


def _scored(teacher: Teacher, pairs: JudgedPairs, folder: Path, seed: int) -> pd.DataFrame:
    """The pairs of split TAUGHT and some judged ones, by query: key, grade, split and score."""
    num_judged = pairs.splits()[TRAIN]
    fold = Fold(0, ceil(num_judged / NUM_JUDGED), seed) if num_judged > NUM_JUDGED else None
    batches = (batch for split in (TAUGHT, TRAIN) for batch in pairs.batches(split, fold if split == TRAIN else None))
    if teacher.model is None:
        assert teacher.inputs.scores is not None
        return _scores_of_table(teacher.inputs.scores, batches)
    digest, ranker = _open(teacher.model, teacher.device)
    follows_from = json.dumps([digest, pairs.digest(), fold])
    path = folder / f"teacher_scores-{hashlib.sha256(follows_from.encode()).hexdigest()[:16]}.parquet"
    if not path.exists():
        logger.info("teacher %r scores %d pairs and %d judged ones", teacher.model, pairs.splits()[TAUGHT], num_judged)
        parts = [batch[_KEYS.names].assign(score=ranker(batch)) for batch in batches]
        _write(pa.Table.from_pandas(pd.concat(parts), schema=_SCORED, preserve_index=False), path)
    scored: pd.DataFrame = pq.read_table(path).to_pandas()
    return scored


def _scores_of_table(spec: InputSpec, batches: Iterator[pd.DataFrame]) -> pd.DataFrame:
    """Pairs with their scores in a table, NaN where they have none."""

    def keys() -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield pa.RecordBatch.from_pandas(batch[_KEYS.names], schema=_KEYS, preserve_index=False)

    with tempfile.TemporaryDirectory(prefix="csrm-scores-") as folder, open_database(folder) as database:
        add_table(database, replace(COMPARED_SCORES, name="teacher_scores"), spec)
        database.register("asked", pa.RecordBatchReader.from_batches(_KEYS, keys()))
        found: pd.DataFrame = (
            database.sql(
                """SELECT asked.*, score FROM asked LEFT JOIN teacher_scores USING (market, query_id, product_id)
                ORDER BY market, query_id, product_id"""
            )
            .to_arrow_table()
            .to_pandas()
        )
    return found


def _open(folder: str, device: str) -> tuple[str, Ranker]:
    """Digest of a model, and how it scores."""
    kind = artefact_kind(folder)
    if kind == ENCODER_KIND:
        encoder = load_encoder(folder, device)
        return encoder.digest, lambda pairs: text_cosines(encoder, pairs)
    if kind != BUNDLE_KIND:
        raise BundleError(
            f"teacher.model {folder!r}: expected the folder of an encoder or a bundle, got "
            f"{'no such folder' if kind is None else f'a {kind!r}'}. Export the model with csrm export-encoder or csrm "
            "export-bundle."
        )
    scorer = load_scorer(folder, device)
    return scorer.digest, lambda pairs: scorer.score(pairs)["relevance_score"].to_numpy(np.float64)


def text_cosines(encoder: Encoder, pairs: pd.DataFrame) -> np.ndarray:
    """Cosine of query and title of each pair, shape (num_pairs,), in [-1, 1].

    Args:
        encoder: each text is embedded once, as prompts show it.
        pairs: query and title, both text.
    """
    query_places, queries = pd.factorize(pairs["query"].map(neutralize))
    title_places, titles = pd.factorize(pairs["title"].map(neutralize))
    return cosine(encoder.embed(list(queries), "query")[query_places], encoder.embed(list(titles))[title_places])


def _write(table: pa.Table, path: Path) -> None:
    """The file is there when it is whole."""
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table, partial)
    partial.replace(path)
