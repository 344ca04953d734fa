"""Many clients of all kinds at one server, who know the right answers: patient ones, and such as leave or read slowly.

Each repeats one of a few known questions. Its answer, asked for alone before, must come back, whatever goes on beside.
"""

import asyncio
import contextlib
import itertools
import json
import random
import statistics
import time
import urllib.parse
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from deploy.local_server import LocalServer

Input = dict[str, Any]
_EVENTS = {"Accept": "text/event-stream"}
# What a client does with its question, and how often among twenty requests.
_WAYS = {"json": 6, "padded": 2, "stream": 4, "slow": 2, "leave": 2, "hang up": 2, "cancel": 2}
_READS, _READ_PAUSE_S = 97, 0.02  # bytes that a slow reader takes at once, and its rest after them


def make_questions(*, length: int, beams: bool = True) -> dict[str, Input]:
    """Greedy and seeded questions, of one completion or three, and beam searches; answers of `length` tokens."""
    raw = {"prompt_template": "{prompt}", "max_new_tokens": length, "min_new_tokens": length}
    seeded = {"temperature": 0.8, "top_k": 20}
    words = ("alpaca", "wool", "Lima", "a herd of llamas", "red green blue")
    questions: dict[str, Input] = {}
    for number, word in enumerate(words):
        questions[f"greedy {word}"] = {**raw, "prompt": word, "temperature": 0}
        questions[f"seeded {word}"] = {**raw, **seeded, "prompt": word, "seed": number}
    questions["greedy template"] = {
        "prompt": "Name a bird.",
        "input": "Peru",
        "temperature": 0,
        "max_new_tokens": length,
    }
    questions["three"] = {**raw, **seeded, "prompt": "Name three.", "n": 3, "seed": 7}
    questions["greedy three"] = {**raw, "prompt": "Name three.", "n": 3, "temperature": 0}
    if beams:
        short = {"max_new_tokens": 4, "min_new_tokens": 4}
        questions["beams"] = {**raw, **short, "prompt": "a beam", "num_beams": 3, "n": 2}
    return questions


@dataclass(kw_only=True)
class Tally:
    """What all clients saw.

    ends: how often a request ended so, by (way, end). An end is "right", "wrong", "left" (by the client's own will), a
    status such as 503, "failed", "broken" (the connection), or "hung".
    waits_s: seconds from a question to its whole right answer.    first_s: to the first piece of a stream.
    wrong: answers that were not the known ones.    failures: what the server said of those that failed.
    """

    ends: Counter = field(default_factory=Counter)
    waits_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    wrong: list[tuple[str, object]] = field(default_factory=list)
    failures: Counter = field(default_factory=Counter)

    def by_end(self) -> Counter:
        found: Counter = Counter()
        for (_, end), count in self.ends.items():
            found[end] += count
        return found

    def report(self) -> str:
        lines = [f"{self.ends.total()} requests: {dict(self.by_end())}"]
        lines += [f"  {way}: " + str({end: n for (w, end), n in self.ends.items() if w == way}) for way in _WAYS]
        for name, seconds in (("whole answer", self.waits_s), ("first piece", self.first_s)):
            if seconds:
                middle, worst = statistics.median(seconds), max(seconds)
                lines.append(f"  {name}: median {middle:.1f} s, worst {worst:.1f} s of {len(seconds)}")
        return "\n".join([*lines, *(f"  failed {count} times: {text}" for text, count in self.failures.most_common(9))])


