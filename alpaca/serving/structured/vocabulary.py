"""The pieces of a model's tokenizer as bytes, which is all that a constraint has to know of it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from alpaca.text.tokenizer import Tokenizer

Encode = Callable[[str], list[int]]
_BREAK = "\n"  # joins with no neighbour, and hides what a tokenizer puts before a text
_MOST_WORDS = 4096


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """pieces: what each id adds to a text that has begun; empty for ids that may not occur in an answer.

    eos_ids: they end it.
    """

    pieces: tuple[bytes, ...]
    eos_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int, eos_ids: Iterable[int]) -> "Vocabulary":
        """The first `size` ids of a tokenizer. Control tokens and <unk> stand for no bytes, so none can be chosen."""
        ends = frozenset(eos_ids)
        without = ends | tokenizer.special_ids
        pieces = (
            b"" if i in without or i >= tokenizer.size or tokenizer.is_unknown(i) else tokenizer.bytes_inside(i)
            for i in range(size)
        )
        return cls(pieces=tuple(pieces), eos_ids=tuple(sorted(end for end in ends if end < size)))

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """The last id of each piece: SentencePiece has single letters twice, as bytes and, later, as themselves."""
        return {piece: token_id for token_id, piece in enumerate(self.pieces) if piece}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.ids), default=0)

    def cut(self, data: bytes) -> list[int]:
        """Ids whose pieces make up `data`, each as long as can be; as far as there are pieces."""
        found, at = [], 0
        while at < len(data):
            ends = range(min(len(data), at + self._longest), at, -1)
            end = next((end for end in ends if data[at:end] in self.ids), None)
            if end is None:
                break
            found.append(self.ids[data[at:end]])
            at = end
        return found

    def spell(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.pieces[i] if i < len(self.pieces) else b"" for i in ids)

    def to_message(self) -> dict[str, Any]:
        return {"pieces": [piece.decode("latin-1") for piece in self.pieces], "eos_ids": list(self.eos_ids)}

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> "Vocabulary":
        pieces = tuple(piece.encode("latin-1") for piece in message["pieces"])
        return cls(pieces=pieces, eos_ids=tuple(message["eos_ids"]))


def encoder(tokenizer: Tokenizer, vocabulary: Vocabulary) -> Encode:
    """Ids of a text inside an answer, as the model saw such texts in training.

    A tokenizer may put a space before a text, or change it. Only ids that spell exactly the text are taken.
    """
    known: dict[str, list[int]] = {}

    def encode(text: str) -> list[int]:
        if text not in known:
            if len(known) >= _MOST_WORDS:
                known.clear()
            known[text] = find(text)
        return known[text]

    def find(text: str) -> list[int]:
        data = text.encode()
        ids = tokenizer.encode(text)
        if vocabulary.spell(ids) == data:
            return ids
        ids = tokenizer.encode(_BREAK + text)
        tail = next((ids[at:] for at in range(len(ids)) if vocabulary.spell(ids[at:]) == data), None)
        return vocabulary.cut(data) if tail is None else tail

    return encode
