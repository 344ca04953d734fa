"""This machine while a benchmark runs: its device, its memory bandwidth, and who else uses its cores."""

import contextlib
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_COPIED_BYTES = 1 << 30
_WAKE_S = 0.3
_MATRIX_S = 0.5


def describe_device() -> dict[str, object]:
    """The CPU's threads, and how busy this machine was before."""
    return {"threads": torch.get_num_threads(), "load_average_before": round(os.getloadavg()[0], 2)}


def wake(device: str = DEVICE) -> None:
    """An idle GPU runs slowly for a moment."""
    if device == "cuda":
        square = torch.randn(4096, 4096, dtype=torch.bfloat16, device=device)
        end = time.monotonic() + _WAKE_S
        while time.monotonic() < end:
            torch.mm(square, square)
            torch.cuda.synchronize()


def measure_bandwidth(device: str = DEVICE, *, num_bytes: int = _COPIED_BYTES) -> float:
    """Bytes a second: of a GPU copying within its memory (read and written), of a CPU reading, or copying if faster."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    copying = 2 * num_bytes / _fastest(lambda: target.copy_(source))
    return copying if device == "cuda" else max(copying, num_bytes / _fastest(source.sum))


def measure_matrix_rate(width: int = 8192, device: str = DEVICE) -> float:
    """FLOP/s of square bfloat16 products, the median of half a second of them: what a hot card keeps up."""
    left, right = (torch.randn(width, width, device=device).bfloat16() for _ in range(2))
    seconds: list[float] = []
    end = time.monotonic() + _MATRIX_S
    while len(seconds) < 3 or time.monotonic() < end:
        seconds.append(_fastest(lambda: left @ right, repeats=1))
    return 2 * width**3 / statistics.median(seconds)


def _fastest(call: Callable[[], object], *, repeats: int = 6) -> float:
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def cpu_seconds() -> float:
    """What this process, all its threads, has used of the CPUs."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_anonymous_bytes() -> int:
    """The most anonymous memory this process has held, its imports included; pages of files are left out as of now."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * (int(lines["VmHWM"].split()[0]) - int(lines["RssFile"].split()[0]))


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
