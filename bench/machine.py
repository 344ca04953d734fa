"""This machine while a benchmark runs: its device, its memory bandwidth, and who else uses its cores."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_COPIED_BYTES = 1 << 30


def describe_device() -> dict[str, object]:
    """The CPU's threads, and how busy this machine was before."""
    return {"threads": torch.get_num_threads(), "load_average_before": round(os.getloadavg()[0], 2)}


def measure_bandwidth(device: str = DEVICE) -> float:
    """Bytes a second: of a GPU copying within its memory (read and written), of a CPU reading, or copying if faster."""
    source = torch.ones(_COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    copying = 2 * _COPIED_BYTES / _fastest(lambda: target.copy_(source))
    return copying if device == "cuda" else max(copying, _COPIED_BYTES / _fastest(source.sum))


def _fastest(call: Callable[[], object], *, repeats: int = 6) -> float:
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def others_cpu_seconds() -> float:
    """CPU time since boot that went to anything but this process, its children and theirs. Idle time is nobody's.

    Interleaving cancels slow drift, not another program that comes and goes: on two cores it costs a factor of ten.
    """
    ticks = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    busy = sum(ticks) - ticks[3] - ticks[4]  # idle, waiting for a disk
    own, family = 0, {os.getpid()}
    for pid, parent, used, used_by_ended in sorted(_processes()):
        if pid in family or parent in family:
            family.add(pid)
            own += used + used_by_ended
    return (busy - own) / os.sysconf("SC_CLK_TCK")


def _processes() -> Iterator[tuple[int, int, int, int]]:
    """Of each process: its id, its parent's, its ticks of CPU time, and those of the children it has waited for."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(") ")[2].split()
            user, system, ended_user, ended_system = map(int, fields[11:15])
            yield int(path.parent.name), int(fields[1]), user + system, ended_user + ended_system


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
