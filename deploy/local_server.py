"""Start `script/serve` as a child, wait until it is ready, ask it, stop it."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tenacity

ROOT = Path(__file__).resolve().parent.parent
_ADDRESS = re.compile(r"serving on http://(\S+:\d+)")
_BARE_ADDRESS = re.compile(r"Starting coglet server on (\S+:\d+)")
_OPENAI_ADDRESS = re.compile(r"OpenAI's API on (http://\S+)/v1")
_CAPACITY_PAUSES_S = (0.001, 0.005, 0.02, 0.1, 0.3, 1.0)


class ServerFailedError(RuntimeError):
    """The server ended, or its setup failed; the message ends with what it logged."""


class LocalServer:
    """A running server; `url` is its address, `logs` what it has printed so far.

    within: a command that ends by running the command that is put behind it, such as `nice -n 5`.
    """

    def __init__(self, flags: list[str], *, env: dict[str, str] | None = None, within: Sequence[str] = ()) -> None:
        self.logs: list[str] = []
        self.url = ""
        self._address = _BARE_ADDRESS if "--bare" in flags else _ADDRESS
        command = [*within, sys.executable, "-m", "deploy.serve", "--port", "0", *flags]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        try:
            self._reader = threading.Thread(target=self._read, daemon=True)
            self._reader.start()
        except BaseException:  # nobody else knows of the child yet
            self.process.kill()
            raise

    def wait_until(self, status: str = "READY", *, timeout_s: float = 120) -> dict[str, Any]:
        """The health report once it has `status`. Raises ServerFailedError when it cannot come any more."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            health = self._health()
            if health.get("status") == status:
                return health
            if health.get("status") == "SETUP_FAILED" or self.process.poll() is not None:
                raise ServerFailedError(f"the server did not start:\n{self.log_text()}")
            time.sleep(0.05)
        raise ServerFailedError(f"the server was not {status} after {timeout_s} s:\n{self.log_text()}")

    def wait_for_openai(self, *, timeout_s: float = 20) -> str:
        """The address of OpenAI's API beside the gate, once it takes predictions. Raises ServerFailedError."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if found := _OPENAI_ADDRESS.search(self.log_text()):
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{found[1]}/health", timeout=5):
                    return found[1]
            time.sleep(0.02)
        raise ServerFailedError(f"OpenAI's API was not ready after {timeout_s} s:\n{self.log_text()}")

    def predict(self, input: dict[str, Any], *, timeout_s: float = 600) -> dict[str, Any]:
        """One prediction. The runtime frees a slot just after its reply, so a 409 is tried again for a moment."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_has_no_slot),
            wait=tenacity.wait_chain(*map(tenacity.wait_fixed, _CAPACITY_PAUSES_S)),
            stop=tenacity.stop_after_attempt(len(_CAPACITY_PAUSES_S) + 1),
            before_sleep=lambda state: state.outcome.exception().close(),
            reraise=True,
        )
        return retrying(self.request, "/predictions", {"input": input}, timeout_s=timeout_s)

    def request(self, path: str, body: dict[str, Any] | None = None, *, timeout_s: float = 60) -> dict[str, Any]:
        """GET, or POST of a JSON body. Raises urllib.error.HTTPError for other than 2xx."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            return json.load(reply)

    def log_text(self) -> str:
        return "".join(self.logs)

    def stop(self) -> int:
        """End the server and return its exit status."""
        self.process.terminate()
        try:
            status = self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self._reader.join(timeout=5)
        return status

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.logs.append(line)
                if match := self._address.search(line):
                    self.url = f"http://{match[1]}"

    def _health(self) -> dict[str, Any]:
        if not self.url:
            return {}
        with contextlib.suppress(OSError):
            return self.request("/health-check", timeout_s=5)
        return {}


def _has_no_slot(error: BaseException) -> bool:
    return isinstance(error, urllib.error.HTTPError) and error.code == 409


@contextlib.contextmanager
def _sigterm_deferred() -> Iterator[None]:
    """A SIGTERM meanwhile counts at the end: an exception out of Popen would leave the child without an owner."""
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set, and none runs
        yield
        return
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
    if received:
        signal.raise_signal(signal.SIGTERM)


def stop_children_on_sigterm() -> None:
    """Let SIGTERM end this program as an exception does, so that the server it runs is stopped, too."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


@contextlib.contextmanager
def running_server(
    flags: list[str],
    *,
    env: dict[str, str] | None = None,
    within: Sequence[str] = (),
    on_failure: Callable[[str], object] = lambda logs: None,
) -> Iterator[LocalServer]:
    """A server that is ready, stopped at the end of the block."""
    server: LocalServer | None = None
    try:
        with _sigterm_deferred():
            server = LocalServer(flags, env=env, within=within)
        server.wait_until("READY")
        yield server
    except BaseException:
        on_failure(server.log_text() if server else "")
        raise
    finally:
        if server is not None:
            server.stop()
