"""Requests get their places in the order in which they came, whatever leaves meanwhile."""

import asyncio
import random

import pytest

from deploy.gate.rules import Refused
from deploy.gate.turns import Turns


def test_random_comings_and_goings_keep_the_order():
    """Against a plain list of who waits, with cancels while waiting, while let in, and while running."""

    async def history(seed: int) -> None:
        rng, turns = random.Random(seed), Turns(3, most_waiting=100)
        let_in, tasks = [], {}

        async def request(number: int, length: int) -> None:
            async with turns.turn():
                let_in.append(number)
                assert turns.num_running <= 3
                for _ in range(length):
                    await asyncio.sleep(0)

        for number in range(60):
            tasks[number] = asyncio.ensure_future(request(number, rng.randrange(8)))
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(0)
            if rng.random() < 0.3:
                tasks[rng.randrange(number + 1)].cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        for at, number in enumerate(let_in):  # who has a place may still be on the way to it
            assert sum(later < number for later in let_in[at + 1 :]) < 3, "in the order in which they came"
        assert set(let_in) >= {number for number, task in tasks.items() if not task.cancelled()}
        assert (turns.num_running, turns.num_waiting) == (0, 0)

    for seed in range(60):
        asyncio.run(history(seed))


def test_a_full_line_refuses():
    async def run() -> None:
        turns, end = Turns(1, most_waiting=2), asyncio.Event()

        async def request() -> None:
            async with turns.turn():
                await end.wait()

        tasks = [asyncio.ensure_future(request()) for _ in range(3)]
        await asyncio.sleep(0)
        assert (turns.num_running, turns.num_waiting) == (1, 2)
        with pytest.raises(Refused, match="2 requests wait already") as caught:
            await request()
        assert caught.value.status == 503
        end.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())
