"""Seconds of one call of something short, on a CPU or a GPU. What is timed is given as several calls of the same work
over different memory, so that together they exceed the caches and the weights come from memory, as in the model.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]

_GPU_LEAST_S = 1e-3  # of one replay: the launch of a graph takes some 10 microseconds
_GPU_MOST_CALLS = 600
_GPU_TOTAL_S = 0.04
_LAUNCH_BOUND = 15  # a launch from Python takes so many times as long as a small kernel
_CPU_TOTAL_S = 0.03
_CPU_MOST_CALLS = 200


def seconds_per_call(calls: Sequence[Call], *, device: str) -> tuple[float, str]:
    """The median, and how it was taken: "graph" (replays of many calls), "launches" where none can be captured, "cpu".

    Each call must have run once before, so that it is compiled.
    """
    return _time_on_gpu(calls) if device == "cuda" else (_time_on_cpu(calls), "cpu")


def _time_on_cpu(calls: Sequence[Call]) -> float:
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < _CPU_TOTAL_S and len(seconds) < _CPU_MOST_CALLS):
        call = calls[len(seconds) % len(calls)]
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _time_on_gpu(calls: Sequence[Call]) -> tuple[float, str]:
    for call in calls:  # whatever a call prepares for its own memory
        call()
    rough = _elapsed(lambda: _run_all(calls)) / len(calls)
    wanted = min(math.ceil(_GPU_LEAST_S / (rough / _LAUNCH_BOUND)), _GPU_MOST_CALLS)
    repeated = list(calls) * math.ceil(wanted / len(calls))
    run, how = _capture(repeated)
    first = _elapsed(run)
    num_replays = min(max(int(_GPU_TOTAL_S / first), 3), 15)
    return statistics.median(_elapsed(run) for _ in range(num_replays)) / len(repeated), how


def _capture(calls: Sequence[Call]) -> tuple[Call, str]:
    """All calls as one CUDA graph, the way the engine launches them; or as launches where something waits."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            _run_all(calls)
    except RuntimeError as error:
        torch.cuda.synchronize()  # raises where the device is lost
        if "out of memory" in str(error):
            raise
        return lambda: _run_all(calls), "launches"
    return graph.replay, "graph"


def _run_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _elapsed(run: Call) -> float:
    """Seconds on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
