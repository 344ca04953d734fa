"""`train`: fine-tuning LLaMA-7B's shape, beside transformers' Trainer and TRL on the same examples and card."""

import importlib.util
from collections.abc import Callable

from bench.gpu import peers
from bench.gpu.child import Report
from bench.gpu.fine_tuning import train_row
from bench.gpu.model import filled_folder
from bench.gpu.scale import choose_scale
from bench.machine import DEVICE


def train_lora(report: Report) -> None:
    """An adapter on a frozen bfloat16 base, as train.py does it."""
    train_row(report, "lora", name="lora", steps=choose_scale().steps)


def train_full(report: Report) -> None:
    """Every weight, `--numerics fast`."""
    train_row(report, "fast", name="full fast", steps=choose_scale().steps)


def train_qlora(report: Report) -> None:
    """An adapter on a 4-bit base within 7.4 GiB. bitsandbytes quantises while it reads a folder with real weights."""
    name, scale = "qlora", choose_scale()
    if importlib.util.find_spec("bitsandbytes") is None:
        report.row(name, left_out="not run: bitsandbytes is not installed")
        return
    dtype = "bfloat16" if DEVICE == "cuda" else "float32"
    with report.guarded(name), filled_folder(scale.shape, dtype) as folder:
        train_row(report, name, name=name, steps=max(2, scale.steps - 2), folder=folder)


JOBS: dict[str, Callable[[Report], None]] = {
    "lora": train_lora,
    "trainer": peers.train_with_trainer,
    "full": train_full,
    "qlora": train_qlora,
    "trl": peers.train_with_trl,
}
