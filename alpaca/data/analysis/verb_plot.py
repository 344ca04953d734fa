"""The figure of Stanford's report: root verbs as an inner ring, their direct objects as an outer one.

It is drawn as SVG, which a small script makes interactive (hovering over or tapping a piece names it and its count,
tapping a verb opens it), and as PNG. As in the original the figure shows the 20 commonest verbs that have objects and
the 4 commonest objects of each, and a verb's piece is as large as those of its objects together. A verb's whole count
is named beside it, and an opened verb shows its other objects, too.
"""

import io
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from alpaca.data.analysis.verbs import Root
from alpaca.pages.templates import read_asset, render_part

NUM_VERBS, NUM_OBJECTS, NUM_OBJECTS_ALONE = 20, 4, 14
_TEMPLATE = Path(__file__).with_name("verb_plot.html.j2")
_CENTRE, _HOLE, _MIDDLE, _RIM = 320, 92, 190, 312  # of the drawing, 640 x 640


@dataclass(frozen=True)
class VerbCount:
    """A verb, the number of instructions it is the root of, and its objects with their numbers, commonest first."""

    verb: str
    count: int
    objects: list[tuple[str, int]]

    @property
    def num_shown(self) -> int:
        """Instructions with one of the objects that the figure shows."""
        return sum(count for _, count in self.objects[:NUM_OBJECTS])


def count_verbs(roots: Iterable[Root]) -> list[VerbCount]:
    """Count the root verbs of orders: commonest first, equally common ones in alphabetical order."""
    objects: dict[str, Counter[str]] = {}
    for root in roots:
        if root.kind == "order":
            objects.setdefault(root.verb, Counter())[root.object] += 1
    counts = [
        VerbCount(
            verb, sum(found.values()), sorted(((o, n) for o, n in found.items() if o), key=lambda o: (-o[1], o[0]))
        )
        for verb, found in objects.items()
    ]
    return sorted(counts, key=lambda verb: (-verb.count, verb.verb))


def select_shown(verbs: list[VerbCount]) -> list[VerbCount]:
    """The verbs that the figure shows: the commonest of those with objects."""
    return [verb for verb in verbs if verb.objects][:NUM_VERBS]


def draw_svg(verbs: list[VerbCount]) -> Markup:
    """The figure as HTML and, for the script, its data as JSON; empty without verbs that have objects."""
    shown = select_shown(verbs)
    if not shown:
        return Markup()
    pieces = [piece for place, verb in enumerate(_angles(shown)) for piece in _verb_pieces(place, len(shown), *verb)]
    data = {"total": sum(verb.count for verb in verbs), "verbs": [_script_data(verb) for verb in shown]}
    return render_part(_TEMPLATE, size=2 * _CENTRE, pieces=pieces, data=data)


def read_script() -> str:
    """The JavaScript that makes the figure interactive."""
    return read_asset(Path(__file__).with_name("verb_plot.js"))


def _script_data(verb: VerbCount) -> dict[str, object]:
    """What the script shows of a verb that is opened. rest: instructions with other objects, or with none."""
    objects = verb.objects[:NUM_OBJECTS_ALONE]
    rest = verb.count - sum(count for _, count in objects)
    return {"verb": verb.verb, "count": verb.count, "objects": objects, "rest": rest}


