"""`start`: from the start of a process to its first token, phase by phase, with built kernels and without."""

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.cold_start import BASELINE, ENGINE, Start, start_script, start_server
from bench.gpu import kernel_cache
from bench.gpu.child import Report
from bench.gpu.model import SHARED_MEMORY, filled_folder
from bench.gpu.scale import choose_scale
from bench.machine import DEVICE


def measure_starts(report: Report) -> None:
    """The most important first: with built kernels where an earlier run has left them; else they are built before."""
    scale = choose_scale()
    start = time.perf_counter()
    with report.guarded("folder"), filled_folder(scale.shape, scale.dtype) as folder:
        report.row("folder", seconds=round(time.perf_counter() - start, 1), is_in_memory=folder.parent == SHARED_MEMORY)
        arguments = [str(folder.absolute()), DEVICE, scale.dtype, "llama"]
        has_kernels = any(Path(os.environ.get("TRITON_CACHE_DIR", "nowhere")).glob("*/*.cubin"))
        if not has_kernels:
            _take(report, "engine, kernels built anew", lambda: start_script(ENGINE, arguments))
        _take(report, "engine, kernels cached", lambda: start_script(ENGINE, arguments))
        _take_server(report, folder, scale.dtype)
        if has_kernels:
            with tempfile.TemporaryDirectory() as empty:
                anew = {**os.environ, **kernel_cache.environment(Path(empty))}
                _take(report, "engine, kernels built anew", lambda: start_script(ENGINE, arguments, env=anew))
        _take(report, "transformers", lambda: start_script(BASELINE, arguments))


def _take_server(report: Report, folder: Path, dtype: str) -> None:
    name, missing = (
        "server, kernels cached",
        [one for one in ("cog", "coglet") if importlib.util.find_spec(one) is None],
    )
    if missing:
        report.row(name, left_out=f"not run: {' and '.join(missing)} not installed")
        return
    _take(report, name, lambda: start_server(folder, "llama", dtype))


def _take(report: Report, name: str, start: Callable[[], Start]) -> None:
    def measure() -> dict[str, object]:
        found = start()
        figures = {"first_token_s": round(found.first_token_s, 2), "phases_s": found.phases}
        return figures if found.ready_s is None else {**figures, "ready_s": round(found.ready_s, 2)}

    report.attempt(name, measure, least_s=8 if DEVICE == "cuda" else 0)


JOBS = {"starts": measure_starts}
