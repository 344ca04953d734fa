"""Environments in which a peer has the project's own packages beside it, made once under .bench/."""

import importlib.util
import shutil
import subprocess
import sys

from bench.environments import FOLDER


def interpreter_with(module: str, package: str) -> str:
    """An interpreter that imports `module`: this one, or one whose `package` is installed beside what is here.

    Raises CalledProcessError where it cannot be installed.
    """
    if importlib.util.find_spec(module):
        return sys.executable
    folder = FOLDER / f"{module}-beside"  # the benchmarks' environments have nothing of the project's
    made = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        (own,) = folder.glob("lib/python*/site-packages")
        (own / "zz_project.pth").write_text("".join(f"{path}\n" for path in sys.path if "site-packages" in path))
        subprocess.run([str(made), "-m", "pip", "install", "-q", "--disable-pip-version-check", package], check=True)
        (folder / "complete").touch()
    return str(made)
