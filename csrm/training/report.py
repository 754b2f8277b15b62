"""A one-page report of a training: HTML that needs no other file and no network.

What it shows is foreign text in part: everything is escaped, characters that cannot be seen are written out, and the
page forbids its reader's browser to run or to fetch anything.
"""

import io
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

import jinja2
import matplotlib
import numpy as np
import pandas as pd
import regex
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve

NUM_BINS = 10
MOST_ROWS = 20
"""Most label issues shown; the rest is in their own file."""

_INK = "#010203"
_COLOURS = ("#3d85c6", "#e07b39", "#45a06b", "#a569bd")
"""Seen on white and on black."""
# Zero-width joiner and non-joiner stay: emoji sequences and several scripts are spelled with them.
_UNSEEN = regex.compile(r"[[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]--[\u200c\u200d]]", flags=regex.V1)


@dataclass(frozen=True)
class StageRecord:
    """One stage of the training."""

    name: str
    num_packs: int | None = None
    seconds: float | None = None
    """Wall clock; None where the stage had ended before and was not run again."""
    settings: Mapping[str, object] = field(default_factory=dict)
    losses: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """Task, for example relevance or translation, to its steps with the mean loss at each, in nats."""


@dataclass(frozen=True)
class RoundRecord:
    """One round of self-distillation. What is not known is None."""

    round_index: int
    is_kept: bool = False
    """Whether it became the trained model."""
    ndcg: float | None = None
    """nDCG@10 on the dev split."""
    control_ndcg: float | None = None
    """The same of a model that learnt the same changes of labels on random pairs: what it gains is not repair."""
    auc: float | None = None
    """ROC-AUC on the dev split."""
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
        """Mean distance of share and score over the bins, weighted by pairs (Naeini et al. 2015, "Obtaining Well
        Calibrated Probabilities Using Bayesian Binning")."""
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
    relevant_shares, mean_scores = calibration_curve(is_relevant, scores, n_bins=NUM_BINS)
    num_pairs = np.bincount(np.searchsorted(np.linspace(0, 1, NUM_BINS + 1)[1:-1], scores))
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
) -> str:
    """The page. What is not given, or holds nothing, has no section.

    Args:
        title: of the page.
        stages: in their order.
        rounds: in their order.
        reliability: of the kept model's scores on the dev split.
        label_issues: query, title, grade, suggested_label, given_probability, suggested_probability; clearest first.
        moves: of `largest_moves`.

    Returns:
        HTML that can be written as UTF-8.
    """
    environment = jinja2.Environment(
        autoescape=True, finalize=_finalized, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = _number
    template = environment.from_string(resources.files(__package__).joinpath("report.html").read_text("utf-8"))
    issues = label_issues if label_issues is not None else pd.DataFrame()
    return template.render(
        title=title,
        stages=[(stage, _loss_plot(stage)) for stage in stages],
        rounds=rounds,
        round_columns=_round_columns(rounds),
        round_plot=_round_plot(rounds),
        reliability=reliability,
        reliability_plot=_reliability_plot(reliability) if reliability is not None else None,
        num_issues=len(issues),
        issues=_rows(issues.head(MOST_ROWS)),
        moves=_rows(moves) if moves is not None else [],
    )


def _rows(frame: pd.DataFrame) -> list[dict[Hashable, object]]:
    """Its rows; what is missing is None."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def _finalized(value: object) -> object:
    """What the template writes, before it is escaped; markup of our own is as it should be."""
    if value is None:
        return ""
    return _seen(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _seen(text: str) -> str:
    """Text whose characters can all be seen, so that what is shown is what is there."""
    shown: str = _UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)
    return shown


def _number(value: float | None, form: str) -> str:
    return format(value, form) if _is_known(value) else "–"


def _is_known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _round_columns(rounds: Sequence[RoundRecord]) -> list[tuple[str, str, str]]:
    """Heading, field and format of the columns that some round has a value for."""
    columns = [
        ("nDCG@10", "ndcg", ".4f"),
        ("nDCG@10, same flips on random pairs", "control_ndcg", ".4f"),
        ("AUC", "auc", ".4f"),
        ("labels flipped", "flipped_share", ".1%"),
        ("flips that were right", "flips_right", ".1%"),
        ("random flips that were right", "random_flips_right", ".1%"),
    ]
    return [column for column in columns if any(_is_known(getattr(one, column[1])) for one in rounds)]


def _loss_plot(stage: StageRecord) -> Markup | None:
    curves = {task: points for task, points in stage.losses.items() if len(points) > 1}
    if not curves:
        return None
    figure, axes = _figure("step", "loss, nats")
    for (task, points), colour in zip(curves.items(), _COLOURS * len(curves), strict=False):
        axes.plot(*zip(*points, strict=True), color=colour, label=_seen(task))
    axes.legend(frameon=False)
    return _svg(figure, f"Loss by step of stage {stage.name}")


def _round_plot(rounds: Sequence[RoundRecord]) -> Markup | None:
    figure, axes = _figure("round", "dev split")
    shown = 0
    for name, label, colour, style in (
        ("ndcg", "nDCG@10", _COLOURS[0], "-"),
        ("control_ndcg", "same flips on random pairs", _COLOURS[0], ":"),
        ("auc", "AUC", _COLOURS[1], "-"),
    ):
        points = [(one.round_index, getattr(one, name)) for one in rounds if _is_known(getattr(one, name))]
        shown = max(shown, len(points))
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=label, linestyle=style, marker="o")
    if shown < 2:
        return None
    axes.set_xticks([one.round_index for one in rounds])
    axes.legend(frameon=False)
    return _svg(figure, "nDCG@10 and AUC on the dev split by round")


def _reliability_plot(found: Reliability) -> Markup:
    figure, axes = _figure("mean score", "share relevant")
    axes.plot([0, 1], [0, 1], color=_INK, linestyle=":", linewidth=1)
    axes.plot(found.mean_scores, found.relevant_shares, color=_COLOURS[0], marker="o")
    for place in zip(found.mean_scores, found.relevant_shares, found.num_pairs, strict=True):
        axes.annotate(f"{place[2]:,}", place[:2], xytext=(4, -10), textcoords="offset points", color=_INK, fontsize=7)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    return _svg(figure, "Share of relevant pairs by mean score")


def _figure(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure, description: str) -> Markup:
    """The figure as an svg element in the page's own ink, dark or light; equal for equal figures."""
    (axes,) = figure.axes
    description = _seen(description)
    axes.patch.set_visible(False)
    axes.tick_params(colors=_INK)
    for part in (axes.xaxis.label, axes.yaxis.label, *(legend.get_texts() if (legend := axes.get_legend()) else ())):
        part.set_color(_INK)
        part.set_parse_math(False)
    for spine in axes.spines.values():
        spine.set_color(_INK)
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    drawing = file.getvalue()
    drawing = drawing[drawing.index("<svg") + len("<svg") :].replace(_INK, "currentColor")
    return Markup('<svg role="img" aria-label="{}"').format(description) + Markup(drawing)
