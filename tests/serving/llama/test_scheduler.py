"""The rules that the block pool and the scheduler promise, each in a case of its own. No torch."""

import sys

import pytest

from alpaca.serving.llama.cache import NO_PREFIX, BlockPool, NoFreeBlocks
from alpaca.serving.llama.scheduler import Scheduler, Sequence

SIZE = 4


# The pool -----------------------------------------------------------------------------------------------------------


def test_blocks_come_back_and_block_zero_is_nobodys():
    pool = BlockPool(6, SIZE)
    blocks = pool.allocate(5)
    assert sorted(blocks) == [1, 2, 3, 4, 5]
    with pytest.raises(NoFreeBlocks, match="1 blocks were asked for and 0 are free"):
        pool.allocate(1)
    pool.hold(blocks[:2])
    pool.release(blocks)
    assert pool.num_free == 3
    pool.release(blocks[:2])
    assert pool.num_free == pool.capacity == 5


def test_a_prefix_is_found_until_its_room_is_needed():
    pool = BlockPool(4, SIZE)
    ids = list(range(10))
    blocks = pool.allocate(3)
    prefix = pool.remember(blocks[0], ids[:4], NO_PREFIX)
    pool.remember(blocks[1], ids[4:8], prefix)
    assert pool.find_prefix(ids)[0] == blocks[:2]
    assert pool.find_prefix([*ids[:4], 9, 9, 9, 9])[0] == blocks[:1]
    assert pool.find_prefix([9, *ids[1:]])[0] == []
    assert pool.find_prefix(ids[:3])[0] == []
    pool.release(blocks)
    assert pool.find_prefix(ids)[0] == blocks[:2]  # nobody holds them, and they are still known
    assert pool.allocate(1) == blocks[2:]  # what holds nothing known goes first
    assert pool.allocate(1) == blocks[1:2]  # then a chain's end
    assert pool.find_prefix(ids)[0] == blocks[:1]


def test_the_same_tokens_after_another_prefix_are_another_block():
    pool = BlockPool(6, SIZE)
    a, b, c, d = pool.allocate(4)
    first, second = pool.remember(a, [1] * 4, NO_PREFIX), pool.remember(b, [2] * 4, NO_PREFIX)
    pool.remember(c, [3] * 4, first)
    assert pool.find_prefix([2] * 4 + [3] * 4)[0] == [b]
    pool.remember(d, [3] * 4, second)
    assert pool.find_prefix([2] * 4 + [3] * 4)[0] == [b, d]
    assert pool.find_prefix([1] * 4 + [3] * 4)[0] == [a, c]


def test_two_who_computed_the_same_share_what_follows():
    pool = BlockPool(6, SIZE)
    a, b, c, another = pool.allocate(4)
    first = pool.remember(a, [1] * 4, NO_PREFIX)
    pool.remember(another, [3] * 4, NO_PREFIX)
    assert pool.remember(b, [1] * 4, NO_PREFIX) == first  # b stays unknown, and its chain goes on after a
    pool.remember(c, [2] * 4, first)
    assert pool.find_prefix([1] * 4 + [2] * 4)[0] == [a, c]


def test_what_followed_a_block_does_not_follow_what_its_room_holds_next():
    pool = BlockPool(4, SIZE)
    a, b, c = pool.allocate(3)
    first = pool.remember(a, [1] * 4, NO_PREFIX)
    pool.remember(b, [1] * 4, NO_PREFIX)  # a second sequence computed the same, and goes on after it
    pool.remember(c, [2] * 4, first)
    pool.release([a])
    assert pool.allocate(1) == [a]
    pool.remember(a, [9] * 4, NO_PREFIX)
    assert pool.find_prefix([9] * 4 + [2] * 4)[0] == [a]


# The scheduler ------------------------------------------------------------------------------------------------------


def scheduler(num_blocks: int, *, max_running: int = 8, max_step_tokens: int = 16) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, SIZE), max_running=max_running, max_step_tokens=max_step_tokens)


def run_step(it: Scheduler, *, token: int = 7) -> list[Sequence]:
    """One step whose tokens are known at once; the sequences that were part of it."""
    scheduled = it.schedule()
    it.record_launch(scheduled)
    for item in scheduled:
        if item.samples_token:
            it.append_token(item.sequence, token)
            if item.sequence.num_generated == item.sequence.max_new_tokens:
                it.finish(item.sequence)
    return [item.sequence for item in scheduled]


def test_first_come_first_served():
    it = scheduler(100, max_running=2)
    sequences = [Sequence([1] * 5, max_new_tokens=3) for _ in range(4)]
    for sequence in sequences:
        it.add(sequence)
    assert run_step(it) == sequences[:2]
    run_step(it)
    run_step(it)
    assert run_step(it) == sequences[2:]


