"""Constrained and free completions in the same steps: each gets what it gets alone, decoded the slow way."""

import dataclasses
import itertools
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from alpaca.errors import InputError
from alpaca.serving.engine import Engine, FinishedEvent, Generation, GenerationCancelledError, TokenEvent
from alpaca.serving.hugging_face.engine import TransformersEngine
from alpaca.serving.llama.network import LlamaModel
from alpaca.serving.llama.sampling import SamplingState, commit_tokens, sample_tokens
from alpaca.serving.request import Request
from alpaca.serving.structured import masks
from alpaca.serving.structured.compiling import Compiler
from alpaca.serving.structured.constraints import Constraint
from alpaca.serving.structured.masks import forbid
from alpaca.serving.structured.matching import Matcher
from tests.serving.llama.test_llama import load, save_model
from tests.serving.llama.test_llama_engine import CONTEXT, MODES, make_engine, naive, random_request, request, tokens
from tests.serving.structured.letters import EOS, Letters, allowed

SIZE = 120
PERSON = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 5}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a", "n"],
    "additionalProperties": False,
}
CONSTRAINTS = [
    Constraint(kind="regex", text="(the |ab)+[a-z]{2,9}[.!]"),
    Constraint(kind="regex", text="[é🦙x]{20,25}"),
    Constraint(kind="json_schema", text=json.dumps(PERSON)),
    Constraint(kind="grammar", text='start: "yes" | "no" rest\nrest: " and " /[a-z]{1,9}/\n'),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[LlamaForCausalLM, LlamaModel]:
    """One model twice in float64: transformers' and ours."""
    folder = tmp_path_factory.mktemp("llama")
    return save_model(folder, num_key_value_heads=2, vocab_size=SIZE), load(folder)


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    compiler = Compiler(Letters(SIZE), SIZE, [EOS])
    yield compiler
    compiler.close()


@pytest.fixture(scope="module", params=[*MODES, "transformers"])
def engine(request, models) -> Iterator[Engine]:
    if request.param == "transformers":
        engine: Engine = TransformersEngine(models[0], Letters(SIZE), max_context=CONTEXT)
    else:
        engine = make_engine(models[1], mode=request.param, tokenizer=Letters(SIZE))
    yield engine
    engine.close()


def read(generation: Generation) -> tuple[list[list[int]], list[str]]:
    """Each completion's tokens, and why it ended."""
    rows: list[list[int]] = [[] for _ in range(generation.request.n)]
    reasons = [""] * generation.request.n
    for event in generation.events():
        if isinstance(event, TokenEvent):
            rows[event.completion].append(event.token_id)
        elif isinstance(event, FinishedEvent):
            reasons[event.completion] = event.reason
    return rows, reasons


@torch.inference_mode()
def alone(model: LlamaForCausalLM, compiler: Compiler, asked: Request) -> tuple[list[list[int]], list[str]]:
    """Decode without batch or cache; a row of logits loses what its constraint does not allow, id by id."""
    rows, reasons = [], []
    for completion in range(asked.n):
        state = SamplingState(asked, completion, eos_ids=[EOS])
        (matcher,) = compiler.start(asked.constraint, 1)
        ids, reason = list(asked.prompt_ids), "length"
        while len(ids) < len(asked.prompt_ids) + asked.max_new_tokens:
            logits = model(torch.tensor([ids]), use_cache=False).logits[:, -1]
            logits[0, sorted(set(range(SIZE)) - allowed(matcher, SIZE))] = float("-inf")
            chosen = sample_tokens(logits, [state])
            commit_tokens([state], chosen)
            if chosen.item() != EOS:
                ids.append(chosen.item())
                matcher.accept(ids[-1])
            if chosen.item() == EOS or matcher.is_complete:
                reason = "stop"
                break
            matcher.find_mask()
        rows.append(ids[len(asked.prompt_ids) :])
        reasons.append(reason)
    return rows, reasons


def constrained(chance: random.Random) -> Request:
    free = random_request(chance)
    return dataclasses.replace(free, constraint=chance.choice(CONSTRAINTS), min_new_tokens=chance.choice([0, 0, 4]))


@pytest.mark.parametrize(
    ("num_blocks", "mode", "seed"),
    [
        (20, "in step", 0),
        (20, "ahead", 0),
        *(
            pytest.param(num_blocks, mode, seed, marks=pytest.mark.slow)
            for num_blocks, mode, seed in itertools.product((200, 20), MODES, (1, 2))
        ),
    ],
)
@pytest.mark.fast_rows(1)
def test_any_mix_gives_what_each_gives_alone(models, compiler, num_blocks, mode, seed):
    reference, model = models
    chance = random.Random(f"{seed}:{num_blocks}:{mode}")
    engine = make_engine(model, num_blocks=num_blocks, mode=mode, tokenizer=Letters(SIZE))
    submitted: list[Generation] = []
    for _ in range(20 if seed else 10):
        asked = constrained(chance) if chance.random() < 0.6 else random_request(chance)
        generation = engine.submit(asked)
        if chance.random() < 0.2:
            threading.Timer(chance.random() * 0.05, generation.cancel).start()
        else:
            submitted.append(generation)
    for generation in submitted:
        if generation.request.constraint is None:
            found = tokens(generation)
            assert found == naive(reference, generation.request, found), generation.request
        else:
            assert read(generation) == alone(reference, compiler, generation.request), generation.request
    engine.close()
    pool = engine._scheduler.pool
    assert pool.num_free == pool.capacity
    assert (engine._scheduler.num_preemptions > 0) == (num_blocks == 20)
    assert engine._masks.is_idle


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda constraint: constraint.text[:9])
@pytest.mark.fast_rows(2)
def test_both_engines_give_what_the_slow_way_gives(engine, models, compiler, constraint):
    asked = request(constraint=constraint, n=3, temperature=1.0, max_new_tokens=60)
    rows, reasons = read(engine.submit(asked))
    assert (rows, reasons) == alone(models[0], compiler, asked)
    assert reasons == ["stop"] * 3
    texts = [Letters(SIZE).decode(row) for row in rows]
    if constraint.kind == "regex":
        assert all(re.fullmatch(constraint.text, text) for text in texts)
    elif constraint.kind == "json_schema":
        assert all(set(json.loads(text)) == {"a", "n"} for text in texts)
    else:
        assert all(re.fullmatch("yes|no and [a-z]{1,9}", text) for text in texts)


