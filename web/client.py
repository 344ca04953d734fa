"""A server of this project as HTTP shows it: its health, its inputs, and predictions that stream and can be stopped.

Nothing of the model's is imported, so that the page runs on a machine that has neither torch nor weights.
"""

import asyncio
import contextlib
import dataclasses
import ipaddress
import json
import logging
import re
import ssl
import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

import httpx
import tenacity

from alpaca.errors import InputError

_CONNECT_TIMEOUT_S = 5.0
_SILENCE_S = 3.0  # without an event for so long, ask whether the server is still there
_GRACE_S = 3.0  # for the server to confirm a stop; then the connection is closed, which stops it as well
_CAPACITY_PAUSES_S = (0.005, 0.02, 0.1, 0.3)  # then the last again; a slot is freed just after its last reply
_CAPACITY_PATIENCE_S = 120.0
_LOOK_S, _SAID_S = 0.05, 0.5  # while a request waits: between two looks, and between two words about it


class ServerTrouble(Exception):
    """The server cannot answer; the message is a sentence for the person at the page."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Health:
    """`state` is ready, busy, starting, broken or gone; the sentence says it to a person."""

    state: str
    sentence: str

    @property
    def answers(self) -> bool:
        return self.state in ("ready", "busy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Waiting:
    """All slots of the server are taken, and have been for so long."""

    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Started:
    """The server has taken the request."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """One item of the output: a piece of a streamed text, else the whole of completion `index`."""

    index: int
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """`status` is succeeded, canceled or failed; `error` a sentence, empty unless it failed."""

    status: str
    error: str = ""
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)


Event = Waiting | Started | Piece | Ended


class Server:
    """The server at `target`. A token, where a proxy in front of it wants one, goes along and is never shown."""

    def __init__(self, target: str, *, token: str | None = None) -> None:
        """Raises InputError when the target is no http address."""
        self._url = _checked_target(target)
        bare = self._url.copy_with(username=None, password=None)
        self.name = str(bare).rstrip("/")
        if token:  # httpx would send the address's own user and password in its place
            self._url = bare
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._tls = ssl.create_default_context()

    def open(self) -> httpx.AsyncClient:
        """A client whose replies may take as long as the model does. A proxy is not asked for this same machine."""
        return httpx.AsyncClient(
            base_url=self._url,
            headers=self._headers,
            verify=self._tls,
            trust_env=not is_loopback(self._url.host),
            timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S),
        )

    async def health(self) -> Health:
        """What the server says of itself; gone when nothing answers."""
        try:
            async with self.open() as client:
                reply = await client.get("health-check", timeout=_CONNECT_TIMEOUT_S)
            return self._read_health(reply)
        except httpx.HTTPError:
            advice = "Start it with script/serve; this page goes on by itself."
            return Health(state="gone", sentence=f"No server answers at {self.name}. {advice}")

    def _read_health(self, reply: httpx.Response) -> Health:
        found = json_object(reply)
        said = str(found.get("status"))
        if said in _HEALTH:
            state, sentence = _HEALTH[said]
            reason = found.get("user_healthcheck_error") or _setup_error(found) if state == "broken" else ""
            return Health(state=state, sentence=sentence + (f" It says: {reason}" if reason else ""))
        sentence = (
            f"What answers at {self.name} is no server of this kind (status {reply.status_code}). Check --target."
        )
        return Health(state="broken", sentence=sentence)

    async def schema(self) -> dict[str, Any]:
        """The OpenAPI document. Raises ServerTrouble."""
        try:
            async with self.open() as client:
                reply = await client.get("openapi.json", timeout=_CONNECT_TIMEOUT_S)
        except httpx.HTTPError:
            raise ServerTrouble((await self.health()).sentence) from None
        if reply.status_code != 200:
            raise ServerTrouble(await self.why_refused(reply))
        return json_object(reply)

    async def cancel(self, identifier: str, *, of: str = "predictions") -> bool:
        """Stop a prediction (or training); False when the server knows none of that id (any more, or not yet)."""
        with contextlib.suppress(httpx.HTTPError):
            async with self.open() as client:
                path = f"{of}/{identifier}/cancel"
                return (await client.post(path, timeout=_CONNECT_TIMEOUT_S)).status_code == 200
        return False

    async def why_refused(self, reply: httpx.Response) -> str:
        """Why a request got this answer: by its health where the server is not ready, which other replies hide."""
        if reply.status_code in (401, 403):
            return f"{self.name} wants a token (status {reply.status_code}): set ALPACA_SERVER_TOKEN for the page."
        if not (health := await self.health()).answers:
            return health.sentence
        found = json_object(reply)
        if isinstance(detail := found.get("detail"), list):
            return " ".join(_refused_input(entry) for entry in detail)
        return f"The server answered {reply.status_code}: {found.get('error') or reply.text[:300] or 'no reason given'}"


class _NoSlotError(Exception):
    """All slots of the server are taken now."""


class Generation:
    """One prediction: waits for a slot, runs, and ends by itself, by `stop`, or when its events are no longer read."""

    def __init__(self, server: Server, values: dict[str, Any], *, patience_s: float = _CAPACITY_PATIENCE_S) -> None:
        self.id = f"page-{uuid.uuid4().hex}"
        self._server, self._values, self._patience_s = server, values, patience_s
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._stopped, self._taken, self._ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def batches(self) -> AsyncIterator[list[Event]]:
        """Whatever has come since the last batch, one event or more, the last of all Ended; what goes wrong is in that.

        Leaving early closes the connection, by which the server stops as well.
        """
        reader = asyncio.create_task(self._read())
        try:
            while not self._ended.is_set():
                batch = [await self._next()]
                while not isinstance(batch[-1], Ended) and not self._queue.empty():
                    batch.append(self._queue.get_nowait())
                if isinstance(batch[-1], Ended):
                    self._ended.set()
                yield batch
        finally:
            self._ended.set()
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def stop(self) -> None:
        """Cancel it at the server. The end comes as an event, after `_GRACE_S` in any case."""
        self._stopped.set()
        for pause in (0.0, 0.1, 0.3, 1.0):  # a request just sent may not be known there yet
            await asyncio.sleep(pause)
            if self._ended.is_set() or await self._server.cancel(self.id):
                break
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._ended.wait(), _GRACE_S)
        self._queue.put_nowait(Ended(status="canceled"))

    async def _next(self) -> Event:
        """The next event; the end when the server was twice found not to answer, as a busy one may be once."""
        num_bad = 0
        while True:
            try:
                return await asyncio.wait_for(self._queue.get(), _SILENCE_S)
            except asyncio.TimeoutError:
                health = await self._server.health()
            num_bad = 0 if health.answers else num_bad + 1
            if num_bad == 2:
                return Ended(status="failed", error=health.sentence)

    async def _read(self) -> None:
        try:
            await self._request()
        except ServerTrouble as trouble:
            self._end("failed", error=str(trouble))
        except (httpx.ConnectError, httpx.ConnectTimeout):
            self._end("failed", error=(await self._server.health()).sentence)
        except httpx.HTTPError:
            health = await self._server.health()
            lost = "The connection to the server broke off before the answer was complete."
            self._end("failed", error=lost if health.answers else f"{lost} {health.sentence}")
        except Exception as error:  # else the page would wait for ever
            logging.getLogger(__name__).exception("prediction %s", self.id)
            said = f"{type(error).__name__}: {error}"
            self._end("failed", error=f"The server's answer could not be read ({said}); the page's log has more.")

    async def _request(self) -> None:
        """Send the request, again while all slots of the server are taken, and follow its answer to the end."""
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_NoSlotError),
            wait=tenacity.wait_chain(*map(tenacity.wait_fixed, _CAPACITY_PAUSES_S)),
            sleep=self._sleep,
        )
        async with self._server.open() as client:
            asking = asyncio.ensure_future(retrying(self._request_once, client))
            try:
                await self._wait_until_taken(asking)
                await asking
            finally:
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)

    async def _wait_until_taken(self, asking: asyncio.Future[None]) -> None:
        """Wait while the request has no slot yet, at this end or in the server's line. `stop` gives up the place."""
        begun = looked = time.monotonic()
        while not asking.done() and not self._taken.is_set():
            await asyncio.wait({asking}, timeout=_LOOK_S)
            now = time.monotonic()
            if self._stopped.is_set() and not self._taken.is_set():
                asking.cancel()
                self._end("canceled")
                raise asyncio.CancelledError
            if now - looked > _SAID_S and not asking.done():
                looked = now
                await self._check_wait(now - begun)

    async def _request_once(self, client: httpx.AsyncClient) -> None:
        if self._stopped.is_set():
            return self._end("canceled")
        headers = {"Accept": "text/event-stream"}
        path, body = f"predictions/{self.id}", {"input": self._values}
        async with client.stream("PUT", path, json=body, headers=headers) as reply:
            if reply.status_code == 200:
                self._taken.set()
                return await self._follow(reply)
            await reply.aread()
        if reply.status_code == 409:
            raise _NoSlotError
        raise ServerTrouble(await self._server.why_refused(reply))

    async def _check_wait(self, waited_s: float) -> None:
        """Raises ServerTrouble when no slot can be hoped for: a runtime whose worker is dead says 409 for ever."""
        health = await self._server.health()
        if not health.answers and health.state != "starting":
            raise ServerTrouble(health.sentence)
        self._queue.put_nowait(Waiting(seconds=waited_s))
        if waited_s > self._patience_s:
            raise ServerTrouble(f"The server was full for {waited_s:.0f} seconds. Try again in a while.")

    async def _sleep(self, seconds: float) -> None:
        """Sleep until `stop` at the longest."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)

    async def _follow(self, reply: httpx.Response) -> None:
        async for name, data in read_events(reply.aiter_bytes()):
            if name == "start":
                self._queue.put_nowait(Started())
            elif name == "output":
                self._queue.put_nowait(Piece(index=data["index"], text=str(data["chunk"])))
            elif name == "completed":
                error = await self._why_failed(data.get("error") or "") if data["status"] == "failed" else ""
                return self._end(data["status"], error=error, metrics=data.get("metrics") or {})
            elif name == "error":
                raise ServerTrouble(f"The server ended the stream: {data.get('error') or data}")
        raise httpx.RemoteProtocolError("the stream ended without a last event")

    async def _why_failed(self, error: str) -> str:
        """The reason given, and the server's state where that is behind it: with a dead worker any message may come."""
        health = await self._server.health()
        return health.sentence if health.state == "broken" and error != _CRASHED else plain_error(error)

    def _end(self, status: str, *, error: str = "", metrics: dict[str, Any] | None = None) -> None:
        self._queue.put_nowait(Ended(status=status, error=error, metrics=metrics or {}))


