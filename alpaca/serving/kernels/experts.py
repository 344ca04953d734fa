"""A feed-forward of experts: a router chooses some for each token, and each expert computes all its tokens at once.

Legend: N packed tokens, D width, F an expert's width, E experts, k experts of a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from alpaca.serving.kernels.linear_base import Linear


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of one layer. router [E, D] is never quantized; each has gate_up: D -> 2F and down: F -> D.

    normalizes: whether the shares of a token's experts are made to sum to one.
    """

    router: torch.Tensor
    gate_up: Sequence[Linear]
    down: Sequence[Linear]
    per_token: int
    normalizes: bool

    @property
    def num_bytes(self) -> int:
        return self.router.nbytes + sum(linear.num_bytes for linear in (*self.gate_up, *self.down))


def choose_experts(x: torch.Tensor, experts: Experts) -> tuple[torch.Tensor, torch.Tensor]:
    """For tokens [N, D] the numbers of their experts [N, k] int64, and their shares [N, k] in float32 or more."""
    logits = torch.nn.functional.linear(x, experts.router)
    probabilities = logits.softmax(-1, dtype=torch.promote_types(torch.float32, x.dtype))
    shares, numbers = probabilities.topk(experts.per_token, dim=-1)
    return numbers, shares / shares.sum(-1, keepdim=True) if experts.normalizes else shares


def mix_experts(x: torch.Tensor, experts: Experts, activate: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The experts' outputs for tokens x [N, D], weighted by their shares and summed, [N, D].

    activate: [n, 2F] -> [n, F]. Tokens are put in order of their experts, so that each expert that has any is computed
    once. How many each has is read on the host, so that a GPU is waited for, and no CUDA graph can hold it.
    """
    numbers, shares = choose_experts(x, experts)
    order = numbers.flatten().argsort(stable=True)
    tokens = order // experts.per_token
    gathered = x.index_select(0, tokens)
    counts = torch.bincount(numbers.flatten(), minlength=len(experts.gate_up)).tolist()
    outputs, start = [], 0
    for gate_up, down, count in zip(experts.gate_up, experts.down, counts, strict=True):
        if count:
            outputs.append(down(activate(gate_up(gathered[start : start + count]))))
            start += count
    weighted = torch.cat(outputs) * shares.flatten().index_select(0, order)[:, None]
    return x.new_zeros(x.shape, dtype=weighted.dtype).index_add_(0, tokens, weighted).to(x.dtype)
