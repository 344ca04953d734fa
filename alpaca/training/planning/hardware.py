"""What a run has to work with: its devices, their memory and the rate of their products."""

import functools
import time
from dataclasses import dataclass

import torch

from alpaca.memory import CUDA_CONTEXT_BYTES
from alpaca.training.distributed import own_free_memory

GPU_COUNTS = (1, 2, 4, 8)
DEVICE_PEAKS = {  # dense bf16 FLOP/s by a word of the device's name, from NVIDIA's data sheets
    "B200": 2250e12, "H200": 989e12, "H100 PCIE": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "L4": 121e12, "A10G": 70e12, "A10": 125e12, "A6000": 155e12, "4090": 165e12, "3090": 71e12,
}  # fmt: skip
_GPU_RESERVE = 0.03  # share of a card that the allocator loses to fragments; an assumption
_ASSUMED_SHARE = 0.4  # share of peak FLOP/s; an assumption. Published runs: 0.14 (Stanford) to 0.68 (fms-fsdp)


def find_device_peak(name: str) -> float | None:
    """A GPU's dense bfloat16 FLOP/s by its data sheet, or None for a GPU that is not listed."""
    words = name.upper()
    return next((peak for part, peak in DEVICE_PEAKS.items() if all(word in words for word in part.split())), None)


@functools.cache  # plans are made again and again, and what else runs here changes it more than time does
def measure_cpu_flops() -> float:
    """FLOP/s of float32 matrix products on this CPU now, in some 50 ms; measured once for a process."""
    left = right = torch.ones(512, 512)
    left @ right
    start = time.perf_counter()
    for _ in range(8):
        left @ right
    return 8 * 2 * 512**3 / (time.perf_counter() - start)


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The hardware of a plan. memory_bytes: what the run may use on each device.    peak_flops: None where unknown."""

    name: str
    memory_bytes: int
    on_gpu: bool
    peak_flops: float | None
    flops: float  # FLOP/s of one device, by which times are estimated
    flops_are: str  # where that rate comes from, in words

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * (1 - _GPU_RESERVE)) if self.on_gpu else self.memory_bytes


def find_hardware(device: torch.device) -> Hardware:
    """This machine's device and the memory that is free on it now."""
    if device.type != "cuda":
        return Hardware(
            name="this CPU", memory_bytes=own_free_memory(device), on_gpu=False, peak_flops=None,
            flops=measure_cpu_flops() / 2,
            flops_are="half of what float32 matrix products reach here now",
        )  # fmt: skip
    name = torch.cuda.get_device_name(device)
    # The context exists already, and the plan counts it: add it, so that it is not counted twice.
    return assume_gpu(name, own_free_memory(device) + CUDA_CONTEXT_BYTES, find_device_peak(name))


def assume_gpu(name: str, memory_bytes: int, peak: float | None) -> Hardware:
    """A GPU that is assumed to reach a usual share of its peak. peak: dense bfloat16 FLOP/s, None where unknown."""
    flops = _ASSUMED_SHARE * (peak or DEVICE_PEAKS["A100"])
    known = f"{_ASSUMED_SHARE:.0%} of {peak / 1e12:,.0f}" if peak else f"{_ASSUMED_SHARE:.0%} of an A100's"
    return Hardware(
        name=name, memory_bytes=memory_bytes, on_gpu=True, peak_flops=peak, flops=flops, flops_are=f"assumed: {known}"
    )
