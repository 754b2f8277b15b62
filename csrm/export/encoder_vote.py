"""An encoder in a bundle: how much its cosine of query and title counts beside the model, chosen on judged pairs."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import log_softmax

from csrm.bundle.contents import BUNDLE_KIND, ENCODER_FOLDER, MOST_TOLERANCE, EncoderVote
from csrm.bundle.golden import GoldenPairs
from csrm.bundle.loading import load_bundle, load_scorer
from csrm.embedding.encoder import Encoder, open_encoder, read_encoder
from csrm.errors import ConfigError, InputError
from csrm.export.parity import SCORE_TOLERANCE
from csrm.export.quality import query_ndcgs
from csrm.export.trials import grade_gains
from csrm.manifest import GOLDEN_NAME, write_manifest
from csrm.scoring.labels import Label, expected_gain
from csrm.scoring.scorer import PairScorer
from csrm.scoring.similarity import LabelMap, Similarity, pooled_logits
from csrm.training.distillation.label_map import fit_label_map
from csrm.training.distillation.teacher import text_cosines

logger = logging.getLogger(__name__)
_LARGEST_WEIGHT = 10.0


class Voter(NamedTuple):
    """An encoder that is to vote."""

    encoder: Encoder
    folder: Path


def open_voter(folder: str, device: str, judged: pd.DataFrame | None) -> Voter:
    """Open the encoder of an ensemble.

    Args:
        folder: of the encoder.
        device: that will score.
        judged: pairs that will choose its weight.

    Raises:
        ConfigError: there are none.
        BundleError: see csrm.embedding.load_encoder.
    """
    if judged is None or judged.empty:
        raise ConfigError(
            f"ensemble.encoder {folder!r}: expected judged pairs that tell how much its cosines count, got none in the "
            "split quality_split. Name inputs.judgments with that split, of any market whose labels you have, or leave "
            "the encoder out."
        )
    settings, digest, path = read_encoder(folder)
    return Voter(open_encoder(settings, digest, path, device), path)


def add_vote(
    folder: Path, voter: Voter, fp32_scorer: PairScorer, judged: pd.DataFrame, grade_labels: Mapping[str, str] | None
) -> None:
    """Put an encoder into a finished bundle, whose golden pairs then have the scores of both.

    Args:
        folder: of the bundle; nobody reads it yet.
        voter: the encoder.
        fp32_scorer: of the bundle's fp32 graph, which the golden scores are of.
        judged: pairs that choose how much the encoder counts: query, title, and what fp32_scorer scores; market,
            query_id, grade.
        grade_labels: grade to label.

    Raises:
        InputError: higher cosines do not go with better labels.
        BundleError: the finished bundle does not give its golden scores.
    """
    bundle = load_bundle(folder)
    settings, labels = bundle.settings, bundle.settings.labels
    vote = fit_vote(voter.encoder, fp32_scorer, judged, labels, grade_labels)
    similarity = Similarity(
        voter.encoder.embed,
        LabelMap(np.array([vote.slope]), np.array(vote.thresholds)),
        weights=vote.weights,
        labels=labels,
    )
    golden = bundle.golden_pairs()
    texts = [[text or "" for text in golden.pairs[name]] for name in ("query", "title")]

    def scores_of(scorer: PairScorer) -> np.ndarray:
        logits = similarity.mixed(scorer.logits(golden.pairs), *texts)
        return expected_gain(logits, np.array([label.gain for label in labels])).astype(np.float64)

    scores, source = scores_of(fp32_scorer), f"{golden.source}, with {vote.model}"
    shift = np.abs(scores_of(load_scorer(folder, settings.device)) - scores).max()
    tolerance = SCORE_TOLERANCE if settings.precision == "fp32" else max(SCORE_TOLERANCE, 2 * float(shift))
    GoldenPairs(source, golden.pairs, golden.prompt_ids, scores).write(folder / GOLDEN_NAME)
    shutil.copytree(voter.folder, folder / ENCODER_FOLDER)
    spread = settings.pack_tolerance * max(1.0, vote.weights[0])
    changes = {
        "encoder": vote,
        "pack_tolerance": min(MOST_TOLERANCE, spread),
        "golden_tolerance": min(MOST_TOLERANCE, tolerance),
        "golden_source": source,
    }
    write_manifest(folder, BUNDLE_KIND, settings.model_copy(update=changes).model_dump(mode="json"))
    load_scorer(folder, settings.device, num_golden=None)


def fit_vote(
    encoder: Encoder,
    scorer: PairScorer,
    judged: pd.DataFrame,
    labels: tuple[Label, ...],
    grade_labels: Mapping[str, str] | None,
) -> EncoderVote:
    """The vote of an encoder under which the labels of judged pairs are most probable.

    Raises:
        InputError: higher cosines do not go with better labels, or a grade has no label.
    """
    gains = grade_gains(judged, labels, grade_labels)
    order = np.argsort([label.gain for label in labels], kind="stable")
    names = judged["grade"].map(grade_labels) if grade_labels else judged["grade"]
    given = names.map({label.name: place for place, label in enumerate(labels)}).to_numpy(np.int64)
    cosines = text_cosines(encoder, judged)
    spread = float(cosines.std()) or 1.0
    unit = fit_label_map(((cosines - cosines.mean()) / spread)[:, None], np.argsort(order)[given], len(labels))
    slope = float(unit.slopes[0]) / spread
    if unit.slopes[0] < 1e-3:
        raise InputError(
            f"ensemble.encoder {encoder.settings.model!r}: higher cosines do not go with better labels on "
            f"{len(judged)} judged pairs, so it has nothing to say. Leave it out, or name an encoder that knows the "
            "language. Has it the prefixes that it was trained with?"
        )
    thresholds = unit.thresholds + slope * cosines.mean()
    own = np.empty((len(judged), len(labels)))
    own[:, order] = LabelMap(np.array([slope]), thresholds).probabilities(cosines[:, None])
    logits = scorer.logits(judged)
    weights = fit_weights(logits, own, given)
    _, query_of_pair = np.unique(judged["market"] + "\t" + judged["query_id"].astype(str), return_inverse=True)
    of_labels = np.array([label.gain for label in labels])
    rankings = {
        "model": expected_gain(logits, of_labels),
        "encoder": cosines,
        "both": expected_gain(pooled_logits(logits, own, weights), of_labels),
    }
    ndcgs = {name: query_ndcgs(query_of_pair, gains, scores) for name, scores in rankings.items()}
    vote = EncoderVote(
        digest=encoder.digest,
        model=encoder.settings.model,
        weights=weights,
        slope=slope,
        thresholds=tuple(thresholds.tolist()),
        num_queries=int(query_of_pair.max()) + 1,
        ndcg={name: round(float(np.nanmean(values)), 4) for name, values in ndcgs.items()},
    )
    logger.info("weights %.2f and %.2f; nDCG@10 %s", *weights, vote.ndcg)
    return vote


def fit_weights(logits: np.ndarray, probabilities: np.ndarray, given: np.ndarray) -> tuple[float, float]:
    """Weights of model and encoder under which the given labels are most probable, each 0 or more.

    Args:
        logits: of the model, shape (num_pairs, num_labels).
        probabilities: of the encoder, shape (num_pairs, num_labels).
        given: place of each pair's label, shape (num_pairs,).
    """

    def loss(weights: np.ndarray) -> float:
        both = log_softmax(pooled_logits(logits, probabilities, (weights[0], weights[1])).astype(np.float64), axis=1)
        return -float(both[np.arange(len(given)), given].mean())

    found = minimize(loss, [0.5, 0.5], method="Nelder-Mead", bounds=[(0.0, _LARGEST_WEIGHT)] * 2)
    return float(found.x[0]), float(found.x[1])
