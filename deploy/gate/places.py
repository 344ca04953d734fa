"""Sees to it that the runtime has places: one that is full for long while nothing runs has lost them for good.

Cog's runtime (0.23.1) gives up the place of each prediction that it could not hand to its worker. The gate passes on
nothing of which it knows that this would happen; this is the net beneath.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Iterator

from deploy.gate.asking import Asker, Request
from deploy.gate.rules import Refused, Route
from deploy.gate.runtime import Runtime, State

_STUCK_S = 30.0
_LEFT_S = 120.0  # for a prediction whose client has left: it ends between two steps
_POLL_S, _LATELY_S = 0.5, 2.0
_KNOWN = 4096
_NO_INPUT = b'{"input": []}'  # the runtime refuses it before it needs a place


class Places:
    """Who uses the runtime's places, as far as the gate knows."""

    def __init__(self, runtime: Runtime, asker: Asker) -> None:
        self._runtime, self._asker = runtime, asker
        self._requests: set[Request] = set()
        self._background: deque[str] = deque(maxlen=_KNOWN)  # paths of those that were not waited for, the last first
        self._used_at = time.monotonic()

    @contextlib.contextmanager
    def used_by(self, request: Request) -> Iterator[None]:
        self._requests.add(request)
        try:
            yield
        except BaseException:
            if request.is_left or request.taken.is_set():
                self._note_use(_LEFT_S)
            raise
        finally:
            self._requests.discard(request)
            if request.taken.is_set():
                self._note_use()

    def _note_use(self, longer_s: float = 0.0) -> None:
        self._used_at = max(self._used_at, time.monotonic() + longer_s)

    def keep_in_mind(self, path: str) -> None:
        """One that runs on although its request was answered."""
        self._background.appendleft(path)

    def may_run(self, path: str) -> bool:
        return path in self._background

    async def watch(self) -> None:
        """Have the runtime started again when all its places are lost. Ends only when cancelled."""
        while True:
            await asyncio.sleep(_POLL_S)
            if not self._looks_lost():
                self._note_use()
            elif time.monotonic() - self._used_at > _STUCK_S:
                if not await self._runs_in_background() and self._looks_lost():
                    self._runtime.end(f"the runtime took nothing for {_STUCK_S:.0f} s although nothing runs")
                self._note_use()

    def _looks_lost(self) -> bool:
        is_full = self._runtime.health.get("status") == "BUSY"
        is_refusing = time.monotonic() - self._asker.refused_at < _LATELY_S
        is_used = any(request.taken.is_set() for request in self._requests)
        return self._runtime.state is State.UP and (is_full or is_refusing) and not is_used

    async def _runs_in_background(self) -> bool:
        """Ask the runtime for those that were not waited for; forget the ones that have ended."""
        while self._background:
            path = self._background[0]
            route = Route(kind="start", path=path, id=path.rpartition("/")[2])
            try:
                reply = await self._asker.once(route, {}, _NO_INPUT)
            except Refused:
                return True  # it is not there, or has no room: not now
            reply.close()
            if reply.status == 202:
                return True
            self._background.popleft()
        return False
