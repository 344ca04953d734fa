"""Draw how many tokens a second serving makes of how many clients, beside transformers, from bench.serve's results.

python -m bench.plot_serving [--results bench/results/serve-cpu.json] [--output docs/images/serving.svg]
"""

import argparse
import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window, wherever it runs
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alpaca.errors import InputError, MissingInput, run_command

ROOT = Path(__file__).resolve().parent.parent
# The rows' ways of answering, by the first word of their names, and what a reader is told about each.
LABELS = {
    "engine": "this project, the engine alone",
    "stream": "this project, streamed over HTTP",
    "batching": "transformers, continuous batching",
    "generate": "transformers, generate() one by one",
}
_STYLES = {
    "engine": {"color": "#9a9a9a", "linestyle": "--", "marker": "o"},
    "stream": {"color": "#e8590c", "marker": "o", "linewidth": 2.2},
    "batching": {"color": "#1c5fa8", "linestyle": "none", "marker": "s"},
    "generate": {"color": "#2b8a3e", "linestyle": "none", "marker": "D"},
}
_LABELLED = ("stream", "batching", "generate")  # whose figures stand beside the points

Series = dict[str, list[tuple[int, float]]]


def read_series(results: Mapping[str, Any]) -> Series:
    """(clients, tokens/s) of each way's plain rows, by rising clients; rows like "engine 8 temperature" are left out.

    Raises InputError where a way that the picture shows has no row that was measured.
    """
    series: Series = {way: [] for way in LABELS}
    for row in results["rows"]:
        plain = re.fullmatch(r"(engine|stream|batching) \d+|generate", row["name"])
        if plain and "tokens_per_s" in row:
            series[row["name"].split()[0]].append((row["clients"], row["tokens_per_s"]))
    if missing := [way for way, points in series.items() if not points]:
        raise InputError(
            f"the results have no row that was measured for {', '.join(missing)}; "
            "run python -m bench.serve without --quick and draw again"
        )
    return {way: sorted(points) for way, points in series.items()}


def draw(results: Mapping[str, Any]) -> str:
    """The picture as SVG; the same results give the same text."""
    series = read_series(results)
    # Text stays text, so that it can be searched; ids come from a fixed salt instead of a random one.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "serving", "font.size": 10}):
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        axes = figure.subplots()
        for way, points in series.items():
            _draw_way(axes, way, points)
        _describe(axes, results)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()) + "\n"


def _draw_way(axes: Axes, way: str, points: list[tuple[int, float]]) -> None:
    clients, rates = zip(*points, strict=True)
    axes.plot(clients, rates, label=LABELS[way], gid=f"series-{way}", **_STYLES[way])
    for at in points if way in _LABELLED else ():
        color = _STYLES[way]["color"]
        axes.annotate(label_of(at[1]), at, xytext=(9, -10), textcoords="offset points", color=color)


def label_of(tokens_per_s: float) -> str:
    """The figure as it stands beside its point."""
    return f"{tokens_per_s:,.0f}"


def _describe(axes: Axes, results: Mapping[str, Any]) -> None:
    hardware, config = results["hardware"], results["config"]
    machine = hardware.get("gpu") or f"{hardware['cores']} cores of an {hardware['cpu']}"
    axes.set_title(f"model {config['shape']} in {config['dtype']} on {machine}", fontsize=10)
    axes.set_xlabel("clients at once")
    axes.set_ylabel("tokens/s, all clients together")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")


def read_results(path: Path) -> dict[str, Any]:
    """bench.serve's JSON. Raises MissingInput, InputError."""
    if not path.is_file():
        raise MissingInput(f"no file {path}; python -m bench.serve writes one")
    results = json.loads(path.read_text())
    if results.get("bench") != "serve":
        raise InputError(f"{path}: expected results of bench.serve, found those of {results.get('bench')!r}")
    return results


def write_aside(path: Path, text: str) -> None:
    """The whole file or what was there before, whenever this is interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def parse_flags(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "serve-cpu.json")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "serving.svg")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_flags()
    write_aside(options.output, draw(read_results(options.results)))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    run_command(main)
