"""Masks of completions that follow a constraint: found beside the engine's thread, and laid on logits.

Legend: R rows (completions), V vocabulary.
"""

import os
import time
from collections.abc import Hashable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from alpaca.serving.structured.matching import Matcher

_MOST_WAITING_S = 0.01
_MOST_THREADS = 4
Owner = TypeVar("Owner", bound=Hashable)


class MaskFinder(Generic[Owner]):
    """Finds masks in threads of its own, so that one that takes long holds up nobody but its own completion.

    A step waits for the masks of its rows, a tenth of a millisecond as a rule, and for each at most 10 ms from its
    beginning. Rows whose masks take longer are left out of steps until they are there.
    """

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._wanted: dict[Owner, tuple[Future[None], float]] = {}

    def begin(self, owner: Owner, matcher: Matcher) -> None:
        """Begin to find a matcher's mask, for a completion that `collect` names when it is there."""
        if self._threads is None:
            num_threads = min(_MOST_THREADS, os.cpu_count() or 1)
            self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="masks")
        self._wanted[owner] = self._threads.submit(matcher.find_mask), time.monotonic() + _MOST_WAITING_S

    def collect(self, *, is_idle: bool) -> Iterator[tuple[Owner, BaseException | None]]:
        """The completions whose masks are there, each with what it failed with.

        is_idle: nothing else can be done, so it waits for one.
        """
        if not self._wanted:
            return
        futures = [future for future, _ in self._wanted.values()]
        until = max(deadline for _, deadline in self._wanted.values())
        timeout = max(until - time.monotonic(), 0.0)
        wait(futures, timeout=timeout)
        if is_idle and not any(future.done() for future in futures):
            wait(futures, timeout=_MOST_WAITING_S, return_when=FIRST_COMPLETED)
        for owner in [owner for owner, (future, _) in self._wanted.items() if future.done()]:
            yield owner, self._wanted.pop(owner)[0].exception()

    def forget(self, owner: Owner) -> None:
        """Nobody wants this completion's mask any more."""
        if found := self._wanted.pop(owner, None):
            found[0].cancel()

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


class Masked(Protocol):
    """How a completion is sampled, as far as it matters here."""

    @property
    def mask(self) -> np.ndarray | None: ...


def forbid(scores: torch.Tensor, states: "list[Masked] | tuple[Masked, ...]") -> None:
    """Make the tokens of scores [R, V] impossible that the rows' masks leave out. Rows without one stay untouched."""
    rows = [(row, state.mask) for row, state in enumerate(states) if state.mask is not None]
    if not rows:
        return
    device, size = scores.device, scores.shape[1]
    packed = torch.from_numpy(np.stack([mask for _, mask in rows]))
    where = torch.tensor([row for row, _ in rows])
    if device.type != "cpu":
        packed = packed.pin_memory().to(device, non_blocking=True)
        where = where.pin_memory().to(device, non_blocking=True)
    bits = (packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=device)) & 1
    allowed = bits.flatten(1)[:, :size].bool()
    if allowed.shape[1] < size:
        allowed = torch.nn.functional.pad(allowed, (0, size - allowed.shape[1]))
    scores.index_copy_(0, where, scores.index_select(0, where).masked_fill_(~allowed, float("-inf")))