def _angles(shown: list[VerbCount]) -> list[tuple[VerbCount, float, float]]:
    """Each verb with the angles at which its piece starts and ends, in radians, clockwise from the top."""
    total = sum(verb.num_shown for verb in shown)
    placed, before = [], 0
    for verb in shown:
        placed.append((verb, math.tau * before / total, math.tau * (before + verb.num_shown) / total))
        before += verb.num_shown
    return placed


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A piece of a ring: a verb's, or one of its objects'.

    place: the verb's number in the figure.    said: what the page says of the piece.    label: empty where the piece is
    too narrow for one.
    """

    path: str
    fill: str
    place: int
    said: str
    is_verb: bool
    label: str
    label_transform: str


def _verb_pieces(place: int, num_verbs: int, verb: VerbCount, start: float, end: float) -> list[_Piece]:
    """The pieces of a verb and of its commonest objects between two angles."""
    hue = 360 * place / num_verbs
    radii, middle = (_HOLE, _MIDDLE), (start + end) / 2
    pieces = [
        _Piece(
            path=_wedge(*radii, start, end), fill=f"hsl({hue:.0f} 62% 62%)", place=place, is_verb=True,
            said=f"{verb.verb}: {verb.count:,} (tap to open)",
            label=_shorten(verb.verb, 13) if end - start > 0.105 else "", label_transform=_turn(sum(radii) / 2, middle),
        )
    ]  # fmt: skip
    radii = (_MIDDLE + 2, _RIM)
    before = start
    for name, count in verb.objects[:NUM_OBJECTS]:
        until = before + (end - start) * count / verb.num_shown
        pieces.append(
            _Piece(
                path=_wedge(*radii, before, until), fill=f"hsl({hue:.0f} 70% 76%)", place=place, is_verb=False,
                said=f"{verb.verb}: {name}: {count:,} (tap for all of {verb.verb})",
                label=_shorten(name, 16) if until - before > 0.052 else "",
                label_transform=_turn((_MIDDLE + _RIM) / 2, (before + until) / 2),
            )
        )  # fmt: skip
        before = until
    return pieces


def _wedge(inner: float, outer: float, start: float, end: float) -> str:
    """The SVG path of a piece between two radii and two angles."""
    end = min(end, start + math.tau - 1e-4)  # an arc that ends where it starts would not be drawn
    far = int(end - start > math.pi)
    return (
        f"M{_point(outer, start)}A{outer} {outer} 0 {far} 1 {_point(outer, end)}"
        f"L{_point(inner, end)}A{inner} {inner} 0 {far} 0 {_point(inner, start)}Z"
    )


def _point(radius: float, angle: float) -> str:
    return f"{_CENTRE + radius * math.sin(angle):.2f} {_CENTRE - radius * math.cos(angle):.2f}"


def _turn(radius: float, angle: float) -> str:
    """The SVG transform of a text along the radius, never upside down."""
    turn = math.degrees(angle) - 90
    flip = " rotate(180)" if turn > 90 else ""
    return f"rotate({turn:.2f} {_CENTRE} {_CENTRE}) translate({_CENTRE + radius} {_CENTRE}){flip}"


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


# PNG ----------------------------------------------------------------------------------------------------------


def draw_png(verbs: list[VerbCount]) -> bytes:
    """The same figure as PNG, 1,600 x 1,600 pixels; without verbs it says so."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import hsv_to_rgb
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 10), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), aspect="equal", xlim=(-1.02, 1.02), ylim=(-1.02, 1.02))
    axes.set_axis_off()
    shown = select_shown(verbs)
    if not shown:
        axes.text(0, 0, "no instruction has a root verb", ha="center", va="center", fontsize=16)
    for place, (verb, start, end) in enumerate(_angles(shown)):
        hue, before = place / len(shown), start
        _draw_piece(axes, (0.29, 0.6), (start, end), hsv_to_rgb((hue, 0.45, 0.88)), verb.verb, bold=True)
        for name, count in verb.objects[:NUM_OBJECTS]:
            until = before + (end - start) * count / verb.num_shown
            _draw_piece(axes, (0.605, 1.0), (before, until), hsv_to_rgb((hue, 0.28, 0.97)), name, bold=False)
            before = until
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _draw_piece(axes, radii, angles, colour, text: str, *, bold: bool) -> None:
    from matplotlib.patches import Wedge

    first, last = 90 - math.degrees(angles[1]), 90 - math.degrees(angles[0])
    axes.add_patch(Wedge((0, 0), radii[1], first, last, width=radii[1] - radii[0], fc=colour, ec="white", lw=0.8))
    if last - first < (4.0 if bold else 2.0):
        return
    middle, radius = math.radians((first + last) / 2), sum(radii) / 2
    turn = (first + last) / 2 % 360
    axes.text(
        radius * math.cos(middle), radius * math.sin(middle), _plain(text, 14 if bold else 18),
        rotation=turn - 180 if 90 < turn < 270 else turn, rotation_mode="anchor", ha="center", va="center",
        fontsize=11 if bold else 10, fontweight="bold" if bold else "normal", color="#16181d", parse_math=False,
    )  # fmt: skip


def _plain(text: str, most: int) -> str:
    """Text that the bundled font can draw: for other letters it would warn and draw boxes, so they become "?"."""
    return _shorten(text.encode("latin-1", "replace").decode("latin-1"), most)
