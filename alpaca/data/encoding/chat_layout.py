"""Conversations by a chat template: the tokens of assistants' turns carry loss, those that end them included.

A turn's tokens are those that the model must write after the generation prompt. Where they begin and end in the text is
found by rendering: what the template makes of the messages before the turn, with the generation prompt, is the text's
beginning; and contents are found by rendering again with their characters exchanged. Only the template's own control
tokens are control tokens; those written in contents are text.
"""

import time
from collections.abc import Sequence
from functools import partial

from alpaca.data.encoding.layout import Layout, Row
from alpaca.data.example import AnyExample, Completion, Conversation, Example, Turn
from alpaca.errors import InputError
from alpaca.text.chat.files import ChatTemplate
from alpaca.text.chat.messages import Message
from alpaca.text.chat.provenance import mark_own
from alpaca.text.chat.renderer import RENDERER
from alpaca.text.markers import MarkedText, private_characters
from alpaca.text.prompts import with_context
from alpaca.text.tokenizer import Tokenizer

_MOST_SHOWN = 60


class ChatLayout(Layout):
    """name: of the template, for the log."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, *, name: str) -> None:
        self.template, self._tokenizer, self._encoder = template, tokenizer, tokenizer.marked_encoder
        self._now = time.time()  # one moment for all, should the template write the date
        self._read_words = partial(RENDERER.read_words, template)
        self.description = f"the chat template {name}"
        self.ends: dict[int, str] = {}

    def encode(self, examples: Sequence[AnyExample]) -> list[Row]:
        placed = [self._place(as_conversation(example)) for example in examples]
        encoded = self._encoder.encode_placed([marked for marked, _ in placed])
        return [
            self._make_row(marked, ids, starts, spans)
            for (marked, spans), (ids, starts) in zip(placed, encoded, strict=True)
        ]

    def _place(self, conversation: Conversation) -> tuple[MarkedText, list[tuple[int, int]]]:
        """The conversation's text, and where in it the trained turns are."""
        messages: list[Message] = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
        text = self._render(messages)
        marked = mark_own(text, messages, render=self._render, read_words=self._read_words, encoder=self._encoder)
        contents = self._find_contents(text, messages)
        spans: list[tuple[int, int]] = []
        for number, turn in enumerate(conversation.turns):
            if turn.is_trained:
                done = spans[-1][1] if spans else 0
                start = self._find_start(text, messages[:number], contents.get(number), done)
                end = self._find_end(marked, messages[: number + 1], contents.get(number))
                if start is None or end is None or not done <= start <= end:
                    begins = messages[0]["content"][:_MOST_SHOWN]
                    raise InputError(
                        f"the chat template writes the conversation that begins {begins!r} so that its turn {number} "
                        "cannot be told from the rest; use another --prompt_template"
                    )
                spans.append((start, end))
        return marked, spans

    def _make_row(self, marked: MarkedText, ids: list[int], starts: list[int], spans: Sequence[tuple[int, int]]) -> Row:
        """The row of tokens that begin at `starts` in the text. Where no token ends the last turn, EOS does."""
        if not any(end == spans[-1][1] for _, end in marked.markers):
            while starts and starts[-1] >= spans[-1][1]:  # white space after the turn
                ids, starts = ids[:-1], starts[:-1]
            ids, starts = [*ids, self._tokenizer.eos_id], [*starts, spans[-1][1] - 1]
        found, at = [], 0
        for start, end in spans:
            first = next((k for k in range(at, len(starts)) if starts[k] >= start), len(starts))
            at = next((k for k in range(first, len(starts)) if starts[k] >= end), len(starts))
            found.append((first, at))
            name = next((marked.text[place[0] : end] for place in marked.markers if place[1] == end), None)
            if name is not None and at > first and ids[at - 1] != self._tokenizer.eos_id:
                self.ends[ids[at - 1]] = name
        return Row(ids, tuple(found))

    def _render(self, messages: Sequence[Message], *, adds_prompt: bool = False) -> str:
        values = self._tokenizer.named_tokens
        return RENDERER.render(self.template, messages, values, now=self._now, adds_prompt=adds_prompt)

    def _find_contents(self, text: str, messages: Sequence[Message]) -> dict[int, tuple[int, int]]:
        """Where assistants' contents stand in the text, by the messages' numbers; none where they cannot be found."""
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        unused = private_characters(set(text))
        marks = dict(zip(numbers, unused, strict=False))
        changed = [
            {**message, "content": "".join(c if c.isspace() else marks[number] for c in message["content"])}
            if number in marks
            else message
            for number, message in enumerate(messages)
        ]
        try:
            disguised = self._render(changed)
        except InputError:  # the template looks into contents, and these are not what it expects
            return {}
        own = set(marks.values())
        if len(disguised) != len(text) or any(a != b and b not in own for a, b in zip(text, disguised, strict=True)):
            return {}
        places = {number: (disguised.find(mark), disguised.rfind(mark) + 1) for number, mark in marks.items()}
        return {
            number: (start, end)
            for number, (start, end) in places.items()
            if end and not disguised[start:end].replace(marks[number], "").strip()  # else it is there more than once
        }

    def _find_start(
        self, text: str, before: Sequence[Message], content: tuple[int, int] | None, done: int
    ) -> int | None:
        """Where the text begins that the model writes after these messages and the generation prompt."""
        asked = self._render(before, adds_prompt=True) if before else None
        if asked is not None and text.startswith(asked) and (content is None or len(asked) <= content[0]):
            return len(asked)
        if content is None:
            return None
        if asked is not None and asked.startswith(unasked := self._render(before)) and asked != unasked:
            prompt = asked[len(unasked) :]
            place = text.rfind(prompt, done, content[0])
            if place >= 0:
                return place + len(prompt)
        return content[0]

    def _find_end(self, marked: MarkedText, upto: Sequence[Message], content: tuple[int, int] | None) -> int | None:
        """Where a turn ends in the text: behind the control token that ends it, if there is one."""
        whole = self._render(upto)
        is_beginning = marked.text.startswith(whole)
        if content is None and not is_beginning:
            return None
        end = content[1] if content is not None else len(whole.rstrip())
        if any(place[1] == end for place in marked.markers):
            return end
        limit = len(whole) if is_beginning else len(marked.text)  # behind it the next turn's own tokens begin
        following = next((place for place in marked.markers if end <= place[0] and place[1] <= limit), None)
        if following is not None and not marked.text[end : following[0]].strip():
            return following[1]
        return end


def as_conversation(example: AnyExample) -> Conversation:
    """An example as turns: an instruction and its context are one message of a user."""
    if isinstance(example, Conversation):
        return example
    if isinstance(example, Completion):
        asked = example.prompt
    else:
        assert isinstance(example, Example)
        asked = with_context(example.instruction, example.input)
    return Conversation((Turn("user", asked), Turn("assistant", example.output, is_trained=True)))
