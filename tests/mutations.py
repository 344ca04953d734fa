"""One-line faults that the tests must see. tests/test_mutations.py plants each in a copy of the tree.

`old` occurs exactly once in `path`; `killed_by` passes on the tree as it is and fails with the fault planted. Where a
line changes, its mutation changes with it: the list is refused when an old text is gone.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """A fault: a text of a file and what stands in its place, and the fast test (a file or a node id) that sees it."""

    path: str
    old: str
    new: str
    killed_by: str
    why: str  # what a user would suffer


SCHEDULER, CACHE, SAMPLING = (f"alpaca/serving/llama/{name}.py" for name in ("scheduler", "cache", "sampling"))
SCHEDULER_RULES = "tests/serving/llama/test_scheduler.py"
SCHEDULER_PROPERTIES = "tests/serving/llama/test_scheduler_properties.py"
SAMPLING_TESTS = "tests/serving/llama/test_sampling.py"

MUTATIONS = [
    # Serving
    Mutation(
        path=SCHEDULER,
        old="bisect.insort(self.waiting, sequence, key=lambda other: other.order)",
        new="self.waiting.append(sequence)",
        killed_by=f"{SCHEDULER_RULES}::test_a_preempted_sequence_goes_back_to_its_place_by_arrival",
        why="a preempted request waits behind all that came after it",
    ),
    Mutation(
        path=SCHEDULER,
        old="or candidate.num_in_flight or",
        new="or",
        killed_by=SCHEDULER_PROPERTIES,
        why="a request is computed on with a token that is not known: another answer",
    ),
    Mutation(
        path=SCHEDULER,
        old="self.pool.num_free - len(self.running)",
        new="self.pool.num_free",
        killed_by=f"{SCHEDULER_RULES}::test_admission_leaves_a_block_for_each_running_sequence",
        why="requests are admitted and preempted at once: their work is lost again and again",
    ),
    Mutation(
        path=SCHEDULER,
        old="find_prefix(sequence.ids[:-1],",
        new="find_prefix(sequence.ids,",
        killed_by=f"{SCHEDULER_RULES}::test_a_known_prefix_is_not_computed_again_but_its_last_token_is",
        why="a prompt that is cached whole has no logits, and its request hangs",
    ),
    Mutation(
        path=CACHE,
        old="key = (prefix, tuple(ids))",
        new="key = (NO_PREFIX, tuple(ids))",
        killed_by=SCHEDULER_PROPERTIES,
        why="keys and values of another prompt are taken for this one's",
    ),
]
