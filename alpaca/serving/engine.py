"""The interface of every engine: it takes requests and gives token events, and each request can be cancelled.

An engine owns the device, in one thread of its own. `submit` may be called from any thread, any number of times; it
returns a `Generation`, whose `events` the caller reads at its own pace.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from alpaca.serving.detokenize import CompletionText
from alpaca.serving.request import NO_ADAPTERS, AdapterNames, Request
from alpaca.serving.structured.matching import Matcher
from alpaca.text.tokenizer import Tokenizer


class GenerationCancelledError(Exception):
    """Raised to the reader of a generation that was cancelled."""


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token's log-probability, and the most likely tokens in its place: (id, log-probability) in falling order."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One more token of a completion.    score: where the request asked for it."""

    completion: int
    token_id: int
    score: TokenScore | None = None


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """No more tokens of a completion will come.

    reason: "stop" for EOS, where its constraint is complete, or where its reader stopped it; else what limits the
    request, "length" or "context".
    """

    completion: int
    reason: str


Event = TokenEvent | FinishedEvent


class Generation:
    """A request in progress. The engine writes tokens to it, one reader reads them, and any thread may cancel it.

    What the engine writes reaches the reader with `flush`, so that tokens may travel together.
    """

    def __init__(self, request: Request, matchers: Sequence[Matcher] = ()) -> None:
        """`matchers`: where each completion stands in the request's constraint, if it has one."""
        self.request, self.matchers = request, matchers
        self.cached_tokens = 0  # prompt tokens whose keys and values an engine did not compute again
        self.prompt_scores: list[TokenScore] = []  # of each prompt token behind `scored_from`; there before any event
        self.finish_reasons: list[str | None] = [None] * request.n  # of the completions whose end the reader has met
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
        """Note that the request has left the queue."""
        self._started_at = time.monotonic()

    def put_token(self, completion: int, token_id: int, score: TokenScore | None = None) -> None:
        self._last_token_at = time.monotonic()
        self._first_token_at = self._first_token_at or self._last_token_at
        self._num_tokens += 1
        self._unsent.append(TokenEvent(completion, token_id, score))

    def finish(self, completion: int, *, at_limit: bool) -> None:
        """End a completion: at the request's limit, or because it is complete or its reader stopped it."""
        self._num_finished += 1
        self._unsent.append(FinishedEvent(completion, self.request.limit if at_limit else "stop"))

    def flush(self, *, interval_s: float = 0.0) -> None:
        """Send the reader what was written, unless that can wait.

        A reader who wants the whole answer gets it at the end. One who reads along gets the first token at once, and
        later ones when `interval_s` has passed since the last, as waking a reader costs more than a token does.
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
        """End the whole generation. `error` is raised to the reader."""
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
        """Tokens and ends one by one, in the order they came. Raises as `batches` does."""
        for batch in self.batches():
            yield from batch

    def stop(self, completion: int) -> None:
        """The reader wants no more of one completion; its end event still comes."""
        self._stopped.add(completion)

    def leave_out(self) -> None:
        """Leave one token out of the count, which came after the reader had stopped its completion."""
        self._num_surplus += 1

    def cancel(self) -> None:
        """The engine drops the request before its next token; the reader is woken at once."""
        self._cancelled.set()
        self._sent.put(GenerationCancelledError())

    def metrics(self) -> dict[str, int | float | str | list[str]]:
        """Counts, seconds, the seed and why it ended, under the names of the Predictor's metrics.

        May be called at any time; before all completions have ended, there is no `finish_reason`.
        """
        end = self._last_token_at or time.monotonic()
        started = self._started_at or end
        seconds = max(end - started, 1e-9)
        reasons = [reason for reason in self.finish_reasons if reason is not None]
        has_ended = len(reasons) == self.request.n
        return {
            "prompt_tokens": len(self.request.prompt_ids),
            "cached_tokens": self.cached_tokens,
            "output_tokens": self._num_tokens - self._num_surplus,
            "queue_s": started - self._submitted_at,
            "time_to_first_token_s": (self._first_token_at or end) - self._submitted_at,
            "tokens_per_second": self._num_tokens / seconds,
            "seed": self.request.seed,
            **({"finish_reason": reasons[0] if self.request.n == 1 else reasons} if has_ended else {}),
        }


class Engine(ABC):
    """Answers requests with one model.

    max_context: most tokens of prompt and answer together.
    adapters: those that requests may ask for.
    """

    tokenizer: Tokenizer
    max_context: int
    adapters: AdapterNames = NO_ADAPTERS

    @abstractmethod
    def submit(self, request: Request) -> Generation:
        """Queue a request.

        Raises EngineClosed if the engine is shut down or has lost its device, and InputError for a request that it
        could never run.
        """

    @abstractmethod
    def prepare(self) -> None:
        """Do, before the first request, what would hold up others if a request did it."""

    @abstractmethod
    def is_healthy(self) -> bool:
        """Whether requests can still be answered."""

    @abstractmethod
    def close(self) -> None:
        """End the engine's thread. Requests in progress fail with EngineClosed."""


def stream_text(generation: Generation, text: CompletionText) -> Iterator[str]:
    """The text of a single completion in pieces, each as soon as it is certain. Waiting tokens make one piece."""
    for batch in generation.batches():
        piece = "".join(advance(generation, text, event) for event in batch)
        if piece:
            yield piece


def complete_texts(generation: Generation, texts: list[CompletionText]) -> Iterator[str]:
    """Each completion's whole text, in order, as soon as it and those before it have ended."""
    return in_order(generation, lambda event: advance(generation, texts[event.completion], event))


def in_order(generation: Generation, piece_of: Callable[[Event], str]) -> Iterator[str]:
    """The pieces of each completion's events, put together as soon as it and those before it have ended."""
    written: list[list[str]] = [[] for _ in range(generation.request.n)]
    ended = [False] * len(written)
    next_one = 0
    for event in generation.events():
        written[event.completion].append(piece_of(event))
        ended[event.completion] |= isinstance(event, FinishedEvent)
        while next_one < len(written) and ended[next_one]:
            yield "".join(written[next_one])
            next_one += 1


def advance(generation: Generation, text: CompletionText, event: Event) -> str:
    """The further text of a completion that is certain after one event. A stop text ends the completion."""
    if isinstance(event, FinishedEvent):
        piece = text.finish()
        generation.finish_reasons[event.completion] = "stop" if text.stopped else event.reason
        return piece
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
    """Whether an error means that this process cannot use the device any more. Running out of memory does not."""
    text = str(error)
    return any(sign in text for sign in _DEVICE_ERRORS) and not any(sign in text for sign in _MEMORY_ERRORS)
