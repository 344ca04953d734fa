"""Scores are transformers' own log-softmax of the model's logits, whatever shares the steps that computed them."""

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import LlamaForCausalLM

from alpaca.errors import InputError, NumbersOverflow
from alpaca.formats.hf.adapters import open_adapter
from alpaca.serving import scoring
from alpaca.serving.engine import Generation, TokenEvent, TokenScore
from alpaca.serving.llama.adapters import with_adapters
from alpaca.serving.llama.network import KeyValueCache, LlamaModel
from alpaca.serving.llama.runner import Runner
from alpaca.serving.loading import load_engine
from alpaca.serving.request import Request
from alpaca.serving.settings import ServerSettings
from tests.serving.llama.test_llama import load, save_model
from tests.serving.llama.test_llama_engine import (
    CONTEXT,
    MODES,
    SIZE,
    engine_of,
    make_engine,
    naive,
    random_request,
    request,
    tokens,
)
from tests.serving.llama.test_serving_adapters import ADAPTERS, Oracle, write_adapter

Model = Callable[[list[int]], torch.Tensor]  # ids -> logits [T, V]
LIMITS = ("length", "context")
IN_FAST = ((200, "graphs"), (30, "ahead"))  # the rest takes a minute
LONG = tuple(3 + i * 7 % 110 for i in range(90))  # longer than a step, and than `ROWS_AT_ONCE`


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[LlamaForCausalLM, LlamaModel]:
    folder = tmp_path_factory.mktemp("llama")
    return save_model(folder, num_key_value_heads=2), load(folder)


@pytest.fixture(scope="module")
def oracle(models) -> Model:
    @torch.inference_mode()
    def logits(ids: list[int]) -> torch.Tensor:
        return models[0](torch.tensor([ids]), use_cache=False).logits[0]

    return logits


def scored(generation: Generation) -> tuple[list[list[int]], list[list[TokenScore | None]]]:
    ids: list[list[int]] = [[] for _ in range(generation.request.n)]
    scores: list[list[TokenScore | None]] = [[] for _ in range(generation.request.n)]
    for event in generation.events():
        if isinstance(event, TokenEvent):
            ids[event.completion].append(event.token_id)
            scores[event.completion].append(event.score)
    return ids, scores


def check_scores(
    found: Sequence[TokenScore], ids: list[int], num_before: int, model: Model, num_top: int, *, atol: float = 2e-5
) -> None:
    """`found` are the scores of ids[num_before:]. Also in float64 transformers norms in float32."""
    logprobs = torch.log_softmax(model(ids), dim=-1)[num_before - 1 : -1]
    assert len(found) == len(ids) - num_before
    for score, token_id, row in zip(found, ids[num_before:], logprobs, strict=True):
        assert score.logprob == pytest.approx(row[token_id].item(), abs=atol)
        best = row.topk(num_top)
        ids_found = [other for other, _ in score.top]
        assert len(set(ids_found)) == num_top  # which of two that are alike comes first is left to chance
        assert row[ids_found].tolist() == pytest.approx(best.values.tolist(), abs=atol)
        assert [logprob for _, logprob in score.top] == pytest.approx(best.values.tolist(), abs=atol)


def check(generation: Generation, model: Model, *, atol: float = 2e-5) -> None:
    """All that a generation says of its tokens, against the model."""
    asked = generation.request
    for ids, scores in zip(*scored(generation), strict=True):
        if asked.logprobs is None:
            assert scores == [None] * len(ids)
        elif ids:
            check_scores(scores, [*asked.prompt_ids, *ids], len(asked.prompt_ids), model, asked.logprobs, atol=atol)
    if asked.echo:
        check_scores(generation.prompt_scores, list(asked.prompt_ids), 1, model, asked.logprobs or 0, atol=atol)
    else:
        assert generation.prompt_scores == []


