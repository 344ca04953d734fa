"""Conversations by a chat template: the tokens of assistants' turns carry loss, those that end them included.

A turn's tokens are those that the model must write after the generation prompt. Where they begin and end in the text is
found by rendering: what the template makes of the messages before the turn, with the generation prompt, is the text's
beginning; and contents are found by rendering again with their characters exchanged (but for words such as `</think>`,
where the template looks for them). Only the template's own control tokens are control tokens; those written in contents
are text.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from alpaca.data.encoding.layout import Layout, Row
from alpaca.data.example import AnyExample, Completion, Conversation, Example, Turn
from alpaca.errors import InputError
from alpaca.text.chat.files import ChatTemplate
from alpaca.text.chat.messages import Message
from alpaca.text.chat.provenance import mark_own, words_to_keep
from alpaca.text.chat.renderer import RENDERER
from alpaca.text.markers import MarkedText, private_characters
from alpaca.text.prompts import with_context
from alpaca.text.tokenizer import Tokenizer

_MOST_SHOWN = 60
_NO_SPACE = re.compile(r"\S")


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
        encoded = self._encoder.encode_placed([one.marked for one in placed])
        return [self._make_row(one, ids, starts) for one, (ids, starts) in zip(placed, encoded, strict=True)]

    def _place(self, conversation: Conversation) -> "_Placed":
        try:
            return self._find_spans(conversation)
        except InputError as error:
            begins = conversation.turns[0].content[:_MOST_SHOWN]
            raise InputError(f"the conversation that begins {begins!r}: {error}") from error

    def _find_spans(self, conversation: Conversation) -> "_Placed":
        messages: list[Message] = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
        trained = [number for number, turn in enumerate(conversation.turns) if turn.is_trained]
        render = _Prefixes(self._render_prefixes, messages, trained)
        text = render(len(messages))
        marked = mark_own(text, messages, render=self._render, read_words=self._read_words, encoder=self._encoder)
        contents = self._find_contents(text, messages)
        spans: list[tuple[int, int]] = []
        is_asked_otherwise = False
        for number in trained:
            done = spans[-1][1] if spans else 0
            start, is_asked = _find_start(marked, number, render, contents.get(number), done)
            is_asked_otherwise |= not is_asked
            end = _find_end(marked, render(number + 1), contents.get(number), start)
            if start is None or end is None or not done <= start <= end:
                raise InputError(
                    f"the chat template writes it so that its turn {number} cannot be told from the rest; use "
                    "another --prompt_template"
                )
            spans.append((start, end))
        return _Placed(marked, spans, is_asked_otherwise)

    def _make_row(self, placed: "_Placed", ids: list[int], starts: list[int]) -> Row:
        """The row of tokens that begin at `starts` in the text. Where no token ends the last turn, EOS does."""
        marked, spans = placed.marked, placed.spans
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
        return Row(ids, tuple(found), is_asked_otherwise=placed.is_asked_otherwise)

    def _render(self, messages: Sequence[Message]) -> str:
        values = self._tokenizer.named_tokens
        return RENDERER.render(self.template, messages, values, now=self._now, adds_prompt=False)

    def _render_prefixes(self, messages: Sequence[Message], prefixes: Sequence[tuple[int, bool]]) -> list[str]:
        values = self._tokenizer.named_tokens
        return RENDERER.render_prefixes(self.template, messages, values, prefixes, now=self._now)

    def _find_contents(self, text: str, messages: Sequence[Message]) -> dict[int, tuple[int, int]]:
        """Where assistants' contents stand in the text, by the messages' numbers; none where they cannot be found."""
        found = self._find_disguised(text, messages, None)
        if found is None:
            found = self._find_disguised(
                text, messages, words_to_keep(self._read_words(), self._encoder.control_tokens)
            )
        return found or {}

    def _find_disguised(
        self, text: str, messages: Sequence[Message], kept: re.Pattern[str] | None
    ) -> dict[int, tuple[int, int]] | None:
        """The same, by contents that keep white space and what `kept` finds; None where they change the text."""
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        marks = dict(zip(numbers, private_characters(set(text)), strict=False))
        changed = [
            {**message, "content": _disguise(message["content"], marks[number], kept)} if number in marks else message
            for number, message in enumerate(messages)
        ]
        try:
            disguised = self._render(changed)
        except InputError:  # the template looks into contents, and these are not what it expects
            return None
        own = set(marks.values())
        if len(disguised) != len(text) or any(a != b and b not in own for a, b in zip(text, disguised, strict=True)):
            return None
        places = {number: (disguised.find(mark), disguised.rfind(mark) + 1) for number, mark in marks.items()}
        rests = {number: disguised[start:end].replace(marks[number], "") for number, (start, end) in places.items()}
        if kept is not None:
            rests = {number: kept.sub("", rest) for number, rest in rests.items()}
        return {
            number: _with_own_words(text, place, changed[number]["content"], marks[number])
            for number, place in places.items()
            if place[1] and not rests[number].strip()  # else it is there more than once
        }


@dataclass(frozen=True)
class _Placed:
    """A conversation's text, and where in it the trained turns are.    is_asked_otherwise: as a Row has it."""

    marked: MarkedText
    spans: list[tuple[int, int]]
    is_asked_otherwise: bool


