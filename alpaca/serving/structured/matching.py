"""Where one completion stands in what it must follow, and which tokens may come next."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from alpaca.errors import InputError
from alpaca.serving.structured.vocabulary import Vocabulary

_WORD_BYTES = 4  # a mask is as many whole words long


@dataclass(frozen=True, eq=False)
class KnownIds:
    """The ids of text, and those that end an answer, as masks: uint8, bit i % 8 of byte i // 8 for id i."""

    text: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> "KnownIds":
        size = len(vocabulary.pieces)
        ends = np.zeros(size, bool)
        ends[list(vocabulary.eos_ids)] = True
        return cls(_pack(np.array([bool(piece) for piece in vocabulary.pieces])), _pack(ends))


def _pack(flags: np.ndarray) -> np.ndarray:
    packed = np.packbits(flags, bitorder="little")
    return np.pad(packed, (0, -len(packed) % _WORD_BYTES))


class Matcher:
    """Follows one completion. Used by one thread at a time.

    inner: llguidance's matcher.   rebuild: makes another at the beginning. Those of equal constraints share what they
    learn of their expressions; when that has reached its bound, a completion goes on with a new one.
    """

    def __init__(self, inner: Any, known: KnownIds, rebuild: Callable[[], Any]) -> None:
        self.mask: np.ndarray | None = None  # of the tokens that may come next, in KnownIds' form; None: not found yet
        self._inner, self._known, self._rebuild = inner, known, rebuild
        self.seconds = 0.0  # that the last mask took to find
        self.may_only_end = False  # whether the mask holds nothing but EOS
        self._token_ids: list[int] = []
        self._is_stale = False

    def copy(self) -> "Matcher":
        """Another completion at the same place."""
        other = Matcher(self._inner.deep_copy(), self._known, self._rebuild)
        other.mask, other.may_only_end = self.mask, self.may_only_end
        other._token_ids, other._is_stale = list(self._token_ids), self._is_stale
        return other

    def accept(self, token_id: int) -> None:
        """Go on by a token that the mask allows. Takes microseconds."""
        self._token_ids.append(token_id)
        self.mask = None
        self._is_stale = not self._inner.consume_token(token_id)

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow but the end."""
        return not self._is_stale and self._inner.is_stopped()

    def find_mask(self) -> None:
        """Find the tokens that may come next. Raises InputError where there are none, or it takes too much to find."""
        begun = time.perf_counter()
        packed = b"" if self._is_stale else self._inner.compute_bitmask()
        if self._is_stale or self._inner.is_error():
            packed = self._find_anew()
        text = self._known.text
        mask = np.frombuffer(packed, np.uint8)[: len(text)] & text  # a grammar can name control tokens
        self.may_only_end = not mask.any()
        if self._inner.is_accepting():
            mask |= self._known.ends
        if not mask.any():
            raise InputError("the constraint allows no token of any text here: write it with texts alone")
        self.mask, self.seconds = mask, time.perf_counter() - begun

    def _find_anew(self) -> bytes:
        self._inner = self._rebuild()
        self._is_stale = not self._inner.consume_tokens(self._token_ids)
        packed = b"" if self._is_stale else self._inner.compute_bitmask()
        if self._inner.is_error():
            reason = self._inner.get_error().partition("\n")[0][:200]
            raise InputError(
                f"the constraint takes too much to follow after {len(self._token_ids)} tokens ({reason}): "
                "make it simpler, and name no control tokens (<name>, <[id]>) in a grammar"
            )
        return packed
