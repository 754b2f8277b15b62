"""An encoder in a bundle: how much its cosine of query and title counts beside the model, chosen on judged pairs."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import minimize

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
from csrm.scoring.similarity import LabelMap, Similarity, vote_features
from csrm.training.distillation.label_map import fit_label_map
from csrm.training.distillation.teacher import text_cosines

logger = logging.getLogger(__name__)
_LARGEST_SLOPE = 10.0
"""Of a feature in standard deviations."""
_LEAST_SCALE = 0.1
"""Of both together, in standard deviations: products keep their order where queries tell the labels."""
_PRIOR = 1e-3
"""Weight of the squared slopes beside the loss of a query: a few queries choose no slope without bound."""


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
    label_map = LabelMap(np.array(vote.weights), np.array(vote.thresholds))
    similarity = Similarity(voter.encoder.embed, label_map, labels)
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
    """The vote of an encoder under which judged pairs are in their order, and have their labels.

    Raises:
        InputError: higher cosines do not go with better labels, or a grade has no label.
    """
    gains = grade_gains(judged, labels, grade_labels)
    names = judged["grade"].map(grade_labels) if grade_labels else judged["grade"]
    by_gain = sorted(labels, key=lambda label: label.gain)
    given = names.map({label.name: place for place, label in enumerate(by_gain)}).to_numpy(np.int64)
    _, queries = np.unique(judged["market"] + "\t" + judged["query_id"].astype(str), return_inverse=True)
    scores, cosines = scorer.score_parts(judged), text_cosines(encoder, judged)
    label_map = fit_pair_map(vote_features(scores, cosines), gains, queries, given, len(labels))
    if label_map.slopes[1] == 0:
        raise InputError(
            f"ensemble.encoder {encoder.settings.model!r}: higher cosines do not go with better labels on "
            f"{len(judged)} judged pairs, so it has nothing to say. Leave it out, or name an encoder that knows the "
            "language. Has it the prefixes that it was trained with?"
        )
    both = vote_features(scores, cosines) @ label_map.slopes
    ndcgs = {
        name: query_ndcgs(queries, gains, of) for name, of in (("model", scores), ("encoder", cosines), ("both", both))
    }
    vote = EncoderVote(
        digest=encoder.digest,
        model=encoder.settings.model,
        weights=(float(label_map.slopes[0]), float(label_map.slopes[1])),
        thresholds=tuple(label_map.thresholds.tolist()),
        num_queries=int(queries.max()) + 1,
        ndcg={name: round(float(np.nanmean(values)), 4) for name, values in ndcgs.items()},
    )
    logger.info("weights %.2f and %.2f; nDCG@10 %s", *vote.weights, vote.ndcg)
    return vote


def fit_pair_map(
    features: np.ndarray, gains: np.ndarray, queries: np.ndarray, given: np.ndarray, num_labels: int
) -> LabelMap:
    """Slopes that order the pairs of each query, then their scale and thresholds that give each pair its label.

    Labels alone would choose slopes by what tells queries apart, which orders no products: a query with few good
    products has low labels throughout. So slopes come from pairs of products of one query (RankNet, Burges et al.
    2005, "Learning to Rank using Gradient Descent"), where each query counts the same and a pair by its difference of
    gains. Slopes are 0 or more.

    Args:
        features: shape (num_pairs, num_features).
        gains: of each pair's label, shape (num_pairs,).
        queries: of each pair, as numbers, shape (num_pairs,).
        given: number of each pair's label, least relevant first, shape (num_pairs,).
        num_labels: how many labels there are.

    Returns:
        Slopes of 0 where no two products of a query have different gains.
    """
    spread = features.std(axis=0)
    unit = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    better, weight = [], []
    for query in np.unique(queries):
        rows = np.flatnonzero(queries == query)
        above, below = np.nonzero(gains[rows][:, None] > gains[rows])
        if len(above):
            better.append(unit[rows[above]] - unit[rows[below]])
            differences = gains[rows[above]] - gains[rows[below]]
            weight.append(differences / differences.sum())
    if not better:
        return LabelMap(np.zeros(features.shape[1]), np.zeros(num_labels - 1))
    ahead, share = np.concatenate(better), np.concatenate(weight) / len(better)

    def loss(slopes: np.ndarray) -> float:
        return float(share @ np.logaddexp(0.0, -ahead @ slopes)) + _PRIOR * float(slopes @ slopes)

    bounds = [(0.0, _LARGEST_SLOPE)] * features.shape[1]
    slopes = minimize(loss, np.full(features.shape[1], 0.5), method="L-BFGS-B", bounds=bounds).x
    slopes[slopes < 1e-3] = 0.0
    if not slopes.any():
        return LabelMap(slopes, np.zeros(num_labels - 1))
    together = unit @ slopes
    of_label = fit_label_map((together / together.std())[:, None], given, num_labels)
    raw = max(of_label.slopes[0], _LEAST_SCALE) / together.std() * slopes / np.where(spread > 0, spread, 1.0)
    return LabelMap(raw, of_label.thresholds + features.mean(axis=0) @ raw)
