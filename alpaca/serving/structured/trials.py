"""The way to the processes that try constraints: started when first needed, and again when one had to be ended."""

import atexit
import contextlib
import queue
import selectors
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from alpaca.errors import InputError, ServiceFailed
from alpaca.serving.structured.constraints import Constraint
from alpaca.serving.structured.trial import MOST_SECONDS
from alpaca.serving.structured.vocabulary import Vocabulary
from alpaca.text.chat import wire

_ROOT = Path(__file__).resolve().parents[3]
_MODULE = "alpaca.serving.structured.trial"
_MOST_WAITING_S = 60.0  # of wall-clock time: far more than the process's own limit, on the busiest machine
_NUM_PROCESSES = 2  # so that one constraint that takes long does not keep all others waiting


class Trials:
    """Tries constraints, for any number of threads; each is tried by one process that has nothing else to do."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        # The one that was used last comes first: a second is started only when two constraints come at once.
        self._idle: queue.LifoQueue[_Trial] = queue.LifoQueue()
        self._all = [_Trial(vocabulary) for _ in range(_NUM_PROCESSES)]
        for trial in self._all:
            self._idle.put(trial)
        atexit.register(self.close)

    def require(self, constraint: Constraint) -> None:
        """Return if the constraint can be built within the bounds. Raises InputError."""
        trial = self._idle.get()
        try:
            trial.require(constraint)
        finally:
            self._idle.put(trial)

    def close(self) -> None:
        """End the processes. The next constraint starts another."""
        for trial in self._all:
            trial.end()


class _Trial:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._process: subprocess.Popen[bytes] | None = None
        self._changing = threading.Lock()

    def require(self, constraint: Constraint) -> None:
        reply = self._exchange({"kind": constraint.kind, "text": constraint.text})
        if reply is None:
            raise self._describe_end(constraint.kind)
        if "refused" in reply:
            raise InputError(reply["refused"])

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """One request and its reply; None where the process ended at work."""
        process = self._process if self._process is not None and self._process.poll() is None else self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError), selectors.DefaultSelector() as selector:
            wire.write_message(process.stdin, request)
            selector.register(process.stdout, selectors.EVENT_READ)
            if selector.select(_MOST_WAITING_S):
                return wire.read_message(process.stdout)
        return None

    def _describe_end(self, kind: str) -> Exception:
        process = self._process
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)  # its output closes just before it is gone
        status = process.poll()
        self.end()
        if status in (None, -signal.SIGPROF):
            return InputError(
                f"{kind} takes more than {MOST_SECONDS:g} s of processor time to read: make it simpler, with fewer "
                "repetitions and alternatives"
            )
        if status in (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGKILL):
            return InputError(
                f"{kind} needs too much memory to be read, or its parts name each other in too long a chain: make it "
                "simpler"
            )
        return ServiceFailed(f"the process that tries constraints ended with status {status}; try again")

    def _start(self) -> subprocess.Popen[bytes]:
        self.end()
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULE], cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the library writes what it panics about, a client's text with it
        )  # fmt: skip
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            wire.write_message(process.stdin, self._vocabulary.to_message())
        with self._changing:
            self._process = process
        return process

    def end(self) -> None:
        with self._changing:
            process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what it did not read any more
                if stream is not None:
                    stream.close()
