"""The scheduler over random histories: arrivals, ends, cancels and preemptions, each step held against its rules.

Tokens are integers here and the cache holds integers, so that every answer can be compared with the one that the same
prompt gets alone, without a cache. No torch.
"""

import random
from collections import Counter
from functools import cache

import pytest

from alpaca.serving.llama.cache import BlockPool
from alpaca.serving.llama.scheduler import ScheduledSequence, Scheduler, Sequence

SIZE = 4  # tokens in a block
EOS = 0
VOCABULARY = 40
NUM_ARRIVAL_STEPS = 150
MOST_STEPS = 3000


# A model of integers ------------------------------------------------------------------------------------------------


def compute_cell(before: int, token: int) -> int:
    """What the cache holds for a token: like keys and values, it depends on all tokens up to this one."""
    return hash((before, token))


def choose_token(cells: list[int]) -> int:
    """The next token, which depends on every cell that attention reads."""
    return hash(tuple(cells)) % VOCABULARY


def answer_alone(sequence: Sequence, window: int = 0) -> list[int]:
    """The tokens that the sequence gets where nothing is shared, cached, preempted or cut into chunks."""
    cells: list[int] = []
    tokens: list[int] = []
    inputs = sequence.token_ids[: sequence.num_prompt_tokens]
    while len(tokens) < sequence.max_new_tokens and EOS not in tokens:
        for token in inputs:
            cells.append(compute_cell(cells[-1] if cells else sequence.adapter_index, token))
        inputs = [choose_token(cells[-window:])]
        tokens += inputs
    return tokens


