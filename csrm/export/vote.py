"""What votes in a bundle beside its model, and how much each voter counts, chosen on judged pairs."""

import logging
import math
import shutil
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import pandas as pd
from pydantic import model_validator
from scipy.optimize import minimize

from csrm.artefacts.manifest import MODEL_NAME, write_manifest
from csrm.bundle.contents import BUNDLE_KIND, ENCODER_FOLDER, MOST_TOLERANCE, BundleVote, VotingEncoder
from csrm.bundle.golden import GoldenPairs
from csrm.bundle.loading import default_tokens_per_call, golden_words, load_bundle, load_scorer
from csrm.config import Settings
from csrm.embedding.encoder import open_encoder, read_encoder
from csrm.errors import ConfigError, ParityError
from csrm.export.parity import pack_spread
from csrm.export.quality import gate, measure_quality, query_ndcgs
from csrm.export.trials import MIN_PACK_TOLERANCE, SPREAD_PAIRS, grade_gains
from csrm.scoring.labels import Label, expected_gain
from csrm.scoring.runtime import load_pack_scorer
from csrm.scoring.scorer import PairScorer, pair_texts
from csrm.scoring.vote import VOTERS, Embed, LabelMap, Vote, Voter, Voters
from csrm.training.distillation.label_map import fit_label_map

logger = logging.getLogger(__name__)
_LARGEST_SLOPE = 10.0
"""Of a feature in standard deviations."""
_LEAST_SCALE = 0.1
"""Of both together, in standard deviations: products keep their order where queries tell the labels."""
_PRIOR = 1e-3
"""Weight of the squared slopes beside the loss of a query: a few queries choose no slope without bound."""
_LEAST_QUERIES = 20
"""Judged queries with products of several gains that choose a vote; each half chooses weights."""


class VoteSettings(Settings):
    """What votes in the scores of a bundle beside its model, as much as quality_split says.

    What does not certainly help there is left out.
    """

    words: bool = False
    """Whether the share of the query's words that the product names votes."""
    encoder: str | None = None
    """Folder of an encoder whose cosine of query and title votes; None: none does."""

    @model_validator(mode="after")
    def _has_a_voter(self) -> Self:
        if not self.words and self.encoder is None:
            raise ValueError("expected words: true, the folder of an encoder, or both; got neither")
        return self


class OpenEncoder(NamedTuple):
    """An encoder that is to vote."""

    embed: Embed
    named: VotingEncoder
    folder: Path


class OpenVote(NamedTuple):
    """What is to vote, opened."""

    words: bool
    encoder: OpenEncoder | None

    def voters(self, names: Collection[Voter]) -> Voters:
        """Those with these names."""
        embed = self.encoder.embed if self.encoder is not None and "encoder" in names else None
        return Voters(counts_words=self.words and "words" in names, embed=embed)


def open_vote(vote: VoteSettings | None, device: str, judged: pd.DataFrame | None) -> OpenVote | None:
    """Open what is to vote; None where nothing is.

    Args:
        vote: what is to vote.
        device: that will score.
        judged: pairs that will choose the weights.

    Raises:
        ConfigError: there are none.
        BundleError: see csrm.embedding.load_encoder.
    """
    if vote is None:
        return None
    if judged is None or judged.empty:
        raise ConfigError(
            "vote: expected judged pairs that tell how much each voter counts, got none in the split quality_split. "
            "Name inputs.judgments with that split, of any market whose labels you have, or leave the section out."
        )
    if vote.encoder is None:
        return OpenVote(vote.words, None)
    settings, digest, path = read_encoder(vote.encoder)
    embed = open_encoder(settings, digest, path, device).embed
    named = VotingEncoder(digest=digest, model=settings.model)
    return OpenVote(vote.words, OpenEncoder(embed, named, path))


