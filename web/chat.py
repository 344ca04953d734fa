"""A conversation with the served model: its turns, what of them is sent, and what the page shows. No page in here.

Every answer is one streamed prediction of the server's input `messages`. A server without a chat template refuses more
than one message, and has no chat here.
"""

import asyncio
import contextlib
import dataclasses
import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from alpaca.pages.templates import render_part
from web.client import Ended, Event, Generation, Piece, Server, Waiting
from web.knobs import OMITTED, Knob
from web.sheet import as_sentence, complaint, figures, note

Turn = dict[str, str]  # role: "user" or "assistant", content
NOT_SETTINGS = (
    "prompt", "input", "prompt_template", "messages", "n", "num_beams", "stream", "details", "logprobs", "echo",
)  # fmt: skip
_TRIED = ("user", "assistant", "user")  # what only a template has room for
_NO_TEMPLATE = "has no chat template"
_TOO_LONG = re.compile(r"model's context is [\d,]+")
_REDRAW_S = 0.04
_TRYING_S = 10.0
_TEMPLATE = Path(__file__).with_name("chat.html.j2")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """turns: all that was said.   num_left_out: how many of them, from the first on, are no longer sent.

    system: the system's text, which is sent as long as there is one.
    """

    turns: tuple[Turn, ...] = ()
    num_left_out: int = 0

    def messages(self, system: str) -> list[Turn]:
        """What is sent."""
        first = [{"role": "system", "content": system}] if system.strip() else []
        return [*first, *self.turns[self.num_left_out :]]

    def say(self, role: str, content: str) -> "Conversation":
        return dataclasses.replace(self, turns=(*self.turns, {"role": role, "content": content}))

    def forget_oldest(self) -> "Conversation | None":
        """Without the oldest question and its answer; None where only the newest question is left."""
        if len(self.turns) - self.num_left_out < 3:
            return None
        return dataclasses.replace(self, num_left_out=self.num_left_out + 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """What the page shows at a moment.   unsent: the text that goes back into its box, since it was not answered."""

    conversation: Conversation
    turns: str
    line: str
    unsent: str = ""
    is_complete: bool = False


def settings_to_send(knobs: list[Knob], shown: list[Any]) -> dict[str, Any]:
    """The inputs beside the messages. Raises InputError."""
    pairs = ((knob, value) for knob, value in zip(knobs, shown, strict=True) if knob.name not in NOT_SETTINGS)
    sent = {knob.name: knob.sent(value) for knob, value in pairs}
    return {name: value for name, value in sent.items() if value is not OMITTED}


async def converse(
    server: Server,
    settings: dict[str, Any],
    *,
    system: str,
    conversation: Conversation,
    text: str,
    on_start: Callable[[Generation], None],
) -> AsyncIterator[Shown]:
    """Say `text` and yield what is to be shown whenever there is more; the last is complete.

    Where the context is full the oldest turns are left out, as many as must be, and the page says so.
    """
    before, now = conversation, conversation.say("user", text)
    while True:
        answer = _Answer()
        yield _running(now, answer)
        generation = Generation(server, {**settings, "messages": now.messages(system), "stream": True})
        on_start(generation)
        async with contextlib.aclosing(generation.batches()) as batches:
            async for batch in batches:
                for event in batch:
                    answer.take(event)
                if answer.end is None:
                    yield _running(now, answer)
                    await asyncio.sleep(_REDRAW_S)
        shorter = now.forget_oldest() if answer.is_too_long else None
        if shorter is None:
            break
        now = shorter
    if answer.text or answer.end.status == "succeeded":
        done = now.say("assistant", answer.text)
        yield Shown(conversation=done, turns=draw(done), line=_last_line(done, answer), is_complete=True)
    else:
        yield Shown(
            conversation=before, turns=draw(before), line=_last_line(before, answer), unsent=text, is_complete=True
        )


class _Answer:
    """The answer so far."""

    def __init__(self) -> None:
        self.text, self.waiting_s = "", 0.0
        self.end: Ended | None = None
        self._begun = time.monotonic()

    def take(self, event: Event) -> None:
        self.waiting_s = event.seconds if isinstance(event, Waiting) else 0.0
        if isinstance(event, Piece):
            self.text += event.text
        elif isinstance(event, Ended):
            self.end = event

    @property
    def is_too_long(self) -> bool:
        return bool(self.end and self.end.status == "failed" and not self.text and _TOO_LONG.search(self.end.error))

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._begun


def _running(conversation: Conversation, answer: _Answer) -> Shown:
    line = f"All slots of the server are taken; waiting for {answer.waiting_s:.0f} s."
    if not answer.waiting_s:
        line = f"{answer.elapsed_s:.1f} s"
    turns = draw(conversation, answer.text)
    return Shown(conversation=conversation, turns=turns, line=_with_left_out(conversation, note(line)))


def _last_line(conversation: Conversation, answer: _Answer) -> str:
    end = answer.end
    if end.status == "failed":
        return complaint(as_sentence(end.error))
    text = f"Stopped after {answer.elapsed_s:.1f} s." if end.status == "canceled" else figures(end.metrics)
    if end.metrics.get("finish_reason") == "context":
        text += " · the answer ended where the context was full"
    return _with_left_out(conversation, note(text))


def _with_left_out(conversation: Conversation, line: str) -> str:
    if not conversation.num_left_out:
        return line
    count = conversation.num_left_out
    return line + note(
        f"The context is full: the model no longer sees the first {count} messages of this conversation."
    )


def draw(conversation: Conversation, answer: str | None = None) -> str:
    """The turns as HTML, and the answer that is being written."""
    turns = [
        {**turn, "is_left_out": place < conversation.num_left_out} for place, turn in enumerate(conversation.turns)
    ]
    return render_part(_TEMPLATE, turns=turns, answer=answer)


async def has_chat(server: Server, knobs: list[Knob]) -> bool | None:
    """Whether the server takes conversations; None where it cannot be told now.

    It is asked to score a short one, without an answer, which costs no more than reading it.
    """
    if not {"messages", "details", "echo", "max_new_tokens"} <= {knob.name for knob in knobs}:
        return False
    values = {"messages": [{"role": role, "content": "hi"} for role in _TRIED], "max_new_tokens": 0}
    asking = Generation(server, {**values, "details": True, "echo": True}, patience_s=_TRYING_S)
    end: Event | None = None
    async with contextlib.aclosing(asking.batches()) as batches:
        async for batch in batches:
            end = batch[-1]
    assert isinstance(end, Ended)
    if end.status == "succeeded":
        return True
    return False if _NO_TEMPLATE in end.error else None
