"""What every benchmark's JSON says of where its figures come from."""

import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

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


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def gpu() -> dict[str, str]:
    """The GPU, its driver and the CUDA that torch was built for; nothing where torch sees none."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"gpu": torch.cuda.get_device_name(), "driver": gpu_driver(), "cuda": torch.version.cuda or "none"}


def gpu_driver(version_file: Path = Path("/proc/driver/nvidia/version")) -> str:
    found = re.search(r"\d+\.\d+(\.\d+)?", version_file.read_text()) if version_file.is_file() else None
    return found[0] if found else "unknown"


def commit() -> str:
    """HEAD, marked where the tree differs from it; without git or outside of a repository what ALPACA_COMMIT says."""
    head = git("rev-parse", "HEAD")
    if not head:
        return os.environ.get("ALPACA_COMMIT") or "unknown"
    return head + ("-dirty" if git("status", "--porcelain") else "")


def git(*arguments: str) -> str:
    """What git prints; nothing where it fails or is not installed."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
