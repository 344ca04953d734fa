"""Our C++ kernels for CPUs: built when first needed, for the machine at hand, and loaded by ctypes.

They are plain C functions over pointers, so that no header of torch is compiled and a build takes seconds. What has no
C++ compiler, or a CPU without AVX2, does without them: `load` gives None, and torch's operations are used instead.

    python -m alpaca.serving.kernels.native.library      builds them, as script/setup does
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent
_BUILT = Path(__file__).parents[4] / ".native"
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-Wall", "-Wextra")
_BUILD_S = 120.0
_INT, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_ARGUMENTS = {
    "pack_weight": [_INT, _POINTER, _POINTER, _INT, _INT],
    "multiply_packed": [_POINTER, _POINTER, _POINTER, _INT],
    "paged_attention": [*[_POINTER] * 7, *[_INT] * 6, _FLOAT, _FLOAT],
    "rotate_and_store": [*[_POINTER] * 7, *[_INT] * 5],
    "rms_norm": [*[_POINTER] * 3, _INT, _INT, _FLOAT],
    "add_rms_norm": [*[_POINTER] * 4, _INT, _INT, _FLOAT],
    "activate_and_multiply": [_POINTER, _POINTER, _INT, _INT, _INT],
    "run_step": [_POINTER, _POINTER],
}
_NUMBERS = {"panel_rows": [], "lanes": [], "step_room": [_POINTER]}


@cache
def load() -> ctypes.CDLL | None:
    """The kernels, built first where they are not; None where they cannot be, which the log says once."""
    try:
        library = _open()
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        logger.warning("CPU kernels: not built, torch's own operations are used (slower): %s", said.strip()[-500:])
        return None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    for name, arguments in _NUMBERS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, _INT
    return library


def _open() -> ctypes.CDLL:
    compiler = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        raise OSError(f"they are written for x86 under Linux, and this is {platform.machine()}, {platform.system()}")
    if compiler is None:
        raise OSError("no C++ compiler: install g++, or name one in CXX")
    built = _BUILT / f"kernels-{_fingerprint(compiler)}.so"
    if built.is_file():
        return ctypes.CDLL(str(built))
    try:
        built.parent.mkdir(exist_ok=True)
        _build(compiler, built)
        return ctypes.CDLL(str(built))
    except OSError:  # of an installation that is only read: a file of this process alone
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / "kernels.so"
            _build(compiler, built)
            return ctypes.CDLL(str(built))


def _build(compiler: str, built: Path) -> None:
    logger.info("CPU kernels: building them with %s, once for this machine", compiler)
    handle, temporary = tempfile.mkstemp(dir=built.parent, suffix=".so")
    os.close(handle)
    try:
        # torch's own OpenMP and not the compiler's: two of them would each start threads for all cores.
        steps = ([*_FLAGS, "-c", str(_SOURCES / "kernels.cpp"), "-o", f"{temporary}.o"],
                 ["-shared", f"{temporary}.o", "-o", temporary, *_openmp()])  # fmt: skip
        for arguments in steps:
            subprocess.run([compiler, *arguments], check=True, capture_output=True, text=True, timeout=_BUILD_S)
        Path(temporary).replace(built)
    finally:
        for left in (temporary, f"{temporary}.o"):
            Path(left).unlink(missing_ok=True)


@cache
def _openmp() -> list[str]:
    """The file of the OpenMP that torch has loaded; the compiler's where torch brings none."""
    torch.get_num_threads()
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = sorted({line.split()[-1] for line in lines if "libgomp" in line})
    return found[:1] or ["-lgomp"]


def cpu_flags() -> frozenset[str]:
    """What this CPU can do, by Linux's names; empty elsewhere."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), []))


def _fingerprint(compiler: str) -> str:
    """Changes with all that a build depends on: sources, flags, compiler, CPU, OpenMP."""
    digest = hashlib.sha256()
    for source in [*sorted(_SOURCES.glob("*.h")), _SOURCES / "kernels.cpp"]:
        digest.update(source.read_bytes())
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=10.0).stdout
    digest.update(repr((_FLAGS, compiler, version, sorted(cpu_flags()), _openmp())).encode())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    load()