def test_an_answer_that_is_cut_says_so(engine):
    def ask(**changes) -> tuple[list[list[int]], list[str]]:
        return read(engine.submit(request(constraint=Constraint(kind="regex", text="a{4}b"), **changes)))

    rows, reasons = ask(max_new_tokens=60, min_new_tokens=50)  # nothing can follow, whatever the minimum is
    assert (Letters(SIZE).decode(rows[0]), reasons) == ("aaaab", ["stop"])
    assert ask(max_new_tokens=len(rows[0])) == (rows, ["stop"])
    cut, reasons = ask(max_new_tokens=len(rows[0]) - 1)
    assert (cut, reasons) == ([rows[0][:-1]], ["length"])
    assert ask(max_new_tokens=2, limit="context")[1] == ["context"]


def test_an_empty_answer(engine):
    asked = request(constraint=Constraint(kind="regex", text="(a{0})"), min_new_tokens=5)
    assert read(engine.submit(asked)) == ([[]], ["stop"])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probabilities_are_those_of_the_model(engine, models, temperature):
    asked = request(constraint=CONSTRAINTS[2], temperature=temperature, logprobs=2, max_new_tokens=60)
    events = [event for event in engine.submit(asked).events() if isinstance(event, TokenEvent)]
    ids = [event.token_id for event in events]
    with torch.inference_mode():
        logits = models[0](torch.tensor([[*asked.prompt_ids, *ids]]), use_cache=False).logits[0]
    expected = logits.log_softmax(-1)[len(asked.prompt_ids) - 1 : -1]
    for event, row in zip(events, expected, strict=True):
        assert event.score.logprob == pytest.approx(row[event.token_id].item(), abs=1e-5)
        assert [token_id for token_id, _ in event.score.top] == row.topk(2).indices.tolist()


def test_no_answer_and_a_constraint(engine):
    asked = request(constraint=CONSTRAINTS[0], echo=True, max_new_tokens=0)
    assert read(engine.submit(asked)) == ([[]], ["length"])


