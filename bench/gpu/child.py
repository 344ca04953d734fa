"""One job of a part, in its own process: `python -m bench.gpu.child MODULE JOB SECONDS`, by bench.gpu.jobs."""

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TextIO

from alpaca import cpu_threads

cpu_threads.set_defaults()  # as predict.py, before torch is imported

_FAILURE_CHARS = 1500


@dataclass
class Report:
    """What a job tells: rows and facts as JSON lines, and how much time it has."""

    channel: TextIO
    deadline: float  # of time.monotonic

    def left_s(self) -> float:
        """Seconds until the job is ended."""
        return self.deadline - time.monotonic()

    def row(self, name: str, **figures: object) -> None:
        """Tell a row; one of the same name is replaced."""
        self._send({"row": {"name": name, **figures}})

    def facts(self, facts: Mapping[str, object]) -> None:
        """Tell what is true of the whole part."""
        self._send({"facts": dict(facts)})

    def attempt(self, name: str, measure: Callable[[], Mapping[str, object]], *, least_s: float = 0.0) -> None:
        """The row `name` with what `measure` gives, or why it has nothing. Its failure is nobody else's."""
        if self.left_s() < least_s:
            self.row(name, left_out=f"{self.left_s():.0f} s were left; it needs {least_s:g}")
            return
        with self.guarded(name):
            self.row(name, **measure())

    @contextlib.contextmanager
    def guarded(self, name: str):
        """A block whose exception becomes the row `name`; what it held on the card is let go either way."""
        try:
            yield
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            self.row(name, failure=f"{type(error).__name__}: {error}"[-_FAILURE_CHARS:])
        free_memory()

    def _send(self, message: dict[str, object]) -> None:
        self.channel.write(json.dumps(message) + "\n")
        self.channel.flush()


def free_memory() -> None:
    """Give the card's memory back to whoever comes next."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def open_channel() -> TextIO:
    """The pipe on standard output, for rows alone: what libraries print goes to the log from now on."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def end_with_parent() -> None:
    """End this process and all it started as soon as standard input ends, as it does when the parent dies."""

    def wait() -> None:
        while os.read(0, 1 << 12):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, name="watch-parent", daemon=True).start()


def main() -> None:
    module, job, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    report = Report(channel=open_channel(), deadline=time.monotonic() + seconds)
    end_with_parent()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    importlib.import_module(module).JOBS[job](report)
    report.channel.close()
    sys.stderr.flush()
    os._exit(0)  # all is told: a thread that hangs, or a library that fails while it is torn down, adds nothing


if __name__ == "__main__":
    main()
