"""Copies, against the obvious slow search."""

import random

import pytest

from alpaca.data.analysis.duplicates import NEAR, find_duplicates, word_pairs
from alpaca.data.example import Example


def near_copies_slowly(examples: list[Example]) -> list[tuple[int, int, float]]:
    """Every example against every earlier one that is no copy itself."""
    kept, found = [], []
    for index, example in enumerate(examples):
        mine = word_pairs(f"{example.instruction}\n{example.input}")
        overlaps = [(len(mine & theirs) / len(mine | theirs), other) for other, theirs in kept]
        best = max(overlaps, key=lambda pair: (pair[0], -pair[1]), default=(0.0, 0))
        if best[0] >= NEAR:
            found.append((index, best[1], best[0]))
        else:
            kept.append((index, mine))
    return found


def made_up(number: int, *, words: int, seed: int) -> list[Example]:
    """Distinct prompts, many of them one or two words away from another."""
    random_ = random.Random(seed)
    texts: dict[str, None] = {}
    while len(texts) < number:
        text = [f"w{random_.randrange(words)}" for _ in range(random_.randrange(1, 14))]
        texts[" ".join(text)] = None
        for _ in range(random_.randrange(3)):
            text[random_.randrange(len(text))] = f"w{random_.randrange(words)}"
            texts[" ".join(text)] = None
    return [Example(instruction=text, output="x") for text in list(texts)[:number]]


@pytest.mark.parametrize(("words", "seed"), [(4, 0), (30, 1), (500, 2)])
def test_near_copies_equal_the_slow_search(words: int, seed: int):
    examples = made_up(400, words=words, seed=seed)
    found = [(copy.index, copy.of, copy.overlap) for copy in find_duplicates(examples, progress=False).near]
    assert found == near_copies_slowly(examples)
    assert len(found) > 20


def test_each_kind_is_told_apart():
    long = "Write a short and friendly letter to the new neighbours"
    examples = [
        Example(instruction=long, output="1"),
        Example(instruction=long, output="1"),
        Example(instruction=long, output="2"),
        Example(instruction=long.replace("new", "old").lower() + "!", output="1"),
        Example(instruction=long, input="They have a dog and come from another country far away", output="1"),
        Example(instruction="", output=""),
    ]
    found = find_duplicates(examples, progress=False)
    assert [(copy.index, copy.of) for copy in found.exact] == [(1, 0)]
    assert [(copy.index, copy.of) for copy in found.conflicting] == [(2, 0)]
    assert [(copy.index, copy.of) for copy in found.near] == [(3, 0)]