def test_rows_without_a_mask_are_not_touched():
    states = [SamplingState(request(), 0, eos_ids=[EOS]) for _ in range(3)]
    forbid(None, states)  # not even looked at
    (matcher,) = Compiler(Letters(SIZE), SIZE, [EOS]).start(CONSTRAINTS[0], 1)
    states[1] = SamplingState(request(), 0, eos_ids=[EOS], matcher=matcher)
    scores = torch.randn(3, SIZE + 9)
    before = scores.clone()
    forbid(scores, states)
    assert torch.equal(scores[[0, 2]], before[[0, 2]])
    left = sorted(allowed(matcher, SIZE))
    assert scores[1].isfinite().nonzero().flatten().tolist() == left
    assert torch.equal(scores[1, left], before[1, left])


@pytest.mark.parametrize("size", [SIZE - 20, SIZE, SIZE + 200])
def test_bits_are_laid_on_another_device_as_here(size):
    """The way for a GPU, on the CPU: the same operations."""
    compiler = Compiler(Letters(SIZE), SIZE, [EOS])
    matchers = [compiler.start(constraint, 1)[0] for constraint in CONSTRAINTS[:2]]
    states = [SamplingState(request(), 0, eos_ids=[EOS], matcher=matcher) for matcher in [*matchers, None]]
    here = torch.randn(3, size)
    there = here.clone()
    forbid(here, states)
    masks._forbid_there(there, [0, 1], np.stack([matcher.mask for matcher in matchers]))
    assert torch.equal(here, there)
    assert here[:2].isfinite().sum() == sum(len([i for i in allowed(m, SIZE) if i < size]) for m in matchers)
    compiler.close()


# Nobody waits for another's constraint --------------------------------------------------------------------------------


class SlowMatcher:
    """Finds each mask after a while, as one does whose expression has many states."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float, fails_after: int | None = None) -> None:
        self.num_found = 0
        original: Callable[[Matcher], None] = Matcher.find_mask

        def find_mask(matcher: Matcher) -> None:
            self.num_found += 1
            if self.num_found == fails_after:
                raise InputError("the constraint takes too much to follow: make it simpler")
            if threading.current_thread().name.startswith("masks"):
                time.sleep(seconds)
            original(matcher)

        monkeypatch.setattr(Matcher, "find_mask", find_mask)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.fast_rows(1)
def test_a_mask_that_takes_long_holds_up_its_own_row_alone(models, compiler, mode, monkeypatch):
    engine = make_engine(models[1], mode=mode, tokenizer=Letters(SIZE))
    asked = request(constraint=CONSTRAINTS[0], max_new_tokens=6)
    expected = alone(models[0], compiler, asked)
    slow = SlowMatcher(monkeypatch, 0.4)
    generation, free = engine.submit(asked), request(max_new_tokens=80, min_new_tokens=80)
    found = tokens(engine.submit(free))
    assert slow.num_found < 4  # of the six
    assert found == naive(models[0], free)
    assert read(generation) == expected
    engine.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_cancel_does_not_wait_for_a_mask(models, mode, monkeypatch):
    engine = make_engine(models[1], mode=mode, tokenizer=Letters(SIZE))
    slow = SlowMatcher(monkeypatch, 0.5)
    generation = engine.submit(request(constraint=CONSTRAINTS[0], n=2, max_new_tokens=30))
    while slow.num_found < 2:
        time.sleep(0.001)
    begun = time.monotonic()
    generation.cancel()
    with pytest.raises(GenerationCancelledError):
        tokens(generation)
    while engine._sequences:
        assert time.monotonic() < begun + 0.2
        time.sleep(0.001)
    pool = engine._scheduler.pool
    assert pool.num_free == pool.capacity
    assert engine._masks.is_idle
    engine.close()


@pytest.mark.fast_rows(1)
def test_a_constraint_that_becomes_too_much_fails_its_request_alone(engine, models, monkeypatch):
    SlowMatcher(monkeypatch, 0.0, fails_after=3)
    free = request(max_new_tokens=40, min_new_tokens=40)
    failing, other = engine.submit(request(constraint=CONSTRAINTS[2])), engine.submit(free)
    with pytest.raises(InputError, match="takes too much to follow"):
        tokens(failing)
    assert tokens(other) == naive(models[0], free)
    assert engine.is_healthy()
