"""The server that clients see: checks each request, waits for its turn, and passes it to the runtime and back."""

import asyncio
import json
import shutil
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from deploy.gate.asking import Asker, Request, has_no_slot
from deploy.gate.bodies import Memory, Receive, read_body
from deploy.gate.exchange import BrokenOff, Reply
from deploy.gate.rules import Refused, Route, Rules, check_body, check_sender, find_route
from deploy.gate.runtime import Runtime, State
from deploy.gate.turns import Turns

Send = Callable[[dict[str, Any]], Awaitable[None]]

_MOST_WAITING, _MOST_BYTES = 2048, 256 << 20
_READING_S = 60.0  # for a client to take a piece of its answer
_RETRY_AFTER_S = 5
_KNOWN_IDS = 4096
_ANSWERED = ("content-type", "cache-control", "preference-applied", "allow")
_BROKEN_OFF = "The server was interrupted before the answer was complete."


class Gate:
    """An ASGI application in front of one runtime."""

    def __init__(self, runtime: Runtime, rules: Rules, *, concurrency: int) -> None:
        self._runtime, self._rules, self._asker = runtime, rules, Asker(runtime)
        self._turns = Turns(concurrency, most_waiting=_MOST_WAITING)
        self._memory = Memory(_MOST_BYTES)
        self._parsing = asyncio.Semaphore(2)  # Python objects take many times a body's size
        self._started: deque[str] = deque(maxlen=_KNOWN_IDS)  # paths of predictions that were not waited for

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            route = find_route(scope["method"], scope["path"], self._rules)
            check_sender(headers, route, self._rules)
            with self._memory.held() as held:
                content = await read_body(headers, receive, self._rules.most_bytes, held)
                if route.kind != "start":
                    work = self._look(route, headers, send)
                else:
                    async with self._parsing:
                        body = await asyncio.to_thread(check_body, content, self._rules)
                    del content
                    held.set(len(body.content))
                    work = self._start(Request(route, headers, body), send)
                await _unless_client_leaves(work, receive)
        except Refused as refused:
            await _send_refusal(send, refused)

    async def _look(self, route: Route, headers: Mapping[str, str], send: Send) -> None:
        if route.path == "/health-check":
            await _send_json(send, 200, self._health())
        else:
            await _pass_on(await self._asker.once(route, headers), send)

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

    async def _start(self, request: Request, send: Send) -> None:
        """A prediction or a training: in its turn. Who comes while the runtime is down is asked to come again."""
        if self._runtime.state is State.STARTING:
            raise Refused(503, "the model is being loaded; try again")
        if request.route.path in self._started:  # asks for the state of what runs already: no slot is needed
            reply = await self._asker.once(request.route, request.headers, request.body.content)
            if not has_no_slot(reply):
                await _pass_on(reply, send)
                return
            reply.close()
        async with self._turns.turn():
            reply = await self._asker.until_taken(request)
            if reply.status == 202 and request.route.id:
                self._started.append(request.route.path)
            await _pass_on(reply, send)


async def _pass_on(reply: Reply, send: Send) -> None:
    """Send the runtime's answer to the client, piece by piece as it comes.

    One that breaks off has its status sent already: only a connection that ends without the answer's end tells.
    """
    has_ended_event = True
    try:
        headers = [(name.encode(), reply.headers[name].encode("latin-1")) for name in _ANSWERED if name in reply.headers]
        if length := reply.headers.get("content-length"):
            headers.append((b"content-length", length.encode()))
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        async for piece in reply.pieces():
            has_ended_event = piece.endswith(b"\n\n")
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    except BrokenOff:
        if has_ended_event and reply.headers.get("content-type", "").startswith("text/event-stream"):
            event = f"event: error\ndata: {json.dumps({'error': _BROKEN_OFF})}\n\n".encode()
            await send({"type": "http.response.body", "body": event, "more_body": True})
    finally:
        reply.close()


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
