"""A tokenizer of 128 ids for the tiny models of the engines' tests: letters, and a few pieces of several."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alpaca.serving.structured.matching import Matcher
from alpaca.text.tokenizer import Tokenizer

EOS = 2
_LONGER = ("ab", "the ", '": "', '{"', '"}', " and", "10", "é", "🦙", "\n")


class Letters(Tokenizer):
    """Ids 0 to 2 are control tokens; the printable letters of ASCII follow, then the longer pieces."""

    bos_id, eos_id, pad_id = 1, EOS, None
    prefix_ids = (1,)
    special_ids = frozenset([0, 1, EOS])
    named_tokens = {}  # noqa: RUF012  as in every Tokenizer

    def __init__(self, size: int) -> None:
        pieces = [b"", b"", b"", *(bytes([byte]) for byte in range(32, 127)), *(text.encode() for text in _LONGER)]
        self.size = self.base_size = size
        self._pieces = (pieces + [b""] * size)[:size]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self._pieces.index(letter.encode()) for letter in text] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self._pieces[token_id]

    def add_pad_token(self) -> bool:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        raise NotImplementedError


def allowed(matcher: Matcher, size: int) -> set[int]:
    """The ids that a matcher's mask allows, bit by bit."""
    return set(np.flatnonzero(np.unpackbits(matcher.mask, bitorder="little")[:size]).tolist())
