"""A training at a server of this project, as HTTP shows it: started, watched, canceled, and its weights at the end.

The server has no route to ask how a training goes. But a request with the id of one that is under way starts nothing:
it is answered with that training's state. Without the required `data` it starts nothing afterwards, either. Just before
the training is known there it may take its id for a moment: the training is then answered with 202, and asked again.
"""

import asyncio
import base64
import contextlib
import dataclasses
import itertools
import math
import mimetypes
import re
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from alpaca.errors import InputError
from web.client import Server, ServerTrouble, json_object, plain_error

DATA = "data"  # the input that is a file
MOST_DATA_BYTES = 256 << 20
_LOOK_S = 1.0  # between two looks at how it goes
_CONNECT_TIMEOUT_S = 5.0
_AGAIN_S = 0.2
_STOPPING_S = 10.0  # for a server to hear that nobody waits any more
_SHARE = 0.1  # of the time, at the most, that looking takes: the server's reply repeats the data
_STEP = re.compile(r"step (\d+)/\d+: loss (\S+?),?(?:\s|$)")
_PACKED = re.compile(r"packed: ([\w.-]+\.tar)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """How a training goes. status: starting, processing, succeeded, failed or canceled.

    losses: by step, those that the server told.    output: of one that succeeded, a data URL or an address.
    """

    status: str = "starting"
    error: str = ""
    losses: dict[int, float] = dataclasses.field(default_factory=dict)
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    output: str = ""
    name: str = "weights.tar"

    @property
    def is_over(self) -> bool:
        return self.status in ("succeeded", "failed", "canceled")


def as_data_url(path: Path) -> str:
    """A data file as training servers take it. Raises InputError for one that is too large."""
    if path.stat().st_size > MOST_DATA_BYTES:
        raise InputError(f"the data file has {path.stat().st_size >> 20} MiB; the server takes {MOST_DATA_BYTES >> 20}")
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def read_data_url(text: str) -> bytes | None:
    """What a data URL holds; None for an address."""
    head, comma, content = text.partition(",")
    return base64.b64decode(content) if comma and head.startswith("data:") and head.endswith(";base64") else None


async def serves_trainings(server: Server) -> bool:
    """Whether the server has the route. One that is for predictions has no such path at all. Raises ServerTrouble."""
    try:
        async with server.open() as client:
            return (await client.get("trainings", timeout=_CONNECT_TIMEOUT_S)).status_code == 405
    except httpx.HTTPError:
        raise ServerTrouble((await server.health()).sentence) from None


class Training:
    """One training, known by an id that nobody can guess."""

    def __init__(self, server: Server, values: dict[str, Any]) -> None:
        self.id = f"page-{uuid.uuid4().hex}"
        self._server, self._values = server, values
        self._seen = Progress()
        self._stopped, self._asked_at = asyncio.Event(), math.inf

    async def progress(self) -> AsyncIterator[Progress]:
        """How it goes, again and again; the last is over. Leaving early cancels it."""
        asking = asyncio.create_task(self._ask())
        yield self._seen
        try:
            while not asking.done():
                begun = time.monotonic()
                found = await self._look()
                pause = max(_LOOK_S, (time.monotonic() - begun) / _SHARE)
                if found is not None and not asking.done():
                    yield found
                await asyncio.wait({asking}, timeout=pause)
            yield asking.result()
        finally:
            if not asking.done():
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.stop(), _STOPPING_S)
                asking.cancel()  # which closes the connection, and cancels it as well
                await asyncio.gather(asking, return_exceptions=True)

    async def stop(self) -> None:
        """Cancel it at the server, which then answers the request that started it.

        While its data are on their way the server does not know it yet, so it is told again.
        """
        self._stopped.set()
        for pause in itertools.chain((0.0, 0.1, 0.3), itertools.repeat(1.0)):
            await asyncio.sleep(pause)
            if self._seen.is_over or await self._server.cancel(self.id, of="trainings"):
                return

    async def _ask(self) -> Progress:
        """Start it and wait for its end."""
        try:
            reply = await self._put()
            while reply.status_code == 202 and not self._stopped.is_set():
                await asyncio.sleep(_AGAIN_S)
                reply = await self._put()
            if reply.status_code == 202:
                self._seen = dataclasses.replace(self._seen, status="canceled")
                return self._seen
            if reply.status_code != 200:
                raise ServerTrouble(await self._server.why_refused(reply))
            self._seen = self._read(json_object(reply))
        except ServerTrouble as trouble:
            self._seen = self._ended(str(trouble))
        except httpx.HTTPError:
            health = await self._server.health()
            lost = "The connection to the server broke off before the training was done."
            self._seen = self._ended(lost if health.answers else f"{lost} {health.sentence}")
        return self._seen

    async def _put(self) -> httpx.Response:
        self._asked_at = time.monotonic()
        async with self._server.open() as client:
            return await client.put(f"trainings/{self.id}", json={"input": self._values})

    def _ended(self, error: str) -> Progress:
        return dataclasses.replace(self._seen, status="failed", error=error)

    async def _look(self) -> Progress | None:
        """How it goes now; None where the server does not know it (yet, or any more)."""
        if time.monotonic() - self._asked_at < _LOOK_S:
            return None
        body, headers = {"input": {}}, {"Prefer": "respond-async"}
        with contextlib.suppress(httpx.HTTPError):
            async with self._server.open() as client:
                reply = await client.put(f"trainings/{self.id}", json=body, headers=headers, timeout=60.0)
            if reply.status_code == 202:
                self._seen = self._read(json_object(reply))
                return self._seen
        return None

    def _read(self, reply: dict[str, Any]) -> Progress:
        logs, metrics = str(reply.get("logs") or ""), reply.get("metrics") or {}
        losses = {**self._seen.losses, **{int(step): _number(loss) for step, loss in _STEP.findall(logs)}}
        if isinstance(metrics.get("step"), int) and isinstance(metrics.get("loss"), int | float):
            losses[metrics["step"]] = metrics["loss"]
        packed = _PACKED.findall(logs)
        return Progress(
            status=str(reply.get("status")),
            error=plain_error(str(reply.get("error") or "")) if reply.get("status") == "failed" else "",
            losses=dict(sorted(losses.items())),
            metrics=metrics,
            output=str(reply.get("output") or ""),
            name=packed[-1] if packed else "weights.tar",
        )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
