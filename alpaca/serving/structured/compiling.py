"""Constraints that were read once are kept, and each completion gets a matcher of its own.

Reading happens in the thread of the request that asks for it, never in the engine's: first in a process that may be
ended (`trials`), then here. What is kept is bounded by number, and each by the library's bounds.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from alpaca.errors import InputError
from alpaca.serving.structured.constraints import Constraint
from alpaca.serving.structured.grammars import build, make_tokenizer
from alpaca.serving.structured.matching import KnownIds, Matcher
from alpaca.serving.structured.trials import Trials
from alpaca.serving.structured.vocabulary import Vocabulary, encoder
from alpaca.text.tokenizer import Tokenizer

MOST_KEPT = 32


class Compiler:
    """Reads constraints for one model's tokenizer, for any number of threads.

    size: number of ids that can be sampled.   eos_ids: those that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, eos_ids: Iterable[int]) -> None:
        self._tokenizer, self._size, self._eos_ids = tokenizer, size, frozenset(eos_ids)
        self._kept: OrderedDict[Constraint, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._preparing = threading.Lock()
        self._prepared: tuple[KnownIds, Any, Trials] | None = None

    def start(self, constraint: Constraint, n: int) -> list[Matcher]:
        """Matchers for `n` completions, at their beginning. Raises InputError for what cannot be followed."""
        known, tokenizer, trials = self._prepare()
        with self._lock:
            built = self._kept.get(constraint)
            if built is not None:
                self._kept.move_to_end(constraint)
        if built is None:
            trials.require(constraint)
            built = build(constraint, tokenizer)
            self._keep(constraint, built)

        def rebuild() -> Any:
            fresh = build(constraint, tokenizer)
            self._keep(constraint, fresh)
            return fresh.deep_copy()

        first = Matcher(built.deep_copy(), known, rebuild)
        first.find_mask()
        return [first, *(first.copy() for _ in range(n - 1))]

    def prepare(self) -> None:
        """Make the vocabulary ready, while nobody waits: for 128,000 pieces the library lets no thread run for 0.7 s.

        What is wrong with it is said to the first request that needs it.
        """
        with contextlib.suppress(InputError):
            self._prepare()

    def close(self) -> None:
        if self._prepared is not None:
            self._prepared[2].close()

    def _keep(self, constraint: Constraint, built: Any) -> None:
        dropped = []  # let go of outside of the lock: freeing a large one takes milliseconds
        with self._lock:
            dropped.append(self._kept.pop(constraint, None))
            self._kept[constraint] = built
            while len(self._kept) > MOST_KEPT:
                dropped.append(self._kept.popitem(last=False))

    def _prepare(self) -> tuple[KnownIds, Any, Trials]:
        """What all constraints share, made once. Raises InputError."""
        with self._preparing:
            if self._prepared is None:
                vocabulary = Vocabulary.of(self._tokenizer, self._size, self._eos_ids)
                tokenizer = make_tokenizer(vocabulary, encoder(self._tokenizer, vocabulary))
                self._prepared = KnownIds.of(vocabulary), tokenizer, Trials(vocabulary)
            return self._prepared
