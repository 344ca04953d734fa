"""Charts of a run as SVG, drawn by matplotlib and coloured by the page: they follow the reader's light or dark look."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[float, float]]
_MOST_POINTS = 600  # of a line; more could not be told apart on the page
_FEW_POINTS = 30  # up to this many are marked by dots
# matplotlib knows no CSS variables: it draws in colours that appear nowhere else, which are then replaced.
_COLOURS = {"#010101": "var(--soft)", "#020202": "var(--line)", "#030303": "var(--a)", "#040404": "var(--b)"}
_SOFT, _LINE, _FIRST, _SECOND = _COLOURS
_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "cog-alpaca", "axes.formatter.useoffset": False}
_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


@dataclass(frozen=True)
class Line:
    """A line of a chart: its name, and (step, value) pairs of finite numbers. is_second: it has the second colour."""

    name: str
    points: Points
    is_second: bool = False


def draw_lines(lines: Sequence[Line], *, y: str, from_zero: bool = False) -> Markup:
    """Draw lines over the steps; a chart of the same lines is the same text. Empty where no line has a point.

    y: what the values are.    from_zero: the axis of values starts at 0.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    filled = [line for line in lines if line.points]
    if not filled:
        return Markup()
    image = io.BytesIO()
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot(facecolor="none")
        for line in filled:
            _draw_line(axes, line)
        axes.set_xlabel("step", color=_SOFT)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        _style_axes(axes, from_zero=from_zero)
        figure.savefig(image, format="svg", metadata=_NO_METADATA)
    return _embed(image.getvalue().decode(), label=f"{y} over the steps")


def _draw_line(axes: "Axes", line: Line) -> None:
    points = _thin(line.points)
    colour = _SECOND if line.is_second else _FIRST
    has_dots = len(points) == 1 or (line.is_second and len(points) <= _FEW_POINTS)
    axes.plot(*zip(*points, strict=True), color=colour, marker="o" if has_dots else "", markersize=4, label=line.name)


def _style_axes(axes: "Axes", *, from_zero: bool) -> None:
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=_LINE)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=_SOFT)
    axes.yaxis.offsetText.set_color(_SOFT)
    axes.legend(frameon=False, labelcolor="linecolor")


def _embed(svg: str, *, label: str) -> Markup:
    """The svg element alone, for an HTML page: named for readers who do not see it, in the page's own colours."""
    tag, _, drawing = svg[svg.index("<svg") :].partition(">")
    view = re.search(r'viewBox="[^"]*"', tag)
    assert view, tag
    # Names of groups would stand on the page once for each chart, and nothing refers to them.
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)
    for drawn, shown in _COLOURS.items():
        drawing = drawing.replace(drawn, shown)
    return Markup(f'<svg role="img" aria-label="{escape(label)}" {view[0]}>{drawing}')


def _thin(points: Points) -> Points:
    """At most so many points as show: means of neighbours."""
    size = -(-len(points) // _MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(value for _, value in group) / len(group)) for group in groups]
