"""Runs the scheduler's steps on the device: lays tokens out, runs the network, samples; and knows no requests' fate.

A step is launched without waiting for the one before: a token that is not known on the host yet is taken from
`last_ids` on the device, where sampling put it. Steps that only decode run in CUDA graphs on a GPU (`graphs.py`).

Legend: N packed tokens of a step, S sequences, R rows that are sampled, V vocabulary.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from alpaca.serving.kernels.low_rank import AdapterRows
from alpaca.serving.kernels.ops import AttentionBatch
from alpaca.serving.llama.graphs import DecodeGraphs, Replayer
from alpaca.serving.llama.network import KeyValueCache, LlamaModel
from alpaca.serving.llama.sampling import Choices, choose, note, send
from alpaca.serving.llama.scheduler import Work
from alpaca.serving.llama.step import HostStep, Launched, StepInputs

UNKNOWN = -1  # in place of a token id: sampled by the step before, to be found in last_ids


class Runner:
    """One model, its key/value cache, and the device's side of up to `max_running` sequences."""

    def __init__(
        self,
        model: LlamaModel,
        cache: KeyValueCache,
        *,
        max_running: int,
        max_context: int,
        vocab_size: int,
        eos_ids: frozenset[int],
    ) -> None:
        self.model = model
        self.cache = cache
        self.vocab_size = vocab_size  # the tokenizer's: an embedding may be padded beyond it
        self.eos_ids = eos_ids
        self.max_blocks = -(-max_context // cache.block_size)  # of one sequence
        self.last_ids = torch.zeros(max_running + 1, dtype=torch.int64, device=model.device)  # the last is for padding
        self.graphs: DecodeGraphs | None = None
        self._block_tables = np.zeros((max_running, self.max_blocks), dtype=np.int32)
        self._in_table: dict[int, tuple[int, int, int]] = {}

    def make_graphs(self, replayer: Replayer | None = None) -> DecodeGraphs:
        """Graphs of this runner's decode steps, which `launch` uses once they are captured and put in `graphs`."""
        return DecodeGraphs(
            self.model,
            self.cache,
            self.last_ids,
            vocab_size=self.vocab_size,
            eos_ids=self.eos_ids,
            max_blocks=self.max_blocks,
            replayer=replayer,
        )

    @torch.inference_mode()
    def launch(self, works: list[Work]) -> Launched:
        """Start a step; what it wrote into the cache is there for every later one."""
        if self.model.adapters is not None:
            works = sorted(works, key=lambda work: work.sequence.adapter)  # rows of one adapter lie together
        step = self._lay_out(works)
        sampled = [work for work in works if work.samples]
        rows = [work.sequence.owner.choices for work in sampled]
        tables = self._tables(works)
        if self.graphs is not None and step.is_decode and len(sampled) == len(works):
            ids = self._launch_graph(step, tables, rows)
        else:
            hidden = self.model.forward(self._inputs(step, tables), self.cache)
            ids = self._sample(hidden, works, step, rows)
        launched = self._deliver(works, ids)
        note(rows, ids)  # last: a step that failed before is tried again as if it had not been
        return launched

    def _launch_graph(self, step: HostStep, tables: np.ndarray, rows: list[Choices]) -> torch.Tensor:
        penalised = any(row.is_penalised for row in rows)
        logits = self.graphs.launch(step, tables, [] if penalised else rows)
        if penalised:
            ids = choose(logits.clone(), rows)
            self._keep_last(step.state_rows, ids)
            return ids
        return self.graphs.sample(len(rows))

    def _sample(self, hidden: torch.Tensor, works: list[Work], step: HostStep, rows: list[Choices]) -> torch.Tensor:
        """The next token of each sequence whose last one is in the step, from hidden [N, D]: [R]."""
        if not rows:
            return torch.empty(0, dtype=torch.int64, device=hidden.device)
        last = [end - 1 for work, end in zip(works, step.query_starts[1:], strict=True) if work.samples]
        if len(last) < len(hidden):
            hidden = hidden.index_select(0, self._tensor(last))
        ids = choose(self.model.logits(hidden)[:, : self.vocab_size], rows)
        self._keep_last([work.sequence.slot for work in works if work.samples], ids)
        return ids

    def _keep_last(self, state_rows: list[int], ids: torch.Tensor) -> None:
        """For the next step, which may start before the host knows them; what is no token must not be looked up."""
        self.last_ids[self._tensor(state_rows)] = ids.clamp(min=0)

    def _deliver(self, works: list[Work], ids: torch.Tensor) -> Launched:
        if ids.device.type == "cpu":
            return Launched(works, ids.clone())  # a graph's next replay writes over them
        on_host = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
        on_host.copy_(ids, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return Launched(works, on_host, ready)

    @torch.inference_mode()
    def compile_prefill(self) -> None:
        """Have every kernel built that a step with prompts can need: of few and many rows, of short and long prompts.

        All of it reads and writes block 0, which is nobody's.
        """
        longest = min(self.max_blocks * self.cache.block_size, len(self.model.rotary))
        for num_tokens, length in itertools.product((16, 32, 64, 128), (1, longest)):
            self._compute_nothing(min(num_tokens, longest), length, slot=0)
        if self.model.adapters is not None:
            for num_tokens in (16, 128):  # their kernels know few rows and many, and no lengths
                self._compute_nothing(min(num_tokens, longest), 1, slot=1)

    def _compute_nothing(self, num_tokens: int, length: int, *, slot: int) -> None:
        """A step of one sequence with `num_tokens` tokens, its last at `length` or later, all with one adapter."""
        device, length = self.model.device, max(num_tokens, length)
        inputs = StepInputs(
            ids=torch.zeros(num_tokens, dtype=torch.int64, device=device),
            positions=torch.arange(num_tokens, device=device),
            slots=torch.zeros(num_tokens, dtype=torch.int64, device=device),
            attention=AttentionBatch(
                block_tables=torch.zeros(1, self.max_blocks, dtype=torch.int32, device=device),
                seq_lens=self._tensor([length], torch.int32),
                query_starts=self._tensor([0, num_tokens], torch.int32),
                max_query_len=num_tokens,
                max_seq_len=length,
            ),
            adapters=AdapterRows(self._tensor([slot] * num_tokens, torch.int32)) if slot else None,
        )
        self.model.logits(self.model.forward(inputs, self.cache))

    # Laying out

    def _lay_out(self, works: list[Work]) -> HostStep:
        step = HostStep([], [], [], [], [0], [], [])
        size = self.cache.block_size
        for work in works:
            sequence, start, end = work.sequence, work.start, work.start + work.num_tokens
            blocks = sequence.blocks
            known = sequence.ids[start:end]
            step.ids.extend(known if len(known) == work.num_tokens else [*known, UNKNOWN])
            step.positions.extend(range(start, end))
            step.slots.extend(blocks[at // size] * size + at % size for at in range(start, end))
            step.seq_lens.append(end)
            step.query_starts.append(step.query_starts[-1] + work.num_tokens)
            step.state_rows.append(sequence.slot)
            step.adapters.extend([sequence.adapter] * work.num_tokens)
        return step

    def _tables(self, works: list[Work]) -> np.ndarray:
        """Each sequence's blocks, [S, P] int32; kept from step to step, as they seldom change."""
        longest = 0
        for work in works:
            sequence = work.sequence
            state = (sequence.order, sequence.num_admissions, len(sequence.blocks))
            if self._in_table.get(sequence.slot) != state:
                self._block_tables[sequence.slot, : len(sequence.blocks)] = sequence.blocks
                self._in_table[sequence.slot] = state
            longest = max(longest, len(sequence.blocks))
        return self._block_tables[[work.sequence.slot for work in works], :longest]

    def _inputs(self, step: HostStep, tables: np.ndarray) -> StepInputs:
        ids = self._tensor(step.ids)
        if UNKNOWN in step.ids:
            assert step.ids.count(UNKNOWN) <= len(step.state_rows)
            row_of_token = np.repeat(step.state_rows, np.diff(step.query_starts))
            ids = torch.where(ids == UNKNOWN, self.last_ids[self._tensor(row_of_token)], ids)
        queries = np.diff(step.query_starts)
        return StepInputs(
            ids=ids,
            positions=self._tensor(step.positions),
            slots=self._tensor(step.slots),
            attention=AttentionBatch(
                block_tables=self._tensor(tables, torch.int32),
                seq_lens=self._tensor(step.seq_lens, torch.int32),
                query_starts=self._tensor(step.query_starts, torch.int32),
                max_query_len=int(queries.max()),
                max_seq_len=max(step.seq_lens),
            ),
            adapters=AdapterRows(self._tensor(step.adapters, torch.int32)) if step.uses_adapters else None,
        )

    def _tensor(self, values: Sequence[int] | np.ndarray, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return send(values, dtype, self.model.device)
