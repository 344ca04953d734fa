"""Rows of fine-tuning: the product's own loop on a model that was drawn on the card, told step by step."""

import statistics
from pathlib import Path

import transformers

from bench.gpu.child import Report, free_memory
from bench.gpu.model import DrawnAutoModel, hollow_folder
from bench.gpu.scale import choose_scale
from bench.machine import DEVICE, measure_matrix_rate, wake
from bench.provenance import ROOT, find_real
from bench.targets import rounded
from bench.train import BenchConfig, run_row

Figures = dict[str, object]


def train_row(report: Report, way: str, *, name: str, steps: int, folder: Path | None = None) -> None:
    """One of bench.train's ways; its row grows with each step. `folder`: with real weights, where it must be read."""
    with report.guarded(name):
        wake()
        matrix_rate = measure_matrix_rate(choose_scale().matrix_width)
        free_memory()  # the plan is made with what is free

        def on_step(rates: list[float]) -> None:
            known = {"tokens_per_second": statistics.median(rates[1:])} if rates[1:] else {}
            report.row(name, steps=steps, steps_done=len(rates) + 1, rates=rates, **known)

        transformers.AutoModelForCausalLM = DrawnAutoModel
        if folder is not None:
            figures = run_row(bench_config(way, steps), way, folder, on_step=on_step)
        else:
            dtype = "bfloat16" if DEVICE == "cuda" else "float32"
            with hollow_folder(choose_scale().shape, dtype) as hollow:
                figures = run_row(bench_config(way, steps), way, hollow, on_step=on_step)
        report.row(name, **figures, steps=steps, **shares(figures, matrix_rate))


def shares(figures: Figures, matrix_rate: float) -> Figures:
    """What the rate is of the card's own, and the plan of what happened."""
    used = figures["flops_per_token"] * figures["tokens_per_second"] if figures.get("flops_per_token") else None
    planned = figures.get("planned_bytes")
    return {
        "matrix_tflop_per_s": rounded(matrix_rate / 1e12),
        "share_of_matrix_rate": rounded(used / matrix_rate) if used else None,
        "peak_over_planned": rounded(figures["peak_bytes"] / planned) if planned else None,
    }


def bench_config(way: str, steps: int) -> BenchConfig:
    """The settings of all rows: one optimizer step as the recipe has it, on real examples where they are."""
    scale = choose_scale()
    return BenchConfig(
        shape=scale.shape, steps=steps, rounds=1, rows=(way,), batch=scale.examples, data_path=str(examples_path()),
        checkpointing=False, learning_rate=1e-4, max_length=scale.max_length, budget_s=0.0,
    )  # fmt: skip


def examples_path() -> Path:
    """The 4,000 real examples, else the few that the project ships."""
    return find_real("alpaca_4000.json") or ROOT / "alpaca/data/sample.json"
