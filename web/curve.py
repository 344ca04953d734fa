"""The loss over the steps of a training as a picture in the page, and the line below it."""

import math
from pathlib import Path

from alpaca.pages.templates import render_part
from web.sheet import as_sentence, complaint, note
from web.trainings import Progress

_TEMPLATE = Path(__file__).with_name("curve.html.j2")
_WIDTH, _HEIGHT, _MARGIN = 640, 240, 44
_MOST_POINTS = 400


def draw_curve(losses: dict[int, float], num_steps: int) -> str:
    """An SVG of the losses; "" before there are two. What is not finite is left out."""
    points = [(step, loss) for step, loss in losses.items() if math.isfinite(loss)]
    if len(points) < 2:
        return ""
    points = [*points[: -1 : max(1, len(points) // _MOST_POINTS)], points[-1]]
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    span, last = high - low or 1.0, max(num_steps, points[-1][0])

    def place(step: int, loss: float) -> str:
        x = _MARGIN + (_WIDTH - 2 * _MARGIN) * step / last
        y = _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * (loss - low) / span
        return f"{x:.1f},{y:.1f}"

    return render_part(
        _TEMPLATE, width=_WIDTH, height=_HEIGHT, margin=_MARGIN, line=" ".join(place(*point) for point in points),
        low=f"{low:.4g}", high=f"{high:.4g}", last=last, newest=f"{points[-1][1]:.4f}",
    )  # fmt: skip


def describe(progress: Progress, elapsed_s: float) -> str:
    """What the page says of a training, as HTML."""
    if progress.status == "failed":
        return complaint(as_sentence(progress.error))
    if progress.status == "canceled":
        return note(f"Canceled after {elapsed_s:.0f} s. Nothing is kept of it.")
    parts = [words.format(progress.metrics[name]) for name, words in _FIGURES.items() if _has(progress, name)]
    steps = f"step {progress.metrics['step']} of {progress.metrics['max_steps']}" if _has(progress, "max_steps") else ""
    if progress.status == "succeeded":
        place = "" if progress.output.startswith("data:") else f"The weights are at {progress.output}"
        return note(
            " · ".join(["Done", *filter(None, [steps]), *parts, f"{elapsed_s:.0f} s in all", *filter(None, [place])])
        )
    if not steps:
        return note(f"The server reads the data and loads the model. {elapsed_s:.0f} s")
    rest = [f"about {progress.metrics['eta_s']:.0f} s to go"] if _has(progress, "eta_s") else []
    return note(" · ".join([steps, *parts, *rest]))


def _has(progress: Progress, name: str) -> bool:
    return isinstance(progress.metrics.get(name), int | float)


_FIGURES = {"loss": "loss {:.4f}", "eval_loss": "held-out loss {:.4f}", "tokens_per_second": "{:,.0f} tokens/s"}
