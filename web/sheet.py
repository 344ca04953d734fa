"""What the page says of a prediction: its answers as cards, a line of figures below, or what went wrong. As HTML."""

import time
from pathlib import Path
from typing import Any

from alpaca.pages.templates import render_part
from web.client import Ended, Event, Health, Piece, Waiting
from web.knobs import OMITTED, Knob


class Sheet:
    """The answers of one prediction so far."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._streams = bool(values.get("stream"))
        self._texts = [""] * (1 if self._streams else int(values.get("n", 1)))
        many = len(self._texts) > 1 or values.get("num_beams", 1) > 1
        self._why_whole = ": the server streams single completions without beam search" if many else ""
        self._begun, self._num_pieces, self._waiting_s = time.monotonic(), 0, 0.0
        self._first_s: float | None = None
        self._end: Ended | None = None

    def take(self, event: Event) -> None:
        if isinstance(event, Piece):
            self._num_pieces += 1
            if self._first_s is None:
                self._first_s = time.monotonic() - self._begun
            self._put(0 if self._streams else event.index, event.text)
        elif isinstance(event, Ended):
            self._end = event
        self._waiting_s = event.seconds if isinstance(event, Waiting) else 0.0

    def _put(self, index: int, text: str) -> None:
        self._texts += [""] * (index + 1 - len(self._texts))
        self._texts[index] += text

    @property
    def is_complete(self) -> bool:
        return self._end is not None

    def answers(self) -> str:
        """One card for each completion; of those that run to their end together, the ones that are done."""
        if self._end and not any(self._texts) and self._end.status != "succeeded":
            return ""
        return render_part(_CARDS, texts=self._texts, is_running=self._end is None)

    def line(self) -> str:
        elapsed_s = time.monotonic() - self._begun
        if self._end is None and self._waiting_s:
            return note(f"All slots of the server are taken; waiting for {self._waiting_s:.0f} s.")
        if self._end is None and self._streams:
            return note(f"{self._num_pieces} pieces, {elapsed_s:.1f} s")
        if self._end is None:
            return note(f"Written whole, not streamed{self._why_whole}. {elapsed_s:.0f} s")
        if self._end.status == "succeeded":
            return note(figures(self._end.metrics))
        if self._end.status == "canceled":
            return note(self._stopped(elapsed_s))
        return complaint(as_sentence(self._end.error))

    def _stopped(self, elapsed_s: float) -> str:
        if self._first_s is None:
            return f"Stopped after {elapsed_s:.1f} s, before there was any text."
        first = f"the first came after {self._first_s:.2f} s"
        return f"Stopped after {self._num_pieces} pieces and {elapsed_s:.1f} s; {first}."


def values_to_send(knobs: list[Knob], shown: list[Any]) -> dict[str, Any]:
    """The prediction's inputs. Raises InputError.

    What cannot be streamed is asked for whole, rather than refused: the box says "stream", not "one completion".
    """
    sent = {knob.name: knob.sent(value) for knob, value in zip(knobs, shown, strict=True)}
    values = {name: value for name, value in sent.items() if value is not OMITTED}
    if values.get("n", 1) > 1 or values.get("num_beams", 1) > 1:
        values.pop("stream", None)
    return values


# Pieces of HTML -----------------------------------------------------------------------------------------------------

_CARDS = Path(__file__).with_name("cards.html.j2")
_LINE = Path(__file__).with_name("line.html.j2")


def status_line(health: Health) -> str:
    return render_part(_LINE, kind=health.state, text=health.sentence)


def note(text: str) -> str:
    return render_part(_LINE, kind="note", text=text)


def complaint(text: str) -> str:
    return render_part(_LINE, kind="complaint", text=text)


def figures(metrics: dict[str, Any]) -> str:
    """The server's own figures of a prediction, those that are there."""
    parts = []
    for name, words in _FIGURES.items():
        value = metrics.get(name)
        if isinstance(value, int | float) and (name not in _MENTIONED_IF_NOT_ZERO or value >= 0.01):
            parts.append(words.format(value))
    return " · ".join(parts) or "Done."


_FIGURES = {
    "output_tokens": "{:.0f} tokens",
    "tokens_per_second": "{:.1f} tokens/s",
    "time_to_first_token_s": "first token after {:.3f} s",
    "queue_s": "{:.3f} s in line",
    "prompt_tokens": "prompt {:.0f} tokens",
    "cached_tokens": "{:.0f} of them from the cache",
    "predict_time": "{:.2f} s in all",
    "seed": "seed {:.0f}",
}
_MENTIONED_IF_NOT_ZERO = ("queue_s", "cached_tokens")


def as_sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?", "!")) else ".")
