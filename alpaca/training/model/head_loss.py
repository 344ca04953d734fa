"""The summed loss of target positions, whose gradients are found in the forward pass, a chunk of logits at a time.

Autograd would keep the logits, or compute them a second time for the gradient. But the gradient of a sum is known as
soon as a chunk's logits are there, up to the factor that the sum itself is given later. So logits are computed once,
each chunk while it is in a CPU's cache, and one softmax serves loss and gradient.

Legend: R target positions, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# Elements of logits that exist at a time: in float32 just more than 32 MiB, as a CPU's heap keeps smaller blocks.
CPU_CHUNK_LOGITS, GPU_CHUNK_LOGITS = 9 << 20, 32 << 20


def chunk_rows(vocab_size: int, *, on_gpu: bool) -> int:
    """The number of positions whose logits exist at the same time."""
    return max(1, (GPU_CHUNK_LOGITS if on_gpu else CPU_CHUNK_LOGITS) // vocab_size)


def sum_target_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, smoothing: float) -> Tensor:
    """The summed cross entropy (float32 scalar) of `ids` [R] by the head: hidden [R, D], weight [V, D], bias [V].

    Differentiable once by hidden, weight and bias. Under autocast products are in its dtype, as a linear layer's.
    smoothing: the share of each target's weight that is spread over the whole vocabulary.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    is_learning = torch.is_grad_enabled()
    with torch.autocast(kind, enabled=False):
        return _SummedLosses.apply(hidden, weight, bias, ids, smoothing, dtype, is_learning)


class _SummedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, smoothing: float,
        dtype: torch.dtype, is_learning: bool,
    ) -> Tensor:  # fmt: skip
        needs = [is_learning and need for need in ctx.needs_input_grad[:3]]
        sums = _Gradients(hidden, weight, bias, needs)
        rows, matrix = hidden.to(dtype), weight.to(dtype)
        num_rows = max(1, min(chunk_rows(len(weight), on_gpu=hidden.is_cuda), len(ids)))
        logits, scores = (rows.new_empty(num_rows, len(weight), dtype=kind) for kind in (dtype, torch.float32))
        losses = [hidden.new_zeros(0, dtype=torch.float32)]
        for start in range(0, len(ids), num_rows):
            some, targets = rows[start : start + num_rows], ids[start : start + num_rows, None]
            own = torch.mm(some, matrix.t(), out=logits[: len(some)])
            if bias is not None:
                own += bias.to(dtype)
            log_p = torch.log_softmax(own.float(), -1, out=scores[: len(some)])
            losses.append(_losses(log_p, targets, smoothing))
            if any(needs):
                sums.add(start, some, matrix, _gradient(log_p, targets, smoothing).to(dtype))
        ctx.save_for_backward(*sums.all)
        return torch.cat(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, factor: Tensor) -> tuple[Tensor | None, ...]:
        found = [
            None if gradient is None else gradient.mul_(factor.to(gradient.dtype)) for gradient in ctx.saved_tensors
        ]
        return (*found, None, None, None, None)


class _Gradients:
    """Of the summed losses by hidden, weight and bias, each None where it is not needed."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]) -> None:
        self._hidden = torch.empty_like(hidden) if needs[0] else None
        self._weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        self._bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs[2] else None
        self._dtypes = weight.dtype, bias.dtype if bias is not None else None

    def add(self, start: int, rows: Tensor, matrix: Tensor, by_logits: Tensor) -> None:
        """The part of a chunk: its first row's number, its rows [r, D], the head [V, D], and the logits' gradient."""
        if self._hidden is not None:
            self._hidden[start : start + len(rows)] = by_logits @ matrix
        if self._weight is not None:
            if rows.dtype == torch.float32:
                self._weight.addmm_(by_logits.t(), rows)
            else:
                self._weight += by_logits.t() @ rows
        if self._bias is not None:
            self._bias += by_logits.sum(0, dtype=torch.float32)

    @property
    def all(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """In the dtypes of what they are gradients of."""
        weight = None if self._weight is None else self._weight.to(self._dtypes[0])
        return self._hidden, weight, None if self._bias is None else self._bias.to(self._dtypes[1])


def _losses(log_p: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """[r, V] and [r, 1] -> [r]."""
    own = -log_p.gather(1, targets)[:, 0]
    return own if not smoothing else (1 - smoothing) * own - smoothing * log_p.mean(-1)


def _gradient(log_p: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Of the losses' sum by the logits, float32 [r, V]; in the place of `log_p`."""
    gradient = log_p.exp_()
    if smoothing:
        gradient -= smoothing / gradient.shape[1]
    return gradient.scatter_add_(1, targets, gradient.new_full(targets.shape, smoothing - 1))