class Device:
    """Computes steps in the order of their launch, as the runner and a GPU do: all writes of a step, then its reads."""

    def __init__(self, window: int = 0) -> None:
        self.window = window
        self.cells: dict[int, int] = {}
        self.last_tokens: dict[int, int] = {}  # by state row: what the host does not know yet

    def run(self, scheduled: list[ScheduledSequence]) -> list[int]:
        """The sampled tokens, one for each item that samples."""
        for item in scheduled:
            self._write(item)
        sampled = [item for item in scheduled if item.samples_token]
        tokens = [choose_token(self._read(item)) for item in sampled]
        self.last_tokens.update((item.sequence.state_row, token) for item, token in zip(sampled, tokens, strict=True))
        return tokens

    def _write(self, item: ScheduledSequence) -> None:
        sequence, end = item.sequence, item.start + item.num_tokens
        tokens = sequence.token_ids[item.start : end]
        if len(tokens) < item.num_tokens:
            tokens = [*tokens, self.last_tokens[sequence.state_row]]
        assert len(tokens) == item.num_tokens, "one token at most is not known yet"
        for at, token in enumerate(tokens, start=item.start):
            before = self.cells[self._place(sequence, at - 1)] if at else sequence.adapter_index
            self.cells[self._place(sequence, at)] = compute_cell(before, token)

    def _read(self, item: ScheduledSequence) -> list[int]:
        end = item.start + item.num_tokens
        start = max(end - self.window, 0) if self.window else 0
        return [self.cells[self._place(item.sequence, at)] for at in range(start, end)]

    def _place(self, sequence: Sequence, at: int) -> int:
        assert sequence.blocks[at // SIZE], "a freed block is read"
        return sequence.blocks[at // SIZE] * SIZE + at % SIZE


# A history ----------------------------------------------------------------------------------------------------------


class History:
    """Drives a scheduler as the engine does: with `ahead`, tokens are known only after the next step's launch."""

    def __init__(self, seed: int, *, ahead: bool, window: int = 0) -> None:
        self.window = window
        self.chance = random.Random(f"{seed}:{ahead}")
        self.ahead = ahead
        self.max_step_tokens = self.chance.choice([8, 12] if window else [8, 20, 60])
        pool = BlockPool(self.chance.randint(6, 9) + window // 4 if window else self.chance.randint(8, 20), SIZE)
        self.scheduler = Scheduler(
            pool, max_running=self.chance.choice([1, 2, 3, 6]), max_step_tokens=self.max_step_tokens, window=window
        )
        self.device = Device(window)
        self.alive: list[Sequence] = []
        self.ended: list[Sequence] = []
        self.first_steps: dict[Sequence, int] = {}  # in which step a sequence's first token was computed
        self.num_steps = 0
        self._under_way: tuple[list[ScheduledSequence], list[int]] = ([], [])

    def run(self) -> None:
        """Arrivals for a while, then steps until every sequence has ended."""
        while self.num_steps < NUM_ARRIVAL_STEPS or self.alive:
            assert self.num_steps < MOST_STEPS, f"{len(self.alive)} sequences never end"
            if self.num_steps < NUM_ARRIVAL_STEPS and self.chance.random() < 0.35:
                self._add_request()
            if self.alive and self.chance.random() < 0.04:
                self._end(self.chance.choice(self.alive), cancelled=True)
            self._step()

    def _step(self) -> None:
        admissions = {sequence: sequence.num_admissions for sequence in self.alive}
        scheduled = self.scheduler.schedule()
        check_scheduled(scheduled, self.scheduler, self.max_step_tokens)
        check_blocks(self.scheduler)
        check_admissions(admissions, scheduled, self.scheduler, self.max_step_tokens)
        tokens = self.device.run(scheduled)
        for item in scheduled:
            if item.samples_token:
                self.first_steps.setdefault(item.sequence, self.num_steps)
        self.scheduler.record_launch(scheduled)
        check_cache(scheduled, self.scheduler)
        check_freed(self.scheduler, self.window)
        known = scheduled, tokens
        if self.ahead:
            known, self._under_way = self._under_way, known
        self._publish(*known)
        self.num_steps += 1

    def _publish(self, scheduled: list[ScheduledSequence], tokens: list[int]) -> None:
        for item, token in zip([item for item in scheduled if item.samples_token], tokens, strict=True):
            sequence = item.sequence
            if sequence.is_finished:
                continue
            self.scheduler.append_token(sequence, token)
            if token == EOS or len(sequence.token_ids) - sequence.num_prompt_tokens == sequence.max_new_tokens:
                self._end(sequence)

    def _add_request(self) -> None:
        """One to three completions, or requests, of a prompt, which often begins like another one."""
        topic = self.chance.randint(1, 20)
        most = self.chance.choice([16, 100]) if self.window else 16  # longer than the cache, whose window suffices
        prompt = [topic] * self.chance.randint(1, most) + [self.chance.randint(1, 2)] * self.chance.randint(0, 5)
        leader, adapter, has_leader = None, self.chance.choice([0, 0, 1]), self.chance.random() < 0.4
        for _ in range(self.chance.choice([1, 1, 1, 3])):
            sequence = Sequence(
                prompt, max_new_tokens=self.chance.randint(1, 24), adapter_index=adapter, shares_prompt_with=leader
            )
            if self.scheduler.fits(sequence.num_prompt_tokens + sequence.max_new_tokens):
                self.scheduler.add(sequence)
                self.alive.append(sequence)
                leader = leader or (sequence if has_leader else None)

    def _end(self, sequence: Sequence, *, cancelled: bool = False) -> None:
        self.scheduler.finish(sequence)
        self.alive.remove(sequence)
        if not cancelled:
            self.ended.append(sequence)


# The rules ----------------------------------------------------------------------------------------------------------


def check_scheduled(scheduled: list[ScheduledSequence], scheduler: Scheduler, max_step_tokens: int) -> None:
    """Each part of a step is what its sequence needs next, all keep to the budget, and the oldest goes on."""
    assert sum(item.num_tokens for item in scheduled) <= max_step_tokens
    assert len({item.sequence for item in scheduled}) == len(scheduled)
    for item in scheduled:
        sequence, end = item.sequence, item.start + item.num_tokens
        assert sequence in scheduler.running
        assert item.start == sequence.num_computed < end
        assert item.samples_token == (end == len(sequence))
        assert sequence.num_generated < sequence.max_new_tokens, "its last token is under way"
        written = {sequence.blocks[at // SIZE] for at in range(item.start, end)}
        holders = Counter(block for other in scheduler.running for block in held(other))
        assert {holders[block] for block in written} == {1}, "somebody else reads what this sequence writes"
    for oldest in scheduler.running[:1]:  # it is in every step, unless all of its tokens are under way
        assert oldest.num_generated >= oldest.max_new_tokens or oldest in {item.sequence for item in scheduled}


def check_blocks(scheduler: Scheduler) -> None:
    """The pool counts exactly the holders that there are, and waiting sequences hold nothing."""
    pool = scheduler.pool
    holders = Counter(block for sequence in scheduler.running for block in held(sequence))
    assert pool._num_holders == [holders[block] for block in range(pool.capacity + 1)]
    assert pool.num_free == pool.capacity - len(holders)
    assert all(len(held(sequence)) == len(set(held(sequence))) for sequence in scheduler.running)
    assert all(len(sequence.blocks) * SIZE >= sequence.num_computed for sequence in scheduler.running)
    assert not any(sequence.blocks or sequence.num_computed for sequence in scheduler.waiting)
    rows = [sequence.state_row for sequence in scheduler.running]
    assert len(set(rows)) == len(rows)


def held(sequence: Sequence) -> list[int]:
    """A sequence's blocks without those that it freed."""
    return [block for block in sequence.blocks if block]


def check_freed(scheduler: Scheduler, window: int) -> None:
    """Exactly the blocks are freed whose tokens all lie before the next token's window, as far as they are known."""
    for sequence in scheduler.running:
        num_known = min(sequence.num_computed, len(sequence.token_ids)) // SIZE
        num_behind = max(sequence.num_computed - window + 1, 0) // SIZE if window else 0
        num_freed = len(sequence.blocks) - len(held(sequence))
        assert num_freed <= min(num_behind, num_known)
        assert not any(sequence.blocks[:num_freed])
        assert num_freed == min(num_behind, num_known) or sequence.num_computed == sequence.num_cached


def check_cache(scheduled: list[ScheduledSequence], scheduler: Scheduler) -> None:
    """A later prompt that begins with a sequence's tokens finds all of its full blocks whose tokens are known.

    Not so where another sequence computed the same at the same time: the blocks of only one of the two are found.
    """
    for sequence in (item.sequence for item in scheduled):
        known = sequence.token_ids[: sequence.num_computed]
        full = sequence.blocks[: len(known) // SIZE]
        if 0 not in full and all(block in scheduler.pool._key_of for block in full):
            assert scheduler.pool.find_prefix(known, sequence.root_prefix)[0] == full


def check_admissions(
    before: dict[Sequence, int], scheduled: list[ScheduledSequence], scheduler: Scheduler, max_step_tokens: int
) -> None:
    """Who starts is first among those that could, has no token in flight and leaves the others a block each.

    Nobody waits who could start: that would be time lost, and a waiting sequence might never run.
    before: how often each sequence had been admitted before this step, in which one may be preempted and admitted.
    """
    admitted = [sequence for sequence in scheduler.running if sequence.num_admissions > before[sequence]]
    could_start = [sequence for sequence in scheduler.waiting if not is_behind_leader(sequence)]
    for sequence in admitted:
        assert sequence.num_in_flight == 0
        assert all(sequence.arrival < other.arrival for other in could_start)
    for sequences in (scheduler.running, scheduler.waiting):
        assert sequences == sorted(sequences, key=lambda sequence: sequence.arrival)
    if admitted:
        assert scheduler.pool.num_free >= len(scheduler.running) - 1
    if could_start and scheduler._free_state_rows and sum(item.num_tokens for item in scheduled) < max_step_tokens:
        first = could_start[0]
        assert first.num_in_flight or num_blocks_wanted(first, scheduler) > scheduler.pool.num_free


def is_behind_leader(sequence: Sequence) -> bool:
    """Whether the prompt that a sequence shares with its leader is not computed yet."""
    leader = sequence.shares_prompt_with
    return leader is not None and not leader.is_finished and leader.num_computed < leader.num_prompt_tokens


def num_blocks_wanted(sequence: Sequence, scheduler: Scheduler) -> int:
    """Free blocks that a waiting sequence takes or finds, and the one that stays for each running sequence."""
    found, _ = scheduler.pool.find_prefix(sequence.token_ids[:-1], sequence.root_prefix)
    num_found, end = len(found), len(sequence)
    if window := scheduler._window:  # what its first step needs, and what that sees
        end = min(end, num_found * SIZE + scheduler._max_step_tokens)
        found = found[max(num_found * SIZE - window + 1, 0) // SIZE :]
    used = {block for other in scheduler.running for block in held(other)}
    return -(-end // SIZE) - (num_found - len(found)) - len(used.intersection(found)) + len(scheduler.running)


CASES = [(seed, ahead, 0) for seed in range(30) for ahead in (False, True)]
CASES += [(seed, ahead, window) for seed in range(8) for ahead in (False, True) for window in (2, 21)]


@cache
def run(seed: int, ahead: bool, window: int) -> History:
    """A history at its end; no test changes it."""
    history = History(seed, ahead=ahead, window=window)
    history.run()
    return history


@pytest.mark.parametrize(("seed", "ahead", "window"), CASES)
@pytest.mark.fast_rows(24)
def test_random_histories_keep_the_rules(seed, ahead, window):
    history = run(seed, ahead, window)
    scheduler = history.scheduler
    assert not scheduler.waiting
    assert not scheduler.running
    assert scheduler.pool.num_free == scheduler.pool.capacity
    assert len(history.ended) > 5
    for sequence in history.ended:
        assert sequence.token_ids[sequence.num_prompt_tokens :] == answer_alone(sequence, window)
    # (Completions behind a leader wait for its prompt, so that others may pass them.)
    leaders = sorted(
        (s for s in history.first_steps if s.shares_prompt_with is None), key=lambda sequence: sequence.arrival
    )
    steps = [history.first_steps[sequence] for sequence in leaders]
    assert steps == sorted(steps)


def test_the_histories_meet_every_case():
    """Preemptions, chunked prompts, shared prefixes and tokens in flight occur, or the test above proves little."""
    histories = [run(seed, True, 0) for seed in range(30)]
    sequences = [sequence for history in histories for sequence in history.ended]
    windowed = [run(seed, True, 21) for seed in range(8)]
    capacity = {history: history.scheduler.pool.capacity * SIZE for history in windowed}
    assert sum(len(s.token_ids) > capacity[history] for history in windowed for s in history.ended) > 20
    assert sum(history.scheduler.num_preemptions for history in windowed) > 50
    assert sum(history.scheduler.num_preemptions for history in histories) > 100
    assert sum(sequence.num_cached > 0 for sequence in sequences) > 100
    assert sum(sequence.shares_prompt_with is not None for sequence in sequences) > 100
    assert sum(sequence.num_admissions > 1 for sequence in sequences) > 50
