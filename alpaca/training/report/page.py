"""report.html: a finished run on one page, with nothing to load from elsewhere.

The functions here make plain values and charts, which page.html.j2 shows.
"""

import importlib.metadata
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from markupsafe import Markup

from alpaca.data.examples import EncodingReport
from alpaca.files.atomic import write_text
from alpaca.pages.templates import render_page
from alpaca.training.planning.plan import Plan
from alpaca.training.planning.words import format_seconds, memory_parts
from alpaca.training.report.answers import Sample
from alpaca.training.report.charts import Line, Points, draw_lines
from alpaca.training.report.recorders import Entry
from alpaca.training.report.scores import Scores, show_score

REPORT_NAME = "report.html"
_TEMPLATE = Path(__file__).with_name("page.html.j2")


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
    scores: Scores = field(default_factory=dict)


def write_report(output_dir: Path, record: Record) -> Path:
    """Write output_dir/report.html."""
    path = output_dir / REPORT_NAME
    write_text(path, make_page(record))
    return path


def make_page(record: Record) -> str:
    """The page as HTML."""
    name = Path(str(record.flags["output_dir"])).absolute().name
    return render_page(
        _TEMPLATE,
        title=f"Training: {name}",
        heading=name,
        highlights=_highlights(record),
        charts=_charts(record.history),
        throughput_rows=_throughput_rows(record),
        memory_rows=_memory_rows(record),
        memory_note=_memory_note(record),
        samples=[_sample_texts(sample) for sample in record.samples],
        samples_note=_samples_note(record),
        scores={name: show_score(*found) for name, found in record.scores.items()},
        data={name: _data_rows(part) for name, part in _data_parts(record).items()},
        machine=_machine(record),
        flags=record.flags,
    )


# Sections -----------------------------------------------------------------------------------------------------


def _highlights(record: Record) -> dict[str, str]:
    summary, flags = record.summary, record.flags
    rows = {"base model": flags["model_name_or_path"], "method": flags["method"], "recipe": flags["recipe"]}
    is_sft = flags.get("objective", "sft") == "sft"
    if not is_sft:
        rows["objective"] = flags["objective"]
    if "first_loss" in summary:
        rows["training loss, first and last"] = f"{summary['first_loss']:.4f} → {summary['last_loss']:.4f}"
    if "first_eval_loss" in summary:
        first, last = summary["first_eval_loss"], summary["last_eval_loss"]
        rows["held-out loss"] = f"{first:.4f} → {last:.4f}"
        if is_sft:
            rows["held-out perplexity"] = f"{_number(math.exp(min(first, 700)))} → {_number(math.exp(min(last, 700)))}"
    rows["time in training steps"] = format_seconds(float(summary["train_runtime"]))
    rows["useful tokens a second"] = f"{record.tokens_per_second:,.0f}"
    return rows


def _charts(history: Sequence[Entry]) -> dict[str, list[Markup]]:
    """The charts of each section. A chart without points is left out, that of perplexity for example."""
    loss, held_out = _points(history, "loss"), _points(history, "eval_loss")
    perplexity, rates = _points(history, "eval_perplexity"), _points(history, "learning_rate")
    speeds = _points(history, "tokens_per_second")
    rewards = [
        Line(f"rewards of {name} answers", _points(history, f"rewards/{name}"), is_second=name == "rejected")
        for name in ("chosen", "rejected")
    ]
    accuracy = Line("rewards/accuracies", _points(history, "rewards/accuracies"))
    held_out_accuracy = Line("held out", _points(history, "eval_rewards/accuracies"), is_second=True)
    charts = {
        "rewards": [draw_lines(rewards, y="reward"), draw_lines([accuracy, held_out_accuracy], y="accuracy")],
        "loss": [
            draw_lines([Line("loss", loss), Line("held-out loss", held_out, is_second=True)], y="loss"),
            draw_lines([Line("held-out perplexity", perplexity, is_second=True)], y="perplexity"),
        ],
        "learning_rate": [draw_lines([Line("learning rate", rates)], y="rate")],
        "throughput": [draw_lines([Line("useful tokens/s", speeds)], y="tokens/s", from_zero=True)],
    }
    return {section: [chart for chart in drawn if chart] for section, drawn in charts.items()}


def _throughput_rows(record: Record) -> dict[str, str]:
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
    return rows


def _memory_rows(record: Record) -> dict[str, str]:
    measured = f"{record.peak_bytes / 1e9:.3f} GB"
    if record.plan is None:
        return {"measured peak": measured}
    memory = record.plan.memory
    planned = memory.peak_bytes - (memory.overhead_bytes if record.device.type == "cuda" else 0)
    rows = {name: f"{size / 1e9:.3f} GB" for name, size in memory_parts(memory).items() if size}
    rows[f"planned peak ({memory.peak_moment})"] = f"{planned / 1e9:.3f} GB"
    rows["measured peak"] = f"{measured} ({record.peak_bytes / planned - 1:+.0%} of the plan)"
    return rows


def _memory_note(record: Record) -> str:
    if record.plan is None:
        return "No plan was made for this kind of model."
    where = "torch's allocations on the GPU; CUDA's context apart"
    if record.device.type != "cuda":
        where = "anonymous memory beyond the interpreter and its imports, over the whole run"
    return f"Of the first process. Measured: {where}. Not all parts are there at the same moment."


def _sample_texts(sample: Sample) -> dict[str, str]:
    return {
        "prompt": sample.prompt, "before": sample.before or "(nothing)", "after": sample.after or "(nothing)",
        "the data's answer": sample.reference,
    }  # fmt: skip


def _samples_note(record: Record) -> str:
    if not record.samples:
        return record.no_samples
    source = "held-out examples" if record.held_out else "training examples (nothing was held out)"
    return f"Greedy, at most 64 tokens; prompts of {source}."


def _data_parts(record: Record) -> dict[str, EncodingReport]:
    parts = {"training data": record.data, "held-out data": record.held_out}
    return {name: part for name, part in parts.items() if part}


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


def _points(history: Iterable[Entry], key: str) -> Points:
    return [(entry["step"], entry[key]) for entry in history if math.isfinite(entry.get(key, math.nan))]


def _number(value: float) -> str:
    """Short: 1,200; 0.75; 2e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.3g}"
    return f"{value:.3g}"
