"""Decode steps as captured CUDA graphs: the host launches one graph for a step instead of some hundred kernels.

A graph reads and writes the memory it was captured with. So the fields of every step are copied into the same buffers,
and a step of S sequences runs in the smallest bucket of at least S rows. The rows beyond S are padding: they write into
block 0, which belongs to no sequence, and their tokens are dropped. Lengths, blocks and sampling parameters vary from
step to step; the kernels read them from the buffers, and none is fixed in a graph.

The network is captured once for each bucket. If there are adapters, it is captured once more with them, so that steps
without an adapter do not pay for them. Sampling is captured apart, once for each bucket and kind of sampling. So a
request with penalties, which is sampled outside of a graph, leaves the network of its step in one.

Tests pass a `replayer` that calls the function again instead of capturing it, on the CPU.

Legend: S sequences of a step, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from alpaca.serving.kernels.low_rank import AdapterRows
from alpaca.serving.kernels.ops import AttentionBatch
from alpaca.serving.llama.network import KeyValueCache, LlamaModel
from alpaca.serving.llama.sampling import (
    SamplingKind,
    SamplingState,
    at_least_float32,
    sample_batch,
    sampling_fields,
)
from alpaca.serving.llama.step import SamplingFields, StepBuffers, StepFields

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_NUM_STAGING = 2  # a step is laid out while the device may still copy the one before
# A bucket's graph may hold any mixture of rows, so only the costly parts of sampling are left out where no row needs
# them.
_KINDS = tuple(
    SamplingKind(any_greedy=True, any_sampled=any_sampled, any_filtered=any_filtered, any_must_go_on=True)
    for any_sampled, any_filtered in ((False, False), (True, False), (True, True))
)


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
    """The graphs of one model and cache. One thread uses them, the one that owns the device.

    last_ids: [1 + max_running] int64, each running sequence's newest token by its state row; row 0 is for padding.
    vocab_size: the tokenizer's; logits beyond it are cut off.
    max_blocks: most blocks of one sequence.
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
        max_running, device = len(last_ids) - 1, model.device
        self._replayer = replayer or CudaReplayer()
        self.buckets = [size for size in BUCKETS if size < max_running] + [max_running]
        self._buffers = StepBuffers(max_running, max_blocks, device=device)
        pin = device.type == "cuda"
        self._staging = [StepBuffers(max_running, max_blocks, pin=pin) for _ in range(_NUM_STAGING)]
        self._query_starts = torch.arange(max_running + 1, dtype=torch.int32, device=device)
        self._eos_ids = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=device)
        self._ids = torch.zeros(max_running, dtype=torch.int64, device=device)
        self._logits: dict[int, torch.Tensor] = {}
        self._forward: dict[tuple[int, bool], Replayable] = {}
        self._sampling: dict[tuple[int, SamplingKind], Replayable] = {}

    @torch.inference_mode()
    def capture(self, progress: Callable[[int], object] = lambda size: None) -> None:
        """Capture all graphs, the largest bucket first, as the others then share its memory."""
        for size in reversed(self.buckets):
            self._forward[size, False] = self._replayer(lambda size=size: self._run_forward(size))
            if self._model.adapters is not None:
                self._forward[size, True] = self._replayer(lambda size=size: self._run_with_adapters(size))
            for kind in _KINDS:
                self._sampling[size, kind] = self._replayer(lambda size=size, kind=kind: self._run_sampling(size, kind))
            progress(size)

    def launch(self, step: StepFields[list], block_tables: np.ndarray, states: list[SamplingState]) -> torch.Tensor:
        """Queue the network of a step in which every sequence has one token. Returns its logits [S, V].

        With `states`, none of them with penalties, `sample` may follow. Without them the caller samples from a copy of
        the logits, which the next launch overwrites.
        """
        num_rows = len(step.token_ids)
        size = next(size for size in self.buckets if size >= num_rows)
        staging = self._staging[0]
        self._staging.reverse()
        staging.write(step, size)
        staging.write_block_tables(block_tables)
        self._size, self._kind = size, _KINDS[0]
        if states:
            staging.write(sampling_fields(states), size)
            self._kind = dataclasses.replace(SamplingKind.of(states), any_greedy=True, any_must_go_on=True)
        self._buffers.copy_from(staging, size)
        self._forward[size, any(step.adapter_indices)].replay()
        return self._logits[size][:num_rows]

    def sample(self, num_rows: int) -> torch.Tensor:
        """Queue the sampling of the step just launched with its states. Returns its token ids [S]."""
        self._sampling[self._size, self._kind].replay()
        return self._ids[:num_rows]

    # What is captured

    def _run_forward(self, size: int) -> None:
        self._logits[size] = self._compute_logits(size, uses_adapters=False)

    def _run_with_adapters(self, size: int) -> None:
        """Put the logits where the graph without adapters puts them, since the graphs of sampling read them there."""
        logits = self._compute_logits(size, uses_adapters=True)
        kept = self._logits.setdefault(size, logits)
        if kept is not logits:
            kept.copy_(logits)

    def _compute_logits(self, size: int, *, uses_adapters: bool) -> torch.Tensor:
        step, block_tables = self._buffers.view(StepFields, size), self._buffers.block_tables
        token_ids = torch.where(step.token_ids < 0, self._last_ids[step.state_rows], step.token_ids)
        attention = AttentionBatch(
            block_tables=block_tables[:size],
            seq_lens=step.seq_lens,
            query_starts=self._query_starts[: size + 1],
            max_query_len=1,
            max_seq_len=block_tables.shape[1] * self._cache.block_size,
        )
        adapters = AdapterRows(step.adapter_indices) if uses_adapters else None
        hidden = self._model.forward(token_ids, step, attention, self._cache, adapters=adapters)
        return self._model.logits(hidden)[:, : self._vocab_size]

    def _run_sampling(self, size: int, kind: SamplingKind) -> None:
        state_rows = self._buffers.view(StepFields, size).state_rows
        # Copied, as sampling changes its scores in place and a replay must find the logits as they were.
        scores = at_least_float32(self._logits[size]).clone()
        ids = sample_batch(scores, self._buffers.view(SamplingFields, size), self._eos_ids, kind)
        self._ids[:size].copy_(ids)
        self._last_ids.index_copy_(0, state_rows, ids.clamp(min=0))
