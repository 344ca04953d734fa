"""What training takes: an instruction with its answer, a conversation, or a text that is continued; and judgements.

Each of the first three has `instruction`, `input` and `output`, so that reports and searches for
copies look at them alike.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """One instruction, its answer, and the context it may refer to ("" for none)."""

    instruction: str
    output: str
    input: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.    is_trained: whether the model learns to write it, if it is an assistant's."""

    role: str
    content: str
    is_trained: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order. At least one is an assistant's that is trained, and none stands after the last such."""

    turns: tuple[Turn, ...]

    @property
    def instruction(self) -> str:
        """What the last answer answers."""
        return self.turns[-2].content if len(self.turns) > 1 else ""

    @property
    def input(self) -> str:
        """The conversation before that, as text."""
        return "\n\n".join(f"{turn.role}: {turn.content}" for turn in self.turns[:-2])

    @property
    def output(self) -> str:
        """The last answer."""
        return self.turns[-1].content


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt as it is, without a template around it, and the text that follows it at once."""

    prompt: str
    completion: str

    @property
    def instruction(self) -> str:
        return self.prompt

    @property
    def input(self) -> str:
        return ""

    @property
    def output(self) -> str:
        return self.completion


AnyExample = Example | Conversation | Completion


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, of which the first is preferred."""

    chosen: AnyExample
    rejected: AnyExample


@dataclass(frozen=True, slots=True)
class Judged:
    """An answer, and whether it is one to give."""

    answer: AnyExample
    is_good: bool
