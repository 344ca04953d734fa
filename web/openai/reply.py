"""The way back to one client."""

import json
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from web.openai.answers import event
from web.openai.refusals import Refusal

Send = Callable[[dict[str, Any]], Awaitable[None]]


class Reply:
    """What is sent of one answer. status: 0 until its head is sent.   begun: when the request came (monotonic)."""

    def __init__(self, send: Send) -> None:
        self._send, self.status, self.begun = send, 0, time.monotonic()
        self._has_ended = False

    async def send_json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content, separators=(",", ":")).encode()
        await self.send_all(status, "application/json", body, headers)

    async def send_all(self, status: int, kind: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        await self._begin(status, {"content-type": kind, "content-length": str(len(body)), **(headers or {})})
        await self._send({"type": "http.response.body", "body": body})
        self._has_ended = True

    async def begin_events(self) -> None:
        await self._begin(200, {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})

    async def send_events(self, events: bytes) -> None:
        if events:
            await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def end_events(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})
        self._has_ended = True

    async def refuse(self, refusal: Refusal) -> None:
        """Say it as an answer of its own; in a stream that has begun as its last event, by which clients know it."""
        if self._has_ended:
            return
        if self.status:
            await self.send_events(event(refusal.as_json()))
            await self.end_events()
            return
        headers = {} if refusal.retry_after_s is None else {"retry-after": str(refusal.retry_after_s)}
        if refusal.allowed:
            headers["allow"] = refusal.allowed
        if refusal.status == 401:
            headers["www-authenticate"] = "Bearer"
        await self.send_json(refusal.as_json(), refusal.status, headers)

    async def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        headers["x-request-id"] = uuid.uuid4().hex
        coded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": coded})
