"""Sampling equals transformers' processors, draws what the probabilities say, and takes no notice of its neighbours."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from alpaca.errors import NumbersOverflow
from alpaca.serving.llama import sampling
from alpaca.serving.llama.sampling import SamplingState, draw, in_chunks, sampling_fields, thresholds
from alpaca.serving.llama.step import to_device
from alpaca.serving.request import Request

DEFAULTS = dict(
    prompt_ids=(1, 5, 7), n=1, max_new_tokens=10, min_new_tokens=0, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0,
    repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, seed=0, num_beams=1,
)  # fmt: skip
CPU = torch.device("cpu")
FILTERS = [
    {"top_k": 1}, {"top_k": 3}, {"top_k": 49}, {"top_k": 10**9}, {"top_p": 0.01}, {"top_p": 0.3}, {"top_p": 0.999},
    {"min_p": 0.02}, {"min_p": 1.0}, {"top_k": 9, "top_p": 0.5}, {"top_k": 20, "top_p": 0.9, "min_p": 0.1}, {},
]  # fmt: skip


def state_of(completion: int = 0, **changes) -> SamplingState:
    return SamplingState(Request(**{**DEFAULTS, **changes}), completion, eos_ids=[2])


def sample(logits: torch.Tensor, rows: list[SamplingState]) -> torch.Tensor:
    ids = sampling.sample_tokens(logits, rows)
    sampling.commit_tokens(rows, ids)
    return ids


@pytest.fixture
def scores() -> torch.Tensor:
    return torch.randn(len(FILTERS), 50, generator=torch.Generator().manual_seed(0)) * 3


def transformers_keeps(scores: torch.Tensor, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> set[int]:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)] if temperature != 1 else [])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    return set(warpers(None, scores[None].clone())[0].isfinite().nonzero()[:, 0].tolist())


def test_filters_keep_what_transformers_keeps_each_row_its_own(scores):
    fields = to_device(sampling_fields([state_of(**options) for options in FILTERS]), CPU)
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    least = thresholds(weights, fields)
    for row, options in enumerate(FILTERS):
        kept = (weights[row] >= least[row]).nonzero()[:, 0].tolist()
        assert set(kept) == transformers_keeps(scores[row], **options)


@pytest.mark.parametrize(("top_p", "num_kept"), [(0.5, 1), (0.5001, 2), (0.75, 2), (0.875, 3), (0.9, 5)])
def test_top_p_keeps_the_fewest_that_reach_it(top_p, num_kept):
    """Probabilities 1/2, 1/4, 1/8, 1/16, 1/16: exact numbers, so that some reach top_p exactly; the last two tie."""
    weights = torch.tensor([[1.0, 0.5, 0.25, 0.125, 0.125]])
    (least,) = thresholds(weights, to_device(sampling_fields([state_of(top_p=top_p)]), CPU))
    assert int((weights >= least).sum()) == num_kept


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_only_kept_tokens_are_chosen_and_all_of_them(scores, temperature):
    for options in FILTERS:
        rows = [state_of(seed=seed, temperature=temperature, **options) for seed in range(400)]
        chosen = set(sample(scores[:1].expand(400, -1).clone(), rows).tolist())
        kept = transformers_keeps(scores[0], temperature=temperature, **options)
        assert chosen <= kept
        likely = (scores[0] / temperature).softmax(-1)
        assert {i for i in kept if likely[i] / likely[list(kept)].sum() > 0.03} <= chosen


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_p": 0.97, "temperature": 2.0}, {"top_k": 1500}])
def test_many_candidates_of_a_large_vocabulary(options):
    """Beyond the few highest scores that usually suffice, everything is sorted."""
    scores = torch.randn(1, 8000, generator=torch.Generator().manual_seed(1))
    row = state_of(seed=5, **options)
    uniform = state_of(seed=5).uniform
    dropped = set(range(8000)) - transformers_keeps(scores[0], **options)
    weights = (scores[0] / options.get("temperature", 1.0)).double().softmax(-1)
    weights[list(dropped)] = 0
    cumulative = weights.cumsum(-1)
    expected = (cumulative / cumulative[-1] > uniform).nonzero()[0, 0].item()
    assert sample(scores, [row]).tolist() == [expected]


def test_a_choice_does_not_depend_on_the_rows_beside_it(scores):
    options = [*FILTERS, {"temperature": 0}, {"repetition_penalty": 1.8}, {"min_new_tokens": 3}]
    scores = torch.cat([scores, scores[:3]])
    together = sample(scores.clone(), [state_of(seed=row, **item) for row, item in enumerate(options)]).tolist()
    alone = [
        sample(scores[row : row + 1].clone(), [state_of(seed=row, **item)]).item() for row, item in enumerate(options)
    ]
    assert together == alone


def test_repetition_penalty_is_transformers_over_prompt_and_answer(scores):
    row = state_of(temperature=0, repetition_penalty=1.7)
    first = sample(scores[:1].clone(), [row]).item()
    seen = torch.tensor([[1, 5, 7, first]])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(seen, scores[1:2].clone()).argmax()
    assert sample(scores[1:2].clone(), [row]).item() == expected


def test_presence_and_frequency_count_generated_tokens_only():
    flat = torch.zeros(1, 8)
    flat[0, 5] = 1.0  # in the prompt: not penalised
    row = state_of(temperature=0, presence_penalty=0.4, frequency_penalty=0.25)
    assert [sample(flat.clone(), [row]).item() for _ in range(4)] == [
        5,
        5,
        5,
        0,
    ]  # 1, 0.35, 0.1, then below 0


@pytest.mark.parametrize("eos_ids", [[2], [7, 2], [0, 4, 7]])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_no_eos_is_chosen_before_min_new_tokens(scores, eos_ids, temperature):
    """As if the model had no such tokens: for every set of EOS ids, each of them the most likely one in turn."""
    for likely in eos_ids:
        certain = scores[:3].clone()
        certain[:, likely] = 100.0
        without = certain.clone()
        without[:, eos_ids] = float("-inf")
        request = Request(**{**DEFAULTS, "temperature": temperature, "min_new_tokens": 2})
        row, free = SamplingState(request, 0, eos_ids=eos_ids), state_of(temperature=temperature)
        chosen = [sample(step.clone(), [row]).item() for step in certain[:, None]]
        expected = [sample(step.clone(), [free]).item() for step in without[:2, None]]
        assert chosen == [*expected, likely]


def test_draws_follow_the_probabilities():
    scores = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()[None]
    uniforms = torch.tensor([(i + 0.5) / 1000 for i in range(1000)], dtype=torch.float64)
    counts = torch.bincount(draw(in_chunks(scores.expand(1000, -1)).exp(), uniforms), minlength=4)
    assert counts.tolist() == [100, 200, 300, 400]


@pytest.mark.parametrize("size", [1, 5, 127, 128, 129, 1000])
def test_draw_is_the_inverse_of_the_cumulative_distribution(size):
    generator = torch.Generator().manual_seed(size)
    scores = torch.randn(200, size, generator=generator) * 4
    scores -= scores.amax(dim=-1, keepdim=True)
    scores[:, 1::3] = float("-inf")
    uniforms = torch.rand(200, generator=generator, dtype=torch.float64)
    cumulative = scores.double().softmax(-1).cumsum(-1)
    expected = [(row > at).nonzero()[0, 0].item() for row, at in zip(cumulative, uniforms, strict=True)]
    assert draw(in_chunks(scores).exp(), uniforms).tolist() == expected


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_draw_never_takes_an_impossible_token(uniform):
    scores = torch.full((1, 700), float("-inf"))
    scores[0, [130, 131, 300]] = 0.0
    weights = in_chunks(scores).exp()
    assert draw(weights, torch.tensor([uniform], dtype=torch.float64)).item() in (130, 131, 300)


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-20, 1e-38, 1e-40, 5e-324])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 5}])
def test_the_smallest_temperatures_take_the_most_likely_token(scores, temperature, options):
    chosen = sample(scores[:1].clone(), [state_of(temperature=temperature, **options)])
    assert chosen.tolist() == scores[:1].argmax(dim=-1).tolist()


def test_completions_have_their_own_streams(scores):
    def run(seed: int, completions: list[int]) -> list[list[int]]:
        rows = [state_of(completion, seed=seed) for completion in completions]
        return [sample(step.expand(len(rows), -1).clone(), rows).tolist() for step in scores[:, None]]

    together = run(9, [0, 1, 2])
    assert [step[2] for step in together] == [step[0] for step in run(9, [2])]  # the others ended at once
    assert len({tuple(step[i] for step in together) for i in range(3)}) == 3
    assert run(9, [0, 1, 2]) == together
    assert run(10, [0, 1, 2]) != together


def test_bfloat16_logits_are_sampled_in_float32():
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(2)).bfloat16()
    rows = [state_of(seed=row, top_p=0.8) for row in range(4)]
    again = [state_of(seed=row, top_p=0.8) for row in range(4)]
    assert torch.equal(sample(logits, rows), sample(logits.float(), again))


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_p": 0.5}, {"top_k": 3}])
def test_a_row_that_is_no_number_is_told_and_harms_no_other(scores, odd, options):
    three = scores[:3].clone()
    alone = sample(three.clone(), [state_of(seed=row, **options) for row in range(3)])
    three[1, 7] = odd
    found = sample(three, [state_of(seed=row, **options) for row in range(3)])
    assert found.tolist() == [alone[0], sampling.NOT_FINITE, alone[2]]
    with pytest.raises(NumbersOverflow, match=r"logits are not finite numbers.* bfloat16 or float32"):
        sampling.require_finite(sampling.NOT_FINITE)


def test_a_token_that_was_not_committed_is_sampled_again(scores):
    row = state_of(frequency_penalty=0.5)
    first = sampling.sample_tokens(scores[:1].clone(), [row])
    assert torch.equal(sampling.sample_tokens(scores[:1].clone(), [row]), first)
    sampling.commit_tokens([row], first)
    after = state_of(frequency_penalty=0.5)
    sample(scores[:1].clone(), [after])
    assert sample(scores[1:2].clone(), [row]).tolist() == sample(scores[1:2].clone(), [after]).tolist()
