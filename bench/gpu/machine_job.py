"""The first job of every part: which card and versions these are, and what the card itself can do."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from bench import machine
from bench.gpu.child import Report
from bench.gpu.scale import choose_scale
from bench.provenance import cpu_model, gpu
from bench.targets import rounded

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "cog",
    "coglet",
    "trl",
    "datasets",
)


def describe_machine(report: Report) -> None:
    """Card, versions, bandwidth of a large copy, rate of a bfloat16 product."""
    scale = choose_scale()
    report.facts({
        "hardware": {"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0)), **gpu()},
        "versions": {"python": platform.python_version(), **versions(_PACKAGES)},
        "kernel_cache_key": kernel_cache_key(),
        "memory_bytes": torch.cuda.mem_get_info()[1] if machine.DEVICE == "cuda" else None,
    })  # fmt: skip
    machine.wake()
    report.attempt(
        "bandwidth", lambda: {"gb_per_s": rounded(machine.measure_bandwidth(num_bytes=scale.copied_bytes) / 1e9)}
    )
    report.attempt(
        "matrix rate", lambda: {"tflop_per_s": rounded(machine.measure_matrix_rate(scale.matrix_width) / 1e12)}
    )


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def kernel_cache_key() -> dict[str, str]:
    """What built kernels are of."""
    device = torch.cuda.get_device_name() if machine.DEVICE == "cuda" else "cpu"
    return {"device": device, **versions(("torch", "triton"))}


JOBS = {"machine": describe_machine}
