"""The servers that predictions go to, which of them can take one now, and who waits for that."""

import asyncio
import contextlib
import json
import ssl
import urllib.parse
from collections import deque
from collections.abc import AsyncIterator, Sequence

from alpaca.errors import InputError
from deploy.gate.exchange import BrokenOff, NotReached, Reply, Unanswered, exchange
from web.openai.refusals import RETRY_AFTER_S, Refusal

_LOOK_S, _LOOK_AGAIN_S = 0.5, 0.1  # between two looks at a target that is up, and that is down
_HEALTH_S = 15.0  # the runtime itself waits for its worker up to 10 s
_MOST_HEALTH_BYTES = 1 << 20
_UP = ("READY", "BUSY")


class Target:
    """One server. num_running: the predictions that it has from here.   went_down: set while it takes none."""

    def __init__(self, url: str, *, token: str | None = None) -> None:
        """Raises InputError for what is no http address."""
        parts = _split(url)
        self.host, self._is_tls = parts.hostname or "", parts.scheme == "https"
        self.port = parts.port or (443 if self._is_tls else 80)
        self.name = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
        self._path = parts.path.rstrip("/")
        self._headers = {"host": parts.netloc, **({"authorization": f"Bearer {token}"} if token else {})}
        self._tls = ssl.create_default_context() if self._is_tls else None
        self.num_running = 0
        self.went_down = asyncio.Event()
        self.went_down.set()

    @property
    def is_up(self) -> bool:
        return not self.went_down.is_set()

    async def ask(self, path: str, body: bytes | None = None) -> Reply:
        """GET, or POST of a body whose answer comes as events. Raises NotReached, Unanswered."""
        method, headers = "GET", dict(self._headers)
        if body is not None:
            method = "POST"
            headers.update({"content-type": "application/json", "accept": "text/event-stream"})
        return await exchange(self.host, self.port, method, f"{self._path}{path}", headers, body or b"", tls=self._tls)

    async def is_ready(self) -> bool:
        """Whether its health says that it takes predictions."""
        looking = asyncio.ensure_future(self._look())
        try:
            await asyncio.wait({looking}, timeout=_HEALTH_S)
            return looking.done() and looking.result() in _UP
        finally:
            looking.cancel()

    async def _look(self) -> object:
        """The state that it gives itself; None where it gives none."""
        reply = None
        try:
            reply = await self.ask("/health-check")
            report = json.loads(await read_all(reply, _MOST_HEALTH_BYTES))
        except (NotReached, Unanswered, BrokenOff, ValueError):
            return None
        finally:
            if reply is not None:
                reply.close()
        return report.get("status") if isinstance(report, dict) else None


class Targets:
    """All targets, and the line of those who wait for one.

    A request of several predictions has one of them in line at a time (`turn`), which goes to the line's end. So the
    requests in line take turns, however many predictions each has, and one that is alone takes all there is.

    most_running: predictions at one target at once.   most_waiting: predictions in line before others are refused.
    """

    def __init__(self, targets: Sequence[Target], *, most_running: int, most_waiting: int) -> None:
        self.all = tuple(targets)
        self._most_running, self._most_waiting = most_running, most_waiting
        self._line: deque[tuple[asyncio.Future[Target], Target | None]] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self._line)

    @property
    def is_any_up(self) -> bool:
        return any(target.is_up for target in self.all)

    async def keep_watched(self) -> None:
        """Follow the health of all of them; ends only when cancelled."""
        await asyncio.gather(*(self._watch(target) for target in self.all))

    async def _watch(self, target: Target) -> None:
        while True:
            if await target.is_ready():
                target.went_down.clear()
                self._let_in()
            else:
                self.drop(target)
            await asyncio.sleep(_LOOK_S if target.is_up else _LOOK_AGAIN_S)

    def drop(self, target: Target) -> None:
        """Send it nothing more until it is ready again. Where it was the last, who waits is told so."""
        target.went_down.set()
        if not self.is_any_up:
            while self._line:
                place, _ = self._line.popleft()
                if not place.done():
                    place.set_exception(_none_up())

    def check_room(self) -> None:
        """Raises Refusal where too many wait already, or there is nothing to wait for."""
        if not self.is_any_up:
            raise _none_up()
        would_wait = bool(self._line) or self._free(None) is None
        if would_wait and len(self._line) >= self._most_waiting:
            raise _line_is_full(len(self._line))

    @contextlib.asynccontextmanager
    async def place(self, *, after: Target | None = None, turn: asyncio.Lock | None = None) -> AsyncIterator[Target]:
        """The target with the fewest predictions, for one more.

        after: the one that did not take the prediction; then it stands first in line, and another is taken if possible.
        turn: held by the one of a request's predictions that is in line.
        Raises Refusal where no target is up.
        """
        async with turn if turn and not after else contextlib.nullcontext():
            target = await self._wait(after)
        try:
            yield target
        finally:
            target.num_running -= 1
            self._let_in()

    async def _wait(self, after: Target | None) -> Target:
        if not self.is_any_up:
            raise _none_up()
        if (after or not self._line) and (target := self._free(after)):
            target.num_running += 1
            return target
        place: asyncio.Future[Target] = asyncio.get_running_loop().create_future()
        (self._line.appendleft if after else self._line.append)((place, after))
        try:
            return await place
        except asyncio.CancelledError:
            with contextlib.suppress(ValueError):
                self._line.remove((place, after))
            if place.done() and not place.cancelled() and place.exception() is None:  # let in at that very moment
                place.result().num_running -= 1
                self._let_in()
            raise
        finally:
            del place  # its error holds this frame, and the request with it, until the collector comes by

    def _free(self, after: Target | None) -> Target | None:
        able = [target for target in self.all if target.is_up and target.num_running < self._most_running]
        return min(able, key=lambda target: (target is after, target.num_running), default=None)

    def _let_in(self) -> None:
        while self._line and (target := self._free(self._line[0][1])):
            place, _ = self._line.popleft()
            if not place.done():
                target.num_running += 1
                place.set_result(target)


async def read_all(reply: Reply, most_bytes: int) -> bytes:
    """The whole content. Raises BrokenOff, ValueError for too much of it."""
    content = b""
    async with contextlib.aclosing(reply.pieces()) as pieces:
        async for piece in pieces:
            content += piece
            if len(content) > most_bytes:
                raise ValueError("the answer is too long")
    return content


def _split(url: str) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(url)
        is_fit = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_fit = False
    if not is_fit or parts.username is not None or parts.query or parts.fragment:
        raise InputError(f"--target must be an address such as http://127.0.0.1:5000; found {url!r}")
    return parts


def _none_up() -> Refusal:
    return Refusal(503, "no model server is ready; try again", retry_after_s=RETRY_AFTER_S)


def _line_is_full(num_waiting: int) -> Refusal:
    return Refusal(
        429, f"{num_waiting} requests wait already; try again later", code="rate_limit_exceeded",
        retry_after_s=RETRY_AFTER_S,
    )  # fmt: skip
