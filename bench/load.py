"""A light load generator: many clients of one Cog server, or of OpenAI's API, in a process of their own.

    python -m bench.load http://127.0.0.1:5000 < plan.json

The plan is a `Plan` as JSON; the last line of the output is a `Load` as JSON. On a machine without a GPU these clients
take their time from the model's cores, so a reply is only collected while it comes (no parsing, no event loop of more
than one callback per arrival), and read once all of it is there. Tokens are counted by the server's metrics: a piece
of a stream may hold several. Standard library only: it starts in a moment and imports no torch.
"""

import argparse
import asyncio
import dataclasses
import functools
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from alpaca.errors import InputError, run_command

_ROOT = Path(__file__).resolve().parent.parent
_FIRST_OUTPUT = re.compile(rb"\nevent: ?output\r?\n")
_FIRST_CHUNK = re.compile(rb"\ndata: ?\{")
_LONGEST_SIGN = 20  # bytes that may be split between two arrivals without the first output being missed
_CAPACITY_PAUSE_S = 0.005  # the runtime frees a slot just after its reply: a 409 is no refusal
_CAPACITY_TIMEOUT_S = 120.0


class LoadFailedError(RuntimeError):
    """A prediction failed, or the server answered something that is not one."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`clients` take the inputs in order, each its next one when its last is answered.

    Client i starts `stagger_s` * i seconds after the first. api: "cog", whose inputs are the Predictor's; or "openai",
    whose inputs are the fields of a streamed completion.
    """

    inputs: list[dict[str, Any]]
    clients: int
    stream: bool = True
    stagger_s: float = 0.0
    api: str = "cog"


@dataclass(kw_only=True)
class Reply:
    """One answered prediction. Times are seconds since the load began."""

    started_s: float
    ended_s: float
    first_output_s: float | None  # seconds after its own start; None without a stream
    num_pieces: int
    num_retries: int
    metrics: dict[str, float]


