"""Locks between processes that write to one place."""

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

from alpaca.errors import OutputExists
from alpaca.files.outputs import require_no_file_above


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keep other processes from writing `target` meanwhile. Raises OutputExists when one does now, InputError."""
    require_no_file_above(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f".{target.name}.lock")
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputExists(f"another process is writing {target} now; wait for it to end") from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


logger = logging.getLogger(__name__)


@contextlib.contextmanager
def waiting_lock(target: Path) -> Iterator[None]:
    """Keep others from making `target` meanwhile; wait where one does now. The lock's file stays.

    (Removing it would let a third process lock a new file of its name while a second waits for the old one.)
    """
    with open(target.with_name(f".{target.name}.waiting"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            logger.info("another process makes %s now; waiting for it", target)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
