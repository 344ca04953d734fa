"""Where an evaluation's figures come from: hardware, versions, commit, seed and command."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

_PACKAGES = ("torch", "transformers", "lm_eval", "datasets")
ROOT = Path(__file__).resolve().parents[2]


def provenance(*, seed: int) -> dict[str, object]:
    """Versions are of the packages that are installed."""
    return {
        "hardware": {"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0)), "gpu": _gpu()},
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": commit(),
        "command": shlex.join(["script/evaluate", *sys.argv[1:]]),
        "seed": seed,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else ()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def commit() -> str:
    """HEAD, marked where the tree differs from it; without git what ALPACA_COMMIT says."""
    head = _git("rev-parse", "HEAD")
    if not head:
        return os.environ.get("ALPACA_COMMIT") or "unknown"
    return head + ("-dirty" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
