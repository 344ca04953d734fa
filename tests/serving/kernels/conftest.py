"""What the kernels' tests share: two threads, among which the ones in C++ divide their rows."""

import pytest


@pytest.fixture(autouse=True)
def divided(two_threads: None) -> None:
    """A worker's own number is one, with which no part of a result could be left out or be written twice."""
