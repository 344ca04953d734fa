"""Measures how long a server takes to start, and removes the empty folders that Cog's runtime leaves."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_SWEEP_S = 60.0
# A folder this old, and older than every prediction that runs here, belongs to a prediction that has ended. Other
# servers on this machine share the place: theirs are left alone for as long as they may well be running.
_LEFT_ALONE_S = 600.0


class Phases:
    """Measures the seconds of phases that follow each other. The first began `before_s` seconds ago."""

    def __init__(self, *, before_s: float = 0.0) -> None:
        self._seconds: dict[str, float] = {}
        self._since = time.monotonic() - before_s

    def end(self, name: str) -> None:
        """End the current phase under this name, and begin the next."""
        now = time.monotonic()
        self._seconds[name], self._since = now - self._since, now

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._seconds.items())


class PredictionFolders:
    """Removes the empty folders that the runtime (0.23) makes for each prediction and never takes away."""

    def __init__(self, root: str | Path = "/tmp/coglet/predictions") -> None:
        self._root = Path(root)
        self._lock = threading.Lock()
        self._started: list[float] = []  # of the predictions that run now, in seconds of time.time()
        self._swept_at = time.time()

    def keep_swept(self, *, every_s: float = _SWEEP_S) -> None:
        """Sweep now, and from now on regularly, also while no prediction ends."""

        def sweep() -> None:
            while True:
                self.sweep()
                time.sleep(every_s)

        threading.Thread(target=sweep, name="sweeping folders", daemon=True).start()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """To be held during a prediction. Sweeps at the end of a prediction, about once a minute."""
        start = time.time()
        with self._lock:
            self._started.append(start)
        try:
            yield
        finally:
            with self._lock:
                self._started.remove(start)
                is_due = time.time() - self._swept_at > _SWEEP_S
                if is_due:
                    self._swept_at = time.time()
            if is_due:
                self.sweep()

    def sweep(self) -> int:
        """Remove empty folders that are old, and older than every running prediction. Returns their number."""
        with self._lock:
            before = min([time.time() - _LEFT_ALONE_S, *(start - _SWEEP_S for start in self._started)])
        removed = 0
        with contextlib.suppress(OSError):
            for folder in self._root.iterdir():
                removed += _remove_if_empty(folder, before)
        return removed


def _remove_if_empty(folder: Path, before: float) -> bool:
    """Remove a folder if it has no file in it and last changed before the time `before`. Returns whether it did."""
    try:
        if folder.stat().st_mtime >= before or any(entry.is_file() for entry in folder.rglob("*")):
            return False
        for entry in folder.iterdir():
            entry.rmdir()
        folder.rmdir()
    except OSError:  # somebody else was quicker, or it is not empty after all
        return False
    return True
