"""What every benchmark's JSON says of where its figures come from."""

import os
import platform
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

from alpaca.evaluation.provenance import commit, cpu_model

ROOT = Path(__file__).resolve().parent.parent


def find_real(name: str) -> Path | None:
    """A file of the folder of real inputs that ALPACA_REAL names; None without the variable or the file.

    The project ships no such folder: it holds Meta's tokenizer and 4,000 examples of Alpaca's data.
    """
    folder = os.environ.get("ALPACA_REAL")
    file = Path(folder) / name if folder else None
    return file if file and file.is_file() else None


def provenance(module: str, packages: tuple[str, ...]) -> dict[str, object]:
    """Hardware, versions of `packages`, commit and command of `python -m bench.MODULE`."""
    return {
        "hardware": {"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0)), **gpu()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "commit": commit(),
        "command": shlex.join(["python", "-m", f"bench.{module}", *sys.argv[1:]]),
    }


def gpu() -> dict[str, str]:
    """The GPU, its driver and the CUDA that torch was built for; nothing where torch sees none."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"gpu": torch.cuda.get_device_name(), "driver": gpu_driver(), "cuda": torch.version.cuda or "none"}


def gpu_driver(version_file: Path = Path("/proc/driver/nvidia/version")) -> str:
    found = re.search(r"\d+\.\d+(\.\d+)?", version_file.read_text()) if version_file.is_file() else None
    return found[0] if found else "unknown"
