"""The ways of generating: what the engine's counts become, and that nothing which hangs is waited for."""

import threading
import time

import pytest

from alpaca.serving.engine import Engine, Generation
from alpaca.serving.request import PredictionInputs, Request
from bench import ways
from bench.rows import Row
from bench.ways import EngineWay, StuckError, call_within


class FakeEngine(Engine):
    """Gives `num_tokens` of each request, `pause_s` apart, and ends it; unless it is to hang after them."""

    max_context = 64

    def __init__(self, *, num_tokens: int, hangs: bool = False, pause_s: float = 0.0) -> None:
        self.tokenizer = WordTokenizer()
        self.num_tokens, self.hangs, self.pause_s = num_tokens, hangs, pause_s

    def submit(self, request: Request) -> Generation:
        generation = Generation(request)
        threading.Thread(target=self._answer, args=(generation,), daemon=True).start()
        return generation

    def _answer(self, generation: Generation) -> None:
        generation.start()
        generation.cached_tokens = 2
        for token_id in range(self.num_tokens):
            time.sleep(self.pause_s)
            generation.put_token(0, token_id)
        if not self.hangs:
            generation.finish(0, at_limit=True)
            generation.flush()

    def prepare(self) -> None:
        raise NotImplementedError

    def is_healthy(self) -> bool:
        return True

    def close(self) -> None: ...


class WordTokenizer:
    prefix_ids = (1,)
    most_characters_per_token = None
    chat_template = None
    trained_prompt = None

    def encode(self, text: str) -> list[int]:
        return list(range(len(text.split())))


INPUTS = [PredictionInputs(prompt="a b c", prompt_template="{prompt}", max_new_tokens=5)] * 3


def row(clients: int) -> Row:
    return Row(name="r", way="engine", num_requests=3, clients=clients, prompt_tokens=(4, 4), new_tokens=(5, 5))


@pytest.mark.parametrize("clients", [1, 3])
def test_engine_counts_are_added_up(clients):
    sample = EngineWay(FakeEngine(num_tokens=5)).run(row(clients), INPUTS)
    assert (sample.num_tokens, sample.cached_tokens, len(sample.first_token_s)) == (15, 6, 3)
    assert sample.seconds > 0


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_engine_that_hangs_is_not_waited_for(monkeypatch, num_tokens):
    monkeypatch.setattr(ways, "STUCK_S", 0.1)
    start = time.monotonic()
    with pytest.raises(StuckError, match=r"the engine made no token for 0\.1 s"):
        EngineWay(FakeEngine(num_tokens=num_tokens, hangs=True)).run(row(3), INPUTS)
    assert time.monotonic() - start < 5


def test_slow_engine_is_waited_for_while_it_makes_tokens(monkeypatch):
    monkeypatch.setattr(ways, "STUCK_S", 0.3)
    assert EngineWay(FakeEngine(num_tokens=12, pause_s=0.06)).run(row(3), INPUTS).num_tokens == 36


def test_watcher_ends_with_the_block():
    with ways.cancelled_when_stuck([]):
        (watcher,) = [thread for thread in threading.enumerate() if thread.name == "watch-engine"]
    watcher.join(timeout=5)
    assert not watcher.is_alive()


def test_call_within_its_limit():
    assert call_within(5, lambda: 7) == 7
    with pytest.raises(KeyError, match="inner"):
        call_within(5, lambda: {}["inner"])
    with pytest.raises(StuckError, match=r"not done after 0\.05 s"):
        call_within(0.05, lambda: time.sleep(1))
