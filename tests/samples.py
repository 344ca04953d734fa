"""Tables of cases of which the fast run takes a few of each kind, and `script/test --all` every one."""

from collections import defaultdict
from collections.abc import Hashable, Iterable

import pytest


def sampled(names: Iterable[Hashable], *fast: Hashable) -> list:
    """Parameters for each of `names`; those that are not in `fast` are slow."""
    names = list(names)
    assert set(fast) <= set(names), f"no such cases: {set(fast) - set(names)}"
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


def mark_slow_rows(items: Iterable[pytest.Item]) -> None:
    """Of a test with the mark `fast_rows(n)`, n rows, spread evenly over its table, stay fast; the others are slow."""
    tables: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("fast_rows") and not item.get_closest_marker("slow"):
            tables[item.nodeid.partition("[")[0]].append(item)
    for rows in tables.values():
        fast = spread(len(rows), rows[0].get_closest_marker("fast_rows").args[0])
        for number, item in enumerate(rows):
            if number not in fast:
                item.add_marker(pytest.mark.slow)


def spread(length: int, count: int) -> set[int]:
    """`count` of the places 0 ... length - 1: the middle of each of as many equal parts."""
    return {(2 * part + 1) * length // (2 * count) for part in range(count)}
