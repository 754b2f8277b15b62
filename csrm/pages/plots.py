"""Plots inside pages: one look for all of them."""

import io
from typing import TYPE_CHECKING

import regex

from csrm.extras import import_eval

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
from csrm.pages.page import seen

INK = "#010203"
"""In a plot: the ink of the page, dark or light."""
COLOURS = ("#3d85c6", "#e07b39", "#45a06b", "#a569bd")
"""Seen on white and on black."""
QUIET = "#8a8f98"
"""The same, for what is compared with."""


def new_figure(x_label: str, y_label: str, width: float = 5, height: float = 3) -> tuple["Figure", "Axes"]:
    """An empty plot, in inches.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure: Figure = import_eval("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def svg(figure: "Figure", description: str) -> "Markup":
    """The figure as an svg element in the page's own ink and font; equal for equal figures.

    Args:
        figure: of new_figure.
        description: what it shows, for those who do not see it. One page has no two figures of one description.
    """
    (axes,) = figure.axes
    description = seen(description)
    axes.patch.set_visible(False)
    axes.tick_params(which="both", colors=INK)
    for part in (axes.xaxis.label, axes.yaxis.label, *(legend.get_texts() if (legend := axes.get_legend()) else ())):
        part.set_color(INK)
        part.set_parse_math(False)
    for spine in axes.spines.values():
        spine.set_color(INK)
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with import_eval("matplotlib").rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    drawing = file.getvalue()
    drawing = drawing[drawing.index("<svg") + len("<svg") :].replace(INK, "currentColor")
    drawing = regex.sub(r'<g id="[^"]*"', "<g", drawing)  # the same in every figure, and named by nothing
    markup: type[Markup] = import_eval("markupsafe").Markup
    return markup('<svg role="img" aria-label="{}"').format(description) + markup(drawing)
