"""What every benchmark's JSON says of where its figures come from."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("ALPACA_REAL", ROOT.parent / "shared" / "real"))


def provenance(module: str, packages: tuple[str, ...]) -> dict[str, object]:
    """Hardware, versions of `packages`, commit and command of `python -m bench.MODULE`."""
    return {
        "hardware": {"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0))},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "commit": git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else ""),
        "command": shlex.join(["python", "-m", f"bench.{module}", *sys.argv[1:]]),
    }


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
