"""The server that clients see: checks each request, waits for its turn, and passes it to the runtime and back."""

import asyncio
import contextlib
import json
import shutil
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any

import httpx

from deploy.gate.rules import Refused, Route, Rules, check_body, check_sender, find_route
from deploy.gate.runtime import Runtime, State
from deploy.gate.turns import Turns

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_MOST_WAITING, _MOST_BYTES = 2048, 256 << 20
_BODY_S = 60.0  # for a client to send its whole request
_READING_S = 60.0  # for a client to take a piece of its answer
_RETRY_AFTER_S = 5
_KNOWN_IDS = 4096
_TAKEN_S = 0.2  # a request that the runtime has not refused by then has its slot
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.2
_ASKED = ("accept", "prefer", "traceparent", "tracestate")  # headers that go on to the runtime
_ANSWERED = ("content-type", "cache-control", "preference-applied", "allow")


class _NotReached(Refused):
    """There is no runtime at its address."""


class _Memory:
    """What all requests together may hold of their bodies, whether they arrive, wait, or are answered."""

    def __init__(self, most_bytes: int) -> None:
        self.num_bytes, self.most_bytes = 0, most_bytes

    @contextlib.contextmanager
    def held(self) -> Iterator["_Held"]:
        """One request's share, given back with the block."""
        held = _Held(self)
        try:
            yield held
        finally:
            held.set(0)


class _Held:
    def __init__(self, memory: _Memory) -> None:
        self._memory, self._num_bytes = memory, 0

    def set(self, num_bytes: int) -> None:
        """Raises Refused where it would grow beyond what there is for all."""
        change = num_bytes - self._num_bytes
        if change > 0 and self._memory.num_bytes + change > self._memory.most_bytes:
            raise Refused(503, "too many requests are being sent; try again later")
        self._memory.num_bytes += change
        self._num_bytes = num_bytes


class Gate:
    """An ASGI application in front of one runtime."""

    def __init__(self, runtime: Runtime, rules: Rules, *, concurrency: int) -> None:
        self._runtime, self._rules = runtime, rules
        self._turns = Turns(concurrency, most_waiting=_MOST_WAITING)
        self._memory = _Memory(_MOST_BYTES)
        self._parsing = asyncio.Semaphore(2)  # Python objects take many times a body's size
        self._door = asyncio.Lock()  # one at a time tries again where the runtime has no slot
        self._started: deque[str] = deque(maxlen=_KNOWN_IDS)  # paths of predictions that were not waited for
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=concurrency)
        self._client = httpx.AsyncClient(base_url=runtime.url, timeout=None, limits=limits, trust_env=False)

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            route = find_route(scope["method"], scope["path"], self._rules)
            check_sender(headers, route, self._rules)
            with self._memory.held() as held:
                body = await _read_body(headers, receive, self._rules.most_bytes, held)
                if route.kind == "start":
                    async with self._parsing:
                        body = await asyncio.to_thread(check_body, body, route, self._rules)
                    held.set(len(body))
                await _unless_client_leaves(self._answer(route, headers, body, send), receive)
        except Refused as refused:
            await _send_refusal(send, refused)

    async def _answer(self, route: Route, headers: Mapping[str, str], body: bytes, send: Send) -> None:
        if route.path == "/health-check":
            await _send_json(send, 200, self._health())
        elif route.kind == "start":
            await self._start(route, headers, body, send)
        else:
            await self._pass_on(await self._ask(route, headers, b""), send)

    def _health(self) -> dict[str, object]:
        """The runtime's last report, and what only this program knows."""
        free = shutil.disk_usage("/tmp").free
        gate = {
            "running": self._turns.num_running,
            "waiting": self._turns.num_waiting,
            "restarts": self._runtime.num_restarts,
            "temporary_folder_free_bytes": free,
        }
        return {**self._runtime.health, "gate": gate}

    async def _start(self, route: Route, headers: Mapping[str, str], body: bytes, send: Send) -> None:
        """A prediction or a training: in its turn. Who comes while the runtime is down is asked to come again."""
        if self._runtime.state is State.STARTING:
            raise Refused(503, "the model is being loaded; try again")
        if route.path in self._started:  # asks for the state of what runs already, for which no slot is needed
            reply = await self._ask(route, headers, body)
            if not _has_no_slot(reply):
                await self._pass_on(reply, send)
                return
            await reply.aclose()
        async with self._turns.turn():
            reply = await self._ask_until_taken(route, headers, body)
            if reply.status_code == 202 and route.id:
                self._started.append(route.path)
            await self._pass_on(reply, send)

    async def _ask_until_taken(self, route: Route, headers: Mapping[str, str], body: bytes) -> httpx.Response:
        """The runtime's answer to a request, asked again as long as it has no slot or is being started."""
        reply = await self._ask_when_up(route, headers, body)
        while _has_no_slot(reply):
            await reply.aclose()
            async with self._door:
                asking = await self._try_again(route, headers, body)
            reply = await asking
        return reply

    async def _try_again(self, route: Route, headers: Mapping[str, str], body: bytes) -> asyncio.Future[httpx.Response]:
        """Ask until the runtime takes the request; the request may still be on its way to an answer."""
        pause = _FIRST_PAUSE_S
        while True:
            await asyncio.sleep(pause)
            asking = asyncio.ensure_future(self._ask_when_up(route, headers, body))
            try:
                await asyncio.wait({asking}, timeout=_TAKEN_S)
            except asyncio.CancelledError:
                asking.cancel()
                raise
            if not asking.done() or not _has_no_slot(asking.result()):
                return asking
            await asking.result().aclose()
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _ask_when_up(self, route: Route, headers: Mapping[str, str], body: bytes) -> httpx.Response:
        """As `_ask`; a runtime that was not there at all, and so was sent nothing, is waited for."""
        while True:
            await self._runtime.until_up()
            try:
                return await self._ask(route, headers, body)
            except _NotReached:
                await asyncio.sleep(_LONGEST_PAUSE_S)  # that it has died is noticed in a moment

    async def _ask(self, route: Route, headers: Mapping[str, str], body: bytes) -> httpx.Response:
        """Send a request to the runtime; its answer's content is not read yet. Raises Refused where there is none."""
        passed = {name: headers[name] for name in _ASKED if name in headers}
        method = {"look": "GET", "cancel": "POST"}.get(route.kind, "PUT" if route.id else "POST")
        if body:
            passed["content-type"] = "application/json"
        try:
            return await self._client.send(
                self._client.build_request(method, route.path, headers=passed, content=body), stream=True
            )
        except httpx.ConnectError:
            raise _NotReached(503, "the server is being started; try again") from None
        except httpx.HTTPError:
            raise Refused(503, "the server was interrupted; try again") from None

    async def _pass_on(self, reply: httpx.Response, send: Send) -> None:
        """Send the runtime's answer to the client, piece by piece as it comes."""
        try:
            headers = [(name.encode(), reply.headers[name].encode()) for name in _ANSWERED if name in reply.headers]
            if length := reply.headers.get("content-length"):
                headers.append((b"content-length", length.encode()))
            await send({"type": "http.response.start", "status": reply.status_code, "headers": headers})
            async for piece in _pieces(reply):
                body = {"type": "http.response.body", "body": piece, "more_body": True}
                await asyncio.wait_for(send(body), _READING_S)
            await send({"type": "http.response.body", "body": b""})
        except asyncio.TimeoutError:  # who does not read gives its place to others
            return
        finally:
            await reply.aclose()