class _Prefixes:
    """What a template makes of a conversation's first messages: what is sure to be needed is rendered at once."""

    def __init__(
        self,
        render: Callable[[Sequence[Message], Sequence[tuple[int, bool]]], list[str]],
        messages: Sequence[Message],
        trained: Sequence[int],
    ) -> None:
        """trained: the numbers of the turns that are learnt."""
        self._render, self._messages = render, messages
        asked = [(number, True) for number in trained if number]
        wanted = list(dict.fromkeys([(len(messages), False), *asked, *((number + 1, False) for number in trained)]))
        self._made = dict(zip(wanted, render(messages, wanted), strict=True))

    def __call__(self, number: int, *, adds_prompt: bool = False) -> str:
        key = (number, adds_prompt)
        if key not in self._made:
            self._made[key] = self._render(self._messages, [key])[0]
        return self._made[key]


def _find_start(
    marked: MarkedText, number: int, render: _Prefixes, content: tuple[int, int] | None, done: int
) -> tuple[int | None, bool]:
    """Where the text begins that the model writes as this turn, after the messages before and the generation prompt.

    And whether all before it is what a server asks with.
    """
    text = marked.text
    asked = render(number, adds_prompt=True) if number else None
    if asked is not None and text.startswith(asked) and (content is None or len(asked) <= content[0]):
        return len(asked), True
    if content is None or asked is None:
        return (None if content is None else content[0]), not number
    unasked = render(number)
    if asked.startswith(unasked) and asked != unasked:
        prompt = asked[len(unasked) :]
        place = text.rfind(prompt, done, content[0])
        if place >= 0:
            return place + len(prompt), False
    if asked == unasked:  # an answer follows its question's last control token at once
        last = max((end for _, end in marked.markers if done <= end <= content[0]), default=content[0])
        return (last if not text[last : content[0]].strip() else content[0]), False
    return content[0], False


def _find_end(marked: MarkedText, whole: str, content: tuple[int, int] | None, start: int | None) -> int | None:
    """Where a turn ends in the text: behind the control token that ends it, if there is one.

    whole: what the template makes of the messages up to this one.
    """
    is_beginning = marked.text.startswith(whole)
    if content is None and not is_beginning:  # nothing of it is written, or it cannot be found
        ending = next((place for place in marked.markers if start is not None and place[0] >= start), None)
        return None if ending is None or marked.text[start : ending[0]].strip() else ending[1]
    end = content[1] if content is not None else len(whole.rstrip())
    if any(place[1] == end for place in marked.markers):
        return end
    limit = len(whole) if is_beginning else len(marked.text)  # behind it the next turn's own tokens begin
    following = next((place for place in marked.markers if end <= place[0] and place[1] <= limit), None)
    if following is not None and not marked.text[end : following[0]].strip():
        return following[1]
    return end


def _disguise(content: str, mark: str, kept: re.Pattern[str] | None) -> str:
    """A content with each character exchanged for `mark`, but for white space and what `kept` finds."""
    made, done = [], 0
    for match in kept.finditer(content) if kept is not None else ():
        made += [_NO_SPACE.sub(mark, content[done : match.start()]), match[0]]
        done = match.end()
    return "".join([*made, _NO_SPACE.sub(mark, content[done:])])


def _with_own_words(text: str, place: tuple[int, int], disguised: str, mark: str) -> tuple[int, int]:
    """A content's place in the text, with the words at its own beginning and end that were not exchanged."""
    start, end = place
    head, tail = disguised.partition(mark)[0].lstrip(), disguised.rpartition(mark)[2].rstrip()
    start -= len(head) if text.endswith(head, 0, start) else 0
    end += len(tail) if text.startswith(tail, end) else 0
    return start, end


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