@dataclass(kw_only=True)
class Load:
    """All replies, and the seconds from the first request to the end of the last reply."""

    seconds: float
    replies: list[Reply] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(int(reply.metrics["output_tokens"]) for reply in self.replies)

    @classmethod
    def from_json(cls, text: str) -> "Load":
        values = json.loads(text)
        return cls(seconds=values["seconds"], replies=[Reply(**reply) for reply in values["replies"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the server, without a path")
    url = parser.parse_args().url
    try:
        plan = Plan(**json.load(sys.stdin))
    except (ValueError, TypeError) as error:
        raise InputError(f"expected a plan as JSON on the standard input: {error}") from error
    print(json.dumps(dataclasses.asdict(asyncio.run(run_load(url, plan)))))


def run_apart(url: str, plan: Plan, *, timeout_s: float) -> Load:
    """Run the plan in a process of its own. Raises LoadFailedError, subprocess.TimeoutExpired."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.load", url], cwd=_ROOT, input=json.dumps(dataclasses.asdict(plan)),
        capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    if done.returncode:
        raise LoadFailedError(f"the clients failed: {done.stderr[-2000:]}")
    return Load.from_json(done.stdout)


async def run_load(url: str, plan: Plan) -> Load:
    """Run the plan. Raises LoadFailedError, OSError."""
    waiting = iter(plan.inputs)
    start = time.monotonic()
    clients = [
        asyncio.create_task(run_client(url, waiting, plan, start=start, delay_s=plan.stagger_s * number))
        for number in range(plan.clients)
    ]
    try:
        replies = [reply for answered in await asyncio.gather(*clients) for reply in answered]
    finally:
        for client in clients:
            client.cancel()
    first = min((reply.started_s for reply in replies), default=0.0)
    return Load(seconds=max((reply.ended_s for reply in replies), default=0.0) - first, replies=replies)


async def run_client(
    url: str, waiting: Iterator[dict[str, Any]], plan: Plan, *, start: float, delay_s: float
) -> list[Reply]:
    """One client: input after input from what all share."""
    await asyncio.sleep(delay_s)
    ask = complete if plan.api == "openai" else functools.partial(predict, stream=plan.stream)
    return [await ask(url, values, start=start) for values in waiting]


async def predict(url: str, values: dict[str, Any], *, stream: bool, start: float) -> Reply:
    """One prediction to its end; a 409 is tried again. The first output counts from the first try."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    request = build_request(f"{host}:{port}", values, stream=stream)
    began = time.monotonic()
    num_retries = 0
    while True:
        _, collected = await asyncio.get_running_loop().create_connection(lambda: _Collector(request), host, port)
        await collected.closed
        status, body = split_reply(b"".join(collected.parts))
        if status != 409 or time.monotonic() - began > _CAPACITY_TIMEOUT_S:
            break
        num_retries += 1
        await asyncio.sleep(_CAPACITY_PAUSE_S)
    prediction = read_prediction(status, body, stream=stream)
    return Reply(
        started_s=began - start,
        ended_s=collected.last_at - start,
        first_output_s=collected.first_output_at - began if collected.first_output_at else None,
        num_pieces=len(prediction["output"]),
        num_retries=num_retries,
        metrics={name: value for name, value in prediction["metrics"].items() if isinstance(value, int | float)},
    )


async def complete(url: str, values: dict[str, Any], *, start: float) -> Reply:
    """One streamed completion of OpenAI's API to its end."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    request = build_completion(f"{host}:{port}", values)
    began = time.monotonic()
    _, collected = await asyncio.get_running_loop().create_connection(
        lambda: _Collector(request, first_output=_FIRST_CHUNK), host, port
    )
    await collected.closed
    chunks, usage = read_completion(*split_reply(b"".join(collected.parts)))
    return Reply(
        started_s=began - start,
        ended_s=collected.last_at - start,
        first_output_s=collected.first_output_at - began,
        num_pieces=len(chunks),
        num_retries=0,
        metrics={"output_tokens": usage["completion_tokens"], "prompt_tokens": usage["prompt_tokens"]},
    )


# HTTP, as little of it as this needs ----------------------------------------------------------------------------


class _Collector(asyncio.Protocol):
    """Sends one request and keeps what comes until the server closes."""

    def __init__(self, request: bytes, *, first_output: re.Pattern[bytes] = _FIRST_OUTPUT) -> None:
        self._sign = first_output
        self.parts: list[bytes] = []
        self.first_output_at = 0.0
        self.last_at = 0.0
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.parts.append(data)
        self.last_at = time.monotonic()
        if not self.first_output_at:
            if self._sign.search(self._tail + data):
                self.first_output_at = self.last_at
            self._tail = (self._tail + data)[-_LONGEST_SIGN:]

    def connection_lost(self, error: Exception | None) -> None:
        if self.closed.done():  # its client was cancelled
            return
        if error is None:
            self.closed.set_result(None)
        else:
            self.closed.set_exception(error)


def build_request(host: str, values: dict[str, Any], *, stream: bool) -> bytes:
    """The bytes of a POST to /predictions whose reply the server ends by closing."""
    accepted = "text/event-stream" if stream else "application/json"
    return _build_post(host, "/predictions", {"input": {**values, "stream": stream}}, accepted)


def build_completion(host: str, values: dict[str, Any]) -> bytes:
    """The bytes of a POST of a streamed completion, whose last chunk has the counts."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    return _build_post(host, "/v1/completions", {**values, **options}, "text/event-stream")


def _build_post(host: str, path: str, content: dict[str, Any], accepted: str) -> bytes:
    body = json.dumps(content).encode()
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", f"Accept: {accepted}"]
    lines += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
    return "\r\n".join(lines).encode() + body


def split_reply(reply: bytes) -> tuple[int, bytes]:
    """Status and body of a whole reply, its chunks put together."""
    head, _, body = reply.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1."):
        raise LoadFailedError(f"expected an HTTP reply, found {reply[:200]!r}")
    is_chunked = b"transfer-encoding: chunked" in head.lower()
    return int(head.split(None, 2)[1]), join_chunks(body) if is_chunked else body


def join_chunks(body: bytes) -> bytes:
    """Undo HTTP's chunked coding. Raises LoadFailedError when the last chunk is missing."""
    parts: list[bytes] = []
    at = 0
    while True:
        line_end = body.find(b"\r\n", at)
        if line_end < 0:
            raise LoadFailedError(f"the reply broke off after {sum(map(len, parts))} bytes")
        size = int(body[at:line_end].partition(b";")[0], 16)
        if size == 0:
            return b"".join(parts)
        parts.append(body[line_end + 2 : line_end + 2 + size])
        at = line_end + 2 + size + 2


def read_prediction(status: int, body: bytes, *, stream: bool) -> dict[str, Any]:
    """The finished prediction a reply holds. Raises LoadFailedError for any that did not succeed."""
    if status != 200:
        raise LoadFailedError(f"the server answered {status}: {body[:500].decode(errors='replace')}")
    prediction = dict(read_events(body)).get("completed") if stream else json.loads(body)
    if not prediction or prediction["status"] != "succeeded":
        raise LoadFailedError(f"a prediction did not succeed: {json.dumps(prediction) if prediction else body[-500:]}")
    return prediction


def read_completion(status: int, body: bytes) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The chunks of a streamed completion, and its counts. Raises LoadFailedError for one that did not end well."""
    if status != 200:
        raise LoadFailedError(f"the server answered {status}: {body[:500].decode(errors='replace')}")
    parts = [part.removeprefix(b"data: ") for part in body.split(b"\n\n")]
    *chunks, counted, end, _ = parts if len(parts) > 2 else (b"", b"", b"")
    if end != b"[DONE]":
        raise LoadFailedError(f"a completion did not succeed: {body[-500:].decode(errors='replace')}")
    return [json.loads(chunk) for chunk in chunks], json.loads(counted)["usage"]


def read_events(body: bytes) -> Iterator[tuple[str, Any]]:
    """(name, data) of each server-sent event; comments are left out."""
    for block in body.replace(b"\r\n", b"\n").split(b"\n\n"):
        fields = dict(line.split(b":", 1) for line in block.split(b"\n") if b":" in line[1:])
        if b"event" in fields and b"data" in fields:
            yield fields[b"event"].strip().decode(), json.loads(fields[b"data"])


if __name__ == "__main__":
    run_command(main)
