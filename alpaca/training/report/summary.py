"""What a run leaves to look at: trainer_state.json, a loss curve, a summary in words, and the memory it took."""

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from alpaca.files.atomic import write_bytes, write_json
from alpaca.training.configuration.settings import RunSettings
from alpaca.training.report.recorders import Entry


def write_trainer_state(
    output_dir: Path,
    settings: RunSettings,
    log_history: Sequence[Entry],
    *,
    num_steps: int,
    steps_per_epoch: int,
    summary: Mapping[str, object],
) -> None:
    """trainer_state.json with the fields transformers' Trainer gives it, and a `summary`."""
    state = {
        "global_step": num_steps,
        "max_steps": num_steps,
        "epoch": num_steps / steps_per_epoch,
        "num_train_epochs": -(-num_steps // steps_per_epoch),
        "train_batch_size": settings.batch.micro_batch_size,
        "logging_steps": settings.report.logging_steps,
        "eval_steps": settings.report.eval_steps,
        "save_steps": settings.checkpoints.steps,
        "log_history": list(log_history),
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "summary": dict(summary),
    }
    write_json(output_dir / "trainer_state.json", state)


def summarize(log_history: Sequence[Entry], *, seconds: float) -> dict[str, object]:
    """The run in a few values; `seconds` is the time this process trained (a resumed run's earlier part apart)."""
    train, held_out = _series(log_history, "loss"), _series(log_history, "eval_loss")
    summary: dict[str, object] = {"train_runtime": round(seconds, 3)}
    if train:
        summary |= {"first_loss": train[0][1], "last_loss": train[-1][1]}
    if held_out:
        summary |= {"first_eval_loss": held_out[0][1], "last_eval_loss": held_out[-1][1]}
    return summary


def describe_summary(summary: Mapping[str, object]) -> str:
    """One line for the log."""
    return ", ".join(
        f"{key.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{key.replace('_', ' ')} {value}"
        for key, value in summary.items()
    )


def draw_losses(path: Path, log_history: Sequence[Entry]) -> None:
    """Loss and held-out loss over the steps, the learning rate on a second axis, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    losses = figure.add_subplot(xlabel="step", ylabel="loss (mean over target tokens)")
    rates = losses.twinx()
    rates.set_ylabel("learning rate")
    lines = [
        *losses.plot(*_columns(log_history, "loss"), color="tab:blue", label="loss"),
        *losses.plot(*_columns(log_history, "eval_loss"), color="tab:red", marker="o", label="held-out loss"),
        *rates.plot(*_columns(log_history, "learning_rate"), color="tab:gray", linestyle=":", label="learning rate"),
    ]
    losses.legend(handles=[line for line in lines if len(line.get_xdata())], loc="upper right")
    losses.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_bytes(path, image.getvalue())


def _series(log_history: Sequence[Entry], key: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[key]) for entry in log_history if key in entry]


def _columns(log_history: Sequence[Entry], key: str) -> tuple[list[float], list[float]]:
    series = _series(log_history, key)
    return [step for step, _ in series], [value for _, value in series]


# Memory and rates ---------------------------------------------------------------------------------------------


class MemoryMeter:
    """The most memory that this process held since the meter was made, as a plan counts it.

    On a GPU what torch allocated there, CUDA's context apart; on a CPU anonymous memory beyond what was held at first
    (the interpreter with its imports).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._first = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        with contextlib.suppress(OSError):  # where the kernel does not let the mark be reset, it is the process's
            Path("/proc/self/clear_refs").write_text("5")
        self._first = _status_bytes("RssAnon")

    def peak_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return max(0, _status_bytes("VmHWM") - _status_bytes("RssFile") - self._first)

    def current_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return max(0, _status_bytes("RssAnon") - self._first)


def _status_bytes(name: str) -> int:
    """A size of /proc/self/status; 0 where there is none."""
    path = Path("/proc/self/status")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def evaluation_entry(loss: float) -> Entry:
    """What an evaluation adds to the log; perplexity is the exponential of the mean loss."""
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}


def describe_quality(entry: Entry) -> str:
    """What an evaluation's entry says besides its loss: perplexity, or how answers are told apart."""
    names = {"eval_perplexity": "perplexity", "eval_rewards/accuracies": "accuracy", "eval_rewards/margins": "margin"}
    return "".join(f", {said} {entry[name]:.2f}" for name, said in names.items() if name in entry)


def describe_progress(loss: float, rate: float, memory_bytes: int, share: float | None) -> str:
    """The progress bar's last words (tqdm itself says the time that is left)."""
    text = f"loss {loss:.4f}, {rate:,.0f} tok/s"
    if share is not None:
        text += f" ({share:.0%} of peak)"
    return f"{text}, {memory_bytes / 1e9:.1f} GB"


def mean_rate(log_history: Sequence[Entry]) -> float:
    """Useful tokens per second over a whole run, each entry for the steps since the one before it."""
    entries, tokens, seconds, before = [entry for entry in log_history if "tokens_per_second" in entry], 0.0, 0.0, 0
    for entry in entries:
        num_steps, before = entry["step"] - before, entry["step"]
        tokens, seconds = tokens + num_steps, seconds + num_steps / max(entry["tokens_per_second"], 1e-9)
    return tokens / seconds if seconds else 0.0
