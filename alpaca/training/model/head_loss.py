"""The summed loss of target positions, whose gradients are found in the forward pass, a chunk of logits at a time.

Autograd would keep the logits, or compute them a second time for the gradient. But the gradient of a sum is known as
soon as a chunk's logits are there, up to the factor that the sum itself is given later. So logits are computed once,
each chunk while it is in a CPU's cache, and one softmax serves loss and gradient.

Legend: R target positions, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# Elements of logits that exist at a time: in float32 just more than 32 MiB, as a CPU's heap keeps smaller blocks.
CPU_CHUNK_LOGITS, GPU_CHUNK_LOGITS = 9 << 20, 32 << 20
# Rows of logits begin at multiples of so many elements: the padding token that fine-tuning adds makes vocabularies odd,
# and a CPU's product into rows of 32,001 takes 1.4 times as long as into rows of 32,064.
_ROW_ELEMENTS = 64


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
        logits = _Logits(rows, num_rows, len(weight))
        losses = [hidden.new_zeros(0, dtype=torch.float32)]
        counts = (ids >= 0)[:, None]  # -100 carries no loss: a process that has no micro-batch left computes such
        all_count = not hidden.is_cuda and bool(counts.all())  # not asked on a GPU, which would have to be waited for
        ids = ids.clamp(min=0)
        for start in range(0, len(ids), num_rows):
            some, targets = rows[start : start + num_rows], ids[start : start + num_rows, None]
            found, probabilities = _losses(logits.compute(some, matrix, bias), logits.probabilities, targets, smoothing)
            losses.append(found if all_count else found * counts[start : start + num_rows, 0])
            if any(needs):
                gradient = _gradient(probabilities, targets, smoothing)
                if not all_count:
                    gradient *= counts[start : start + num_rows]
                sums.add(start, some, matrix, gradient.to(dtype))
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


class _Logits:
    """A chunk's logits in float32, in rows of a length that suits products; a CPU's softmax takes their place."""

    def __init__(self, rows: Tensor, num_rows: int, vocab_size: int) -> None:
        length = -(-vocab_size // _ROW_ELEMENTS) * _ROW_ELEMENTS
        self._size = vocab_size
        self._all = rows.new_empty(num_rows, length, dtype=torch.float32)
        self._low = None if rows.dtype == torch.float32 else rows.new_empty(num_rows, vocab_size)
        self._others = torch.empty_like(self._all) if rows.is_cuda else self._all

    def compute(self, rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        """[r, D] and [V, D] -> [r, V], a view that holds until the next call."""
        logits = self._all[: len(rows), : self._size]
        own = torch.mm(rows, matrix.t(), out=logits if self._low is None else self._low[: len(rows)])
        if bias is not None:
            own += bias.to(own.dtype)
        if self._low is not None:
            logits.copy_(own)
        return logits

    def probabilities(self, num_rows: int) -> Tensor:
        """The softmax [num_rows, V] of what was computed, which on a CPU is gone then."""
        scores = self._all[:num_rows]
        scores[:, self._size :] = -torch.inf  # what fills a row up has no probability
        return torch.softmax(scores, -1, out=self._others[:num_rows])[:, : self._size]


def _losses(
    logits: Tensor, probabilities: Callable[[int], Tensor], targets: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """The losses [r] of logits [r, V] and targets [r, 1], and the probabilities [r, V].

    One exponential serves both. The logarithm of a row's sum is found from the highest logit and its probability, the
    greatest, which is never too small for it; against log_softmax a loss differs by some 1e-7 of it.
    """
    own, highest = logits.gather(1, targets)[:, 0], logits.amax(-1)
    mean = logits.mean(-1) if smoothing else None
    found = probabilities(len(logits))
    log_sum = highest - found.amax(-1).log()
    losses = log_sum - own
    return losses if mean is None else (1 - smoothing) * losses + smoothing * (log_sum - mean), found


def _gradient(probabilities: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Of the losses' sum by the logits, float32 [r, V]; in the place of `probabilities`."""
    if smoothing:
        probabilities -= smoothing / probabilities.shape[1]
    return probabilities.scatter_add_(1, targets, probabilities.new_full(targets.shape, smoothing - 1))
