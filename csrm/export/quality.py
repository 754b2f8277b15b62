"""The quality gate: a precision may not rank labelled pairs worse than fp32 does."""

from pathlib import Path

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score, roc_auc_score

from csrm.bundle.contents import Estimate, PrecisionReport, Quality
from csrm.errors import InputError
from csrm.evaluation.metrics import DEPTH, resampled_pair_metrics

MAX_LOSS = 0.005
"""Of ROC-AUC and of nDCG@10."""
MIN_SPEARMAN = 0.99
NUM_RESAMPLES = 1000


def measure_quality(
    query_ids: np.ndarray, gains: np.ndarray, expected: np.ndarray, actual: np.ndarray, seed: int = 0
) -> Quality:
    """How well scores rank labelled pairs, against the scores of fp32.

    Losses have 95 % bootstrap intervals over queries; a resample draws the same queries for both.

    Args:
        query_ids: query of each pair, shape (num_pairs,).
        gains: gain of each pair's grade; the pairs with the highest one are the relevant ones of ROC-AUC.
        expected: scores of fp32.
        actual: scores to measure, finite.

    Raises:
        InputError: all pairs have one gain, or there are fewer than two queries.
    """
    _, query_of_pair = np.unique(query_ids, return_inverse=True)
    num_queries = int(query_of_pair.max()) + 1
    relevant = gains == gains.max()
    if relevant.all() or num_queries < 2:
        raise InputError(
            f"quality pairs: expected at least two queries and pairs of several grades, got {num_queries} queries and "
            f"gains {sorted(set(gains.tolist()))}. Give more judgments, or export at precision fp32."
        )
    weights = np.random.default_rng(seed).multinomial(
        num_queries, np.full(num_queries, 1 / num_queries), size=NUM_RESAMPLES
    )
    both = (expected, actual)
    aucs = [float(roc_auc_score(relevant, scores)) for scores in both]
    resampled = [
        resampled_pair_metrics(relevant, scores, query_of_pair, weights)[:, 0] for scores in (expected, actual)
    ]
    ndcgs = np.array([query_ndcgs(query_of_pair, gains, scores) for scores in (expected, actual)])
    defined = np.isfinite(ndcgs[0])
    losses = (ndcgs[0] - ndcgs[1])[defined]
    drawn = weights[:, defined]
    shifts = np.abs(actual - expected)
    return Quality(
        num_pairs=len(gains),
        num_queries=num_queries,
        auc=aucs[1],
        ndcg=float(ndcgs[1][defined].mean()),
        auc_loss=_estimate(aucs[0] - aucs[1], resampled[0] - resampled[1]),
        ndcg_loss=_estimate(float(losses.mean()), drawn @ losses / drawn.sum(axis=1).clip(min=1)),
        spearman=float(spearmanr(expected, actual).statistic),
        largest_shift=float(shifts.max()),
        mean_shift=float(shifts.mean()),
    )


def gate(quality: Quality, reference: Quality) -> list[str]:
    """What does not hold, one phrase each; empty where the precision may be used.

    Args:
        reference: quality of fp32 on the same pairs; its ROC-AUC must be above chance, else nothing is proven.
    """
    problems = []
    if not reference.auc > 0.5:
        problems.append(f"fp32 has ROC-AUC {reference.auc:.3f}, expected > 0.5: a model at chance proves nothing")
    for name, loss in (("ROC-AUC", quality.auc_loss), (f"nDCG@{DEPTH}", quality.ndcg_loss)):
        if not loss.value <= MAX_LOSS:
            problems.append(
                f"loss of {name} {loss.value:.4f} [{loss.low:.4f}, {loss.high:.4f}], expected <= {MAX_LOSS}"
            )
    if not quality.spearman >= MIN_SPEARMAN:
        problems.append(f"Spearman {quality.spearman:.4f}, expected >= {MIN_SPEARMAN}")
    return problems


def plot_precisions(reports: list[PrecisionReport], path: Path) -> None:
    """Losses with their intervals, size and speed of each recipe that was measured."""
    from matplotlib.figure import Figure

    measured = [report for report in reports if report.quality is not None]
    names = [f"{report.precision}\n{'passed' if report.verdict == 'passed' else 'refused'}" for report in measured]
    figure = Figure(figsize=(2.2 + 1.9 * len(measured), 7), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1)
    places = np.arange(len(measured))
    for offset, name in ((-0.1, "auc_loss"), (0.1, "ndcg_loss")):
        losses: list[Estimate] = [getattr(report.quality, name) for report in measured]
        values = np.array([loss.value for loss in losses])
        errors = np.array([[loss.value - loss.low, loss.high - loss.value] for loss in losses]).T.clip(min=0)
        label = "ROC-AUC" if name == "auc_loss" else f"nDCG@{DEPTH}"
        top.errorbar(places + offset, values, errors, fmt="o", capsize=4, label=label)
    top.axhline(MAX_LOSS, color="black", linestyle=":", label="allowed")
    top.set_ylabel("loss against fp32")
    top.legend()
    for axes, values, label in (
        (middle, np.array([report.num_bytes / 1e6 for report in measured]), "MB"),
        (bottom, np.array([report.pairs_per_s for report in measured]), "pairs/s"),
    ):
        axes.bar(places, values, width=0.5)
        axes.set_ylabel(label)
    for axes in (top, middle, bottom):
        axes.set_xticks(places, names)
        axes.set_xlim(-0.5, len(measured) - 0.5)
    figure.savefig(path, dpi=110)


def query_ndcgs(query_of_pair: np.ndarray, gains: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """nDCG@10 of each query with a gain: linear gains, log2 discount, ties shared; NaN for the others."""
    ndcgs = np.full(query_of_pair.max() + 1, np.nan)
    for query in range(len(ndcgs)):
        chosen = query_of_pair == query
        if gains[chosen].any():
            ndcgs[query] = ndcg_score([gains[chosen]], [scores[chosen]], k=DEPTH) if chosen.sum() > 1 else 1.0
    return ndcgs


def _estimate(value: float, resampled: np.ndarray) -> Estimate:
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return Estimate(value=value, low=float(low), high=float(high))
