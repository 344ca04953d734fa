"""The server that clients see: checks each request, waits for its turn, and passes it to the runtime and back."""

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from deploy.gate.asking import Asker, Request, has_no_slot
from deploy.gate.bodies import Memory, Receive, read_body
from deploy.gate.exchange import BrokenOff, Reply
from deploy.gate.leaving import unless_client_leaves
from deploy.gate.places import Places
from deploy.gate.room import Room, free_room
from deploy.gate.rules import Refused, Route, Rules, check_body, check_sender, find_route, has_key
from deploy.gate.runtime import Runtime, State
from deploy.gate.turns import Turns
from deploy.gate.webhooks import Webhooks

Send = Callable[[dict[str, Any]], Awaitable[None]]

_MOST_WAITING, _MOST_BYTES = 2048, 256 << 20
_RETRY_AFTER_S = 5
_CANCEL_S, _CANCEL_PAUSE_S = 5.0, 0.02  # for a request to get so far that it can be canceled
_ANSWERED = ("content-type", "cache-control", "content-length", "preference-applied", "allow")
_BROKEN_OFF = "The server was interrupted before the answer was complete."


class Gate:
    """An ASGI application in front of one runtime."""

    def __init__(self, runtime: Runtime, rules: Rules, *, concurrency: int, webhook_token: str | None = None) -> None:
        self._runtime, self._rules, self._room = runtime, rules, Room(concurrency)
        self._asker = Asker(runtime, self._room)
        self._places = Places(runtime, self._asker)
        self._turns = Turns(concurrency, most_waiting=_MOST_WAITING)
        self._webhooks = Webhooks(webhook_token)
        self._known: dict[str, Request] = {}  # those with ids that wait or run
        self._handed: dict[str, Request] = {}  # those with ids that were answered before their worker surely has them
        self._open: Counter[str] = Counter()  # ids of requests by PUT, from their heads on
        self._memory = Memory(_MOST_BYTES)
        self._parsing = asyncio.Semaphore(2)  # Python objects take many times a body's size

    async def watch(self) -> None:
        """Keep the runtime's places. Ends only when cancelled."""
        await self._places.watch()

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        has_begun = False

        async def send_and_note(message: dict[str, Any]) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._answer(scope, receive, send_and_note)
        except asyncio.CancelledError:  # this program ends
            if not has_begun:
                await _send_refusal(send, Refused(503, "the server was ended"))

    async def _answer(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            route = find_route(scope["method"], scope["path"], self._rules)
            check_sender(headers, route, self._rules)
            with self._memory.held() as held, self._is_open(route):
                content = await read_body(headers, receive, self._rules.most_bytes, held)
                if route.kind != "start":
                    work = self._look(route, headers, send)
                else:
                    async with self._parsing:
                        body = await asyncio.to_thread(check_body, content, self._rules)
                    del content
                    held.set(len(body.content))
                    work = self._start(Request(route, headers, body), send)
                await unless_client_leaves(work, receive)
        except Refused as refused:
            refused.__traceback__ = None  # its frames hold the body, and asyncio holds them in a circle
            await _send_refusal(send, refused)

    @contextlib.contextmanager
    def _is_open(self, route: Route) -> Iterator[None]:
        """Note that a request with this id is here, long before `_known` has it: its body is read first."""
        if route.kind != "start" or route.id is None:
            yield
            return
        self._open[route.id] += 1
        try:
            yield
        finally:
            self._open[route.id] -= 1
            if not self._open[route.id]:
                del self._open[route.id]

    async def _look(self, route: Route, headers: Mapping[str, str], send: Send) -> None:
        if route.path == "/health-check":
            health = self._health()
            if not has_key(headers, self._rules):
                health.pop("setup", None)  # its log names the server's folders, and where the runtime listens
            await _send_json(send, 200, health)
        elif route.kind == "cancel":
            await self._cancel(route, headers, send)
        else:
            await _pass_on(await self._asker.once(route, headers), send)

    def _health(self) -> dict[str, object]:
        """The runtime's last report, and what only this program knows."""
        free = free_room()
        gate = {
            "running": self._turns.num_running,
            "waiting": self._turns.num_waiting,
            "restarts": self._runtime.num_restarts,
            "temporary_folder_free_bytes": free.num_bytes,
            "temporary_folder_free_files": free.files,
            "problem": self._room.problem(free),
        }
        return {**self._runtime.health, "gate": gate}

    async def _start(self, request: Request, send: Send) -> None:
        """A prediction or a training: in its turn. Who comes while the runtime is down is asked to come again."""
        first = self._known.get(request.route.id or "")
        if first is not None and not await self._has_been_taken(first, request, send):
            return
        if self._runtime.state is State.STARTING:
            raise Refused(503, "the model is being loaded; try again")
        # The runtime shows what runs: no slot is needed.
        if first is not None or self._places.may_run(request.route.path):
            reply = await self._asker.once(request.route, request.headers, request.body.content)
            if not has_no_slot(reply):
                await _pass_on(reply, send)
                return
            reply.close()
        with self._findable(request):
            try:
                await self._answer_in_turn(request, send)
            except asyncio.CancelledError:
                if not request.is_canceled:
                    raise
                if request.body.webhook and request.body.webhook_at_end:
                    self._webhooks.post(request.body.webhook, _canceled(request))
                await _send_canceled(request, send)

    async def _answer_in_turn(self, request: Request, send: Send) -> None:
        async with self._turns.turn():
            with self._places.used_by(request):
                reply = await self._asker.until_taken(request)
                if reply.status == 202 and request.id:
                    self._places.keep_in_mind(request.path)
                await _pass_on(reply, send)

    @contextlib.contextmanager
    def _findable(self, request: Request) -> Iterator[None]:
        """By its id, while it waits and runs."""
        request.task = asyncio.current_task()
        is_first = request.id is not None and self._known.setdefault(request.id, request) is request
        try:
            yield
        finally:
            request.taken.set()
            if is_first:
                del self._known[request.id]
            if request.id and request.is_asked and (rest := request.rest_of_handing_over_s) > 0:
                self._handed[request.id] = request
                asyncio.get_running_loop().call_later(rest, self._handed.pop, request.id, None)

    async def _has_been_taken(self, first: Request, second: Request, send: Send) -> bool:
        """Whether the runtime has the first of two PUTs of one id, so that it answers the second; else that is done.

        As the runtime does: who wants events gets the first one's, anybody else is told its state at once.
        """
        if second.wants_events:
            await first.taken.wait()
        if first.is_canceled:
            await _send_canceled(second, send)
            return False
        if first.taken.is_set():
            return True
        async with self._parsing:
            given = await asyncio.to_thread(json.loads, first.body.content)
        state = {"id": first.id, "input": given.get("input"), "logs": "", "metrics": {}, "status": "starting"}
        await _send_json(send, 202, state)
        return False

    async def _cancel(self, route: Route, headers: Mapping[str, str], send: Send) -> None:
        """Of one that waits here; else by the runtime, which may not know yet of what was just sent to it."""
        deadline = time.monotonic() + _CANCEL_S
        while True:
            request = self._known.get(route.id or "")
            if request is not None and not request.is_asked:
                request.cancel()
                await _send_json(send, 200, {})
                return
            if asked := request or self._handed.get(route.id or ""):
                await asyncio.sleep(asked.rest_of_handing_over_s)
            is_last = route.id not in self._open or time.monotonic() > deadline
            if request is not None or is_last:
                reply = await self._asker.once(route, headers)
                if reply.status != 404 or is_last:
                    await _pass_on(reply, send)
                    return
                reply.close()
            await asyncio.sleep(_CANCEL_PAUSE_S)


def _canceled(request: Request) -> dict[str, object]:
    """What the runtime says of a prediction that was canceled before it put anything out."""
    return {"id": request.id, "logs": "", "metrics": {}, "status": "canceled"}


async def _send_canceled(request: Request, send: Send) -> None:
    if request.wants_events:
        head = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": _event("completed", _canceled(request))})
    else:
        await _send_json(send, 202 if request.wants_async else 200, _canceled(request))


async def _pass_on(reply: Reply, send: Send) -> None:
    """Send the runtime's answer to the client, piece by piece as it comes.

    One that breaks off has its status sent already: only a connection that ends without the answer's end tells.
    """
    has_ended_event = True
    try:
        headers = [
            (name.encode(), reply.headers[name].encode("latin-1")) for name in _ANSWERED if name in reply.headers
        ]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        async for piece in reply.pieces():
            has_ended_event = piece.endswith(b"\n\n")
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    except BrokenOff:
        if has_ended_event and reply.headers.get("content-type", "").startswith("text/event-stream"):
            event = _event("error", {"error": _BROKEN_OFF})
            await send({"type": "http.response.body", "body": event, "more_body": True})
    finally:
        reply.close()


def _event(name: str, content: object) -> bytes:
    return f"event: {name}\ndata: {json.dumps(content)}\n\n".encode()


async def _send_refusal(send: Send, refused: Refused) -> None:
    headers = [(b"retry-after", str(_RETRY_AFTER_S).encode())] if refused.status == 503 else []
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refused.allow:
        headers.append((b"allow", refused.allow.encode()))
    await _send_json(send, refused.status, {"detail": str(refused)}, headers)


async def _send_json(
    send: Send, status: int, content: object, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    body = json.dumps(content).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
