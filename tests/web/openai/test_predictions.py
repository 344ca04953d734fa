"""How long a prediction is tried at servers that are up and do not take it."""

import asyncio
import contextlib

import pytest

from tests.web.openai.fake_server import FakeServer
from web.openai import predictions
from web.openai.predictions import predict
from web.openai.refusals import Refusal
from web.openai.targets import Target, Targets

INPUTS = {"prompt": "one two", "max_new_tokens": 9}


async def ask(fake: FakeServer, *, in_line_s: float) -> str:
    """The answer's text, to a prediction that first waits so long behind another."""
    target = Target(fake.url)
    target.went_down.clear()
    targets = Targets([target], most_running=1, most_waiting=1)

    async def answer() -> str:
        async with contextlib.aclosing(predict(targets, INPUTS, {})) as batches:
            return "".join([document["text"] async for batch in batches for document in batch])

    async with targets.place():
        answering = asyncio.ensure_future(answer())
        await asyncio.sleep(in_line_s)
        assert targets.num_waiting == 1
    return await answering


def test_time_in_line_is_no_refusal(fake, monkeypatch):
    monkeypatch.setattr(predictions, "_PATIENCE_S", 0.1)
    fake.num_full = 3
    assert asyncio.run(ask(fake, in_line_s=0.3)) == " one two ไ0"
    assert fake.num_full == 0


def test_a_server_that_takes_nothing_is_told_in_time(fake, monkeypatch):
    monkeypatch.setattr(predictions, "_PATIENCE_S", 0.1)
    fake.num_full = 10**6
    with pytest.raises(Refusal, match="the model servers take nothing now") as refused:
        asyncio.run(ask(fake, in_line_s=0.01))
    assert refused.value.status == 503
    assert fake.asked == []
