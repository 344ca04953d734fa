"""Thousands of requests of nobody's making, at the real server behind its gate: it answers all, and stays as it was."""

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from deploy.gate.rules import MOST_PREDICTION_BYTES
from deploy.local_server import LocalServer, running_server

NUM_REQUESTS = int(os.environ.get("ALPACA_ATTACK_REQUESTS", "20000"))
AT_ONCE = 16
CONTROL = {"prompt": "Name a bird.", "temperature": 0, "max_new_tokens": 12, "min_new_tokens": 12}
NUMBERS = (0, 1, -1, 2, 0.5, -0.0, 1e308, 1e-308, 2**31, 2**53, 2**64, -(2**63), 10**30, 3.0, True, False)
TEXTS = (
    "", " ", "a", "{prompt}", "{input}", "{prompt}{input}", "\x00", "\ud800", "🦙" * 50, "</s>", "<s>" * 9, "ก\u0e33",
    "\u202e", "../../x", "data:,x", "http://127.0.0.1:1/", "null", "x" * 3000, "{prompt}" * 40, "none", "default",
    "%s%n",
)  # fmt: skip
FIELDS = (
    "prompt", "input", "prompt_template", "n", "max_new_tokens", "min_new_tokens", "total_tokens", "temperature",
    "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop", "seed",
    "num_beams", "stream", "replicate_weights", "max_length", "max_tokens", "unknown", "__class__",
)  # fmt: skip
PATHS = (
    "/", "/health-check", "/openapi.json", "/shutdown", "/docs", "/trainings", "/predictions/", "/predictions//x",
    "/predictions/a/cancel", "/predictions/../shutdown", "/predictions/%2e%2e", "/metrics", "/predictions/" + "a" * 99,
)  # fmt: skip


def any_value(rng: random.Random, depth: int = 0) -> object:
    kind = rng.randrange(6 if depth < 3 else 3)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return rng.choice((None, "word " * rng.randrange(400), float("nan")))
    if kind == 3:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    if kind == 4:
        return {rng.choice(TEXTS)[:20]: any_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return [rng.choice(TEXTS)] * rng.randrange(200)


def any_request(rng: random.Random) -> dict:
    """Method, path, headers and content: a valid request with a few things changed, or something else altogether."""
    inputs = {"prompt": rng.choice(TEXTS), "max_new_tokens": rng.randrange(1, 8)}
    inputs |= {rng.choice(FIELDS): any_value(rng) for _ in range(rng.randrange(4))}
    body: object = {"input": inputs}
    if rng.random() < 0.2:
        body |= {rng.choice(("id", "webhook", "webhook_events_filter", "context", "input", "version")): any_value(rng)}
    if rng.random() < 0.05:
        body = any_value(rng)
    content = json.dumps(body, ensure_ascii=rng.random() < 0.9).encode("utf-8", errors="surrogatepass")
    if rng.random() < 0.05:
        at = rng.randrange(len(content) + 1)
        content = content[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(5))) + content[at + 1 :]
    headers = {"Content-Type": rng.choice(("application/json",) * 8 + ("text/plain", "multipart/form-data", ""))}
    if rng.random() < 0.3:
        headers["Accept"] = rng.choice(("text/event-stream", "*/*", "x"))
    if rng.random() < 0.1:
        headers[rng.choice(("Host", "Origin", "Prefer", "Authorization", "Expect"))] = rng.choice(
            ("evil.net", "http://evil.net", "respond-async", "wait=1", "Bearer x", "localhost", "127.0.0.1")
        )
    method, path = ("POST", "/predictions") if rng.random() < 0.7 else ("PUT", f"/predictions/f-{rng.randrange(10**9)}")
    if rng.random() < 0.1:
        method, path = rng.choice(("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")), rng.choice(PATHS)
    return {"method": method, "url": path, "headers": headers, "content": content}


async def attack(url: str, expected: list[str]) -> Counter:
    """Send all; the count of each status. Among them, the same question now and then gets the same answer."""
    statuses: Counter = Counter()
    requests = iter(range(NUM_REQUESTS))
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:

        async def work() -> None:
            for number in requests:
                asked = any_request(random.Random(number))
                try:
                    reply = await client.request(**asked)
                except (httpx.HTTPError, httpx.InvalidURL) as error:
                    statuses[type(error).__name__] += 1
                    continue
                statuses[reply.status_code] += 1
                assert reply.status_code < 500 or reply.status_code == 503, (number, asked, reply.text[:500])
                if number % 200 == 0:
                    again = await client.post("/predictions", json={"input": CONTROL})
                    assert again.json()["output"] == expected, number

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return statuses


@pytest.fixture(scope="module")
def server(llama_folder: Path) -> Iterator[LocalServer]:
    flags = ["--weights", str(llama_folder), "--concurrency", "16", "--max_context", "256"]
    with running_server(flags, on_failure=print) as server:
        yield server


