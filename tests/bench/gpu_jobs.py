"""Jobs for the tests of bench.gpu: rows without a measurement, and the ways in which a job can go wrong."""

import os
import subprocess
import sys
import time
from pathlib import Path

from bench.gpu.child import Report


def tell_rows(report: Report) -> None:
    report.row("one", value=1)
    report.row("two", value=2)


def fail_in_the_middle(report: Report) -> None:
    def fail() -> dict[str, object]:
        raise MemoryError("no room")

    report.attempt("first", lambda: {"value": 1})
    report.attempt("second", fail)
    report.attempt("third", lambda: {"value": 3})


def end_badly(report: Report) -> None:
    report.row("before", value=1)
    print("the last words", file=sys.stderr)
    sys.exit(3)


def hang(report: Report) -> None:
    """With a child of its own, whose process id is in the file that HANGING names."""
    report.row("before", value=1)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    if "HANGING" in os.environ:
        Path(os.environ["HANGING"]).write_text(f"{os.getpid()} {sleeper.pid}")
    print("noise on standard output")
    report.row("hanging")
    time.sleep(120)


JOBS = {"rows": tell_rows, "middle": fail_in_the_middle, "badly": end_badly, "hang": hang}
