"""The figure of Stanford's report: root verbs as an inner ring, their direct objects as an outer one.

As SVG that a small script makes interactive (hover or tap names a piece and its count, a verb opens on its own), and
as PNG. As in the original: the 20 commonest verbs that have objects, the 4 commonest objects of each, and a verb's
piece as large as these together. A verb's whole count is said beside it, and opened it shows what else it has.
"""

import html
import io
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from alpaca.data.analysis.verbs import Root

NUM_VERBS, NUM_OBJECTS, NUM_OBJECTS_ALONE = 20, 4, 14
_CENTRE, _HOLE, _MIDDLE, _RIM = 320, 92, 190, 312  # of the drawing, 640 x 640


@dataclass(frozen=True)
class VerbCount:
    """A verb, how many instructions it is the root of, and its objects with theirs, commonest first."""

    verb: str
    count: int
    objects: list[tuple[str, int]]

    @property
    def num_shown(self) -> int:
        """Instructions with one of the objects that the figure shows."""
        return sum(count for _, count in self.objects[:NUM_OBJECTS])


def count_verbs(roots: Iterable[Root]) -> list[VerbCount]:
    """All verbs of orders, commonest first, those as common by the alphabet."""
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


def shown_verbs(verbs: list[VerbCount]) -> list[VerbCount]:
    """The verbs of the figure."""
    return [verb for verb in verbs if verb.objects][:NUM_VERBS]


def draw_svg(verbs: list[VerbCount]) -> str:
    """The figure and, for the script, its data; "" for no verbs."""
    shown = shown_verbs(verbs)
    if not shown:
        return ""
    pieces = [piece for place, verb in enumerate(_angles(shown)) for piece in _verb_pieces(place, len(shown), *verb)]
    size = 2 * _CENTRE
    return (
        f'<figure id="verbs"><svg viewBox="0 0 {size} {size}" role="group" aria-label="Root verbs and their objects">'
        f'<g id="ring">{"".join(pieces)}</g><g id="alone"></g>'
        f'<text id="hub" x="{_CENTRE}" y="{_CENTRE}" text-anchor="middle"></text></svg>'
        '<p id="said" class="note" aria-live="polite"></p></figure>'
        f'<script type="application/json" id="verb-data">{_data(shown, sum(verb.count for verb in verbs))}</script>'
    )


STYLE = """
#verbs svg { max-width: 40rem; margin: 0 auto; } #verbs path { stroke: var(--page); stroke-width: 1; cursor: pointer; }
#verbs path:hover, #verbs path:focus { outline: none; filter: brightness(1.12) saturate(1.4); }
#verbs svg text { fill: #16181d; pointer-events: none; font-size: 12.5px; } #verbs #ring text.verb { font-weight: 600; }
#verbs svg #hub { fill: var(--ink); font-size: 15px; }
#said { text-align: center; min-height: 1.5em; color: var(--ink); }
"""


def script() -> str:
    """The JavaScript that makes the figure interactive."""
    return Path(__file__).with_name("verb_plot.js").read_text("utf-8")


def _data(shown: list[VerbCount], total: int) -> str:
    """JSON for a script element: no < > & that could end it."""
    verbs = [
        {
            "verb": verb.verb, "count": verb.count, "objects": verb.objects[:NUM_OBJECTS_ALONE],
            "rest": verb.count - sum(count for _, count in verb.objects[:NUM_OBJECTS_ALONE]),
        }
        for verb in shown
    ]  # fmt: skip
    text = json.dumps({"total": total, "verbs": verbs}, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _angles(shown: list[VerbCount]) -> list[tuple[VerbCount, float, float]]:
    """Each verb with the angles between which it stands, in radians, clockwise from the top."""
    total = sum(verb.num_shown for verb in shown)
    placed, before = [], 0
    for verb in shown:
        placed.append((verb, math.tau * before / total, math.tau * (before + verb.num_shown) / total))
        before += verb.num_shown
    return placed


def _verb_pieces(place: int, num: int, verb: VerbCount, start: float, end: float) -> list[str]:
    hue = 360 * place / num
    said = f"{verb.verb}: {verb.count:,} (tap to open)"
    pieces = [_piece((_HOLE, _MIDDLE), (start, end), f"hsl({hue:.0f} 62% 62%)", said, place)]
    if end - start > 0.105:
        pieces.append(_label(verb.verb, (_HOLE + _MIDDLE) / 2, (start + end) / 2, most=13, style=' class="verb"'))
    before, span = start, end - start
    for name, count in verb.objects[:NUM_OBJECTS]:
        until = before + span * count / verb.num_shown
        said = f"{verb.verb}: {name}: {count:,} (tap for all of {verb.verb})"
        pieces.append(_piece((_MIDDLE + 2, _RIM), (before, until), f"hsl({hue:.0f} 70% 76%)", said, place))
        if until - before > 0.052:
            pieces.append(_label(name, (_MIDDLE + _RIM) / 2, (before + until) / 2, most=16))
        before = until
    return pieces


def _piece(radii: tuple[float, float], angles: tuple[float, float], fill: str, said: str, place: int) -> str:
    text = html.escape(said)
    path = _wedge(*radii, *angles)
    look = f'd="{path}" fill="{fill}" tabindex="0"'
    return f'<path {look} data-verb="{place}" data-said="{text}"><title>{text}</title></path>'


def _wedge(inner: float, outer: float, start: float, end: float) -> str:
    end = min(end, start + math.tau - 1e-4)  # a whole circle has no arc
    far = int(end - start > math.pi)
    return (
        f"M{_point(outer, start)}A{outer} {outer} 0 {far} 1 {_point(outer, end)}"
        f"L{_point(inner, end)}A{inner} {inner} 0 {far} 0 {_point(inner, start)}Z"
    )


def _point(radius: float, angle: float) -> str:
    return f"{_CENTRE + radius * math.sin(angle):.2f} {_CENTRE - radius * math.cos(angle):.2f}"


def _label(text: str, radius: float, angle: float, *, most: int, style: str = "") -> str:
    """Text along the radius, never upside down."""
    turn = math.degrees(angle) - 90
    flip = " rotate(180)" if turn > 90 else ""
    where = f"rotate({turn:.2f} {_CENTRE} {_CENTRE}) translate({_CENTRE + radius} {_CENTRE}){flip}"
    shown = text if len(text) <= most else text[: most - 1] + "…"
    return (
        f'<text{style} transform="{where}" text-anchor="middle" dominant-baseline="central">{html.escape(shown)}</text>'
    )


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
    shown = shown_verbs(verbs)
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
    """What the bundled font can draw; other letters become question marks, where it would warn and draw boxes."""
    text = text.encode("latin-1", "replace").decode("latin-1")
    return text if len(text) <= most else text[: most - 1] + "…"
