"""Decides which tokens of which sequences the next step computes. Plain Python without torch: it only decides.

Requests are served in order of arrival. Every running sequence gets its next token in each step (decode). What is left
of the step's token budget goes to prompts, in order and in chunks (prefill), so that a long prompt never holds the
others up. When the cache is full, the youngest running sequence gives its blocks back and computes its tokens again
later (preemption by recomputation). The oldest sequence is never preempted, so every sequence finishes some day.

A step may be scheduled while the step before it is still being computed. Tokens that were sampled, but whose ids the
host does not know yet, are counted as `num_in_flight`.
"""

import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from alpaca.serving.llama.cache import NO_PREFIX, BlockPool


class Sequence:
    """The tokens of one completion, the blocks that hold their keys and values, and how far it has been computed.

    adapter_index: 0 for the base model alone, k for the k-th adapter (`kernels.low_rank`).
    long_from: from so many tokens on, all its positions turn as those of long sequences do (longrope); 0: never.
    shares_prompt_with: the first completion of the same prompt. This sequence waits until that one has computed the
    prompt, then shares its blocks.
    scores_from: from this prompt token on, the logits are wanted of all but the last. They are computed even if the
    cache has them. None: no logits are wanted.
    completion: the caller's own record of the completion. The scheduler never looks into it.
    """

    def __init__(
        self,
        prompt_ids: Iterable[int],
        *,
        max_new_tokens: int,
        adapter_index: int = 0,
        long_from: int = 0,
        shares_prompt_with: "Sequence | None" = None,
        scores_from: int | None = None,
        completion: Any = None,
    ) -> None:
        self.token_ids = list(prompt_ids)  # the prompt, then the tokens of the answer whose ids are known
        self.num_prompt_tokens = len(self.token_ids)
        self.max_new_tokens = max_new_tokens
        self.adapter_index = adapter_index
        self.long_from = long_from
        self.is_long = False  # whether its blocks hold keys that turn as those of long sequences
        self.shares_prompt_with = shares_prompt_with
        # Prompt tokens whose logits are wanted still, and the first of them; none after the last.
        self.unscored = range(0) if scores_from is None else range(scores_from, self.num_prompt_tokens - 1)
        self.completion = completion
        self.arrival = -1  # the sequence's number in order of arrival
        self.state_row: int | None = None  # its row of the runner's state, while it runs
        self.blocks: list[int] = []  # 0: freed, since no later token sees it
        self.num_computed = 0  # tokens whose keys and values are in the blocks once every launched step is done
        self.num_in_flight = 0
        self.num_cached = 0  # prompt tokens that were found in the cache when it first ran
        self.num_admissions = 0
        self.is_held = False  # whether its next token has to wait for something that the caller is about
        self.is_finished = False
        self._num_remembered_blocks = self._num_freed_blocks = 0
        self._prefix = self.root_prefix  # what the remembered blocks hold

    @property
    def root_prefix(self) -> int:
        """The prefix before the first block.

        Each adapter has its own, as it changes the keys and values of a token, and so have long sequences.
        """
        return NO_PREFIX - 2 * self.adapter_index - self.is_long

    def __len__(self) -> int:
        """Number of tokens, those in flight included."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_to_compute(self) -> int:
        """Number of tokens that a step may compute by now: all, or all but the last where none is wanted after it."""
        return len(self) - (self.max_new_tokens == 0)

    @property
    def num_generated(self) -> int:
        """Number of tokens of the answer, those in flight included."""
        return len(self) - self.num_prompt_tokens

    @property
    def must_be_long(self) -> bool:
        """Whether the next step has to see keys that turn as those of long sequences."""
        return bool(self.long_from) and len(self) >= self.long_from

    def release_into(self, pool: BlockPool) -> None:
        """Give all blocks back. Their tokens have to be computed again, or found in the cache."""
        pool.release(self.blocks[self._num_freed_blocks :])
        self.blocks = []
        self.num_computed = self._num_remembered_blocks = self._num_freed_blocks = 0
        self._prefix = self.root_prefix

    def take_blocks(self, found: list[int], prefix: int, new: list[int], block_size: int) -> None:
        """Begin with blocks found in the cache, which hold `prefix`, and with new blocks for the tokens after it.

        Of those found the first ones are 0, where no later token sees them.
        """
        self.blocks, self._prefix, self._num_remembered_blocks = found + new, prefix, len(found)
        self._num_freed_blocks = found.count(0)
        self.num_computed = len(found) * block_size

    def free_behind(self, window: int, pool: BlockPool) -> None:
        """Give back the blocks whose tokens lie before all that the next token sees, once they are remembered.

        Steps that were launched may still read them: whoever gets them writes in a later step.
        """
        num_behind = max(self.num_computed - window + 1, 0) // pool.block_size
        for index in range(self._num_freed_blocks, min(num_behind, self._num_remembered_blocks)):
            pool.release([self.blocks[index]])
            self.blocks[index] = 0
            self._num_freed_blocks = index + 1

    def remember_full_blocks(self, pool: BlockPool) -> None:
        """Tell the pool what the newly filled blocks hold, so that later prompts find them."""
        size = pool.block_size
        for index in range(self._num_remembered_blocks, min(self.num_computed, len(self.token_ids)) // size):
            token_ids = self.token_ids[index * size : (index + 1) * size]
            self._prefix = pool.remember(self.blocks[index], token_ids, self._prefix)
            self._num_remembered_blocks = index + 1


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """One sequence's part of a step: the step computes `num_tokens` of its tokens, from position `start` on.

    samples_token: whether they reach the end of the sequence, so that the last one's logits give a new token.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples_token: bool

    @property
    def scored(self) -> range:
        """The prompt tokens among them whose logits are wanted, to score the tokens after them. Before the launch."""
        wanted = self.sequence.unscored
        return range(max(wanted.start, self.start), min(wanted.stop, self.start + self.num_tokens))


