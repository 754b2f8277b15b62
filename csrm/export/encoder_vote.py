"""An encoder in a bundle: how much its cosine of query and title counts beside the model, chosen on judged pairs."""

import logging
import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import minimize

from csrm.artefacts.manifest import MODEL_NAME, write_manifest
from csrm.bundle.contents import BUNDLE_KIND, ENCODER_FOLDER, MOST_TOLERANCE, EncoderVote
from csrm.bundle.loading import default_tokens_per_call, load_bundle, load_scorer
from csrm.embedding.encoder import Encoder, open_encoder, read_encoder
from csrm.errors import ConfigError, InputError
from csrm.export.parity import pack_spread
from csrm.export.quality import measure_quality, query_ndcgs
from csrm.export.trials import MIN_PACK_TOLERANCE, SPREAD_PAIRS, grade_gains
from csrm.scoring.labels import Label
from csrm.scoring.runtime import load_pack_scorer
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
    folder: Path,
    voter: Voter,
    fp32_scorer: PairScorer,
    *,
    pairs: pd.DataFrame,
    judged: pd.DataFrame,
    grade_labels: Mapping[str, str] | None,
) -> None:
    """Put an encoder into a finished bundle. Its golden pairs still prove the model, its own golden texts the encoder.

    Speed, quality and the spread over packs are measured again, with the vote.

    Args:
        folder: of the bundle; nobody reads it yet.
        voter: the encoder.
        fp32_scorer: of the bundle's fp32 graph.
        pairs: see csrm.export.bundle.export_bundle.
        judged: pairs that choose how much the encoder counts: query, title, and what fp32_scorer scores; market,
            query_id, grade.
        grade_labels: grade to label.

    Raises:
        InputError: model or encoder do not order the judged products.
        BundleError: the finished bundle does not give its golden scores.
    """
    bundle = load_bundle(folder)
    settings, labels = bundle.settings, bundle.settings.labels
    scorer = load_scorer(folder, settings.device)
    vote = fit_vote(voter.encoder, fp32_scorer, judged, labels, grade_labels)
    similarity = Similarity(voter.encoder.embed, vote.label_map, labels)
    fp32_scorer.similarity = scorer.similarity = similarity
    pack_scorer, _ = load_pack_scorer(folder / MODEL_NAME, settings.device)
    tokens, sample = default_tokens_per_call(settings.device), pairs.iloc[:SPREAD_PAIRS]
    spread = pack_spread(sample, scorer.tokenizer, labels, pack_scorer, tokens, similarity=similarity)
    in_fp32, found = fp32_scorer.score_parts(judged), scorer.score_parts(judged)
    queries = (judged["market"] + "\t" + judged["query_id"].astype(str)).to_numpy()
    measured = {
        "pairs_per_s": len(sample) / _seconds(scorer, similarity, sample),
        "pack_spread": spread,
        "quality": measure_quality(queries, grade_gains(judged, labels, grade_labels), in_fp32, found),
    }
    own = settings.report
    golden_median = float(np.median(scorer.score_parts(bundle.golden_pairs().pairs)))
    changes = {
        "encoder": vote.model_copy(update={"golden_median": golden_median}),
        "precisions": tuple(
            report.model_copy(update=measured) if report is own else report for report in settings.precisions
        ),
        "pack_tolerance": min(MOST_TOLERANCE, max(MIN_PACK_TOLERANCE, 2 * spread)),
    }
    shutil.copytree(voter.folder, folder / ENCODER_FOLDER)
    write_manifest(folder, BUNDLE_KIND, settings.model_copy(update=changes).model_dump(mode="json"))
    load_scorer(folder, settings.device, num_golden=None)


def _seconds(scorer: PairScorer, similarity: Similarity, sample: pd.DataFrame) -> float:
    """Of the sample, each text embedded anew: the median of three."""
    taken = []
    for _ in range(3):
        similarity.forget()
        start = time.perf_counter()
        scorer.logits(sample)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def fit_vote(
    encoder: Encoder,
    scorer: PairScorer,
    judged: pd.DataFrame,
    labels: tuple[Label, ...],
    grade_labels: Mapping[str, str] | None,
) -> EncoderVote:
    """The vote of an encoder under which judged pairs are in their order, and have their labels.

    Raises:
        InputError: model or encoder do not order the judged products, or a grade has no label.
    """
    gains = grade_gains(judged, labels, grade_labels)
    names = judged["grade"].map(grade_labels) if grade_labels else judged["grade"]
    by_gain = sorted(labels, key=lambda label: label.gain)
    given = names.map({label.name: place for place, label in enumerate(by_gain)}).to_numpy(np.int64)
    _, queries = np.unique(judged["market"] + "\t" + judged["query_id"].astype(str), return_inverse=True)
    scores, cosines = scorer.score_parts(judged), text_cosines(encoder, judged)
    label_map = fit_pair_map(vote_features(scores, cosines), gains, queries, given, len(labels))
    for name, slope, way in zip(
        ("the model's scores", f"cosines of encoder {encoder.settings.model!r}"),
        label_map.slopes,
        ("Train the model longer", "Leave the encoder out, or give it the prefixes that it was trained with"),
        strict=True,
    ):
        if slope == 0:
            raise InputError(
                f"ensemble.encoder: expected {name} to order the products of {len(judged)} judged pairs, beside the "
                f"other one; they do not. {way}. Where queries have products of one grade alone, judge more."
            )
    rankings = {"model": scores, "encoder": cosines, "both": vote_features(scores, cosines) @ label_map.slopes}
    ndcgs = {name: query_ndcgs(queries, gains, ranking) for name, ranking in rankings.items()}
    vote = EncoderVote(
        digest=encoder.digest,
        model=encoder.settings.model,
        weights=(float(label_map.slopes[0]), float(label_map.slopes[1])),
        thresholds=tuple(label_map.thresholds.tolist()),
        num_queries=int(queries.max()) + 1,
        ndcg={name: round(float(np.nanmean(values)), 4) for name, values in ndcgs.items()},
        golden_median=0.0,
    )
    logger.info("weights %.2f and %.2f; nDCG@10 %s", *vote.weights, vote.ndcg)
    if vote.ndcg["both"] < max(vote.ndcg["model"], vote.ndcg["encoder"]):
        logger.warning("model and encoder together rank no better than one of them, by nDCG@10: %s", vote.ndcg)
    places = np.linspace(-20, 20, 2_001)[:, None] + np.mean(label_map.thresholds)
    likeliest = LabelMap(np.ones(1), label_map.thresholds).probabilities(places).argmax(axis=1)
    if never := [label.name for place, label in enumerate(by_gain) if place not in likeliest]:
        logger.warning("grades %s are the most probable ones at no score, and are predicted no more", never)
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
