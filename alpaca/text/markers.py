"""Text in which some control tokens are meant, and others are only written: which of them is which, and its ids."""

import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

_KEY_CHARACTERS = 3  # of 65,534 each: nobody sends the right ones by chance
_PRIVATE = (0xF0000, 0xFFFFE)  # characters that Unicode leaves to private use


@dataclass(frozen=True)
class MarkedText:
    """A text, and the places [start, end) of the control tokens in it that are meant. All others are text."""

    text: str
    markers: tuple[tuple[int, int], ...]


class MarkedEncoder:
    """Tokenizes marked text: as AutoTokenizer would, were the control tokens that are not meant no tokens.

    Each control token gets a second name, drawn at random, that is an ordinary token of the same behaviour. The text is
    tokenized as one, with the tokens meant under their second names and control tokens as text. So the text between two
    markers is cut as it would be without all this.
    """

    def __init__(self, backend, control_tokens: Iterable[str]) -> None:
        """backend: a `tokenizers.Tokenizer` that nothing else uses.   control_tokens: those it has by that name."""
        from tokenizers import AddedToken

        self._backend = backend
        listed = {token.content: (token_id, token) for token_id, token in backend.get_added_tokens_decoder().items()}
        names = sorted(
            listed.keys() & set(control_tokens), key=len, reverse=True
        )  # of two that begin alike, the longer
        self.control_tokens = tuple(names)
        self._keys = dict(zip(names, _draw_keys(), strict=False))
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        backend.add_tokens(
            [
                AddedToken(key, normalized=False, lstrip=listed[name][1].lstrip, rstrip=listed[name][1].rstrip)
                for name, key in self._keys.items()
            ]
        )
        self._ids = {backend.token_to_id(key): listed[name][0] for name, key in self._keys.items()}
        self._pattern = re.compile("|".join(map(re.escape, names))) if names else None

    def find(self, text: str) -> tuple[tuple[int, int], ...]:
        """The places of all control tokens that are written in a text."""
        return tuple(match.span() for match in self._pattern.finditer(text)) if self._pattern else ()

    def with_keys(self, marked: MarkedText) -> str:
        """The text with the tokens that are meant under their second names: what `encode` takes."""
        return "".join(self._parts(marked))

    def encode(self, text: str) -> list[int]:
        """The ids of a text made by `with_keys`; nothing is put before or after it."""
        return [
            self._ids.get(token_id, token_id) for token_id in self._backend.encode(text, add_special_tokens=False).ids
        ]

    def encode_placed(self, texts: Sequence[MarkedText]) -> list[tuple[list[int], list[int]]]:
        """For each text its ids, and where in it each of them begins."""
        found = self._backend.encode_batch([self.with_keys(marked) for marked in texts], add_special_tokens=False)
        encoded = []
        for marked, encoding in zip(texts, found, strict=True):
            places = self._places(marked)
            ids = [self._ids.get(token_id, token_id) for token_id in encoding.ids]
            encoded.append((ids, [places[start] for start, _ in encoding.offsets]))
        return encoded

    def _places(self, marked: MarkedText) -> list[int]:
        """For each character of `with_keys`' text, and its end, the place in `marked.text`."""
        places, done = [], 0
        for start, end in marked.markers:
            places += [*range(done, start), *[start] * len(self._keys[marked.text[start:end]])]
            done = end
        return [*places, *range(done, len(marked.text) + 1)]

    def _parts(self, marked: MarkedText) -> Iterator[str]:
        done = 0
        for start, end in marked.markers:
            yield marked.text[done:start]
            yield self._keys[marked.text[start:end]]
            done = end
        yield marked.text[done:]


def private_characters(used: set[str]) -> Iterator[str]:
    """Characters of private use that do not occur in `used`."""
    return (chr(code) for code in range(*_PRIVATE) if chr(code) not in used)


def _draw_keys() -> Iterator[str]:
    """Names that nobody can guess, each another one."""
    drawn: set[str] = set()
    while True:
        key = "".join(chr(_PRIVATE[0] + secrets.randbelow(_PRIVATE[1] - _PRIVATE[0])) for _ in range(_KEY_CHARACTERS))
        if key not in drawn:
            drawn.add(key)
            yield key