def _has_no_slot(reply: httpx.Response) -> bool:
    return reply.status_code == 409


async def _pieces(reply: httpx.Response) -> AsyncIterator[bytes]:
    """The content as it comes. An answer that breaks off ends here, too: its status is sent already."""
    try:
        async for piece in reply.aiter_raw():
            yield piece
    except httpx.HTTPError:
        return


async def _read_body(headers: Mapping[str, str], receive: Receive, most_bytes: int, held: "_Held") -> bytes:
    """The whole body. Raises Refused for one that is too large or too slow, or whose client has gone."""
    if headers.get("content-length", "0").isdigit() and int(headers.get("content-length", "0")[:20]) > most_bytes:
        raise _too_large(most_bytes)
    try:
        return await asyncio.wait_for(_collect_body(receive, most_bytes, held), _BODY_S)
    except asyncio.TimeoutError:
        raise Refused(408, f"the request was not there within {_BODY_S:.0f} s") from None


async def _collect_body(receive: Receive, most_bytes: int, held: "_Held") -> bytes:
    pieces, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "the client went away")
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > most_bytes:
            raise _too_large(most_bytes)
        held.set(size)
        if not message.get("more_body"):
            return b"".join(pieces)


def _too_large(most_bytes: int) -> Refused:
    return Refused(413, f"a request may have {most_bytes >> 20} MiB")


async def _unless_client_leaves(work: Awaitable[None], receive: Receive) -> None:
    """Do `work`; where the client closes its connection meanwhile, end it, which cancels what the runtime does."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_wait_for_end(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _wait_for_end(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_refusal(send: Send, refused: Refused) -> None:
    headers = [(b"retry-after", str(_RETRY_AFTER_S).encode())] if refused.status == 503 else []
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await _send_json(send, refused.status, {"detail": str(refused)}, headers)


async def _send_json(
    send: Send, status: int, content: object, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    body = json.dumps(content).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
