"""Requests to a service that may fail: retried with patience, and kept within a budget."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone

import tenacity

from alpaca.data.generation.services import Client, Completion, RequestFailed, count_tokens_roughly, cut_at_stop
from alpaca.errors import ServiceFailed

_SHORTER = 0.8  # the original's factor for max_tokens when prompt and answer exceed the context
_LEAST_TOKENS = 64


class BudgetSpent(Exception):
    """A bound on requests or tokens is reached: no further request is sent, and the answers so far are kept."""


class Stopped(Exception):
    """The run ends, so a wait for the next try was cut short."""


class Budget:
    """Bounds on the number of requests of this run, failed ones included, and on the tokens of all runs together.

    Until a request has ended it counts with the most tokens that it may use, so that the bound holds whatever the
    lengths of the answers. num_tokens: those that earlier runs used. Safe to use from many threads.
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
        """Replace the `reserved` tokens of a request that has ended by the number it used."""
        with self._lock:
            self._reserved -= reserved
            self.num_tokens += used


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How often and when to try again.

    Waits double from `first_wait_s` to `longest_wait_s`. A service may ask for a wait of up to `longest_retry_after_s`.
    """

    max_attempts: int = 8
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0
    longest_retry_after_s: float = 900.0


class Requester:
    """Asks a client from many threads, and again after failures that may pass.

    A wait that the service asks one thread for holds for all threads.
    """

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
        """Get a completion, cut at the stop text. Raises ServiceFailed, BudgetSpent or Stopped.

        number: the prompt's, for messages and for services that take a seed.
        """
        length = self._max_tokens

        def ask_once() -> Completion:
            nonlocal length
            self._wait_for_turn()
            try:
                return cut_at_stop(self._ask_once(prompt, length, number), self._stop)
            except RequestFailed as failure:
                length = self._choose_length(failure, length)
                raise

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(RequestFailed),
            stop=tenacity.stop_after_attempt(self._patience.max_attempts),
            wait=lambda state: self._choose_wait(_failure_of(state), state.attempt_number),
            sleep=self._sleep,
            before_sleep=lambda state: self._announce_wait(state, number),
            retry_error_callback=lambda state: _give_up(state, number),
        )(ask_once)

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

    def _choose_length(self, failure: RequestFailed, max_tokens: int) -> int:
        """max_tokens for the next try: fewer after a prompt that was too long with them.

        Raises ServiceFailed where no further try can help.
        """
        if failure.is_too_long:
            shorter = int(max_tokens * _SHORTER)
            if shorter < _LEAST_TOKENS:
                raise ServiceFailed(f"{failure}; the prompt alone fills the context: lower --num_prompt_instructions")
            return shorter
        if failure.is_permanent:
            raise ServiceFailed(str(failure))
        return max_tokens

    def _announce_wait(self, state: tenacity.RetryCallState, number: int) -> None:
        """Log the wait before the next try; one that the service asked for holds for all threads."""
        failure = _failure_of(state)
        if failure.is_too_long:
            return
        attempts = f"attempt {state.attempt_number} of {self._patience.max_attempts}"
        self._say(f"prompt {number}: {failure}; again in {state.upcoming_sleep:.1f} s ({attempts})")
        if failure.retry_after_s is not None:
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + failure.retry_after_s)

    def _choose_wait(self, failure: RequestFailed, attempt: int) -> float:
        """Seconds to wait before the next try; none after a prompt that was too long.

        A random share, half to all, of a wait that doubles: threads that failed together must not ask again together.
        Never less than the service asked for. Raises ServiceFailed where it asks for more than this command waits.
        """
        patience = self._patience
        if failure.is_too_long:
            return 0.0
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


def _failure_of(state: tenacity.RetryCallState) -> RequestFailed:
    failure = state.outcome.exception() if state.outcome else None
    assert isinstance(failure, RequestFailed)
    return failure


def _give_up(state: tenacity.RetryCallState, number: int) -> Completion:
    attempts = state.attempt_number
    raise ServiceFailed(f"gave up on prompt {number} after {attempts} attempts; the last one: {_failure_of(state)}")


def utc_now() -> str:
    """The time for a log: ISO 8601, UTC, whole seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
