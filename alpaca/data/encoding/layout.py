"""How examples become tokens: what a layout is, and which one a run has."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from alpaca.data.example import AnyExample


@dataclass(frozen=True, slots=True)
class Row:
    """One example's tokens, before any is cut.

    ids: with all that stands before and after.    spans: the places [start, end) that carry loss, in order.
    is_merged: whether a token holds the prompt's last and the answer's first characters.
    is_asked_otherwise: whether a server's prompt for one of the answers is not what stands before it here.
    """

    ids: list[int]
    spans: tuple[tuple[int, int], ...]
    is_merged: bool = False
    is_asked_otherwise: bool = False


class Layout(ABC):
    """Turns examples into rows of tokens.

    description: for the log.    ends: ids and names of tokens that ended answers in the rows made so far, EOS aside.
    """

    description: str
    ends: Mapping[int, str] = MappingProxyType({})

    @abstractmethod
    def encode(self, examples: Sequence[AnyExample]) -> list[Row]:
        """The rows of examples, in order. Raises InputError for one that this layout has no room for."""
