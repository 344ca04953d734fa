"""Who is next: requests wait for a free place in the order in which they came."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

from deploy.gate.rules import Refused


class Turns:
    """Places for `capacity` requests at once; all others wait in line.

    most_waiting: how many requests may wait.
    """

    def __init__(self, capacity: int, *, most_waiting: int) -> None:
        self.num_running = 0
        self._capacity, self._most_waiting = capacity, most_waiting
        self._line: deque[asyncio.Future[None]] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self._line)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a place and hold it. Raises Refused where the line is full."""
        if self.num_running < self._capacity and not self._line:
            self.num_running += 1
        else:
            await self._wait()
        try:
            yield
        finally:
            self.num_running -= 1
            self._let_in()

    async def _wait(self) -> None:
        if len(self._line) >= self._most_waiting:
            raise Refused(503, f"{len(self._line)} requests wait already; try again later")
        place = asyncio.get_running_loop().create_future()
        self._line.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # let in at that very moment
                self.num_running -= 1
                self._let_in()
            with contextlib.suppress(ValueError):
                self._line.remove(place)
            raise

    def _let_in(self) -> None:
        while self._line and self.num_running < self._capacity:
            place = self._line.popleft()
            if not place.cancelled():
                place.set_result(None)
                self.num_running += 1
