"""What adapters add to the linear layers. They are not merged into the weights: each row of a step has its own or none.

    y = f (x W^T + s x A^T B^T), with A, B, s (and for DoRA f, else 1) of the row's adapter

All adapters are stacked on the device, so that one call serves rows of many. The functions here are in plain torch.
They run on a CPU, and the kernels of `triton_low_rank` must give the same numbers.

Legend: N packed rows, I input width, O output width, K adapters, P parts of a layer that any of them changes (query,
key and value lie end to end in one layer), r the largest rank. Adapter index 0 means no adapter, index k the k-th.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

# All adapters are computed for every row at once up to so many rows, and ranks of all adapters together. Beyond that,
# the products that are thrown away cost more than the calls that are saved.
_FEW_ROWS, _FEW_RANKS = 64, 256


@dataclass(frozen=True, eq=False)
class AdapterRows:
    """Which adapter each packed row of a step has: `adapter_indices` [N] int32.

    The functions here read the tensor once and keep what they found. So a tensor that is overwritten in place, as that
    of a CUDA graph is, needs `triton_low_rank`. Neighbouring rows with one adapter are computed together.
    """

    adapter_indices: torch.Tensor
    _runs: list[tuple[int, int, int]] = field(default_factory=list, init=False, repr=False)
    _others: list[torch.Tensor] = field(default_factory=list, init=False, repr=False)

    def runs(self) -> list[tuple[int, int, int]]:
        """(adapter, first row, row after the last) of neighbouring rows with one adapter. Waits for the device."""
        if not self._runs:
            indices = self.adapter_indices.tolist()
            starts = [row for row, adapter in enumerate(indices) if row == 0 or adapter != indices[row - 1]]
            ends = [*starts[1:], len(indices)]
            runs = ((indices[start], start, end) for start, end in zip(starts, ends, strict=True))
            self._runs.extend(run for run in runs if run[0])
        return self._runs

    def others(self, num_adapters: int) -> torch.Tensor:
        """[N, K] bool: whether an adapter is not the row's."""
        if not self._others:
            self._others.append(self.adapter_indices[:, None] != torch.arange(1, num_adapters + 1))
        return self._others[0]


class LowRankStack:
    """What all adapters change in one linear layer.

    a: [K, P r, I], a part's ranks together, zeros beyond an adapter's own rank.
    b: [K, W, r], the parts' outputs (W together) end to end, with the scale multiplied in.
    parts: for each part its first output in the layer, and the number of its outputs.
    factors: [K, W], those of DoRA; ones for an adapter without them; None if no adapter has them.
    """

    def __init__(
        self, a: torch.Tensor, b: torch.Tensor, parts: Sequence[tuple[int, int]], factors: torch.Tensor | None = None
    ) -> None:
        self.a, self.b, self.parts, self.factors = a, b, tuple(parts), factors
        self.rank = b.shape[2]
        self.num_bytes = a.nbytes + b.nbytes + (0 if factors is None else factors.nbytes)  # a CPU has b a second time
        self.pieces = [(a[k], list(self._pieces_of(k))) for k in range(len(a))]  # views, made once
        joins = a.device.type == "cpu" and 1 < len(a) <= _FEW_RANKS // self.rank
        self.joined = list(self._joined_parts()) if joins else []

    def _pieces_of(self, k: int) -> Iterator["_Piece"]:
        first = 0
        for part, (column, width) in enumerate(self.parts):
            outputs = slice(first, first + width)
            ranks = slice(part * self.rank, (part + 1) * self.rank)
            factors = None if self.factors is None else self.factors[k, outputs]
            yield _Piece(slice(column, column + width), ranks, self.b[k, outputs].T, factors)
            first += width

    def _joined_parts(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """For each part its outputs in the layer, and B^T of all adapters for them, [K r, outputs]."""
        first = 0
        for column, width in self.parts:
            yield slice(column, column + width), self.b[:, first : first + width].transpose(1, 2).flatten(0, 1)
            first += width


@dataclass(frozen=True, eq=False, slots=True)
class _Piece:
    """One part of one adapter: the outputs it adds to, the ranks it reads, B^T [r, outputs], DoRA's factors [outputs].

    One product over all parts of a layer, with zeros between them, was no quicker than one product for each.
    """

    columns: slice
    ranks: slice
    b: torch.Tensor
    factors: torch.Tensor | None


def add_low_rank(y: torch.Tensor, x: torch.Tensor, stack: LowRankStack, rows: AdapterRows) -> torch.Tensor:
    """Apply each row's adapter to a layer's output y [N, O], given its input x [N, I]. Changes y and returns it."""
    if len(rows.runs()) > 1 and len(x) <= _FEW_ROWS and stack.joined:
        return _add_all_at_once(y, x, stack, rows)
    for adapter, start, end in rows.runs():
        a, pieces = stack.pieces[adapter - 1]
        narrow, wide = functional.linear(x[start:end], a), y[start:end]
        for piece in pieces:
            own = wide[:, piece.columns]
            own.addmm_(narrow[:, piece.ranks], piece.b)
            if piece.factors is not None:
                own.mul_(piece.factors)
    return y


def _add_all_at_once(y: torch.Tensor, x: torch.Tensor, stack: LowRankStack, rows: AdapterRows) -> torch.Tensor:
    """`add_low_rank` in as many calls as one adapter needs: each row meets all adapters, and what others add is zeroed.

    It is overwritten, not multiplied by zero, since another adapter's numbers for the row may not be finite.
    """
    num_adapters, num_parts = len(stack.a), len(stack.parts)
    narrow = functional.linear(x, stack.a.flatten(0, 1)).view(len(x), num_adapters, num_parts, stack.rank)
    narrow.masked_fill_(rows.others(num_adapters)[:, :, None, None], 0)
    for part, (columns, b) in enumerate(stack.joined):
        y[:, columns].addmm_(narrow[:, :, part].flatten(1), b)
    if stack.factors is not None:
        _scale_rows(y, stack, rows)
    return y


def _scale_rows(y: torch.Tensor, stack: LowRankStack, rows: AdapterRows) -> None:
    """Multiply each row by the DoRA factors of its adapter. A row without an adapter stays as it is."""
    for adapter, start, end in rows.runs():
        for piece in stack.pieces[adapter - 1][1]:
            y[start:end, piece.columns].mul_(piece.factors)
