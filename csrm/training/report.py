"""A one-page report of a training: HTML that needs no other file and no network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from markupsafe import Markup
from sklearn.calibration import calibration_curve

from csrm.pages.page import is_known, render, rows, seen
from csrm.pages.plots import COLOURS, INK, new_figure, svg
from csrm.training.data.judges import Agreement

NUM_RELIABILITY_BINS = 10
MOST_ROWS = 20
"""Most label issues shown; the rest is in their own file."""


@dataclass(frozen=True)
class StageRecord:
    """One stage of the training."""

    name: str
    num_packs: int | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    losses: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """Task, for example relevance or translation, to its steps with the mean loss at each, in nats."""
    dev: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """Metric of the dev split to the steps after which it was measured, with its value at each."""
    kept: object = None
    """Text that says which step dev chose; None: it chose none."""


@dataclass(frozen=True)
class RoundRecord:
    """One round of self-distillation. What is not known is None."""

    round_index: int
    is_kept: bool = False
    """Whether it became the trained model."""
    ndcg: float | None = None
    """nDCG@10 on the dev split."""
    auc: float | None = None
    """ROC-AUC on the dev split."""
    control_auc: float | None = None
    """The same of a model that learnt the same changes of labels on random pairs: what it gains is not repair."""
    agreement: float | None = None
    """ROC-AUC of its teachers on the given labels of the folds that they did not see."""
    gain_error: float | None = None
    """Standard error of what chooses the round, gained over the round kept before; a smaller gain is none."""
    flipped_share: float | None = None
    """Of the given labels, those whose most probable soft label is another one."""
    flips_right: float | None = None
    """Of the flipped labels whose truth is known, those that were wrong."""
    random_flips_right: float | None = None
    """The same of labels flipped at random: the share of given labels that are wrong."""


@dataclass(frozen=True)
class Reliability:
    """Whether pairs of score 0.8 are relevant in 80 % of cases."""

    mean_scores: np.ndarray
    """Of each bin that has pairs, ascending."""
    relevant_shares: np.ndarray
    """Of the same bins."""
    num_pairs: np.ndarray
    """Of the same bins."""

    @property
    def expected_error(self) -> float:
        """Mean distance of share and score over the bins, weighted by pairs.

        Naeini et al. 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning".
        """
        return float(np.average(np.abs(self.relevant_shares - self.mean_scores), weights=self.num_pairs))


def reliability(scores: np.ndarray, is_relevant: np.ndarray) -> Reliability:
    """Calibration of scores in ten bins of equal width.

    Args:
        scores: in [0, 1], shape (num_pairs,), at least one.
        is_relevant: whether the given label is the most relevant one, shape (num_pairs,), bool. A relevance score is an
            expected gain, so where other labels have a gain too, a perfect score lies a little above this share.

    Raises:
        ValueError: a score is outside [0, 1] or not a number.
    """
    scores = scores.astype(np.float64)
    relevant_shares, mean_scores = calibration_curve(is_relevant, scores, n_bins=NUM_RELIABILITY_BINS)
    num_pairs = np.bincount(np.searchsorted(np.linspace(0, 1, NUM_RELIABILITY_BINS + 1)[1:-1], scores))
    return Reliability(mean_scores, relevant_shares, num_pairs[num_pairs > 0])


def largest_moves(
    pairs: pd.DataFrame, before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray, num_rows: int = 10
) -> pd.DataFrame:
    """The pairs whose score moved most between two rounds, the largest move first.

    Args:
        pairs: query, title and grade.
        before, after: a score for each row.

    Returns:
        query, title, grade, before, after.
    """
    moved = pairs[["query", "title", "grade"]].assign(before=np.asarray(before), after=np.asarray(after))
    distance = (moved["after"] - moved["before"]).abs()
    order = distance[distance > 0].sort_values(ascending=False, kind="stable").index
    return moved.loc[order[:num_rows]].reset_index(drop=True)


def report_html(
    title: str,
    stages: Sequence[StageRecord] = (),
    rounds: Sequence[RoundRecord] = (),
    reliability: Reliability | None = None,
    label_issues: pd.DataFrame | None = None,
    moves: pd.DataFrame | None = None,
    agreement: Agreement | None = None,
) -> str:
    """The page. What is not given, or holds nothing, has no section.

    Args:
        title: of the page.
        stages: in their order.
        rounds: in their order.
        reliability: of the kept model's scores on the dev split.
        label_issues: query, title, grade, suggested_label, given_probability, suggested_probability; clearest first.
        moves: of `largest_moves`.
        agreement: of the judges.

    Returns:
        HTML that can be written as UTF-8.
    """
    issues = label_issues if label_issues is not None else pd.DataFrame()
    return render(
        "training/report.html",
        title=title,
        stages=[(stage, _loss_plot(stage), _dev_plot(stage)) for stage in stages],
        rounds=rounds,
        round_columns=_round_columns(rounds),
        round_plot=_round_plot(rounds),
        reliability=reliability,
        reliability_plot=_reliability_plot(reliability) if reliability is not None else None,
        num_issues=len(issues),
        issues=rows(issues.head(MOST_ROWS)),
        moves=rows(moves) if moves is not None else [],
        agreement=agreement,
    )


def _round_columns(rounds: Sequence[RoundRecord]) -> list[tuple[str, str, str]]:
    """Heading, field and format of the columns that some round has a value for."""
    columns = [
        ("nDCG@10", "ndcg", ".4f"),
        ("AUC", "auc", ".4f"),
        ("AUC, same flips on random pairs", "control_auc", ".4f"),
        ("agreement of teachers with unseen labels", "agreement", ".4f"),
        ("standard error of the gain", "gain_error", ".4f"),
        ("labels flipped", "flipped_share", ".1%"),
        ("flips that were right", "flips_right", ".1%"),
        ("random flips that were right", "random_flips_right", ".1%"),
    ]
    return [column for column in columns if any(is_known(getattr(round_, column[1])) for round_ in rounds)]


def _loss_plot(stage: StageRecord) -> Markup | None:
    return _step_plot(stage.losses, "loss, nats", f"Loss by step of stage {stage.name}")


def _dev_plot(stage: StageRecord) -> Markup | None:
    return _step_plot(stage.dev, "dev split", f"Metrics on the dev split by step of stage {stage.name}", marker="o")


def _step_plot(
    values: Mapping[str, Sequence[tuple[float, float]]], axis: str, title: str, *, marker: str = ""
) -> Markup | None:
    """Curves of those values that have more than one step; None where none has."""
    curves = {name: points for name, points in values.items() if len(points) > 1}
    if not curves:
        return None
    figure, axes = new_figure("step", axis)
    for (name, points), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
        axes.plot(*zip(*points, strict=True), color=colour, label=seen(name), marker=marker)
    axes.legend(frameon=False)
    return svg(figure, title)


def _round_plot(rounds: Sequence[RoundRecord]) -> Markup | None:
    figure, axes = new_figure("round", "dev split")
    shown = 0
    for name, label, colour, style in (
        ("ndcg", "nDCG@10", COLOURS[0], "-"),
        ("auc", "AUC", COLOURS[1], "-"),
        ("control_auc", "AUC, same flips on random pairs", COLOURS[1], ":"),
    ):
        points = [(round_.round_index, getattr(round_, name)) for round_ in rounds if is_known(getattr(round_, name))]
        shown = max(shown, len(points))
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=label, linestyle=style, marker="o")
    if shown < 2:
        return None
    axes.set_xticks([round_.round_index for round_ in rounds])
    axes.legend(frameon=False)
    return svg(figure, "nDCG@10 and AUC on the dev split by round")


def _reliability_plot(found: Reliability) -> Markup:
    figure, axes = new_figure("mean score", "share relevant")
    axes.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1)
    axes.plot(found.mean_scores, found.relevant_shares, color=COLOURS[0], marker="o")
    for place in zip(found.mean_scores, found.relevant_shares, found.num_pairs, strict=True):
        axes.annotate(f"{place[2]:,}", place[:2], xytext=(4, -10), textcoords="offset points", color=INK, fontsize=7)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    return svg(figure, "Share of relevant pairs by mean score")
