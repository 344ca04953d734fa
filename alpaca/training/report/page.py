"""report.html: a finished run on one page, with nothing to load from elsewhere. Charts are inline SVG.

The page's frame and look are those of `alpaca.pages.html`.
"""

import html
import importlib.metadata
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from alpaca.data.examples import EncodingReport
from alpaca.files.atomic import write_text
from alpaca.pages.html import note, page, section, table
from alpaca.training.planning.plan import Plan
from alpaca.training.planning.words import format_seconds, memory_parts
from alpaca.training.report.answers import Sample
from alpaca.training.report.recorders import Entry

REPORT_NAME = "report.html"
_MOST_POINTS = 600  # of a line; more do not show
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 260, 58, 12, 12, 40  # of a chart, and its margins


@dataclass(frozen=True, kw_only=True)
class Record:
    """What the page shows.

    flags: the resolved command line.    share_of_peak: None where the device's peak is not known.
    """

    flags: Mapping[str, object]
    plan: Plan | None
    history: Sequence[Entry]
    summary: Mapping[str, object]
    data: EncodingReport
    held_out: EncodingReport | None
    num_processes: int
    device: torch.device
    peak_bytes: int
    tokens_per_second: float
    share_of_peak: float | None
    samples: list[Sample] = field(default_factory=list)
    no_samples: str = ""  # why there are none


def write_report(output_dir: Path, record: Record) -> Path:
    """Write output_dir/report.html."""
    path = output_dir / REPORT_NAME
    write_text(path, make_page(record))
    return path


def make_page(record: Record) -> str:
    """The page as HTML."""
    name = Path(str(record.flags["output_dir"])).absolute().name
    sections = [
        section("In short", table(_highlights(record))),
        section("Loss", _loss_charts(record.history)),
        section("Learning rate", line_chart({"learning rate": _points(record.history, "learning_rate")}, y="rate")),
        section("Throughput", _throughput(record)),
        section("Memory", _memory(record)),
        section("Answers before and after", _samples(record)),
        section("Data", _data(record)),
        section("Hardware and versions", table(_machine(record))),
        section("Configuration", table({key: str(value) for key, value in record.flags.items()})),
    ]
    return page(f"Training: {name}", name, sections)


# Sections -----------------------------------------------------------------------------------------------------


def _highlights(record: Record) -> dict[str, str]:
    summary, flags = record.summary, record.flags
    rows = {"base model": flags["model_name_or_path"], "method": flags["method"], "recipe": flags["recipe"]}
    if "first_loss" in summary:
        rows["training loss, first and last"] = f"{summary['first_loss']:.4f} → {summary['last_loss']:.4f}"
    if "first_eval_loss" in summary:
        first, last = summary["first_eval_loss"], summary["last_eval_loss"]
        rows["held-out loss"] = f"{first:.4f} → {last:.4f}"
        rows["held-out perplexity"] = f"{_number(math.exp(min(first, 700)))} → {_number(math.exp(min(last, 700)))}"
    rows["time in training steps"] = format_seconds(float(summary["train_runtime"]))
    rows["useful tokens a second"] = f"{record.tokens_per_second:,.0f}"
    return rows


def _loss_charts(history: Sequence[Entry]) -> str:
    charts = [line_chart({"loss": _points(history, "loss"), "held-out loss": _points(history, "eval_loss")}, y="loss")]
    if perplexity := _points(history, "eval_perplexity"):
        charts.append(line_chart({"": [], "held-out perplexity": perplexity}, y="perplexity"))
    return "".join(charts)


def _throughput(record: Record) -> str:
    share = "unknown (no peak is listed for this device)"
    if record.share_of_peak is not None:
        share = f"{record.share_of_peak:.1%}"
    rows = {
        "useful tokens a second, over the run": f"{record.tokens_per_second:,.1f}",
        "share of the device's peak": share,
    }
    if record.plan:
        rows["planned"] = (
            f"{record.plan.work.num_tokens / record.plan.seconds:,.1f} tokens/s, at "
            f"{record.plan.hardware.flops / 1e12:,.3f} TFLOP/s ({record.plan.hardware.flops_are})"
        )
    chart = line_chart({"useful tokens/s": _points(record.history, "tokens_per_second")}, y="tokens/s", zero=True)
    return chart + table(rows)


def _memory(record: Record) -> str:
    measured = f"{record.peak_bytes / 1e9:.3f} GB"
    if record.plan is None:
        return table({"measured peak": measured}) + note("No plan was made for this kind of model.")
    memory = record.plan.memory
    planned = memory.peak_bytes - (memory.overhead_bytes if record.device.type == "cuda" else 0)
    rows = {name: f"{size / 1e9:.3f} GB" for name, size in memory_parts(memory).items() if size}
    rows[f"planned peak ({memory.peak_moment})"] = f"{planned / 1e9:.3f} GB"
    rows["measured peak"] = f"{measured} ({record.peak_bytes / planned - 1:+.0%} of the plan)"
    where = "torch's allocations on the GPU; CUDA's context apart"
    if record.device.type != "cuda":
        where = "anonymous memory beyond the interpreter and its imports, over the whole run"
    return table(rows) + note(f"Of the first process. Measured: {where}. Not all parts are there at the same moment.")


