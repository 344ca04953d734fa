"""Experts grouped over a step are a plain loop over tokens and their experts."""

import pytest
import torch

from alpaca.serving.kernels import ops
from alpaca.serving.kernels.experts import Experts, choose_experts, mix_experts
from alpaca.serving.kernels.linear_base import PlainLinear
from tests.serving.kernels.test_ops import TOLERANCES, check, random

WIDTH, INNER = 16, 12


def make(num_experts: int, per_token: int, *, normalizes: bool, dtype: torch.dtype) -> Experts:
    def layers(rows: int, columns: int, seed: int) -> list[PlainLinear]:
        return [PlainLinear(random(rows, columns, seed=seed + 10 * e, dtype=dtype)) for e in range(num_experts)]

    return Experts(
        router=random(num_experts, WIDTH, seed=7, dtype=dtype), gate_up=layers(2 * INNER, WIDTH, 1),
        down=layers(WIDTH, INNER, 2), per_token=per_token, normalizes=normalizes,
    )  # fmt: skip


def mix_one_by_one(x: torch.Tensor, experts: Experts) -> torch.Tensor:
    rows = []
    for token in x:
        probabilities = (experts.router @ token).softmax(0)
        best = sorted(range(len(probabilities)), key=lambda e: -probabilities[e])[: experts.per_token]
        total = sum(probabilities[e] for e in best) if experts.normalizes else 1.0
        outputs = [experts.down[e](ops.silu_mul(experts.gate_up[e](token[None])))[0] for e in best]
        rows.append(sum(probabilities[e] / total * out for e, out in zip(best, outputs, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("normalizes", [True, False])
@pytest.mark.parametrize(("num_experts", "per_token"), [(1, 1), (5, 2), (40, 3), (4, 4)])
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_grouped_experts_are_a_plain_loop(num_tokens, num_experts, per_token, normalizes):
    experts = make(num_experts, per_token, normalizes=normalizes, dtype=torch.float64)
    x = random(num_tokens, WIDTH, seed=5)
    check(mix_experts(x, experts, ops.silu_mul), mix_one_by_one(x, experts), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_are_summed_in_float32(dtype):
    """As transformers does for each expert's output; the sum is rounded once."""
    experts = make(6, 3, normalizes=True, dtype=dtype)
    x = random(9, WIDTH, seed=5, dtype=dtype) * 0.1
    numbers, shares = choose_experts(x, experts)
    assert shares.dtype == torch.float32
    expected = torch.zeros(9, WIDTH)
    for token in range(9):
        for expert, share in zip(numbers[token].tolist(), shares[token], strict=True):
            out = experts.down[expert](ops.silu_mul(experts.gate_up[expert](x[token : token + 1])))
            expected[token] += share * out[0].float()
    found = mix_experts(x, experts, ops.silu_mul)
    assert found.dtype == dtype
    tolerance = 4 * TOLERANCES[dtype]
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