def add_vote(
    folder: Path,
    vote: OpenVote,
    fp32_scorer: PairScorer,
    *,
    pairs: pd.DataFrame,
    judged: pd.DataFrame,
    grade_labels: Mapping[str, str] | None,
) -> None:
    """Put a vote into a finished bundle, where a voter helps. Its golden pairs still prove the model.

    Speed, quality and the spread over packs are measured again, with the vote.

    Args:
        folder: of the bundle; nobody reads it yet.
        vote: what is to vote.
        fp32_scorer: of the bundle's fp32 graph.
        pairs: see csrm.export.bundle.export_bundle.
        judged: pairs that choose the weights: what fp32_scorer scores, and market, query_id, grade.
        grade_labels: grade to label.

    Raises:
        InputError: a grade has no label.
        ParityError: with the vote the bundle's precision does not pass its gate.
        BundleError: the finished bundle does not give its golden scores.
    """
    bundle = load_bundle(folder)
    settings, labels, golden = bundle.settings, bundle.settings.labels, bundle.golden_pairs()
    scorer = load_scorer(folder, settings.device)
    gains_of_labels = np.array([label.gain for label in labels])
    logits = fp32_scorer.logits(judged)
    fitted = fit_vote(
        vote, expected_gain(logits, gains_of_labels), judged, labels=labels, grade_labels=grade_labels, golden=golden
    )
    if fitted is None:
        return
    voters = vote.voters(fitted.weights)
    scorer.vote = Vote(voters, fitted.label_map, labels)
    pack_scorer, _ = load_pack_scorer(folder / MODEL_NAME, settings.device)
    tokens, sample = default_tokens_per_call(settings.device), pairs.iloc[:SPREAD_PAIRS]
    spread = pack_spread(sample, scorer.tokenizer, labels, pack_scorer, tokens, vote=scorer.vote)
    in_fp32 = expected_gain(scorer.vote.mixed(logits, list(pair_texts(judged))), gains_of_labels)
    found = in_fp32 if settings.precision == "fp32" else scorer.score_parts(judged)
    queries, gains = _queries(judged), grade_gains(judged, labels, grade_labels)
    quality = measure_quality(queries, gains, in_fp32, found)
    if settings.precision != "fp32" and (problems := gate(quality, measure_quality(queries, gains, in_fp32, in_fp32))):
        raise ParityError(
            f"quality gate: with the vote {settings.precision} does not pass, the bundle was not written: "
            f"{'; '.join(problems)}. Export at precision fp32, or leave the section vote out."
        )
    measured = {
        "pairs_per_s": len(sample) / _seconds(scorer, voters, sample),
        "pack_spread": spread,
        "quality": quality,
    }
    own = settings.report
    golden_median = float(np.median(scorer.score_parts(golden.pairs)))
    changes = {
        "vote": fitted.model_copy(update={"golden_median": golden_median}),
        "precisions": tuple(
            report.model_copy(update=measured) if report is own else report for report in settings.precisions
        ),
        "pack_tolerance": min(MOST_TOLERANCE, max(MIN_PACK_TOLERANCE, 2 * spread)),
    }
    if vote.encoder is not None and fitted.encoder is not None:
        shutil.copytree(vote.encoder.folder, folder / ENCODER_FOLDER)
    write_manifest(folder, BUNDLE_KIND, settings.model_copy(update=changes).model_dump(mode="json"))
    load_scorer(folder, settings.device, num_golden=None)


def _seconds(scorer: PairScorer, voters: Voters, sample: pd.DataFrame) -> float:
    """Of the sample, each text embedded anew: the median of three."""
    taken = []
    for _ in range(3):
        voters.forget()
        start = time.perf_counter()
        scorer.logits(sample)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _queries(judged: pd.DataFrame) -> np.ndarray:
    return (judged["market"] + "\t" + judged["query_id"].astype(str)).to_numpy()


def fit_vote(
    vote: OpenVote,
    scores: np.ndarray,
    judged: pd.DataFrame,
    *,
    labels: tuple[Label, ...],
    grade_labels: Mapping[str, str] | None,
    golden: GoldenPairs,
) -> BundleVote | None:
    """The vote under which judged pairs are in their order, and have their labels; None where no voter certainly helps.

    Queries are halved at random; each half's nDCG@10 is measured with the weights that the other half chose. Voters are
    added one after the other, the best first, as long as one gains more than the standard error of its gain. All
    queries then choose the weights of those.

    Args:
        vote: what is to vote.
        scores: of the judged pairs by the model, shape (num_pairs,).
        judged: csrm.scoring.PAIR_COLUMNS, query_id and grade.
        labels: of the model.
        grade_labels: grade to label.
        golden: pairs that will prove that words are cut in the same way.

    Raises:
        InputError: a grade has no label.
    """
    gains = grade_gains(judged, labels, grade_labels)
    grades = judged["grade"].map(grade_labels) if grade_labels else judged["grade"]
    by_gain = sorted(labels, key=lambda label: label.gain)
    given = grades.map({label.name: place for place, label in enumerate(by_gain)}).to_numpy(np.int64)
    _, queries = np.unique(_queries(judged), return_inverse=True)
    if why := _too_little(by_gain, given, gains, queries):
        logger.warning("no vote: %s. The model alone scores", why)
        return None
    voters = vote.voters(VOTERS)
    features = voters.features(scores, list(pair_texts(judged)))
    columns = {name: features[:, place] for place, name in enumerate(voters.names)}
    pairs = _JudgedPairs(columns, gains, queries, given, len(labels))
    chosen, together = _chosen(voters.names, pairs.held_out_ndcgs)
    if len(chosen) == 1:
        return None
    label_map = pairs.label_map(chosen)
    if label_map.slopes.min() == 0:
        logger.warning("no vote: of all judged queries together, %s orders nothing", chosen[label_map.slopes.argmin()])
        return None
    ndcgs = {name: query_ndcgs(queries, gains, columns[name]) for name in chosen} | {"together": together}
    places = pairs.features(chosen) @ label_map.slopes
    reached = np.linspace(places.min(), places.max(), 2_001)[:, None]
    likeliest = LabelMap(np.ones(1), label_map.thresholds).probabilities(reached).argmax(axis=1)
    if never := [label.name for place, label in enumerate(by_gain) if place not in likeliest]:
        logger.warning("grades %s are the most probable ones at no score, and are predicted no more", never)
    return BundleVote(
        weights=dict(zip(chosen, label_map.slopes.tolist(), strict=True)),
        thresholds=tuple(label_map.thresholds.tolist()),
        num_queries=int(queries.max()) + 1,
        ndcg={name: round(float(np.nanmean(values)), 4) for name, values in ndcgs.items()},
        encoder=vote.encoder.named if vote.encoder is not None and "encoder" in chosen else None,
        golden_median=0.0,
        golden_words=golden_words(golden) if "words" in chosen else None,
    )


