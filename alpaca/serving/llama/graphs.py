"""Decode steps as captured CUDA graphs: one launch for a step instead of some hundred kernels.

A graph is bound to the memory it was captured with, so every step's inputs go into the same buffers, and a step of S
sequences runs in the smallest bucket that holds them; the rows beyond S are padding: they write into block 0, which is
nobody's, and their tokens are dropped. What varies from step to step (lengths, blocks, sampling) is read from these
buffers on the device and never baked in. The network is captured once for each bucket, and where there are adapters
once more with them, so that steps in which no row has one cost nothing more; sampling once for each bucket and kind of
sampling, so that a request with penalties (sampled outside of a graph) costs the others no graph.

`replayer` makes something with `replay()` of a function; tests pass one that simply calls it, on the CPU.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from alpaca.serving.kernels.low_rank import AdapterRows
from alpaca.serving.kernels.ops import AttentionBatch
from alpaca.serving.llama.network import KeyValueCache, LlamaModel
from alpaca.serving.llama.sampling import Choices, SamplingBatch, at_least_float32, columns_of, flags_of, sample
from alpaca.serving.llama.step import HostStep, StepInputs

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_STAGING_SETS = 2  # a step is laid out while the device may still copy the one before
_FIELDS = {
    "ids": torch.int64, "positions": torch.int64, "slots": torch.int64, "state_rows": torch.int64,
    "top_k": torch.int64, "uniform": torch.float64, "seq_lens": torch.int32, "temperature": torch.float32,
    "top_p": torch.float32, "min_p": torch.float32, "must_go_on": torch.bool, "adapters": torch.int32,
}  # fmt: skip
_KINDS = ((False, False), (True, False), (True, True))  # any row sampled, any row filtered


class Replayable(Protocol):
    def replay(self) -> None: ...


Replayer = Callable[[Callable[[], None]], Replayable]


class CudaReplayer:
    """Captures functions as CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # one for all: libraries keep a workspace for each

    def __call__(self, function: Callable[[], None]) -> Replayable:
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # compiles kernels and lets libraries allocate, which a capture must not
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            function()
        return graph


class DecodeGraphs:
    """The graphs over one model and cache. Not safe for several threads, as the device has one owner.

    last_ids: [max_running + 1] int64, each running sequence's newest token; the last row is for padding.
    vocab_size: the tokenizer's, by which logits are cut.    max_blocks: of one sequence.
    """

    def __init__(
        self,
        model: LlamaModel,
        cache: KeyValueCache,
        last_ids: torch.Tensor,
        *,
        vocab_size: int,
        eos_ids: frozenset[int],
        max_blocks: int,
        replayer: Replayer | None = None,
    ) -> None:
        self._model, self._cache, self._last_ids, self._vocab_size = model, cache, last_ids, vocab_size
        max_running = len(last_ids) - 1
        self._replayer = replayer or CudaReplayer()
        self.buckets = [size for size in BUCKETS if size < max_running] + [max_running]
        device, num_rows, num_blocks = model.device, self.buckets[-1], max_blocks
        self._padding_row = max_running  # of last_ids
        self._memory = _bytes_for(num_rows, device=device)
        self._inputs = _views(self._memory, num_rows)
        self._tables = torch.zeros(num_rows, num_blocks, dtype=torch.int32, device=device)
        self._query_starts = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
        self._eos_ids = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=device)
        self._ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._staging = [_Staging(num_rows, num_blocks, pin=device.type == "cuda") for _ in range(_STAGING_SETS)]
        self._logits: dict[int, torch.Tensor] = {}
        self._forward: dict[tuple[int, bool], Replayable] = {}
        self._sampling: dict[tuple[int, tuple[bool, bool]], Replayable] = {}

    @torch.inference_mode()
    def capture(self, progress: Callable[[int], object] = lambda size: None) -> None:
        """Capture everything, the largest bucket first, whose memory the others then share."""
        for size in reversed(self.buckets):
            self._forward[size, False] = self._replayer(lambda size=size: self._run_forward(size))
            if self._model.adapters is not None:
                self._forward[size, True] = self._replayer(lambda size=size: self._run_with_adapters(size))
            for kind in _KINDS:
                self._sampling[size, kind] = self._replayer(lambda size=size, kind=kind: self._run_sampling(size, kind))
            progress(size)

    def launch(self, step: HostStep, tables: np.ndarray, rows: Sequence[Choices]) -> torch.Tensor:
        """Queue a step that gives every sequence one token. The logits [S, V], for `choose`.

        Where `rows` are given, none of them penalised, they are for `sample`.
        """
        num_rows = len(step.ids)
        size = next(size for size in self.buckets if size >= num_rows)
        staging = self._staging[0]
        self._staging.reverse()
        staging.fill(step, tables, size, padding_row=self._padding_row)
        self._size, self._kind = size, (False, False)
        if rows:
            staging.fill_sampling(columns_of(rows), size)
            flags = flags_of(rows)
            self._kind = (flags["any_sampled"], flags["any_filtered"])
        staging.send(self._memory, self._tables, size)
        self._forward[size, step.uses_adapters].replay()
        return self._logits[size][:num_rows]

    def sample(self, num_rows: int) -> torch.Tensor:
        """Queue the sampling of the step just launched with its rows. Its ids [S]."""
        self._sampling[self._size, self._kind].replay()
        return self._ids[:num_rows]

    # What is captured

    def _run_forward(self, size: int) -> None:
        self._logits[size] = self._compute_logits(size, uses_adapters=False)

    def _run_with_adapters(self, size: int) -> None:
        """The same into the same memory, where the sampling's graphs look for it."""
        logits = self._compute_logits(size, uses_adapters=True)
        kept = self._logits.setdefault(size, logits)
        if kept is not logits:
            kept.copy_(logits)

    def _compute_logits(self, size: int, *, uses_adapters: bool) -> torch.Tensor:
        inputs = {name: tensor[:size] for name, tensor in self._inputs.items()}
        ids = torch.where(inputs["ids"] < 0, self._last_ids[inputs["state_rows"]], inputs["ids"])
        step = StepInputs(
            ids=ids,
            positions=inputs["positions"],
            slots=inputs["slots"],
            attention=AttentionBatch(
                block_tables=self._tables[:size],
                seq_lens=inputs["seq_lens"],
                query_starts=self._query_starts[: size + 1],
                max_query_len=1,
                max_seq_len=self._tables.shape[1] * self._cache.block_size,
            ),
            adapters=AdapterRows(inputs["adapters"]) if uses_adapters else None,
        )
        hidden = self._model.forward(step, self._cache)
        return self._model.logits(hidden)[:, : self._vocab_size]

    def _run_sampling(self, size: int, kind: tuple[bool, bool]) -> None:
        inputs = {name: tensor[:size] for name, tensor in self._inputs.items()}
        batch = SamplingBatch(
            **{name: inputs[name] for name in ("temperature", "top_k", "top_p", "min_p", "uniform", "must_go_on")},
            eos_ids=self._eos_ids,
            any_greedy=True,
            any_sampled=kind[0],
            any_filtered=kind[1],
            any_must_go_on=True,
        )
        # Copied, as sampling changes its scores in place and a replay must find the logits as they were.
        ids = sample(at_least_float32(self._logits[size]).clone(), batch)
        self._ids[:size].copy_(ids)
        self._last_ids.index_copy_(0, inputs["state_rows"], ids.clamp(min=0))


