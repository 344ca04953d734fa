"""Environments of other programs, made once under .bench/, so that their packages never meet the project's own."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.provenance import ROOT

FOLDER = ROOT / ".bench"


def environment(name: str, packages: Sequence[str], *, torch: str) -> Path:
    """The interpreter of .bench/NAME, which has this release of torch and `packages`; its first use installs them."""
    folder = FOLDER / name
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"making {folder} …", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, f"torch=={torch}"], check=True)
        subprocess.run([*install, *packages], check=True)
        (folder / "complete").touch()
    return python