class MixedClients:
    """Clients of one server.

    most_s: after so long without an end a request counts as hung.    known: the right answers, by the question's name.
    """

    def __init__(self, server: LocalServer, questions: Mapping[str, Input], *, most_s: float) -> None:
        self.url, self.tally = server.url, Tally()
        self.questions, self._most_s, self._ends_early = dict(questions), most_s, False
        self.known = {name: server.predict(asked)["output"] for name, asked in self.questions.items()}

    async def run(self, num_clients: int, *, seconds: float) -> None:
        """Let so many clients ask for some time, each again as soon as it has its answer; then wait for the last."""
        end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=num_clients)  # idle ones for 5 s
        async with httpx.AsyncClient(base_url=self.url, timeout=None, limits=limits, trust_env=False) as client:
            await asyncio.gather(*(self._ask_until(end, client, random.Random(n)) for n in range(num_clients)))

    def stop(self) -> None:
        """Let no client ask again; from any thread."""
        self._ends_early = True

    async def _ask_until(self, end: float, client: httpx.AsyncClient, rng: random.Random) -> None:
        while time.monotonic() < end and not self._ends_early:
            way = rng.choices(list(_WAYS), list(_WAYS.values()))[0]
            name = rng.choice(list(self.questions))
            try:
                ended = await asyncio.wait_for(self._ask(way, name, client, rng), self._most_s)
            except asyncio.TimeoutError:
                ended = "hung"
            except (httpx.HTTPError, OSError, asyncio.IncompleteReadError) as error:
                ended = "broken"
                self.tally.failures[f"{way}: {error!r}"] += 1
            self.tally.ends[way, ended] += 1
            if ended not in ("right", "left"):
                await asyncio.sleep(0.2 + rng.random())  # as a client that was refused should

    async def _ask(self, way: str, name: str, client: httpx.AsyncClient, rng: random.Random) -> str:
        asked, begun = self.questions[name], time.monotonic()
        if way in ("stream", "slow", "hang up") and (asked.get("n", 1) > 1 or asked.get("num_beams", 1) > 1):
            asked = {**asked, "stream": False}  # one event for each completion
        elif way in ("stream", "slow", "hang up"):
            asked = {**asked, "stream": True}
        if way == "cancel":
            return await self._cancel(asked, client, rng)
        if way == "leave":
            return await self._leave(asked, client, rng)
        if way == "slow":
            status, body = await read_slowly(self.url, {"input": asked})
            found = _read_events(body.decode().split("\n")) if status == 200 else None
        elif way in ("stream", "hang up"):
            status, found = await self._stream(asked, client, hangs_up=way == "hang up")
        else:
            padding = " " * rng.randrange(200_000) if way == "padded" else ""
            content = json.dumps({"input": asked, "context": {"x": padding[:60_000]}, "x": padding}) + padding
            reply = await client.post("/predictions", content=content, headers={"Content-Type": "application/json"})
            status, found = reply.status_code, reply.json()
        return self._judge(name, status, found, begun)

    async def _stream(self, asked: Input, client: httpx.AsyncClient, *, hangs_up: bool) -> tuple[int, dict | None]:
        begun = time.monotonic()
        lines: list[str] = []
        async with client.stream("POST", "/predictions", json={"input": asked}, headers=_EVENTS) as reply:
            if reply.status_code != 200:
                return reply.status_code, None
            async for line in reply.aiter_lines():
                if line == "event: output" and line not in lines:
                    self.tally.first_s.append(time.monotonic() - begun)
                    if hangs_up:
                        return 200, None
                lines.append(line)
        return 200, _read_events(lines)

    async def _leave(self, asked: Input, client: httpx.AsyncClient, rng: random.Random) -> str:
        """Close the connection while waiting, or while the answer is made."""
        with contextlib.suppress(httpx.TimeoutException):
            await client.post("/predictions", json={"input": asked}, timeout=rng.choice((0.05, 0.5, 3.0)))
        return "left"

    async def _cancel(self, asked: Input, client: httpx.AsyncClient, rng: random.Random) -> str:
        """Ask under an id, and cancel it a moment later from another connection."""
        path = f"/predictions/mixed-{rng.randrange(10**12)}"
        asking = asyncio.ensure_future(client.put(path, json={"input": asked}))
        try:
            await asyncio.sleep(rng.choice((0.05, 0.5, 3.0)))
            await client.post(f"{path}/cancel", timeout=30)
            asking.cancel()  # one that still waits in line is unknown to the runtime
            await asyncio.wait({asking})
        finally:
            asking.cancel()
        return "left"

    def _judge(self, name: str, status: int, found: Mapping[str, Any] | None, begun: float) -> str:
        if status != 200:
            return str(status)
        if found is None:
            return "left"
        if found.get("status") != "succeeded":
            self.tally.failures[f"{name}: {found.get('error')}"[:200]] += 1
            return "broken" if found.get("status") is None else "failed"
        known, output = self.known[name], found["output"]
        if output != known and ["".join(output)] != known:  # the pieces of one
            self.tally.wrong.append((name, output))
            return "wrong"
        self.tally.waits_s.append(time.monotonic() - begun)
        return "right"


async def read_slowly(url: str, body: object) -> tuple[int, bytes]:
    """Stream a prediction over a bare connection, a few bytes at a time; status and content."""
    address = urllib.parse.urlsplit(url)
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=_READS)
    try:
        head = f"POST /predictions HTTP/1.0\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        head += f"Accept: text/event-stream\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        received = b""
        while piece := await reader.read(_READS):
            received += piece
            await asyncio.sleep(_READ_PAUSE_S)
    finally:
        writer.close()
    head, _, content = received.partition(b"\r\n\r\n")
    if not head:
        raise asyncio.IncompleteReadError(received, None)
    return int(head.split()[1]), content


def _read_events(lines: list[str]) -> dict[str, Any]:
    """The data of a stream's last event, which is the whole prediction. One that broke off has no status."""
    whole: dict[str, Any] = {"error": "the stream ended early"}
    for before, line in itertools.pairwise(lines):
        if before in ("event: completed", "event: error"):
            whole = json.loads(line.removeprefix("data:"))
    return whole
