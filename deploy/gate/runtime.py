"""Keeps Cog's runtime running: starts it as a child, watches its health, starts it again when its worker dies."""

import asyncio
import contextlib
import ctypes
import json
import os
import random
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

import httpx

_POLL_S, _STARTING_POLL_S = 0.5, 0.1
_HEALTH_S = 15.0  # the runtime itself waits for its worker up to 10 s
_MOST_DEATHS, _WITHIN_S = 3, 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 8.0
_STOPPED_S = 120.0  # a worker that does not answer for so long is taken for dead; a long step, or a suspended machine
_NOTICED_S = 5.0  # from a connection that broke until the death behind it is known
_ENDING_S = 20.0  # for the runtime to finish what it does after SIGTERM
_PR_SET_PDEATHSIG = 1


class State(Enum):
    """What the runtime can do. FAILED: its setup did, and trying again would not help."""

    STARTING = "STARTING"
    UP = "UP"
    FAILED = "FAILED"


class GivenUp(Exception):
    """The runtime died too often, or could not be started. status: the exit status for this program."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Runtime:
    """The child process. `url`: where it listens. `health`: its last report."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.host, self.port = _private_address()
        self.url = f"http://{self.host}:{self.port}"
        self.state = State.STARTING
        self.health: dict[str, object] = {"status": "STARTING"}
        self.num_restarts = 0
        self.num_lives = 0
        self._command = [*command, "--host", self.host]
        self._environment = {**environment, "PORT": str(self.port)}
        self._process: asyncio.subprocess.Process | None = None
        self._has_been_up = False
        self._silent_since: float | None = None
        self._deaths: deque[float] = deque(maxlen=_MOST_DEATHS)
        self._changed = asyncio.Event()
        self._ending = asyncio.Event()  # this life of the runtime is to end
        self._has_had_worker = False  # in this life

    async def keep_running(self) -> None:
        """Start the runtime, and start it again whenever it dies. Raises GivenUp; ends only so, or when cancelled.

        Cancelling it ends the runtime as SIGTERM does.
        """
        pause = _FIRST_PAUSE_S
        while True:
            was_up = await self._run_once()
            self.num_lives += 1
            self._set(State.STARTING, {"status": "STARTING"})
            if self._ending.is_set():
                self._ending.clear()
            else:
                self._count_death()
                pause = _FIRST_PAUSE_S if was_up else min(2 * pause, _LONGEST_PAUSE_S)
                _say(f"the runtime or its worker died; starting it again in {pause:.1f} s")
                await asyncio.sleep(pause)
            self.num_restarts += 1

    def end(self, why: str) -> None:
        """End this life of the runtime at once, which is no death, and have it started again."""
        _say(f"{why}; starting it again")
        self._ending.set()

    async def until_up(self) -> None:
        """Wait until the runtime takes requests, or has failed for good."""
        while self.state is State.STARTING:
            await self._changed.wait()

    async def ends(self, life: int) -> bool:
        """Whether the runtime's life of that number (`num_lives` during it) is over, or is within a moment."""
        deadline = time.monotonic() + _NOTICED_S
        while self.num_lives == life and time.monotonic() < deadline:
            await asyncio.sleep(_STARTING_POLL_S)
        return self.num_lives != life

    async def _run_once(self) -> bool:
        """Run the runtime until it has died; whether it was up before."""
        self._process = await asyncio.create_subprocess_exec(
            *self._command, env=self._environment, start_new_session=True, preexec_fn=die_with_parent
        )
        self._has_had_worker = False
        ended = asyncio.ensure_future(self._process.wait())
        watching = asyncio.ensure_future(self._watch())
        ending = asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait({ended, watching, ending}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._send(signal.SIGTERM)
            await asyncio.wait({ended}, timeout=_ENDING_S)
            raise
        finally:
            watching.cancel()
            ending.cancel()
            self._kill_all()
            await ended
        return self.state is not State.STARTING

    def _send(self, number: signal.Signals) -> None:
        """Send a signal to the runtime, if it has not ended."""
        assert self._process is not None
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def _kill_all(self) -> None:
        """Kill what is left of the runtime, its worker and what that has started: its session's group of processes."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _watch(self) -> None:
        """Follow the runtime's health; returns when its worker is dead. A fault in looking is no death."""
        self._silent_since = None
        async with httpx.AsyncClient(base_url=self.url, timeout=_HEALTH_S, trust_env=False) as client:
            while True:
                try:
                    if self._is_dead(await _ask_health(client)) or self._has_lost_worker():
                        return
                except Exception as error:  # the runtime may be well, and what it does would be lost
                    _say(f"the runtime's health could not be read: {type(error).__name__}: {error}")
                await asyncio.sleep(_STARTING_POLL_S if self.state is State.STARTING else _POLL_S)

    def _is_dead(self, health: dict[str, object]) -> bool:
        """What a report says of the worker; keeps the state that follows from it."""
        status, problem = health.get("status"), str(health.get("user_healthcheck_error", ""))
        if status in ("READY", "BUSY"):
            self._silent_since = None
            self._has_been_up = True
            self._set(State.UP, health)
        elif status in ("SETUP_FAILED", "DEFUNCT"):
            if self._has_been_up:  # what it needs may be held still, by a worker that is about to end
                return True
            self._set(State.FAILED, health)
        elif status == "UNHEALTHY" and "timed out" not in problem:
            return True
        elif self.state is State.UP:
            self._silent_since = self._silent_since or time.monotonic()
            return time.monotonic() - self._silent_since > _STOPPED_S
        return False

    def _has_lost_worker(self) -> bool:
        """Whether the worker died while it was being started, for whose first word the runtime waits for ever."""
        assert self._process is not None
        if self.state is not State.STARTING or sys.platform != "linux":
            return False
        lives = _has_living_child(self._process.pid)
        self._has_had_worker |= lives
        return self._has_had_worker and not lives

    def _set(self, state: State, health: dict[str, object]) -> None:
        self.health = health
        if state is not self.state:
            self.state = state
            self._changed.set()
            self._changed = asyncio.Event()

    def _count_death(self) -> None:
        """Raise GivenUp for the third death within a minute, and for a runtime that ended before it was ever up."""
        assert self._process is not None
        status = self._process.returncode or 0
        if not self._has_been_up:
            raise GivenUp(f"Cog's runtime could not be started (exit status {status})", abs(status) or 1)
        self._deaths.append(time.monotonic())
        if len(self._deaths) == _MOST_DEATHS and self._deaths[-1] - self._deaths[0] < _WITHIN_S:
            raise GivenUp(f"the runtime died {_MOST_DEATHS} times within {_WITHIN_S:.0f} s; its log is above", 1)


async def _ask_health(client: httpx.AsyncClient) -> dict[str, object]:
    """The runtime's report; an empty one where there is none."""
    try:
        report = (await client.get("/health-check")).json()
    except (httpx.HTTPError, json.JSONDecodeError):
        return {}
    return report if isinstance(report, dict) else {}


def _has_living_child(pid: int) -> bool:
    """Whether a process has a child that has not ended (Linux)."""
    with contextlib.suppress(OSError):
        for listed in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in listed.read_text().split():
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{child}/stat").read_text().rpartition(") ")[2][0] != "Z":
                        return True
    return False


def _private_address() -> tuple[str, int]:
    """A loopback address and port that nobody guesses: a page in a browser on this machine may try any of them.

    Linux takes every address of 127.0.0.0/8; elsewhere there is but one.
    """
    source = random.SystemRandom()
    host = "127.0.0.1"
    if sys.platform == "linux":
        host = ".".join(["127", *(str(source.randint(1, 254)) for _ in range(3))])
    return host, source.randint(20_000, 32_000)  # below the ports that the kernel gives away


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