# What is read off the wire ------------------------------------------------------------------------------------------


async def read_events(chunks: AsyncIterable[bytes]) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Server-sent events as (name, data).

    Lines end at line feeds only: httpx's own lines end at U+2028 and U+0085, too, which JSON may hold unescaped.
    """
    name, rest = "", b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"event:"):
                name = line.removeprefix(b"event:").strip().decode()
            elif line.startswith(b"data:"):
                data = json.loads(line.removeprefix(b"data:"))
                yield name, data if isinstance(data, dict) else {"error": data}


def plain_error(error: str) -> str:
    """A failed prediction's error without the names of the runtime and of Python's classes in front."""
    if error == _CRASHED:
        return (
            "The server's worker died while it computed this. Try again in a while; restart the server if it stays so."
        )
    error = re.sub(r"^((Prediction failed|Generator iteration error): )+", "", error)
    error = re.sub(r"^(?:[A-Z]\w*Error|(?:[A-Z][a-z]+){2,}): (?=\S)", "", error)
    return error[:1].upper() + error[1:] or "The server gave no reason; its log may."


def json_object(reply: httpx.Response) -> dict[str, Any]:
    """The body as a JSON object; empty where it is none."""
    try:
        found = reply.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


_CRASHED = "Worker crashed"
_HEALTH = {
    "READY": ("ready", "The server is ready."),
    "BUSY": ("busy", "The server is ready; all its slots are taken just now."),
    "STARTING": ("starting", "The server is starting: it loads the model. This page goes on by itself."),
    "UNHEALTHY": ("broken", "The server is unhealthy and has to be restarted."),
    "DEFUNCT": ("broken", "The server is defunct and has to be restarted."),
    "SETUP_FAILED": ("broken", "The server could not load its model and has to be started again."),
}


def _checked_target(target: str) -> httpx.URL:
    try:
        url = httpx.URL(target)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(f"--target must be an address such as http://127.0.0.1:5000; found {target!r}")
    return url


def _setup_error(health: dict[str, Any]) -> str:
    """The last line of a failed setup's log, from where the reason begins."""
    setup = health.get("setup") or {}
    lines = str(setup.get("logs") or "").strip().splitlines() if setup.get("status") == "failed" else []
    return plain_error(re.sub(r"^.*[Ss]etup failed: ", "", lines[-1])) if lines else ""


def _refused_input(entry: dict[str, Any]) -> str:
    name = str((entry.get("loc") or ["an input"])[-1])
    message = re.sub(r"\b(\d+)\.0\b", r"\1", str(entry.get("msg")))
    return f"{name}: {message}."
