"""What every engine is to the rest of the program: requests in, token events out, one by one, cancellable.

An engine owns the device in one thread of its own. `submit` may be called from any thread, any number of times; it
returns a `Generation`, whose `events` the caller reads at its own pace.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue

from alpaca.serving.detokenize import CompletionText
from alpaca.serving.request import Request
from alpaca.tokenizer import Tokenizer


class GenerationCancelledError(Exception):
    """The reader of a generation is told that it was cancelled."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One more token of a completion."""

    completion: int
    token_id: int


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """No more tokens of a completion will come: EOS, its length, or its reader's stop."""

    completion: int


class Generation:
    """One request under way. The engine writes to it, one reader reads it, anyone may cancel it."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.cached_tokens = 0  # prompt tokens whose keys and values an engine did not compute again
        self._events: SimpleQueue[TokenEvent | FinishedEvent | BaseException] = SimpleQueue()
        self._cancelled = threading.Event()
        self._stopped: set[int] = set()
        self._submitted_at = time.monotonic()
        self._started_at = self._first_token_at = self._last_token_at = 0.0
        self._num_tokens = 0

    # The engine's side

    def start(self) -> None:
        """The request leaves the queue."""
        self._started_at = time.monotonic()

    def put_token(self, completion: int, token_id: int) -> None:
        self._last_token_at = time.monotonic()
        self._first_token_at = self._first_token_at or self._last_token_at
        self._num_tokens += 1
        self._events.put(TokenEvent(completion, token_id))

    def finish(self, completion: int) -> None:
        self._events.put(FinishedEvent(completion))

    def fail(self, error: BaseException) -> None:
        """End the whole generation; the reader gets `error`."""
        self._events.put(error)

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def is_stopped(self, completion: int) -> bool:
        return completion in self._stopped

    # The reader's side

    def events(self) -> Iterator[TokenEvent | FinishedEvent]:
        """Tokens and ends, in the order they came, until every completion has ended.

        Raises GenerationCancelledError at once when cancelled, and whatever the engine failed with.
        """
        running = self.request.n
        while running:
            event = self._events.get()
            if self.is_cancelled:
                raise GenerationCancelledError
            if isinstance(event, BaseException):
                raise event
            running -= isinstance(event, FinishedEvent)
            yield event

    def stop(self, completion: int) -> None:
        """The reader wants no more of one completion; its end event still comes."""
        self._stopped.add(completion)

    def cancel(self) -> None:
        """The engine drops the request before its next token; the reader is woken at once."""
        self._cancelled.set()
        self._events.put(GenerationCancelledError())

    def metrics(self) -> dict[str, int | float]:
        """Counts, seconds and the seed, under the names of the Predictor's metrics."""
        end = self._last_token_at or time.monotonic()
        seconds = max(end - self._started_at, 1e-9)
        return {
            "prompt_tokens": len(self.request.prompt_ids),
            "cached_tokens": self.cached_tokens,
            "output_tokens": self._num_tokens,
            "queue_s": self._started_at - self._submitted_at,
            "time_to_first_token_s": (self._first_token_at or end) - self._submitted_at,
            "tokens_per_second": self._num_tokens / seconds,
            "seed": self.request.seed,
        }


class Engine(ABC):
    """Runs generations. `max_context` is the most tokens prompt and answer may have together."""

    tokenizer: Tokenizer
    max_context: int

    @abstractmethod
    def submit(self, request: Request) -> Generation:
        """Take a request. Raises EngineClosed when the engine is shut down or has lost its device."""

    @abstractmethod
    def is_healthy(self) -> bool:
        """Whether requests can still be answered."""

    @abstractmethod
    def close(self) -> None:
        """End the thread; what is running fails with EngineClosed."""


def stream_text(generation: Generation, text: CompletionText) -> Iterator[str]:
    """The pieces of a single completion as they become certain; never an empty one."""
    for event in generation.events():
        piece = _advance(generation, text, event)
        if piece:
            yield piece


def complete_texts(generation: Generation, texts: list[CompletionText]) -> Iterator[str]:
    """Each completion's whole text, in order, each as soon as it and those before it are done."""
    written = [""] * len(texts)
    ended = [False] * len(texts)
    next_one = 0
    for event in generation.events():
        written[event.completion] += _advance(generation, texts[event.completion], event)
        ended[event.completion] |= isinstance(event, FinishedEvent)
        while next_one < len(texts) and ended[next_one]:
            yield written[next_one]
            next_one += 1


def _advance(generation: Generation, text: CompletionText, event: TokenEvent | FinishedEvent) -> str:
    if isinstance(event, FinishedEvent):
        return text.finish()
    piece = text.push(event.token_id)
    if text.stopped:
        generation.stop(event.completion)
    return piece
