"""The benchmark's load generator against a server whose every byte is known."""

import asyncio
import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable

import pytest

from bench.load import Load, LoadFailedError, Plan, join_chunks, run_load
from tests.conftest import ROOT

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
BUSY = b'HTTP/1.1 409 Conflict\r\ncontent-length: 18\r\n\r\n{"error":"at cap"}'


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(name: str, data: object) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def completed(output: list[str], num_tokens: int, status: str = "succeeded") -> bytes:
    metrics = {"output_tokens": num_tokens, "seed": 1}
    return event("completed", {"status": status, "output": output, "metrics": metrics, "error": "boom"})


@contextlib.asynccontextmanager
async def fake_server(answer: Callable[[int, dict], list[bytes]]) -> AsyncIterator[str]:
    """Replies to request number i, body given, with those writes, a pause before each, and closes."""
    count = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().split("content-length:")[1].split()[0])
        number, count = count, count + 1
        for part in answer(number, json.loads(await reader.readexactly(length))):
            await asyncio.sleep(0.02)
            writer.write(part)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def load(answer: Callable[[int, dict], list[bytes]], plan: Plan) -> Load:
    async def run() -> Load:
        async with fake_server(answer) as url:
            return await run_load(url, plan)

    return asyncio.run(run())


def test_tokens_are_counted_by_metrics_not_by_pieces():
    def answer(number: int, body: dict) -> list[bytes]:
        assert body["input"] == {"prompt": "x", "stream": True}
        pieces = [chunk(event("output", {"chunk": "a b c"})), chunk(event("output", {"chunk": "d"}))]
        return [HEAD + chunk(event("start", {})), *pieces, chunk(completed(["a b c", "d"], 4)) + chunk(b"")]

    (reply,) = load(answer, Plan(inputs=[{"prompt": "x"}], clients=1)).replies
    assert reply.num_pieces == 2
    assert reply.metrics == {"output_tokens": 4, "seed": 1}
    assert 0.04 <= reply.first_output_s < reply.ended_s - 0.03  # the second of four writes


def data(content: object) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


COUNTED = data({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}})


def test_completions_of_openais_api():
    def answer(number: int, body: dict) -> list[bytes]:
        assert body == {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}}
        pieces = [chunk(data({"choices": [{"text": text}]})) for text in ("a b", "c")]
        return [HEAD, *pieces, chunk(COUNTED + b"data: [DONE]\n\n") + chunk(b"")]

    (reply,) = load(answer, Plan(inputs=[{"prompt": "x"}], clients=1, api="openai")).replies
    assert reply.num_pieces == 2
    assert reply.metrics == {"output_tokens": 5, "prompt_tokens": 3}
    assert 0.04 <= reply.first_output_s < reply.ended_s - 0.03


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"HTTP/1.1 429 Too Many\r\n\r\nlater", "answered 429: later"),
        (HEAD + chunk(data({"error": {"message": "boom"}})) + chunk(b""), "did not succeed.*boom"),
        (HEAD + chunk(COUNTED) + chunk(b""), "did not succeed"),
    ],
)
def test_a_completion_that_is_no_success_fails_the_load(reply, message):
    with pytest.raises(LoadFailedError, match=message):
        load(lambda number, body: [reply], Plan(inputs=[{"prompt": "x"}], clients=1, api="openai"))


def test_events_cut_anywhere_are_found():
    whole = HEAD + chunk(event("output", {"chunk": "é\n"})) + chunk(completed(["é\n"], 1)) + chunk(b"")

    def answer(number: int, body: dict) -> list[bytes]:
        cut = len(HEAD) + 4 + 3 * number
        return [whole[:cut], whole[cut:]]

    result = load(answer, Plan(inputs=[{"prompt": "x"}] * 20, clients=4))
    assert result.num_tokens == 20
    assert all(reply.first_output_s >= 0.02 for reply in result.replies)


def test_busy_is_tried_again_within_the_same_request():
    def answer(number: int, body: dict) -> list[bytes]:
        return [BUSY] if number < 3 else [HEAD + chunk(event("output", {})) + chunk(completed(["a"], 1)) + chunk(b"")]

    (reply,) = load(answer, Plan(inputs=[{"prompt": "x"}], clients=1)).replies
    assert reply.num_retries == 3
    assert reply.first_output_s > 3 * 0.02


def test_clients_share_the_inputs_and_start_one_after_the_other():
    def answer(number: int, body: dict) -> list[bytes]:
        reply = {"status": "succeeded", "output": ["a"], "metrics": {"output_tokens": int(body["input"]["prompt"])}}
        data = json.dumps(reply).encode()
        return [b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(data), data)]

    inputs = [{"prompt": str(number)} for number in range(9)]
    result = load(answer, Plan(inputs=inputs, clients=3, stream=False, stagger_s=0.05))
    assert sorted(reply.metrics["output_tokens"] for reply in result.replies) == list(range(9))
    starts = sorted(reply.started_s for reply in result.replies)
    assert starts[0] < 0.05
    assert all(reply.first_output_s is None for reply in result.replies)
    assert result.seconds >= 0.1


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"HTTP/1.1 422 Unprocessable\r\n\r\nbad input", "answered 422: bad input"),
        (HEAD + chunk(completed([], 0, "failed")) + chunk(b""), "did not succeed.*boom"),
        (HEAD + chunk(event("output", {})) + chunk(b""), "did not succeed"),
        (HEAD + chunk(event("output", {})), "broke off after"),
        (b"", "expected an HTTP reply"),
    ],
)
def test_whatever_is_no_success_fails_the_load(reply, message):
    with pytest.raises(LoadFailedError, match=message):
        load(lambda number, body: [reply], Plan(inputs=[{"prompt": "x"}], clients=1))


def test_chunks_are_joined():
    assert join_chunks(b"3\r\nabc\r\nA;note=1\r\n0123456789\r\n0\r\n\r\n") == b"abc0123456789"


def test_command_reads_a_plan_and_prints_the_load():
    async def run() -> bytes:
        reply = HEAD + chunk(event("output", {})) + chunk(completed(["a"], 3)) + chunk(b"")
        async with fake_server(lambda number, body: [reply]) as url:
            command = [sys.executable, "-m", "bench.load", url]
            pipe = subprocess.PIPE
            process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=pipe, stdout=pipe)
            plan = Plan(inputs=[{"prompt": "x"}] * 2, clients=2)
            return (await process.communicate(json.dumps(dataclasses.asdict(plan)).encode()))[0]

    assert Load.from_json(asyncio.run(run()).decode()).num_tokens == 6