def test_a_long_prompt_is_read_in_chunks_beside_running_streams():
    it = scheduler(100)
    stream, long = Sequence([1, 2], max_new_tokens=20), Sequence(range(50), max_new_tokens=2)
    it.add(stream)
    run_step(it)
    it.add(long)
    steps = []
    while long.num_generated < 1:
        scheduled = it.schedule()
        steps.append([(item.sequence is stream, item.num_tokens) for item in scheduled])
        it.record_launch(scheduled)
        for item in scheduled:
            if item.samples_token:
                it.append_token(item.sequence, 7)
    assert steps == [[(True, 1), (False, 15)]] * 3 + [[(True, 1), (False, 5)]]


def test_completions_of_one_prompt_share_its_blocks():
    it = scheduler(100, max_step_tokens=64)
    prompt = list(range(18))
    leader = Sequence(prompt, max_new_tokens=5)
    others = [Sequence(prompt, max_new_tokens=5, shares_prompt_with=leader) for _ in range(3)]
    for sequence in (leader, *others):
        it.add(sequence)
    assert run_step(it) == [leader]  # the others wait until there is something to share
    assert set(run_step(it)) == {leader, *others}
    assert [sequence.num_cached for sequence in others] == [16] * 3
    assert all(sequence.blocks[:4] == leader.blocks[:4] for sequence in others)
    assert it.pool.num_used == 4 + 4  # the prompt's once, and one for each answer


def test_a_known_prefix_is_not_computed_again_but_its_last_token_is():
    it = scheduler(100, max_step_tokens=64)
    for expected in ([(0, 16)], [(12, 4)]):  # the whole prompt is known, yet its logits are wanted
        it.add(sequence := Sequence(range(16), max_new_tokens=1))
        scheduled = it.schedule()
        assert [(item.start, item.num_tokens) for item in scheduled] == expected
        it.record_launch(scheduled)
        it.append_token(sequence, 7)
        it.finish(sequence)


def test_the_youngest_makes_room_and_goes_on_later():
    it = scheduler(1 + 6)  # two sequences of 4 blocks do not fit
    old, young = (Sequence([i] * 6, max_new_tokens=10) for i in (1, 2))
    it.add(old)
    it.add(young)
    order: list[Sequence] = []
    while not (old.is_finished and young.is_finished):
        ran = run_step(it)
        assert old.is_finished or old in ran  # the oldest is never stopped
        order += [sequence for sequence in ran if sequence.is_finished]
    assert order == [old, young]
    assert young.num_admissions == 2
    assert len(young.token_ids) == 16
    assert it.pool.num_free == it.pool.capacity


def test_a_preempted_sequence_goes_back_to_its_place_by_arrival():
    it = scheduler(1 + 7)
    old, young, last = (Sequence([i] * 6, max_new_tokens=10) for i in (1, 2, 3))
    it.add(old)
    it.add(young)
    run_step(it)
    it.add(last)
    while it.num_preemptions == 0:
        run_step(it)
    assert it.waiting == [young, last]
    while not young.is_finished:
        run_step(it)
    assert young.num_admissions == 2
    assert last.num_generated < young.num_generated


def test_who_is_preempted_with_a_token_in_flight_waits_until_it_is_known():
    """Two requests computed the same prompt: after the preemption nearly all blocks are found with the other one."""
    it = scheduler(1 + 9, max_step_tokens=64)
    old, young = (Sequence(range(16), max_new_tokens=4) for _ in range(2))
    it.add(old)
    it.add(young)
    it.record_launch(it.schedule())  # both sample, and nobody knows the tokens yet
    assert young.num_in_flight == 1
    scheduled = it.schedule()
    assert it.num_preemptions == 1
    assert [item.sequence for item in scheduled] == [old]
    assert young.state_row is None
    it.record_launch(scheduled)
    for sequence in (old, young):
        it.append_token(sequence, 7)
    assert [(item.sequence, item.num_tokens) for item in it.schedule()] == [(old, 1), (young, 1)]


@pytest.mark.parametrize(("num_blocks", "is_admitted"), [(2 + 3 + 1, False), (2 + 3 + 2, True)])
def test_admission_leaves_a_block_for_each_running_sequence(num_blocks, is_admitted):
    """Two sequences run in a block each; the third wants three blocks, and two more have to stay free."""
    it = scheduler(1 + num_blocks, max_step_tokens=64)
    for token in (1, 2):
        it.add(Sequence([token] * 2, max_new_tokens=2))
    run_step(it)
    it.add(third := Sequence([3] * 12, max_new_tokens=4))
    it.schedule()
    assert (third in it.running) == is_admitted


def test_what_can_never_fit_is_known_beforehand():
    it = scheduler(1 + 4)
    assert it.fits(17)  # the last token is never an input
    assert not it.fits(18)


def test_no_torch_behind_the_scheduler():
    import subprocess

    code = "import sys, alpaca.serving.llama.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
