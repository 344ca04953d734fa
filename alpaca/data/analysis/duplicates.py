"""Copies in a data set: exact ones, prompts with several answers, and near copies by the words of the prompt.

Near copies are found exactly, not by hashing. In file order, a prompt is a near copy when its pairs of neighbouring
words and those of an earlier prompt that is no copy itself overlap to at least 0.6 (Jaccard: shared over all): one word
replaced in a prompt of seven or more. Two sets that overlap so much share one of their rarest few pairs, so only those
are looked up: seconds for 52,000 examples.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tqdm import tqdm

from alpaca.data.example import AnyExample

NEAR = 0.6  # Jaccard from which on two prompts are near copies
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Copy:
    """The example at `index` repeats the one at `of`, which comes earlier. overlap: Jaccard, 1.0 for exact ones."""

    index: int
    of: int
    overlap: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """exact: all three texts equal. conflicting: same instruction and input, another output. near: similar prompts.

    An example is in one list only, the first that it fits.
    """

    exact: list[Copy]
    conflicting: list[Copy]
    near: list[Copy]


def find_duplicates(examples: Sequence[AnyExample], *, progress: bool = True) -> Duplicates:
    """Which examples repeat earlier ones; indices count in `examples`."""
    exact, conflicting = [], []
    whole: dict[AnyExample, int] = {}
    prompts: dict[tuple[str, str], int] = {}
    for index, example in enumerate(examples):
        prompt = (example.instruction, example.input)
        if (first := whole.setdefault(example, index)) != index:
            exact.append(Copy(index, first))
        elif (first := prompts.setdefault(prompt, index)) != index:
            conflicting.append(Copy(index, first))
    distinct = sorted(prompts.values())
    sets = [word_pairs(f"{examples[index].instruction}\n{examples[index].input}") for index in distinct]
    near = [Copy(distinct[a], distinct[b], overlap) for a, b, overlap in _near_copies(sets, progress=progress)]
    return Duplicates(exact=exact, conflicting=conflicting, near=near)


def word_pairs(text: str) -> frozenset[tuple[str, str]]:
    """The pairs of neighbouring words, in lower case without punctuation; the ends of the text count as words."""
    words = ["", *_WORD.findall(text.lower()), ""]
    return frozenset(pairwise(words))


def _near_copies(sets: Sequence[frozenset[tuple[str, str]]], *, progress: bool) -> list[tuple[int, int, float]]:
    """(place, place of the earlier one it is nearest to, Jaccard) of every set that overlaps NEAR with a kept one."""
    ranks = _ranks(sets)
    seen: dict[int, list[int]] = defaultdict(list)  # a pair's rank -> the kept sets that have it among their rarest
    kept: dict[int, frozenset[int]] = {}
    found = []
    bar = tqdm(sets, desc="compare", unit=" examples", delay=1, disable=None if progress else True)
    for place, pairs in enumerate(bar):
        order = sorted(ranks[pair] for pair in pairs)
        rarest = order[: len(order) - math.ceil(NEAR * len(order)) + 1]
        numbers = frozenset(order)
        if best := _nearest(numbers, {other for rank in rarest for other in seen[rank]}, kept):
            found.append((place, *best))
            continue
        kept[place] = numbers
        for rank in rarest:
            seen[rank].append(place)
    return found


def _ranks(sets: Sequence[frozenset[tuple[str, str]]]) -> dict[tuple[str, str], int]:
    counts = Counter(pair for pairs in sets for pair in pairs)
    return {pair: rank for rank, pair in enumerate(sorted(counts, key=lambda pair: (counts[pair], pair)))}


def _nearest(
    numbers: frozenset[int], candidates: set[int], kept: dict[int, frozenset[int]]
) -> tuple[int, float] | None:
    """The earliest of the kept sets with the largest overlap, where that is NEAR or more."""
    best, most = None, 0.0
    for other in sorted(candidates):
        theirs = kept[other]
        smaller, larger = sorted((len(numbers), len(theirs)))
        if smaller < NEAR * larger:
            continue
        shared = len(numbers & theirs)
        overlap = shared / (len(numbers) + len(theirs) - shared)
        if overlap >= NEAR and overlap > most:
            best, most = other, overlap
    return None if best is None else (best, most)
