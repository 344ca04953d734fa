"""Sampling equals transformers' processors, and draws what the probabilities say."""

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from alpaca.serving.request import Request
from alpaca.serving.sampling import Sampler, draw, keep_min_p, keep_top_k, keep_top_p

DEFAULTS = dict(
    prompt_ids=(1, 5, 7), n=1, max_new_tokens=10, min_new_tokens=0, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0,
    repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, seed=0, num_beams=1,
)  # fmt: skip
CPU = torch.device("cpu")


def sampler(vocab_size: int = 50, **changes) -> Sampler:
    return Sampler(Request(**{**DEFAULTS, **changes}), vocab_size=vocab_size, eos_ids=[2], device=CPU)


@pytest.fixture
def scores() -> torch.Tensor:
    return torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("top_k", [1, 3, 49])
def test_top_k_is_transformers(scores, top_k):
    assert torch.equal(keep_top_k(scores, top_k), TopKLogitsWarper(top_k)(None, scores))


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
def test_top_p_is_transformers(scores, top_p):
    assert torch.equal(keep_top_p(scores, top_p), TopPLogitsWarper(top_p)(None, scores))


@pytest.mark.parametrize("min_p", [0.01, 0.2, 1.0])
def test_min_p_is_transformers(scores, min_p):
    assert torch.equal(keep_min_p(scores, min_p), MinPLogitsWarper(min_p)(None, scores))


def test_repetition_penalty_is_transformers_over_prompt_and_answer(scores):
    one = sampler(temperature=0, repetition_penalty=1.7)
    first = one.choose(scores[:1].clone(), [0], 0)[0]
    seen = torch.tensor([[1, 5, 7, first]])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(seen, scores[1:2].clone()).argmax()
    assert one.choose(scores[1:2].clone(), [0], 1) == [expected]


def test_presence_and_frequency_count_generated_tokens_only():
    flat = torch.zeros(1, 8)
    flat[0, 5] = 1.0  # in the prompt: not penalised
    one = sampler(vocab_size=8, temperature=0, presence_penalty=0.4, frequency_penalty=0.25)
    assert [one.choose(flat.clone(), [0], i)[0] for i in range(4)] == [5, 5, 5, 0]  # 1, 0.35, 0.1, then below 0


def test_eos_is_not_chosen_before_min_new_tokens():
    certain = torch.zeros(1, 8)
    certain[0, 2] = 100.0
    for temperature in (0, 1.0):
        one = sampler(vocab_size=8, temperature=temperature, min_new_tokens=2)
        chosen = [one.choose(certain.clone(), [0], i)[0] for i in range(3)]
        assert 2 not in chosen[:2]
        assert chosen[2] == 2


def test_draws_follow_the_probabilities():
    scores = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()[None]
    uniforms = [(i + 0.5) / 1000 for i in range(1000)]
    counts = torch.bincount(draw(scores.expand(1000, -1), uniforms), minlength=4)
    assert counts.tolist() == [100, 200, 300, 400]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_draw_never_takes_an_impossible_token(uniform):
    scores = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]])
    assert draw(scores, [uniform]).item() in (1, 2)


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-20, 1e-38, 1e-40, 5e-324])
def test_the_smallest_temperatures_take_the_most_likely_token(scores, temperature):
    one = sampler(temperature=temperature)
    assert one.choose(scores[:1].clone(), [0], 0) == scores[:1].argmax(dim=-1).tolist()


def test_completions_have_their_own_streams_and_do_not_depend_on_each_other(scores):
    steps = [scores[i : i + 1] for i in range(6)]
    together = sampler(n=3, seed=9)
    rows = [together.choose(step.expand(3, -1).clone(), [0, 1, 2], i) for i, step in enumerate(steps)]
    again = sampler(n=3, seed=9)
    alone = [again.choose(step.clone(), [2], i)[0] for i, step in enumerate(steps)]  # the others ended at once
    assert [row[2] for row in rows] == alone
    assert len({tuple(row[i] for row in rows) for i in range(3)}) == 3
    assert rows == [sampler(n=3, seed=9).choose(steps[0].expand(3, -1).clone(), [0, 1, 2], 0), *rows[1:]]
    assert [row[0] for row in rows] != [
        sampler(seed=10).choose(step.clone(), [0], i)[0] for i, step in enumerate(steps)
    ]