def memory(server: LocalServer) -> int:
    """Bytes that the gate, the runtime and its worker hold."""
    root = psutil.Process(server.process.pid)
    return sum(process.memory_info().rss for process in [root, *root.children(recursive=True)])


@pytest.mark.slow
@pytest.mark.alone
def test_the_server_stays_as_it_was(server):
    expected = server.predict(CONTROL)["output"]
    for _ in range(20):  # what the first requests allocate stays
        server.predict({**CONTROL, "n": 3, "num_beams": 3})
    before = memory(server)
    statuses = asyncio.run(attack(server.url, expected))
    health = server.request("/health-check")
    assert (health["status"], health["gate"]["restarts"], health["gate"]["running"]) == ("READY", 0, 0)
    assert server.predict(CONTROL)["output"] == expected
    grown = memory(server) - before
    print(f"\n{NUM_REQUESTS} requests: {dict(statuses)}; memory {before / 1e6:.0f} MB, then {grown / 1e6:+.0f} MB")
    assert statuses.total() == NUM_REQUESTS
    assert statuses[200] > NUM_REQUESTS / 10, "many are answered, so that the inputs themselves were tried"
    assert grown < 300e6


MIB = 1 << 20
NUM_PLACES = 2


def body(prompt: str, context_bytes: int, **others: object) -> bytes:
    """A request whose context has so many bytes as JSON."""
    context = {"x": "y" * (context_bytes - len('{"x":""}'))}
    return json.dumps({"input": {"prompt": prompt}, "context": context, **others}).encode()


# The runtime hands an input to its worker in a message up to 6 MiB, and by a file above: sizes on both sides of that.
AT_THE_BOUNDS = {
    "context": body("a", 64 << 10),
    "context and input in one message": body("x" * (6 * MIB - 20), 64 << 10),
    "input by file": body("x" * (6 * MIB + 1), 64 << 10),
    "all": body("x" * (MOST_PREDICTION_BYTES - (66 << 10)), 64 << 10, id="i" * 64),
    "letters that JSON writes with six": body("\x01" * MIB, 64 << 10),
    "letters of three bytes": ('{"input": {"prompt": "' + "ก" * (2 * MIB - 9) + '"}}').encode(),
    "input alone": b'{"input": {"prompt": "' + b"x" * (MOST_PREDICTION_BYTES - 25) + b'"}}',
}
BEYOND = {
    "context": (body("a", (64 << 10) + 1), 413),
    "another field": (json.dumps({"input": {}, "x": "y" * MOST_PREDICTION_BYTES}).encode(), 413),
    "input": (body("x" * MOST_PREDICTION_BYTES, 10), 413),
    "id": (json.dumps({"input": {}, "id": "i" * 65}).encode(), 422),
    "webhook": (json.dumps({"input": {}, "webhook": "http://127.0.0.1/" + "x" * 2048}).encode(), 422),
    "events": (json.dumps({"input": {}, "webhook_events_filter": ["x" * 999]}).encode(), 422),
}


@pytest.mark.slow
@pytest.mark.alone
def test_no_size_of_a_request_takes_a_place_for_ever(llama_folder: Path):
    """The largest that the gate takes, in each field that is passed on, more often than there are places."""
    flags = ["--weights", str(llama_folder), "--concurrency", str(NUM_PLACES)]
    with running_server(flags, on_failure=print) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        expected = server.predict(CONTROL)["output"]

        def send(content: bytes) -> httpx.Response:
            return client.post("/predictions", content=content, headers={"Content-Type": "application/json"})

        for content in AT_THE_BOUNDS.values():
            assert len(content) <= MOST_PREDICTION_BYTES
            replies = [send(content) for _ in range(NUM_PLACES + 1)]
            assert [reply.status_code for reply in replies] == [200] * len(replies)
            assert all("send" not in reply.json().get("error", "") for reply in replies)
        for content, status in BEYOND.values():
            assert [send(content).status_code for _ in range(NUM_PLACES + 1)] == [status] * (NUM_PLACES + 1)
        assert send(json.dumps({"input": CONTROL}).encode()).json()["output"] == expected
        assert all_places_are_used(client)
        assert client.get("/health-check").json()["gate"]["restarts"] == 0


def all_places_are_used(client: httpx.Client) -> bool:
    """Whether as many predictions as there are places are with the worker at once."""
    long = {"input": {"prompt": "", "prompt_template": "{prompt}", "max_new_tokens": 1900, "min_new_tokens": 1900}}
    paths = [f"/predictions/long-{number}" for number in range(NUM_PLACES)]
    for path in paths:
        assert client.put(path, json=long, headers={"Prefer": "respond-async"}).status_code == 202
    states = [client.put(path, json=long).json()["status"] for path in paths]
    for path in paths:
        client.post(f"{path}/cancel")
    return states == ["processing"] * NUM_PLACES
