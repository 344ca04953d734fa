"""Which tokens of which sequences the next step computes. Plain Python, no torch: decisions only.

First come, first served. Every running sequence gets its next token in each step (decode); what is left of the step's
token budget goes to prompts, in order and in chunks (prefill), so that a long prompt never stalls the others. When the
cache is full the youngest running sequence gives its blocks back and later computes its tokens again (preemption by
recomputation); the oldest always goes on, so nobody starves.

A step may be scheduled while the one before is still under way: tokens that were sampled but are not known yet count
as `num_in_flight`.
"""

import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from alpaca.serving.llama.cache import NO_PREFIX, BlockPool


class Sequence:
    """One completion: its tokens, the blocks that hold their keys and values, and how far it has come."""

    def __init__(
        self,
        prompt_ids: Iterable[int],
        *,
        max_new_tokens: int,
        adapter: int = 0,
        leader: "Sequence | None" = None,
        owner: Any = None,
    ) -> None:
        self.ids = list(prompt_ids)  # prompt and what is known of the answer
        self.num_prompt = len(self.ids)
        self.max_new_tokens = max_new_tokens
        self.adapter = adapter  # its slot (low_rank.py); 0: none
        self.leader = leader  # the first completion of the same prompt, whose blocks this one shares
        self.owner = owner
        self.order = -1  # of arrival
        self.slot: int | None = None  # its row of the runner's state while it runs
        self.blocks: list[int] = []
        self.num_computed = 0  # tokens whose keys and values are in the blocks, or will be after the step under way
        self.num_in_flight = 0
        self.num_cached = 0  # prompt tokens that were found in the cache when it first ran
        self.num_admissions = 0
        self.is_finished = False
        self._num_remembered = 0
        self._prefix = self.root

    @property
    def root(self) -> int:
        """What stands before its first block: an adapter's keys and values are no other's, whatever the tokens."""
        return NO_PREFIX - self.adapter

    def __len__(self) -> int:
        """Tokens, those in flight included."""
        return len(self.ids) + self.num_in_flight

    @property
    def num_generated(self) -> int:
        """Tokens of the answer, those in flight included."""
        return len(self) - self.num_prompt

    def release_into(self, pool: BlockPool) -> None:
        """Give all blocks back; what they hold has to be computed again (or found)."""
        pool.release(self.blocks)
        self.blocks = []
        self.num_computed = self._num_remembered = 0
        self._prefix = self.root

    def start(self, found: list[int], prefix: int, new: list[int], block_size: int) -> None:
        """Take blocks that were found in the cache to hold `prefix`, and new ones for what follows it."""
        self.blocks, self._prefix, self._num_remembered = found + new, prefix, len(found)
        self.num_computed = len(found) * block_size

    def remember_full_blocks(self, pool: BlockPool) -> None:
        """Make those blocks known that are full of known tokens."""
        size = pool.block_size
        for index in range(self._num_remembered, min(self.num_computed, len(self.ids)) // size):
            ids = self.ids[index * size : (index + 1) * size]
            self._prefix = pool.remember(self.blocks[index], ids, self._prefix)
            self._num_remembered = index + 1


@dataclass(frozen=True, slots=True)
class Work:
    """A sequence's part of a step: `num_tokens` tokens from position `start` on."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool  # the last of them is the sequence's last: its logits give the next token


class Scheduler:
    """Holds the waiting and the running sequences, both in order of arrival."""

    def __init__(self, pool: BlockPool, *, max_running: int, max_step_tokens: int) -> None:
        assert max_step_tokens > max_running, "every running sequence and some prompt tokens fit a step"
        self.pool = pool
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._max_step_tokens = max_step_tokens
        self._free_slots = list(reversed(range(max_running)))
        self._num_arrived = 0

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens in the end could ever run. The last one is never an input."""
        return self._num_blocks(num_tokens - 1) <= self.pool.capacity

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in the queue, behind all that came before."""
        assert self.fits(sequence.num_prompt + sequence.max_new_tokens), "refused when it was submitted"
        sequence.order = self._num_arrived
        self._num_arrived += 1
        self.waiting.append(sequence)

    def schedule(self) -> list[Work]:
        """The next step: decode first, then prompts under way, then the queue. Empty when nothing can be done now."""
        works = self._decode()
        budget = self._max_step_tokens - len(works)
        for sequence in self.running:
            if len(sequence) - sequence.num_computed > 1:
                budget -= self._prefill(works, sequence, budget)
        while budget and (sequence := self._admit_next()) is not None:
            budget -= self._prefill(works, sequence, budget)
        return works

    def launched(self, works: list[Work]) -> None:
        """The step will be computed: count its tokens."""
        for work in works:
            sequence = work.sequence
            sequence.num_computed += work.num_tokens
            sequence.num_in_flight += work.samples
            sequence.remember_full_blocks(self.pool)

    def append(self, sequence: Sequence, token_id: int) -> None:
        """A token in flight is known now."""
        sequence.num_in_flight -= 1
        sequence.ids.append(token_id)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is."""
        sequence.is_finished = True
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self._stop_running(sequence)

    # Decode

    def _decode(self) -> list[Work]:
        works: list[Work] = []
        for sequence in list(self.running):
            is_ready = sequence.slot is not None and len(sequence) - sequence.num_computed == 1
            if is_ready and sequence.num_generated < sequence.max_new_tokens and self._make_room(sequence):
                works.append(Work(sequence, sequence.num_computed, 1, True))
        return works

    def _make_room(self, sequence: Sequence) -> bool:
        """A block for the sequence's next token, taken from the youngest if need be; False when that is itself."""
        if self._num_blocks(len(sequence)) <= len(sequence.blocks):
            return True
        while self.pool.num_free == 0:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.blocks += self.pool.allocate(1)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self._stop_running(sequence)
        bisect.insort(self.waiting, sequence, key=lambda other: other.order)

    # Prefill

    def _prefill(self, works: list[Work], sequence: Sequence, budget: int) -> int:
        """Add as much of the sequence's prompt as the budget allows; the number of tokens."""
        count = min(len(sequence) - sequence.num_computed, budget)
        if count:
            ends = sequence.num_computed + count == len(sequence)
            works.append(Work(sequence, sequence.num_computed, count, ends))
        return count

    def _admit_next(self) -> Sequence | None:
        """Start the first waiting sequence if a slot and blocks for all its tokens are there."""
        candidate = next((s for s in self.waiting if not self._waits_for_leader(s)), None)
        if candidate is None or not self._free_slots or candidate.num_in_flight or not self._take_blocks(candidate):
            return None
        self.waiting.remove(candidate)
        candidate.slot = self._free_slots.pop()
        bisect.insort(self.running, candidate, key=lambda other: other.order)
        if candidate.num_admissions == 0:
            candidate.num_cached = candidate.num_computed
        candidate.num_admissions += 1
        return candidate

    def _waits_for_leader(self, sequence: Sequence) -> bool:
        leader = sequence.leader
        return leader is not None and not leader.is_finished and leader.num_computed < leader.num_prompt

    def _take_blocks(self, sequence: Sequence) -> bool:
        """Hold the blocks of the known prefix and new ones for the rest. The last token is computed in any case."""
        found, prefix = self.pool.find_prefix(sequence.ids[:-1], sequence.root)
        self.pool.hold(found)
        missing = self._num_blocks(len(sequence)) - len(found)
        # One block for each running sequence stays free: admitting now what is preempted at once would be work lost.
        if missing > self.pool.num_free - len(self.running):
            self.pool.release(found)
            return False
        sequence.start(found, prefix, self.pool.allocate(missing), self.pool.block_size)
        return True

    # Both

    def _stop_running(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = None
        sequence.release_into(self.pool)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_size)