class _Staging:
    """A step's inputs on the host, in pinned memory, to be copied while the device works."""

    def __init__(self, num_rows: int, num_blocks: int, *, pin: bool) -> None:
        self._bytes = _bytes_for(num_rows, pin=pin)
        self._fields = {name: tensor.numpy() for name, tensor in _views(self._bytes, num_rows).items()}
        self._tables = torch.zeros(num_rows, num_blocks, dtype=torch.int32, pin_memory=pin)
        self._table_rows = self._tables.numpy()

    def fill(self, step: HostStep, tables: np.ndarray, size: int, *, padding_row: int) -> None:
        """Lay a step out, padding up to `size` rows."""
        for name, values, padding in (
            ("ids", step.ids, 0),
            ("positions", step.positions, 0),
            ("slots", step.slots, 0),
            ("seq_lens", step.seq_lens, 0),
            ("state_rows", step.state_rows, padding_row),
            ("adapters", step.adapters, 0),
        ):
            self._put(name, values, size, padding)
        self._table_rows[: len(tables), : tables.shape[1]] = tables

    def fill_sampling(self, columns: dict[str, list], size: int) -> None:
        """The same for the rows' sampling; padding rows are greedy."""
        for name, values in columns.items():
            self._put(name, values, size, 0)

    def send(self, inputs: torch.Tensor, tables: torch.Tensor, size: int) -> None:
        """Copy everything to the device, without waiting."""
        inputs.copy_(self._bytes, non_blocking=True)
        tables[:size].copy_(self._tables[:size], non_blocking=True)

    def _put(self, name: str, values: Sequence, size: int, padding: int) -> None:
        field = self._fields[name]
        field[: len(values)] = values
        field[len(values) : size] = padding


def _bytes_for(num_rows: int, *, device: torch.device | None = None, pin: bool = False) -> torch.Tensor:
    """Memory for all fields: one copy moves them together."""
    size = sum(_aligned(num_rows * dtype.itemsize) for dtype in _FIELDS.values())
    return torch.zeros(size, dtype=torch.uint8, device=device, pin_memory=pin)


def _views(memory: torch.Tensor, num_rows: int) -> dict[str, torch.Tensor]:
    """Each field [num_rows] as a part of `memory`."""
    views = {}
    start = 0
    for name, dtype in _FIELDS.items():
        num_bytes = num_rows * dtype.itemsize
        views[name] = memory[start : start + num_bytes].view(dtype)
        start += _aligned(num_bytes)
    return views


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16