def most_blocks(window: int, max_step_tokens: int, block_size: int) -> int:
    """The most blocks that a sequence holds at once where every layer sees `window` tokens at most.

    They have its window and a step's tokens. Either end cuts a block, and one waits until its tokens are known.
    """
    return -(-(window + max_step_tokens) // block_size) + 2


class Scheduler:
    """Holds the waiting and the running sequences, both in order of arrival, and gives them room in steps.

    max_running: most sequences that run at once. Each has one of the runner's state rows 1 to max_running.
    max_step_tokens: most tokens of one step.
    window: most tokens that any layer of the model sees, the newest included; 0: some layer sees all.
    """

    def __init__(self, pool: BlockPool, *, max_running: int, max_step_tokens: int, window: int = 0) -> None:
        assert max_step_tokens > max_running, "every running sequence and some prompt tokens fit a step"
        self.pool = pool
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._max_step_tokens = max_step_tokens
        self._window = window
        self._free_state_rows = list(range(max_running, 0, -1))
        self._num_arrived = 0

    def fits(self, num_tokens: int) -> bool:
        """Whether the cache could ever hold a sequence that grows to `num_tokens` tokens.

        The last token is never computed, so it needs no room.
        """
        num_blocks = self._num_blocks(num_tokens - 1)
        if self._window:
            num_blocks = min(num_blocks, most_blocks(self._window, self._max_step_tokens, self.pool.block_size))
        return num_blocks <= self.pool.capacity

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        assert self.fits(sequence.num_prompt_tokens + sequence.max_new_tokens), "the engine refuses what never fits"
        sequence.arrival = self._num_arrived
        self._num_arrived += 1
        self.waiting.append(sequence)

    def schedule(self) -> list[ScheduledSequence]:
        """Plan the next step: decoding first, then prompts that have begun, then the queue.

        The list is empty when nothing can be computed now. Call `record_launch` once the step is launched.
        """
        self._requeue_grown()
        if self._window:
            self._take_blocks_for_prompts()
        scheduled = self._schedule_decoding()
        budget = self._max_step_tokens - len(scheduled)
        for sequence in self.running:
            if len(sequence) - sequence.num_computed > 1 and not sequence.is_held:
                budget -= self._schedule_prompt(scheduled, sequence, budget)
        while budget and (sequence := self._admit_next()) is not None:
            budget -= self._schedule_prompt(scheduled, sequence, budget)
        return scheduled

    def record_launch(self, scheduled: list[ScheduledSequence]) -> None:
        """Count the tokens of a step that was launched."""
        for item in scheduled:
            sequence = item.sequence
            sequence.num_computed += item.num_tokens
            if sequence.unscored:
                sequence.unscored = range(max(sequence.unscored.start, sequence.num_computed), sequence.unscored.stop)
            sequence.num_in_flight += item.samples_token
            sequence.remember_full_blocks(self.pool)
            if self._window:
                sequence.free_behind(self._window, self.pool)

    def append_token(self, sequence: Sequence, token_id: int) -> None:
        """Add the id of a token that was in flight."""
        sequence.num_in_flight -= 1
        sequence.token_ids.append(token_id)

    def finish(self, sequence: Sequence) -> None:
        """Remove a sequence that waits or runs."""
        sequence.is_finished = True
        if sequence.state_row is None:
            self.waiting.remove(sequence)
        else:
            self._stop_running(sequence)

    # Decode

    def _schedule_decoding(self) -> list[ScheduledSequence]:
        scheduled: list[ScheduledSequence] = []
        for sequence in list(self.running):
            is_ready = sequence.state_row is not None and len(sequence) - sequence.num_computed == 1
            is_ready &= not sequence.is_held
            if is_ready and sequence.num_generated < sequence.max_new_tokens and self._make_room(sequence):
                scheduled.append(ScheduledSequence(sequence, sequence.num_computed, 1, True))
        return scheduled

    def _make_room(self, sequence: Sequence) -> bool:
        """Give the sequence a block for its next token, preempting the youngest sequences if need be.

        Returns False when the sequence itself was the youngest and has been preempted.
        """
        return self._num_blocks(len(sequence)) <= len(sequence.blocks) or self._take_block(sequence)

    def _take_block(self, sequence: Sequence) -> bool:
        """One more block for a running sequence, as `_make_room` says."""
        while self.pool.num_free == 0:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.blocks += self.pool.allocate(1)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self._requeue(sequence)

    def _requeue(self, sequence: Sequence) -> None:
        """Let a running sequence wait again; all its tokens are computed anew later."""
        self._stop_running(sequence)
        bisect.insort(self.waiting, sequence, key=lambda other: other.arrival)

    def _requeue_grown(self) -> None:
        """Let sequences that grew long begin anew: all their keys turn otherwise from now on."""
        for sequence in [s for s in self.running if s.must_be_long and not s.is_long]:
            self._requeue(sequence)

    # Prefill

    def _schedule_prompt(self, scheduled: list[ScheduledSequence], sequence: Sequence, budget: int) -> int:
        """Schedule as many of the sequence's missing tokens as budget and blocks allow; returns their number."""
        room = len(sequence.blocks) * self.pool.block_size - sequence.num_computed
        num_tokens = min(sequence.num_to_compute - sequence.num_computed, budget, room)
        if num_tokens:
            reaches_end = sequence.num_computed + num_tokens == len(sequence)
            scheduled.append(ScheduledSequence(sequence, sequence.num_computed, num_tokens, reaches_end))
        return num_tokens

    def _take_blocks_for_prompts(self) -> None:
        """Give sequences whose prompts are under way blocks for the next step: with windows they began with a few.

        Each gets one at least, for which the youngest sequences are preempted, and else what is free.
        """
        for sequence in list(self.running):
            if sequence.state_row is None or len(sequence) - sequence.num_computed <= 1:
                continue
            if len(sequence.blocks) * self.pool.block_size == sequence.num_computed and not self._take_block(sequence):
                continue
            missing = self._num_blocks(self._next_end(sequence, sequence.num_computed)) - len(sequence.blocks)
            spare = self.pool.num_free - len(self.running)  # as for an admission, one for each running sequence stays
            sequence.blocks += self.pool.allocate(max(min(missing, spare), 0))

    def _next_end(self, sequence: Sequence, start: int) -> int:
        """Up to which of its tokens a sequence needs blocks when its next step begins with token `start`."""
        end = sequence.num_to_compute
        return min(end, start + self._max_step_tokens) if self._window else end

    def _admit_next(self) -> Sequence | None:
        """Start the first waiting sequence, if a state row is free and there are blocks for all its tokens.

        Where all layers have windows, those for its first step are enough.
        """
        candidate = next((s for s in self.waiting if not s.is_held and not self._waits_for_prompt(s)), None)
        if candidate is None or not self._free_state_rows or candidate.num_in_flight or not self._allocate(candidate):
            return None
        self.waiting.remove(candidate)
        candidate.state_row = self._free_state_rows.pop()
        bisect.insort(self.running, candidate, key=lambda other: other.arrival)
        if candidate.num_admissions == 0:
            candidate.num_cached = candidate.num_computed
        candidate.num_admissions += 1
        return candidate

    def _waits_for_prompt(self, sequence: Sequence) -> bool:
        """Whether the completion whose prompt this sequence shares has not computed it yet."""
        first = sequence.shares_prompt_with
        return first is not None and not first.is_finished and first.num_computed < first.num_prompt_tokens

    def _allocate(self, sequence: Sequence) -> bool:
        """Give the sequence the cached blocks of its beginning and new ones for the rest; False if too few are free.

        Its last token is computed even if it is cached, as its logits are needed, and so are those still to be scored.
        """
        sequence.is_long = sequence.must_be_long
        most_found = sequence.unscored.start if sequence.unscored else len(sequence.token_ids) - 1
        found, prefix = self.pool.find_prefix(sequence.token_ids[:most_found], sequence.root_prefix)
        num_found, size = len(found), self.pool.block_size
        num_unseen = max(num_found * size - self._window + 1, 0) // size if self._window else 0
        found = found[num_unseen:]
        self.pool.hold(found)
        num_missing = self._num_blocks(self._next_end(sequence, num_found * size)) - num_found
        # One block for each running sequence stays free. Otherwise the sequence admitted here would soon be preempted,
        # and its work lost.
        if num_missing > self.pool.num_free - len(self.running):
            self.pool.release(found)
            return False
        sequence.take_blocks([0] * num_unseen + found, prefix, self.pool.allocate(num_missing), size)
        return True

    # Both

    def _stop_running(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free_state_rows.append(sequence.state_row)
        sequence.state_row = None
        sequence.release_into(self.pool)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_size)