@pytest.mark.parametrize(
    ("num_blocks", "mode"),
    [
        pytest.param(num_blocks, mode, marks=() if (num_blocks, mode) in IN_FAST else pytest.mark.slow)
        for num_blocks in (200, 30)
        for mode in MODES
    ],
)
def test_scores_of_any_mixture_are_transformers_and_change_no_answer(models, oracle, mode, num_blocks):
    """Sampled, penalised and greedy, n of 3, prompts found in the cache, some that ask and some that do not."""
    chance = random.Random(f"{mode}:{num_blocks}")
    engine = make_engine(models[1], mode=mode, num_blocks=num_blocks)
    generations = []
    for index in range(16):
        asked = dict(vars(random_request(chance)))
        if index % 3:
            asked |= {"logprobs": chance.choice([None, 0, 1, 5, 20]), "echo": chance.random() < 0.6}
        if asked["echo"] and chance.random() < 0.3:
            asked["max_new_tokens"] = 0
        generations.append(engine.submit(Request(**asked)))
    for generation in generations:
        check(generation, oracle)
    again = [engine.submit(generation.request) for generation in generations[:6]]  # found in the cache now
    for generation in again:
        check(generation, oracle)
    for generation in [engine.submit(generation.request) for generation in generations[:4]]:
        found = tokens(generation)
        if generation.request.max_new_tokens:
            assert found == naive(models[0], generation.request, found)
        else:
            assert found == [[]] * generation.request.n
    assert (engine._scheduler.num_preemptions > 0) == (num_blocks == 30)
    engine.close()
    assert engine._scheduler.pool.num_free == engine._scheduler.pool.capacity


@pytest.mark.parametrize("mode", MODES)
def test_a_long_prompt_beside_others_is_scored_once_however_often_it_is_preempted(models, oracle, mode):
    engine = make_engine(models[1], mode=mode, num_blocks=30)
    others = [request(prompt_ids=(1, 5 + i), max_new_tokens=60, min_new_tokens=60) for i in range(3)]
    generations = [engine.submit(other) for other in others]
    generations += [engine.submit(request(prompt_ids=LONG, echo=True, logprobs=2, n=2, max_new_tokens=3))]
    for generation in generations:
        check(generation, oracle)
    engine.close()


def test_a_prompt_in_the_cache_is_computed_again_for_echo_and_shared_afterwards(models, oracle):
    engine = make_engine(models[1])
    asked = request(prompt_ids=LONG, max_new_tokens=2)
    tokens(engine.submit(asked))
    cached = {}
    for echo in (False, True, False):
        generation = engine.submit(request(prompt_ids=LONG, max_new_tokens=2, echo=echo, logprobs=1))
        check(generation, oracle)
        cached[echo] = generation.metrics()["cached_tokens"]
    assert cached == {False: 88, True: 0}
    three = engine.submit(request(prompt_ids=LONG, max_new_tokens=2, echo=True, n=3, temperature=1.0))
    check(three, oracle)
    assert len(three.prompt_scores) == len(LONG) - 1  # once, not for each completion
    engine.close()


def test_echo_without_an_answer_is_the_prompts_log_likelihood(models, oracle):
    engine = make_engine(models[1], mode="ahead")
    context = tuple(3 + i * 5 % 110 for i in range(CONTEXT))  # no room for an answer, and none needed
    for prompt in ((1, 50, 60, 70), LONG, context, (1,)):
        generation = engine.submit(request(prompt_ids=prompt, echo=True, max_new_tokens=0, n=2))
        assert tokens(generation) == [[], []]
        metrics = generation.metrics()
        assert metrics["output_tokens"] == 0
        logprobs = torch.log_softmax(oracle(list(prompt)), dim=-1)[:-1]
        expected = logprobs.gather(1, torch.tensor(prompt[1:], dtype=torch.int64)[:, None]).sum().item()
        assert sum(score.logprob for score in generation.prompt_scores) == pytest.approx(expected, abs=1e-3)
    engine.close()


