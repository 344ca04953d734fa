"""Runs scheduled steps on the device: lays out their fields, runs the network, and samples.

The runner launches a step without waiting for the one before it. A token that the host does not know yet is taken from
`last_ids` on the device, where the sampling of the step before put it. On a GPU, steps that only decode run as CUDA
graphs (`graphs.py`).

Legend: N packed tokens of a step, S sequences, R sequences that get a new token, P blocks of the longest sequence,
D model width.
"""

import dataclasses
import itertools

import numpy as np
import torch

from alpaca.serving.kernels.low_rank import AdapterRows
from alpaca.serving.kernels.ops import AttentionBatch
from alpaca.serving.llama.graphs import DecodeGraphs, Replayer
from alpaca.serving.llama.network import KeyValueCache, LlamaModel
from alpaca.serving.llama.sampling import SamplingState, commit_tokens, sample_tokens
from alpaca.serving.llama.scheduler import ScheduledSequence
from alpaca.serving.llama.step import UNKNOWN, PendingStep, StepFields, StepScores, to_device, to_tensor
from alpaca.serving.scoring import score_tokens


class Runner:
    """One model, its key/value cache, and the state on the device of up to `max_running` sequences.

    max_context: most tokens of one sequence.
    vocab_size: the tokenizer's. The model may have more rows; their tokens are never sampled.
    """

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
        self.vocab_size = vocab_size
        self.eos_ids = eos_ids
        self.max_blocks = -(-max_context // cache.block_size)  # of one sequence
        # Each running sequence's newest token, by its state row. Row 0 is for padding.
        self.last_ids = torch.zeros(1 + max_running, dtype=torch.int64, device=model.device)
        # In the rotary table the rows for long sequences follow the others, which are as many.
        self._first_long_row = len(model.rotary) // 2 if model.config.rope.long_from else 0
        self.graphs: DecodeGraphs | None = None
        self._block_tables = np.zeros((1 + max_running, self.max_blocks), dtype=np.int32)
        self._table_versions: dict[int, tuple[int, int, int]] = {}

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
    def launch(self, scheduled: list[ScheduledSequence]) -> PendingStep:
        """Queue a step on the device. Every later step sees the keys and values that it writes into the cache.

        A step that raises here may be launched again with the same outcome.
        """
        if self.model.adapters is not None:  # tokens of one adapter must lie together
            scheduled = sorted(scheduled, key=lambda item: item.sequence.adapter_index)
        step, block_tables = self._lay_out(scheduled), self._gather_block_tables(scheduled)
        states = [item.sequence.completion.sampling for item in scheduled if item.samples_token]
        if self.graphs is not None and len(step.token_ids) == len(scheduled) == len(states):
            ids, scores = self._run_graph(step, block_tables, states)
        else:
            hidden = self._run_network(step, block_tables)
            ids, scores = self._sample(hidden, scheduled, states)
            if any(item.sequence.unscored for item in scheduled):
                scores = self._score_prompts(hidden, scheduled, scores)
        pending = self._start_copy(scheduled, ids, scores)
        commit_tokens(states, ids)  # last, so that a step that failed above can be launched again
        return pending

    def _run_graph(
        self, step: StepFields[list], block_tables: np.ndarray, states: list[SamplingState]
    ) -> tuple[torch.Tensor, StepScores | None]:
        """A step that decodes only. Penalties and masks differ from row to row in ways that no graph holds."""
        is_apart = any(state.has_own_scores for state in states)
        logits = self.graphs.launch(step, block_tables, [] if is_apart else states)
        if not is_apart:
            ids = self.graphs.sample(len(states))  # it leaves the logits as they are
        else:
            ids = sample_tokens(logits.clone(), states)
            self._keep_last(step.state_rows, ids)
        return ids, _score_rows(logits, ids, states)

    def _run_network(self, step: StepFields[list], block_tables: np.ndarray) -> torch.Tensor:
        """Hidden states [N, D] of a step's tokens."""
        fields = to_device(step, self.model.device)
        attention = AttentionBatch(
            block_tables=self._tensor(block_tables, torch.int32),
            seq_lens=fields.seq_lens,
            query_starts=self._tensor([0, *itertools.accumulate(step.query_lens)], torch.int32),
            max_query_len=max(step.query_lens),
            max_seq_len=max(step.seq_lens),
        )
        return self.model.forward(
            self._find_token_ids(step, fields),
            fields,
            attention,
            self.cache,
            adapters=AdapterRows(fields.adapter_indices) if any(step.adapter_indices) else None,
        )

    def _find_token_ids(self, step: StepFields[list], fields: StepFields[torch.Tensor]) -> torch.Tensor:
        """The step's token ids [N], with those that only the device knows filled in."""
        if UNKNOWN not in step.token_ids:
            return fields.token_ids
        assert step.token_ids.count(UNKNOWN) <= len(step.state_rows)
        row_of_token = fields.state_rows.repeat_interleave(fields.query_lens, output_size=len(step.token_ids))
        return torch.where(fields.token_ids == UNKNOWN, self.last_ids[row_of_token], fields.token_ids)

    def _sample(
        self, hidden: torch.Tensor, scheduled: list[ScheduledSequence], states: list[SamplingState]
    ) -> tuple[torch.Tensor, StepScores | None]:
        """The new token [R] of each sequence whose last known token is in the step, from hidden states [N, D].

        With the scores of those that are to be scored.
        """
        if not states:
            return torch.empty(0, dtype=torch.int64, device=hidden.device), None
        starts = zip(scheduled, _starts(scheduled), strict=True)
        last_tokens = [start + item.num_tokens - 1 for item, start in starts if item.samples_token]
        if len(last_tokens) < len(hidden):
            hidden = hidden.index_select(0, self._tensor(last_tokens))
        logits = self.model.logits(hidden)[:, : self.vocab_size]
        # Sampling changes wide logits in place, and scores are those of the model.
        is_kept = logits.dtype.itemsize >= 4 and any(state.request.logprobs is not None for state in states)
        ids = sample_tokens(logits.clone() if is_kept else logits, states)
        self._keep_last([item.sequence.state_row for item in scheduled if item.samples_token], ids)
        return ids, _score_rows(logits, ids, states)

    def _score_prompts(
        self, hidden: torch.Tensor, scheduled: list[ScheduledSequence], scores: StepScores | None
    ) -> StepScores | None:
        """Score the prompt tokens that follow those in the step, where they are to be scored; beside other scores."""
        rows: list[int] = []
        token_ids: list[int] = []
        num_top: list[int] = []
        prompts: list[tuple[ScheduledSequence, int]] = []
        for item, first_row in zip(scheduled, _starts(scheduled), strict=True):
            if scored := item.scored:
                rows.extend(first_row + at - item.start for at in scored)
                token_ids.extend(item.sequence.token_ids[at + 1] for at in scored)
                num_top.extend([item.sequence.completion.sampling.request.logprobs or 0] * len(scored))
                prompts.append((item, len(scored)))
        if not prompts:
            return scores
        found = score_tokens(
            self._tensor(rows),
            self._tensor(token_ids),
            lambda some: self.model.logits(hidden.index_select(0, some))[:, : self.vocab_size],
            num_top=num_top,
        )
        return dataclasses.replace(scores or StepScores(), prompts=prompts, prompt_scores=found)

    def _keep_last(self, state_rows: list[int], ids: torch.Tensor) -> None:
        """Keep the new tokens for the next step, which may start before the host knows them.

        NOT_FINITE is kept as token 0, since the embedding has no row for it.
        """
        self.last_ids[self._tensor(state_rows)] = ids.clamp(min=0)

    def _start_copy(
        self, scheduled: list[ScheduledSequence], ids: torch.Tensor, scores: StepScores | None
    ) -> PendingStep:
        """Begin to copy the new tokens and their scores to the host."""
        scores = scores and scores.to_host()
        if ids.device.type == "cpu":
            return PendingStep(scheduled, ids.clone(), scores=scores)  # the next replay of a graph overwrites `ids`
        on_host = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
        on_host.copy_(ids, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return PendingStep(scheduled, on_host, ready, scores)

    @torch.inference_mode()
    def compile_prefill(self) -> None:
        """Build every kernel that a step with prompts can need, for few and many tokens, short and long prompts.

        The steps read and write block 0, which belongs to no sequence.
        """
        longest = min(self.max_blocks * self.cache.block_size, len(self.model.rotary))
        for num_tokens, length in itertools.product((16, 32, 64, 128), (1, longest)):
            self._run_padding(min(num_tokens, longest), length, adapter_index=0)
        if self.model.adapters is not None:
            for num_tokens in (16, 128):  # the adapters' kernels differ for few and many tokens, not by length
                self._run_padding(min(num_tokens, longest), 1, adapter_index=1)

    def _run_padding(self, num_tokens: int, length: int, *, adapter_index: int) -> None:
        """Run a step of one made-up sequence with `num_tokens` tokens in the step, and at least `length` in all."""
        zeros = [0] * num_tokens
        step = StepFields(
            token_ids=zeros, positions=list(range(num_tokens)), slot_mapping=zeros,
            adapter_indices=[adapter_index] * num_tokens, state_rows=[0], seq_lens=[max(num_tokens, length)],
            query_lens=[num_tokens],
        )  # fmt: skip
        self.model.logits(self._run_network(step, self._block_tables[:1]))

    # Laying out

    def _lay_out(self, scheduled: list[ScheduledSequence]) -> StepFields[list]:
        step = StepFields(
            token_ids=[], positions=[], slot_mapping=[], adapter_indices=[], state_rows=[], seq_lens=[], query_lens=[]
        )
        size = self.cache.block_size
        for item in scheduled:
            sequence, start, end = item.sequence, item.start, item.start + item.num_tokens
            blocks = sequence.blocks
            known = sequence.token_ids[start:end]
            step.token_ids.extend(known if len(known) == item.num_tokens else [*known, UNKNOWN])
            row = self._first_long_row if sequence.is_long else 0
            step.positions.extend(range(row + start, row + end))
            step.slot_mapping.extend(blocks[at // size] * size + at % size for at in range(start, end))
            step.adapter_indices.extend([sequence.adapter_index] * item.num_tokens)
            step.state_rows.append(sequence.state_row)
            step.seq_lens.append(end)
            step.query_lens.append(item.num_tokens)
        return step

    def _gather_block_tables(self, scheduled: list[ScheduledSequence]) -> np.ndarray:
        """Each sequence's blocks, [S, P] int32. Rows are kept from step to step, as they seldom change."""
        longest = 0
        for item in scheduled:
            sequence = item.sequence
            version = (sequence.arrival, sequence.num_admissions, len(sequence.blocks))
            if self._table_versions.get(sequence.state_row) != version:
                self._block_tables[sequence.state_row, : len(sequence.blocks)] = sequence.blocks
                self._table_versions[sequence.state_row] = version
            longest = max(longest, len(sequence.blocks))
        return self._block_tables[[item.sequence.state_row for item in scheduled], :longest]

    def _tensor(self, values: list[int] | np.ndarray, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return to_tensor(values, dtype, self.model.device)


def _starts(scheduled: list[ScheduledSequence]) -> list[int]:
    """The row of each sequence's first token in the step."""
    return [0, *itertools.accumulate(item.num_tokens for item in scheduled[:-1])]


def _score_rows(logits: torch.Tensor, ids: torch.Tensor, states: list[SamplingState]) -> StepScores | None:
    """The scores of new tokens [R] by the model's logits [R, V], for the rows that want them."""
    rows = [row for row, state in enumerate(states) if state.request.logprobs is not None]
    if not rows:
        return None
    where = to_tensor(rows, torch.int64, logits.device)
    scores = score_tokens(
        where,
        ids.index_select(0, where),
        lambda some: logits.index_select(0, some),
        num_top=[states[row].request.logprobs for row in rows],
    )
    return StepScores(rows=rows, row_scores=scores)
