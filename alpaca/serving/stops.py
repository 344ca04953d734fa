"""Finds stop texts in an answer as it grows, in time linear in the answer however many there are."""

from collections import deque
from collections.abc import Iterable


class StopTexts:
    """An automaton over several texts: one step a character, after Aho and Corasick (1975).

    A state stands for the longest end of what was read that one of the texts begins with; 0 is nothing.
    lengths[state]: how many characters that end has.
    matches[state]: length of the longest text that is complete in this state; 0 if none is.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        """Texts must not be empty. Takes time and memory for each of their characters."""
        self._next: list[dict[str, int]] = [{}]
        self._shorter = [0]  # the state of the longest proper end
        self.lengths = [0]
        self.matches = [0]
        for text in texts:
            self._add(text)
        self._link()

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while state and character not in self._next[state]:
            state = self._shorter[state]
        return self._next[state].get(character, 0)

    def _add(self, text: str) -> None:
        state = 0
        for character in text:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._shorter.append(0)
                self.lengths.append(self.lengths[state] + 1)
                self.matches.append(0)
            state = self._next[state][character]
        self.matches[state] = len(text)

    def _link(self) -> None:
        """Find each state's shorter one, breadth first, since it is found through its parent's."""
        states = deque(self._next[0].values())
        while states:
            state = states.popleft()
            for character, longer in self._next[state].items():
                self._shorter[longer] = self.step(self._shorter[state], character)
                self.matches[longer] = self.matches[longer] or self.matches[self._shorter[longer]]
                states.append(longer)