@pytest.mark.parametrize("mode", MODES)
def test_scores_from_a_token_on_are_those_of_the_whole_prompt(models, oracle, mode):
    """What stands before it comes from the cache; the last token is not computed, so there may be one more of them."""
    engine = make_engine(models[1], mode=mode, num_blocks=40)
    context = tuple(3 + i * 5 % 110 for i in range(CONTEXT + 1))
    asked = [
        (LONG, 0),
        (LONG, 50),
        (LONG, len(LONG) - 2),
        (context[:-1], CONTEXT - 4),
        (context, CONTEXT - 1),
        ((1, 9), 0),
    ]
    for prompt, start in [*asked, *asked]:
        generation = engine.submit(
            request(prompt_ids=prompt, echo=True, scored_from=start, max_new_tokens=0, logprobs=1)
        )
        assert tokens(generation) == [[]]
        check_scores(generation.prompt_scores, list(prompt), start + 1, oracle, 1)
    engine.close()
    assert engine._scheduler.pool.num_free == engine._scheduler.pool.capacity


def test_no_more_logits_at_once_than_a_few_rows(models, oracle, monkeypatch):
    """Of a prompt; a step's new tokens need theirs anyway."""
    largest = 0
    score = scoring._score

    def watched(logits: torch.Tensor, *rest):
        nonlocal largest
        largest = max(largest, len(logits))
        return score(logits, *rest)

    monkeypatch.setattr(scoring, "_score", watched)
    monkeypatch.setattr(scoring, "ROWS_AT_ONCE", 5)
    engine = make_engine(models[1])
    generations = [engine.submit(request(prompt_ids=LONG, echo=True, logprobs=3, n=3, temperature=1.0))]
    generations += [engine.submit(request(prompt_ids=(1, 2 + i), logprobs=1)) for i in range(7)]
    for generation in generations:
        check(generation, oracle)
    assert largest == 5
    engine.close()


def test_who_does_not_ask_pays_nothing(models, monkeypatch):
    """Not one more operation on tensors: none of the functions that score is called, and no logits are copied."""
    monkeypatch.setattr(scoring, "_score", None)
    monkeypatch.setattr("alpaca.serving.llama.runner.score_tokens", None)
    for mode in MODES:
        engine = make_engine(models[1], mode=mode)
        asked = [request(prompt_ids=LONG, max_new_tokens=6), request(temperature=1.0, n=3, max_new_tokens=6)]
        for generation in [engine.submit(one) for one in asked]:
            assert tokens(generation) == naive(models[0], generation.request)
        engine.close()


def test_ids_that_cannot_be_sampled_take_no_part(models, oracle):
    """A model may have more rows than its tokenizer has ids."""
    model, vocab_size = models[1], 100
    cache = KeyValueCache(model.config, num_blocks=50, block_size=SIZE, dtype=model.dtype, device=model.device)
    runner = Runner(model, cache, max_running=4, max_context=CONTEXT, vocab_size=vocab_size, eos_ids=frozenset([2]))
    engine = engine_of(runner, launches_ahead=False)
    prompt = tuple(i for i in LONG if i < vocab_size)
    check(engine.submit(request(prompt_ids=prompt, echo=True, logprobs=4)), lambda ids: oracle(ids)[:, :vocab_size])
    with pytest.raises(InputError, match=r"token id 110 is outside of the model's 100 rows"):
        engine.submit(request(prompt_ids=(1, 110), echo=True))
    engine.close()


