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
from alpaca.serving.request import NO_ADAPTERS, AdapterNames, Request
from alpaca.text.tokenizer import Tokenizer


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


Event = TokenEvent | FinishedEvent


class Generation:
    """One request under way. The engine writes to it, one reader reads it, anyone may cancel it.

    What the engine writes reaches the reader with `flush`, so that tokens may travel together.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.cached_tokens = 0  # prompt tokens whose keys and values an engine did not compute again
        self._unsent: list[Event] = []
        self._sent: SimpleQueue[list[Event] | BaseException] = SimpleQueue()
        self._cancelled = threading.Event()
        self._stopped: set[int] = set()
        self._num_finished = 0
        self._submitted_at = time.monotonic()
        self._started_at = self._first_token_at = self._last_token_at = self._flushed_at = 0.0
        self._num_tokens = 0
        self._num_surplus = 0

    # The engine's side

    def start(self) -> None:
        """The request leaves the queue."""
        self._started_at = time.monotonic()

    def put_token(self, completion: int, token_id: int) -> None:
        self._last_token_at = time.monotonic()
        self._first_token_at = self._first_token_at or self._last_token_at
        self._num_tokens += 1
        self._unsent.append(TokenEvent(completion, token_id))

    def finish(self, completion: int) -> None:
        self._num_finished += 1
        self._unsent.append(FinishedEvent(completion))

    def flush(self, *, interval_s: float = 0.0) -> None:
        """Let the reader have what was written, unless it can wait.

        A reader who wants the whole answer gets it at the end. One who reads along gets the first token at once, and
        later ones when `interval_s` has passed since it last got some: waking it costs more than handing on a token.
        """
        if not self._unsent:
            return
        has_ended = self._num_finished == self.request.n
        now = time.monotonic()
        is_due = self.request.reads_along and now >= self._flushed_at + interval_s
        if has_ended or is_due:
            self._flushed_at = now
            events, self._unsent = self._unsent, []
            self._sent.put(events)

    def fail(self, error: BaseException) -> None:
        """End the whole generation; the reader gets `error`."""
        self._sent.put(error)

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def is_stopped(self, completion: int) -> bool:
        return completion in self._stopped

    # The reader's side

    def batches(self) -> Iterator[list[Event]]:
        """Tokens and ends, in the order they came, as many at a time as there are, until every completion has ended.

        Raises GenerationCancelledError at once when cancelled, and whatever the engine failed with.
        """
        running = self.request.n
        while running:
            batch = self._sent.get()
            if self.is_cancelled:
                raise GenerationCancelledError
            if isinstance(batch, BaseException):
                raise batch
            running -= sum(isinstance(event, FinishedEvent) for event in batch)
            yield batch

    def events(self) -> Iterator[Event]:
        """The same one by one."""
        for batch in self.batches():
            yield from batch

    def stop(self, completion: int) -> None:
        """The reader wants no more of one completion; its end event still comes."""
        self._stopped.add(completion)

    def leave_out(self) -> None:
        """The reader got a token of a completion that it had stopped: it is no part of the answer."""
        self._num_surplus += 1

    def cancel(self) -> None:
        """The engine drops the request before its next token; the reader is woken at once."""
        self._cancelled.set()
        self._sent.put(GenerationCancelledError())

    def metrics(self) -> dict[str, int | float]:
        """Counts, seconds and the seed, under the names of the Predictor's metrics; also of what never ran or ended."""
        end = self._last_token_at or time.monotonic()
        started = self._started_at or end
        seconds = max(end - started, 1e-9)
        return {
            "prompt_tokens": len(self.request.prompt_ids),
            "cached_tokens": self.cached_tokens,
            "output_tokens": self._num_tokens - self._num_surplus,
            "queue_s": started - self._submitted_at,
            "time_to_first_token_s": (self._first_token_at or end) - self._submitted_at,
            "tokens_per_second": self._num_tokens / seconds,
            "seed": self.request.seed,
        }


class Engine(ABC):
    """Runs generations. `max_context` is the most tokens prompt and answer may have together.

    `adapters` are those that requests may ask for.
    """

    tokenizer: Tokenizer
    max_context: int
    adapters: AdapterNames = NO_ADAPTERS

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
    """The pieces of a single completion as they become certain; never an empty one. What waits together is one."""
    for batch in generation.batches():
        piece = "".join(_advance(generation, text, event) for event in batch)
        if piece:
            yield piece


def complete_texts(generation: Generation, texts: list[CompletionText]) -> Iterator[str]:
    """Each completion's whole text, in order, each as soon as it and those before it are done."""
    written: list[list[str]] = [[] for _ in texts]
    ended = [False] * len(texts)
    next_one = 0
    for event in generation.events():
        written[event.completion].append(_advance(generation, texts[event.completion], event))
        ended[event.completion] |= isinstance(event, FinishedEvent)
        while next_one < len(texts) and ended[next_one]:
            yield "".join(written[next_one])
            next_one += 1


def _advance(generation: Generation, text: CompletionText, event: Event) -> str:
    if isinstance(event, FinishedEvent):
        return text.finish()
    if text.stopped:
        generation.leave_out()
        return ""
    piece = text.push(event.token_id)
    if text.stopped:
        generation.stop(event.completion)
    return piece


_DEVICE_ERRORS = ("CUDA error", "CUDA driver error", "Triton Error [CUDA]", "device-side assert", "NCCL")
_MEMORY_ERRORS = ("out of memory", "ALLOC_FAILED")


def is_device_lost(error: BaseException) -> bool:
    """Whether an error means that the device is of no more use to this process. Out of memory passes."""
    text = str(error)
    return any(sign in text for sign in _DEVICE_ERRORS) and not any(sign in text for sign in _MEMORY_ERRORS)
