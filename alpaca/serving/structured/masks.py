"""Masks of completions that follow a constraint: found beside the engine's thread, and laid on logits.

Legend: R rows (completions), V vocabulary.
"""

import os
import time
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from alpaca.serving.llama.step import to_tensor
from alpaca.serving.structured.matching import Matcher

_MOST_WAITING_S = 0.01
_SLOW_S = 0.002  # a matcher whose last mask took longer gets a thread for itself
_MOST_THREADS = 4
Owner = TypeVar("Owner", bound=Hashable)


class _Search:
    """A mask that is being found.    error: what it failed with."""

    def __init__(self, matcher: Matcher) -> None:
        self.is_done = False
        self.error: BaseException | None = None
        self._matcher = matcher

    def run(self) -> None:
        try:
            self._matcher.find_mask()
        except BaseException as error:
            self.error = error
        self.is_done = True


class MaskFinder(Generic[Owner]):
    """Finds masks in threads of its own, so that one that takes long holds up nobody but its own completion.

    A step waits for the masks of its rows, a tenth of a millisecond as a rule, and at most 10 ms from their beginning.
    Rows whose masks take longer are left out of steps until they are there.
    """

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._searches: dict[Owner, _Search] = {}
        self._unbegun: list[tuple[Owner, Matcher]] = []
        self._running: dict[Future[None], float] = {}  # and until when a step waits for it

    def want(self, owner: Owner, matcher: Matcher) -> None:
        """Have a matcher's mask found, for a completion that `collect` names when it is there."""
        self._unbegun.append((owner, matcher))

    def forget(self, owner: Owner) -> None:
        """Nobody wants this completion's mask any more."""
        self._searches.pop(owner, None)
        self._unbegun = [item for item in self._unbegun if item[0] is not owner]

    @property
    def is_idle(self) -> bool:
        return not self._searches and not self._unbegun

    def collect(self, *, has_work: bool) -> Iterator[tuple[Owner, BaseException | None]]:
        """The completions whose masks are there, each with what it failed with.

        has_work: whether there is anything else to do; otherwise it waits for one.
        """
        if self.is_idle:
            return
        self._begin()
        until = max(self._running.values(), default=0.0)
        _, late = wait(self._running, timeout=max(until - time.monotonic(), 0.0))
        if not has_work and len(late) == len(self._running):
            wait(late, timeout=_MOST_WAITING_S, return_when=FIRST_COMPLETED)
        self._running = {future: until for future, until in self._running.items() if not future.done()}
        for owner in [owner for owner, search in self._searches.items() if search.is_done]:
            yield owner, self._searches.pop(owner).error

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self) -> None:
        """Begin what is wanted: all quick ones in one thread, as waking one takes longer than a mask does."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="masks")
        quick: list[_Search] = []
        for owner, matcher in self._unbegun:
            search = self._searches[owner] = _Search(matcher)
            if matcher.seconds > _SLOW_S:
                self._submit([search])
            else:
                quick.append(search)
        self._unbegun = []
        if quick:
            self._submit(quick)

    def _submit(self, searches: list[_Search]) -> None:
        assert self._threads is not None
        future = self._threads.submit(lambda: [search.run() for search in searches] and None)
        self._running[future] = time.monotonic() + _MOST_WAITING_S


class Masked(Protocol):
    """How a completion is sampled, as far as it matters here."""

    @property
    def mask(self) -> np.ndarray | None: ...


def forbid(scores: torch.Tensor, states: Sequence[Masked]) -> None:
    """Make the tokens of scores [R, V] impossible that the rows' masks leave out. Rows without one stay untouched."""
    rows = [(row, state.mask) for row, state in enumerate(states) if state.mask is not None]
    if not rows:
        return
    if scores.device.type == "cpu":
        for row, mask in rows:
            scores[row].masked_fill_(torch.from_numpy(_left_out(mask, scores.shape[1])), float("-inf"))
        return
    _forbid_there(scores, [row for row, _ in rows], np.stack([mask for _, mask in rows]))


def _left_out(mask: np.ndarray, size: int) -> np.ndarray:
    """The ids that a mask leaves out, bool [size]; all of those beyond it."""
    flags = np.unpackbits(~mask, bitorder="little")[:size].view(np.bool_)
    return flags if len(flags) == size else np.pad(flags, (0, size - len(flags)), constant_values=True)


def _forbid_there(scores: torch.Tensor, rows: list[int], masks: np.ndarray) -> None:
    """The same on another device: bits travel, an eighth of the bytes, and the host does not wait."""
    device, size = scores.device, scores.shape[1]
    packed, where = to_tensor(masks, torch.uint8, device), to_tensor(rows, torch.int64, device)
    bits = packed[:, :, None] & to_tensor([1 << bit for bit in range(8)], torch.uint8, device)
    left_out = bits.flatten(1)[:, :size] == 0
    if left_out.shape[1] < size:
        left_out = torch.nn.functional.pad(left_out, (0, size - left_out.shape[1]), value=True)
    scores.index_copy_(0, where, scores.index_select(0, where).masked_fill_(left_out, float("-inf")))
