"""A request of many prompts beside others: it takes what is free, and its turn where others wait."""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.web.openai.fake_server import FakeServer, completion
from tests.web.openai.running import RunningEndpoint, running_endpoint, wait_for
from web.openai.targets import Target, Targets

NUM_PLACES, NUM_PROMPTS = 4, 200


@pytest.fixture
def endpoint(fake) -> Iterator[RunningEndpoint]:
    with running_endpoint([fake.url], "--concurrency", str(NUM_PLACES), "--max_waiting", "2") as endpoint:
        yield endpoint


def figures(endpoint: RunningEndpoint, fake: FakeServer) -> tuple[float, float]:
    """Predictions at the target, and in line."""
    return endpoint.figure(f'openai_running{{target="{fake.url}"}}'), endpoint.figure("openai_waiting")


def test_requests_in_line_take_turns():
    """Each takes a place, says so, and gives it back a moment later, from which on the next one has it."""
    taken: list[str] = []

    async def take(targets: Targets, name: str, turn: asyncio.Lock | None) -> None:
        async with targets.place(turn=turn):
            taken.append(name)
            await asyncio.sleep(0.01)

    async def act() -> None:
        target = Target("http://127.0.0.1:1")
        target.went_down.clear()
        targets, first, second = Targets([target], most_running=1, most_waiting=9), asyncio.Lock(), asyncio.Lock()
        members = [(f"a{i}", first) for i in range(5)] + [(f"b{i}", second) for i in range(2)] + [("c", None)]
        tasks = [asyncio.ensure_future(take(targets, name, turn)) for name, turn in members]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert targets.num_waiting == 3
        await asyncio.gather(*tasks)

    asyncio.run(act())
    assert taken == ["a0", "a1", "b0", "c", "a2", "b1", "a3", "a4"]  # a0 when nobody was in line


def test_a_small_request_beside_a_list_is_answered_soon(endpoint, fake):
    member_s = 0.05
    prompts = [f"slow {member_s} {number}" for number in range(NUM_PROMPTS)]
    with ThreadPoolExecutor(1) as threads:
        listed = threads.submit(endpoint.complete, prompts)
        wait_for(lambda: figures(endpoint, fake)[0] == NUM_PLACES)
        for _ in range(3):
            begun = time.monotonic()
            assert endpoint.complete("small").status_code == 200
            assert time.monotonic() - begun < 10 * member_s
        assert not listed.done()
        reply = listed.result()
    assert [choice["text"] for choice in reply.json()["choices"]] == ["".join(completion(p, 0)) for p in prompts]


def test_a_list_that_is_alone_has_all_places(endpoint, fake):
    with ThreadPoolExecutor(1) as threads:
        listed = threads.submit(endpoint.complete, [f"slow 0.03 {number}" for number in range(NUM_PROMPTS)])
        wait_for(lambda: figures(endpoint, fake) == (NUM_PLACES, 1))
        seen = [figures(endpoint, fake)[0] for _ in range(50)]
        assert not listed.done()
        assert listed.result().status_code == 200
    assert sum(seen) > 0.95 * NUM_PLACES * len(seen)


def test_a_full_line_is_429_beside_a_list(endpoint, fake):
    with ThreadPoolExecutor(2) as threads:
        listed = threads.submit(endpoint.complete, ["hold"] * NUM_PROMPTS)
        wait_for(lambda: figures(endpoint, fake) == (NUM_PLACES, 1))
        small = threads.submit(endpoint.complete, "small")
        wait_for(lambda: figures(endpoint, fake) == (NUM_PLACES, 2))
        assert endpoint.complete("one too many").status_code == 429
        fake.release.set()
        assert [listed.result().status_code, small.result().status_code] == [200, 200]


def test_a_client_that_leaves_cancels_the_members_not_handed_in(endpoint, fake):
    body = {"model": "alpaca", "prompt": ["hold"] * NUM_PROMPTS}
    with pytest.raises(httpx.ReadTimeout, match="timed out"):
        endpoint.client.post("/v1/completions", json=body, timeout=0.5)
    wait_for(lambda: figures(endpoint, fake) == (0, 0))
    fake.release.set()
    assert endpoint.complete("after").status_code == 200
    assert fake.prompts() == ["hold"] * NUM_PLACES + ["after"]