def _samples(record: Record) -> str:
    if not record.samples:
        return note(record.no_samples)
    source = "held-out examples" if record.held_out else "training examples (nothing was held out)"
    articles = []
    for sample in record.samples:
        parts = {
            "prompt": sample.prompt, "before": sample.before or "(nothing)", "after": sample.after or "(nothing)",
            "the data's answer": sample.reference,
        }  # fmt: skip
        body = "".join(f"<h3>{name}</h3><pre>{html.escape(text)}</pre>" for name, text in parts.items())
        articles.append(f"<article>{body}</article>")
    return note(f"Greedy, at most 64 tokens; prompts of {source}.") + "".join(articles)


def _data(record: Record) -> str:
    parts = {"training data": record.data, "held-out data": record.held_out}
    return "".join(f"<h3>{name}</h3>{table(_data_rows(part))}" for name, part in parts.items() if part)


def _data_rows(report: EncodingReport) -> dict[str, str]:
    return {
        "examples": f"{report.num_kept:,} of {report.num_read:,}",
        "tokens": f"{report.num_tokens:,}",
        "tokens that carry loss": f"{report.num_targets:,}",
        f"cut at {report.max_length} tokens": f"{report.num_without_eos:,}",
        "dropped (nothing left to learn)": f"{report.num_all_masked:,}",
        "with an empty answer": f"{report.num_empty_outputs:,}",
        "exact copies": f"{report.num_duplicates:,}",
    }


def _machine(record: Record) -> dict[str, str]:
    on_gpu = record.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(record.device) if on_gpu else f"CPU ({platform.machine()})",
        "processes": str(record.num_processes),
        "CUDA": str(torch.version.cuda or "none"),
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "system": platform.platform(),
    }


# Charts -------------------------------------------------------------------------------------------------------

Points = list[tuple[float, float]]


def _points(history: Iterable[Entry], key: str) -> Points:
    return [(entry["step"], entry[key]) for entry in history if math.isfinite(entry.get(key, math.nan))]


def line_chart(series: Mapping[str, Points], *, y: str, zero: bool = False) -> str:
    """Up to two lines over the steps as SVG; a key where there are two. zero: the axis starts there."""
    filled = {name: _thin(points) for name, points in series.items() if points}
    if not filled:
        return note("Nothing was logged.")
    everything = [point for points in filled.values() for point in points]
    xs, ys = _ticks([x for x, _ in everything]), _ticks([value for _, value in everything] + [0.0] * zero)
    scale = _Scale(xs[0], xs[-1], ys[0], ys[-1])
    parts = [*_axes(scale, xs, ys)]
    for (name, points), letter in zip(series.items(), "ab", strict=False):
        if points:
            parts.append(_line(scale, filled[name], letter))
    keys = [(name, letter) for (name, points), letter in zip(series.items(), "ab", strict=False) if points]
    for row, (name, letter) in enumerate(keys):
        place = f'x="{_WIDTH - _RIGHT - 4}" y="{_TOP + 16 + 18 * row}" text-anchor="end"'
        parts.append(f'<text class="key-{letter}" {place}>{html.escape(name)}</text>')
    label = html.escape(f"{y} over the steps")
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


@dataclass(frozen=True)
class _Scale:
    """From values to places in the drawing."""

    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.left) / (self.right - self.left) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.low) / (self.high - self.low) * (_HEIGHT - _TOP - _BOTTOM)


def _axes(scale: _Scale, xs: list[float], ys: list[float]) -> list[str]:
    parts = []
    for value in ys:
        place = f"{scale.y(value):.1f}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{place}" y2="{place}"/>')
        text = f'x="{_LEFT - 6}" y="{scale.y(value) + 4:.1f}" text-anchor="end"'
        parts.append(f"<text {text}>{_number(value)}</text>")
    for value in xs:
        text = f'x="{scale.x(value):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle"'
        parts.append(f"<text {text}>{_number(value)}</text>")
    parts.append(f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">step</text>')
    return parts


def _line(scale: _Scale, points: Points, letter: str) -> str:
    places = [(scale.x(x), scale.y(value)) for x, value in points]
    line = f'<polyline class="{letter}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>'
    if len(points) > 30 or (letter == "a" and len(points) > 1):
        return line
    style = "dot" if letter == "b" else "a"
    return line + "".join(f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places)


def _thin(points: Points) -> Points:
    """At most so many points: means of neighbours."""
    size = -(-len(points) // _MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _ticks(values: list[float]) -> list[float]:
    """About five round numbers that enclose the values."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    raw = (high - low) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _number(value: float) -> str:
    """Short: 1,200; 0.75; 2e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.3g}"
    return f"{value:.3g}"
