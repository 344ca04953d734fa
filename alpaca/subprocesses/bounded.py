"""A process that is asked one thing after the other, and ends where one takes more than it may.

It runs a module of this project, which reads `wire` messages, answers each, and sets its own bounds.
"""

import contextlib
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alpaca.subprocesses import wire

_ROOT = Path(__file__).resolve().parents[2]
_MOST_WAITING_S = 60.0  # of wall-clock time: far more than the processes' own limits, on the busiest machine
TOOK_TOO_LONG = -signal.SIGPROF  # the status of one that a timer of its own processor time has ended


class Ended(Exception):
    """Nothing was answered. status: the process's exit status, or None where it went on without an answer.

    was_wanted: somebody called `end` meanwhile.
    """

    def __init__(self, status: int | None, *, was_wanted: bool) -> None:
        super().__init__(f"the process ended with status {status}")
        self.status = status
        self.was_wanted = was_wanted


class BoundedProcess:
    """Started when it is first asked, and again when it has ended. One thread at a time may ask, any may end it."""

    def __init__(self, module: str, *, first: Mapping[str, Any] | None = None, stderr: int | None = None) -> None:
        """first: a message that each process gets before all others, and does not answer."""
        self._module = module
        self._first = first
        self._stderr = stderr
        self._process: subprocess.Popen[bytes] | None = None
        self._changing = threading.Lock()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The reply. Raises Ended, and then there is no process any more.

        What ended a process from outside (a signal, memory that others took) is no fault of the request: unless it took
        too long, or somebody called `end`, another process is asked once.
        """
        try:
            return self._ask_once(request)
        except Ended as ended:
            if ended.status == TOOK_TOO_LONG or ended.was_wanted:
                raise
        return self._ask_once(request)

    def _ask_once(self, request: Mapping[str, Any]) -> dict[str, Any]:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        reply = None
        with contextlib.suppress(OSError, ValueError), selectors.DefaultSelector() as selector:  # ended, or closed
            wire.write_message(process.stdin, request)
            selector.register(process.stdout, selectors.EVENT_READ)
            reply = wire.read_message(process.stdout) if selector.select(_MOST_WAITING_S) else None
        if reply is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)  # its output closes just before it is gone
            status, was_wanted = process.poll(), self._process is not process
            self.end()
            raise Ended(status, was_wanted=was_wanted)
        return reply

    def _start(self) -> subprocess.Popen[bytes]:
        self.end()
        process = subprocess.Popen(
            [sys.executable, "-m", self._module], cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._stderr,
        )  # fmt: skip
        assert process.stdin is not None
        if self._first is not None:
            with contextlib.suppress(OSError):
                wire.write_message(process.stdin, self._first)
        with self._changing:
            self._process = process
        return process

    def end(self) -> None:
        """End the process, if there is one. The next request starts another."""
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
