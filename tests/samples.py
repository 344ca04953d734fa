"""Tables of cases of which the fast run takes a few of each kind, and `script/test --all` every one."""

from collections.abc import Hashable, Iterable

import pytest


def sampled(names: Iterable[Hashable], *fast: Hashable) -> list:
    """Parameters for each of `names`; those that are not in `fast` are slow."""
    names = list(names)
    assert set(fast) <= set(names), f"no such cases: {set(fast) - set(names)}"
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]
