"""Locks between processes that write to one place, and temporary folders that are known by a lock.

The system releases a lock when its process ends, however it ends, so the lock file of a killed process blocks nobody.
"""

import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from alpaca.errors import OutputExists, undisturbed
from alpaca.files.outputs import require_no_file_above

logger = logging.getLogger(__name__)
_NEW_S = 60.0  # a temporary folder may be so old before its owner has locked it
_POLL_S = 0.1  # between two looks at a lock that another process holds


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep other processes from writing `target` during the block.

    Raises OutputExists when another process holds the lock, InputError when `target` would lie below a file.
    """
    require_no_file_above(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f".{target.name}.lock")
    lock = _make_lock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise OutputExists(f"another process is writing {target} now; wait for it to end") from None
    try:
        yield
    finally:
        with undisturbed():
            path.unlink(missing_ok=True)
            lock.release()


@contextlib.contextmanager
def waiting_lock(target: Path) -> Iterator[None]:
    """Keep other processes from making `target` during the block; wait while another process does.

    The lock's file stays: if it were removed, a third process could lock a new file of that name while a second one
    still waits for the old file.
    """
    lock = _make_lock(target.with_name(f".{target.name}.waiting"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.info("another process makes %s now; waiting for it", target)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make_lock(path: Path) -> FileLock:
    """A lock by flock alone: filelock's fallback, a marker file, would outlive a killed process."""
    return FileLock(path, poll_interval=_POLL_S, thread_local=False, fallback_to_soft=False)


class ScratchFolder:
    """A temporary folder `path` whose name begins with `prefix`.

    It is removed by `remove`, else at the end of this process, else by the next folder with that prefix. The system
    releases the lock beside it when its process ends, however it ends: so a left folder is known, in other containers
    that share the place, too.
    """

    def __init__(self, prefix: str) -> None:
        _remove_left(prefix)
        self._folder = tempfile.TemporaryDirectory(prefix=prefix)
        self.path = Path(self._folder.name)
        self._lock = _make_lock(_beside(self.path))
        self._lock.acquire(blocking=False)

    def remove(self) -> None:
        self._folder.cleanup()
        _let_go(self._lock)


def _remove_left(prefix: str) -> None:
    for path in Path(tempfile.gettempdir()).glob(f".{prefix}*.alive"):
        with contextlib.suppress(OSError, Timeout):
            if time.time() - path.stat().st_mtime < _NEW_S:
                continue
            folder = path.with_name(path.name.removeprefix(".").removesuffix(".alive"))
            lock = _make_lock(path)
            lock.acquire(blocking=False)
            shutil.rmtree(folder, ignore_errors=True)
            _let_go(lock)


def _let_go(lock: FileLock) -> None:
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.alive")
