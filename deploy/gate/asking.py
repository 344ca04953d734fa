"""Asks the runtime for what clients want, until it takes it: while it has no slot or starts, after it has died."""

import asyncio
import contextlib
import math
import re
import time
import uuid
from collections.abc import Mapping

from deploy.gate.exchange import BrokenOff, NotReached, Reply, Unanswered, abandon, exchange
from deploy.gate.room import Room
from deploy.gate.rules import Body, Refused, Route
from deploy.gate.runtime import Runtime

_TAKEN_S = 0.2  # a request that the runtime has not refused by then has its slot
# A cancel that comes while the runtime (0.23.1) hands a request to its worker makes that fail, and the worker goes on
# with it: an unwanted answer, or a training that nothing can end any more and that no other can run beside.
_HANDED_OVER_S, _TRAINING_HANDED_OVER_S = 0.2, 2.0
# What the runtime says of a prediction whose worker has died: the whole answer, or the event that ends one.
_WORKER_DIED = re.compile(rb'"error": ?"(?:Prediction failed: )?(?:Worker crashed|Failed to send request: )')
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.2
_PASSED = ("accept", "prefer", "traceparent", "tracestate")  # headers that go on to the runtime


class Request:
    """A prediction or a training on its way to its answer.

    is_asked: the runtime may know of it, since asked_at (time.monotonic()). taken: the runtime has it, or it is over.
    is_left: the runtime had taken it, and nobody waits for it any more.
    """

    def __init__(self, route: Route, headers: Mapping[str, str], body: Body) -> None:
        self.route, self.headers, self.body = route, headers, body
        self.wants_async = "respond-async" in headers.get("prefer", "")
        self.wants_events = "text/event-stream" in headers.get("accept", "")
        self.id = route.id or body.id
        if self.wants_async and self.id is None:  # so that the runtime can be asked for it
            self.id = uuid.uuid4().hex
            self.route = Route(kind="start", path=f"{route.path}/{self.id}", id=self.id)
        self.is_asked = self.is_canceled = self.is_left = False
        is_training = route.path.startswith("/trainings")
        self.handed_over_s = _TRAINING_HANDED_OVER_S if is_training else _HANDED_OVER_S
        self.asked_at = -math.inf
        self.taken = asyncio.Event()
        self.task: asyncio.Task[None] | None = None  # that waits with it
        self.may_repeat = not (self.wants_async or body.webhook or is_training)

    @property
    def path(self) -> str:
        """Of the prediction itself: where it is found by its id."""
        return self.route.path if self.route.id else f"{self.route.path}/{self.id}"

    @property
    def rest_of_handing_over_s(self) -> float:
        """Seconds until its worker has what the runtime was asked, so that a cancel is heard."""
        return self.asked_at + self.handed_over_s - time.monotonic()

    def cancel(self) -> None:
        """Take it out of the line: by a CancelledError in its task. Not while it is asked: that the runtime cancels."""
        if self.task is not None and not self.is_canceled:
            self.is_canceled = True
            self.task.cancel()


class Asker:
    """Puts requests to the runtime, across its deaths. `refused_at`: when it last had no slot, in time.monotonic()."""

    def __init__(self, runtime: Runtime, room: Room) -> None:
        self.refused_at = -math.inf
        self._runtime, self._room = runtime, room
        self._door = asyncio.Lock()  # one at a time tries again where the runtime has no slot

    async def until_taken(self, request: Request) -> Reply:
        """The answer to a request, asked again as long as there is no slot or no runtime. Raises Refused."""
        reply = await self._when_up(request)
        while has_no_slot(reply):
            reply.close()
            async with self._door:
                asking = await self._try_again(request)
            reply = await asking
        return reply

    async def once(self, route: Route, headers: Mapping[str, str], content: bytes = b"") -> Reply:
        """The runtime's answer, its content not read yet. Raises Refused where there is none."""
        try:
            return await self._send(route, headers, content, open_s=0)
        except NotReached:
            raise Refused(503, "the server is being started; try again") from None
        except Unanswered:
            raise _interrupted() from None

    async def _try_again(self, request: Request) -> asyncio.Future[Reply]:
        """Ask until the runtime takes the request; the request may still be on its way to an answer."""
        pause = _FIRST_PAUSE_S
        while True:
            await asyncio.sleep(pause)
            asking = asyncio.ensure_future(self._when_up(request))
            try:
                await asyncio.wait({asking}, timeout=_TAKEN_S)
            except asyncio.CancelledError:
                abandon(asking)
                raise
            if not asking.done() or not has_no_slot(asking.result()):
                return asking
            asking.result().close()
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _when_up(self, request: Request) -> Reply:
        """Ask once there is a runtime, and once more where it died before it answered.

        What was sent may be what it died of. And a runtime may have begun, by its webhooks or in the background, what
        must not be done twice; any other prediction is nothing but its answer.
        """
        while True:
            await self._runtime.until_up()
            life = self._runtime.num_lives
            try:
                return await self._ask(request)
            except NotReached:
                await asyncio.sleep(_LONGEST_PAUSE_S)  # that it has died is noticed in a moment
            except Unanswered:
                if not request.may_repeat or not await self._runtime.ends(life):
                    raise _interrupted() from None
                request.may_repeat = False

    async def _ask(self, request: Request) -> Reply:
        """Ask, and keep in the request what the runtime may know of it. Raises NotReached, Unanswered."""
        request.is_asked, request.asked_at = True, time.monotonic()
        taken = asyncio.get_running_loop().call_later(_TAKEN_S, request.taken.set)
        try:
            reply = await self._send(request.route, request.headers, request.body.content, open_s=request.handed_over_s)
            if request.may_repeat:
                await _require_living_worker(reply)
        except BaseException:
            request.is_left = request.taken.is_set()
            request.is_asked = False
            request.taken.clear()
            raise
        finally:
            taken.cancel()
        if has_no_slot(reply):
            self.refused_at = time.monotonic()
            request.is_asked = False
            request.taken.clear()
        else:
            request.taken.set()
        return reply

    async def _send(self, route: Route, headers: Mapping[str, str], content: bytes, *, open_s: float) -> Reply:
        """Raises NotReached, Unanswered, and Refused where there is no room for a prediction."""
        passed = {name: headers[name] for name in _PASSED if name in headers}
        if content:
            passed["content-type"] = "application/json"
        method = {"look": "GET", "cancel": "POST"}.get(route.kind, "PUT" if route.id else "POST")
        with self._room.held(len(content)) if route.kind == "start" else contextlib.nullcontext():
            return await exchange(
                self._runtime.host, self._runtime.port, method, route.path, passed, content, open_s=open_s
            )


async def _require_living_worker(reply: Reply) -> None:
    """Close an answer that says but that the worker has died, and raise Unanswered."""
    try:
        if _WORKER_DIED.search(await reply.first_piece()):
            raise Unanswered("the worker died before an answer began")
    except BrokenOff:
        reply.close()
        raise Unanswered("the connection ended before an answer began") from None
    except BaseException:
        reply.close()
        raise


def has_no_slot(reply: Reply) -> bool:
    return reply.status == 409


def _interrupted() -> Refused:
    return Refused(503, "the server was interrupted; try again")
