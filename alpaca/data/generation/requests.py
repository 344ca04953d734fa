"""Requests to a service that may fail: retried with patience, and kept within a budget."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone

from alpaca.data.generation.services import Client, Completion, RequestFailed, count_tokens_roughly, cut_at_stop
from alpaca.errors import ServiceFailed

_SHORTER = 0.8  # the original's factor for max_tokens when prompt and answer exceed the context
_LEAST_TOKENS = 64


# Bounds and repetition ------------------------------------------------------------------------------------------


class BudgetSpent(Exception):
    """A bound of the bill is reached: nothing more is asked, what came is kept."""


class Stopped(Exception):
    """The run ends; a wait was given up."""


class Budget:
    """How much may still be asked. Requests are those of this run, failed ones too; tokens those of all runs.

    A request is counted with all the tokens it may come to until it has ended, so that the bound holds whatever the
    answers' lengths.
    """

    def __init__(self, *, max_requests: int | None, max_tokens_total: int | None, num_tokens: int = 0) -> None:
        self.num_requests, self.num_tokens = 0, num_tokens
        self._max_requests, self._max_tokens, self._reserved = max_requests, max_tokens_total, 0
        self._lock = threading.Lock()

    def take(self, num_tokens: int) -> None:
        """Count a request that may use `num_tokens`. Raises BudgetSpent."""
        with self._lock:
            if self._max_requests is not None and self.num_requests >= self._max_requests:
                raise BudgetSpent(f"--max_requests {self._max_requests} is reached")
            if self._max_tokens is not None and self.num_tokens + self._reserved + num_tokens > self._max_tokens:
                raise BudgetSpent(
                    f"--max_tokens_total {self._max_tokens:,} leaves no room for another request "
                    f"({self.num_tokens:,} used, the next may take {num_tokens:,})"
                )
            self.num_requests += 1
            self._reserved += num_tokens

    def settle(self, reserved: int, used: int) -> None:
        """The request that `reserved` was taken for used this many."""
        with self._lock:
            self._reserved -= reserved
            self.num_tokens += used


@dataclass(frozen=True, kw_only=True)
class Patience:
    """When to try again. Waits double from `first_wait_s` to `longest_wait_s`; a service may ask for up to
    `longest_retry_after_s`."""

    max_attempts: int = 8
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0
    longest_retry_after_s: float = 900.0


class Requester:
    """Asks a client from many threads: again after what passes; what the service asks to wait holds for all of them."""

    def __init__(
        self,
        client: Client,
        budget: Budget,
        *,
        max_tokens: int,
        stop: str,
        patience: Patience | None = None,
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        self._client, self._budget, self._max_tokens, self._stop = client, budget, max_tokens, stop
        self._patience, self._say = patience or Patience(), say
        self._stopped = threading.Event()
        self._not_before = 0.0
        self._lock = threading.Lock()

    def stop(self) -> None:
        """End every wait, and start no request any more."""
        self._stopped.set()

    def ask(self, prompt: str, *, number: int) -> Completion:
        """A completion, cut at the stop text. Raises ServiceFailed, BudgetSpent or Stopped."""
        max_tokens, patience = self._max_tokens, self._patience
        for attempt in range(1, patience.max_attempts + 1):
            self._wait_for_turn()
            try:
                return cut_at_stop(self._ask_once(prompt, max_tokens, number), self._stop)
            except RequestFailed as failure:
                max_tokens = self._prepare_next(failure, attempt, max_tokens, number)
        raise AssertionError("unreachable")

    def _ask_once(self, prompt: str, max_tokens: int, number: int) -> Completion:
        reserved = -(-len(prompt) // 3) + max_tokens  # 3 letters to a token is on the safe side in English
        self._budget.take(reserved)
        used = 0
        try:
            completion = self._client.complete(prompt, max_tokens=max_tokens, number=number)
            used = completion.prompt_tokens + completion.output_tokens
            used = used or count_tokens_roughly(prompt + completion.text)
            return completion
        finally:
            self._budget.settle(reserved, used)

    def _prepare_next(self, failure: RequestFailed, attempt: int, max_tokens: int, number: int) -> int:
        """Wait, or shorten; max_tokens of the next try. Raises ServiceFailed when there is none."""
        shorter = int(max_tokens * _SHORTER)
        if failure.is_too_long and shorter < _LEAST_TOKENS:
            raise ServiceFailed(f"{failure}; the prompt alone fills the context: lower --num_prompt_instructions")
        if attempt == self._patience.max_attempts:
            raise ServiceFailed(f"gave up on prompt {number} after {attempt} attempts; the last one: {failure}")
        if failure.is_too_long:
            return shorter
        if failure.is_permanent:
            raise ServiceFailed(str(failure))
        wait_s = self._choose_wait(failure, attempt)
        self._say(
            f"prompt {number}: {failure}; again in {wait_s:.1f} s (attempt {attempt} of {self._patience.max_attempts})"
        )
        if failure.retry_after_s is not None:
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + failure.retry_after_s)
        self._sleep(wait_s)
        return max_tokens

    def _choose_wait(self, failure: RequestFailed, attempt: int) -> float:
        """Seconds: between half and all of a doubling wait, so that threads part; never less than was asked for."""
        patience = self._patience
        backoff = min(patience.longest_wait_s, patience.first_wait_s * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
        if failure.retry_after_s is None:
            return backoff
        if failure.retry_after_s > patience.longest_retry_after_s:
            raise ServiceFailed(
                f"{failure}; it asks to wait {failure.retry_after_s:,.0f} s, more than the "
                f"{patience.longest_retry_after_s:,.0f} s this command waits: start it again then, it goes on"
            )
        return failure.retry_after_s + backoff * 0.1

    def _wait_for_turn(self) -> None:
        with self._lock:
            wait_s = self._not_before - time.monotonic()
        self._sleep(max(0.0, wait_s))

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise Stopped


def utc_now() -> str:
    """The time for a log: ISO 8601, UTC, whole seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