class _JudgedPairs(NamedTuple):
    """Judged pairs that choose a vote; arrays are of shape (num_pairs,)."""

    columns: Mapping[Voter, np.ndarray]
    """Feature of each voter."""
    gains: np.ndarray
    queries: np.ndarray
    """Numbers from 0."""
    given: np.ndarray
    """Numbers of the labels, least relevant first."""
    num_labels: int

    def features(self, names: Sequence[Voter]) -> np.ndarray:
        return np.stack([self.columns[name] for name in names], axis=1)

    def label_map(self, names: Sequence[Voter], rows: np.ndarray | slice = slice(None)) -> LabelMap:
        """That these rows choose."""
        return fit_pair_map(
            self.features(names)[rows], self.gains[rows], self.queries[rows], self.given[rows], self.num_labels
        )

    def held_out_ndcgs(self, names: Sequence[Voter]) -> np.ndarray:
        """nDCG@10 of each query with the weights that the other half of the queries chose."""
        halves = np.random.default_rng(0).permutation(np.arange(self.queries.max() + 1) % 2)[self.queries]
        ranking = np.empty(len(self.queries))
        for half in (0, 1):
            is_measured = halves == half
            ranking[is_measured] = self.features(names)[is_measured] @ self.label_map(names, ~is_measured).slopes
        return query_ndcgs(self.queries, self.gains, ranking)


def _too_little(by_gain: Sequence[Label], given: np.ndarray, gains: np.ndarray, queries: np.ndarray) -> str:
    """Why judged pairs can choose no vote; empty where they can."""
    for place, label in ((0, by_gain[0]), (len(by_gain) - 1, by_gain[-1])):
        if not (given == place).any():
            return f"no judged pair has label {label.name!r}, so that nothing tells its scores"
    frame = pd.DataFrame({"query": queries, "gain": gains}).groupby("query")["gain"].nunique()
    if (num := int((frame > 1).sum())) < _LEAST_QUERIES:
        return f"expected {_LEAST_QUERIES} judged queries with products of several gains, got {num}"
    return ""


def _chosen(
    names: Sequence[Voter], held_out: Callable[[Sequence[Voter]], np.ndarray]
) -> tuple[tuple[Voter, ...], np.ndarray]:
    """The model with the voters that help, in the order of VOTERS, and their nDCG@10 of each query."""
    chosen: tuple[Voter, ...] = ("model",)
    ndcgs, left = held_out(chosen), [name for name in names if name != "model"]
    while left:
        found = {}
        for name in left:
            more = tuple(voter for voter in VOTERS if voter in (*chosen, name))
            found[name] = held_out(more)
        name = max(left, key=lambda voter: float(np.nanmean(found[voter] - ndcgs)))
        gain = (found[name] - ndcgs)[np.isfinite(ndcgs)]
        error = float(gain.std(ddof=1)) / math.sqrt(len(gain))
        logger.info("%s beside %s: nDCG@10 %+.4f, standard error %.4f", name, ", ".join(chosen), gain.mean(), error)
        if gain.mean() <= error:
            logger.warning("left out: %s, whose gain is within its standard error", ", ".join(left))
            break
        chosen, ndcgs = tuple(voter for voter in VOTERS if voter in (*chosen, name)), found[name]
        left.remove(name)
    return chosen, ndcgs


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
