"""What is left of requests' bodies once they are answered, without Python's collector of cycles."""

import asyncio
import gc
import json
import tracemalloc
from collections.abc import Iterator

import pytest

from deploy.gate.rules import MOST_PREDICTION_BYTES, Rules
from web.openai.app import Endpoint
from web.openai.inputs import Models
from web.openai.metrics import Metrics
from web.openai.targets import Target, Targets

MIB = 1 << 20
TEXT = "x" * (2 * MIB)


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    tracemalloc.start()
    yield
    tracemalloc.stop()
    gc.enable()


def body(prompt: object) -> bytes:
    return json.dumps({"model": "alpaca", "prompt": prompt, "user": TEXT}).encode()


async def send(endpoint: Endpoint, content: bytes, *, leaves: bool) -> int:
    """The status for a request in pieces, 0 for a client that leaves: within its body, or where that is whole, then."""
    pieces = [content[i : i + 65536] for i in range(0, len(content), 65536)]
    sent: list[dict] = []

    async def receive() -> dict:
        if pieces:
            piece = pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(pieces) or content[-1:] != b"}"}
        await asyncio.sleep(0.05 if leaves else 60)
        return {"type": "http.disconnect"}

    async def note(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [(b"host", b"localhost")]}
    await endpoint(scope, receive, note)
    return sent[0]["status"] if sent else 0


@pytest.mark.parametrize(
    ("content", "leaves", "is_up", "most_waiting", "status"),
    [
        (lambda: body("x")[:-1], True, True, 9, 400),
        (lambda: b"x" * (MOST_PREDICTION_BYTES + 1), False, True, 9, 413),
        (lambda: b"{" + body("x"), False, True, 9, 400),
        (lambda: body(1), False, True, 9, 400),
        (lambda: body("x"), False, False, 9, 503),
        (lambda: body("x"), False, True, -1, 429),
        (lambda: body("x"), False, True, 9, 200),
        (lambda: body("fail InputError: no"), False, True, 9, 400),
        (lambda: body(["fail InputError: no", TEXT]), False, True, 9, 400),
        (lambda: body("hold " + TEXT), True, True, 9, 0),
        (lambda: body(["hold " + TEXT, "hold", "hold"]), True, True, 9, 0),
    ],
    ids=[
        "cut", "too-large", "no-json", "refused", "none-up", "full", "answered", "failed", "list-failed", "left",
        "list-left",
    ],
)  # fmt: skip
def test_nothing_is_left_of_a_request(fake, no_collector, content, leaves, is_up, most_waiting, status):
    async def act() -> None:
        target = Target(fake.url)
        if is_up:
            target.went_down.clear()
        targets = Targets([target], most_running=2 if most_waiting >= 0 else 0, most_waiting=max(0, most_waiting))
        endpoint = Endpoint(targets, Models(base="alpaca"), Rules(hosts=(), keys=()), Metrics(targets))
        before = None
        for _ in range(4):
            assert await send(endpoint, content(), leaves=leaves) == status
            fake.release.set()
            await asyncio.sleep(0.1)
            fake.release.clear()
            fake.asked.clear()
            before = before or tracemalloc.get_traced_memory()[0]
        assert tracemalloc.get_traced_memory()[0] - before < MIB

    asyncio.run(act())