def test_adapters_score_by_their_own_distribution(tmp_path):
    base = save_model(tmp_path / "base")
    adapters = {
        name: open_adapter(write_adapter(base, tmp_path / name, seed=seed, **ADAPTERS[name]))
        for seed, name in enumerate(("alpaca-lora", "dora"))
    }
    oracle = Oracle(base, {name: adapter.path for name, adapter in adapters.items()})
    engine = make_engine(with_adapters(load(tmp_path / "base"), adapters), mode="graphs")
    names = ["dora", None, "alpaca-lora", "dora", None]
    asked = [
        request(
            prompt_ids=(1, 7, 8, 9, 10, 11 + i), adapter=name, echo=i < 4, logprobs=3, temperature=i / 4, n=1 + i % 2
        )
        for i, name in enumerate(names)
    ]
    found = [engine.submit(one) for one in asked]
    outcomes = [scored(generation) for generation in found]
    for one, generation, (rows, scores) in zip(asked, found, outcomes, strict=True):
        reference = oracle.using(one.adapter)

        @torch.inference_mode()
        def logits(ids: list[int], reference=reference) -> torch.Tensor:
            return reference(torch.tensor([ids]), use_cache=False).logits[0]

        prompt = list(one.prompt_ids)
        for ids, own in zip(rows, scores, strict=True):
            check_scores(own, [*prompt, *ids], len(prompt), logits, 3)
        if one.echo:
            check_scores(generation.prompt_scores, prompt, 1, logits, 3)
    engine.close()


def test_a_prompt_whose_logits_are_no_numbers_fails_alone(models, oracle):
    model = models[1]
    engine = make_engine(model, mode="ahead")
    embedding = model.embedding.clone()
    try:
        model.embedding[55] = float("nan")
        sick = engine.submit(request(prompt_ids=(1, 55, 60), echo=True, max_new_tokens=0))
        healthy = engine.submit(request(prompt_ids=LONG[:4], echo=True, logprobs=1))
        with pytest.raises(NumbersOverflow, match="not finite"):
            tokens(sick)
        outcome = scored(healthy)
    finally:
        model.embedding.copy_(embedding)
    assert 55 not in outcome[0][0]
    check_scores(healthy.prompt_scores, list(LONG[:4]), 1, oracle, 1)
    engine.close()


def test_a_real_models_scores_are_transformers(tmp_path, real):
    """In float32, by the operations that a server uses on this machine."""
    from alpaca.formats.meta.to_hf import convert
    from convert.convert_llama_weights_to_hf import parse_arguments

    flags = ["--input_dir", str(real / "unconverted-weights"), "--model_size", "260K", "--output_dir", str(tmp_path)]
    folder = convert(parse_arguments(flags))
    engine = load_engine(folder, ServerSettings(engine="llama"))
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @torch.inference_mode()
    def logits(ids: list[int]) -> torch.Tensor:
        return reference(torch.tensor([ids]), use_cache=False).logits[0]

    story = (1, *engine.tokenizer.encode("Once upon a time, there was a little girl who had a red ball. " * 9))
    assert len(story) > 150
    asked = [
        request(prompt_ids=story, echo=True, logprobs=3, max_new_tokens=60),
        request(prompt_ids=story, echo=True, max_new_tokens=0),
        request(prompt_ids=story[:9], logprobs=20, n=3, temperature=1.0, max_new_tokens=60),
        request(prompt_ids=story[:5], max_new_tokens=60),
    ]
    for generation in [engine.submit(one) for one in asked]:
        check(generation, logits, atol=1e-3)
    engine.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.fast_rows(1)
def test_why_an_answer_ended(models, mode):
    engine = make_engine(models[1], mode=mode)
    asked = [
        request(temperature=1.2, max_new_tokens=40, seed=seed, limit=limit) for seed in range(10) for limit in LIMITS
    ]
    seen = set()
    for generation in [engine.submit(one) for one in asked]:
        *before, end = generation.events()
        assert end.reason == ("stop" if len(before) < 40 else generation.request.limit)
        seen.add(end.reason)
    assert seen == {"stop", *LIMITS}
    generation = engine.submit(request(max_new_tokens=60, min_new_tokens=60))
    generation.stop(0)
    *_, end = generation.events()
    assert end.reason == "stop"
    engine.close()
