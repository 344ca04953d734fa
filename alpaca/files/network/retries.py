"""Trying again: what a network interrupts is repeated with growing pauses, until too many tries in a row failed."""

import logging
from collections.abc import Callable
from typing import TypeVar

import tenacity

from alpaca.errors import MissingInput

logger = logging.getLogger(__name__)
T = TypeVar("T")
_MOST_FAILURES = 6  # in a row
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 20.0


class InterruptedTry(Exception):
    """One try ended too early; the next may succeed. Its text is shown and holds no secret."""


def retry(
    action: Callable[[], T], *, what: str, left: str = "", has_progressed: Callable[[], bool] = lambda: False
) -> T:
    """Call `action` until it raises no InterruptedTry, with pauses that double from 0.5 s to 20 s.

    what: the beginning of messages, such as "http://host/x could not be reached".    left: a sentence that says what
    the failed tries have left.    has_progressed: asked once after each failed try; where it says yes, the count of
    failures in a row begins again. Raises MissingInput after 6 failures in a row.
    """

    def restart_count(state: tenacity.RetryCallState) -> None:
        if has_progressed():
            state.attempt_number = 1

    def warn(state: tenacity.RetryCallState) -> None:
        logger.warning("%s: %s; trying again in %.1f s", what, _error_of(state), state.upcoming_sleep)

    def give_up(state: tenacity.RetryCallState) -> T:
        advice = ". ".join(["check the address and the network", *([left] if left else [])])
        raise MissingInput(f"{what} in {state.attempt_number} tries: {_error_of(state)}; {advice}")

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(InterruptedTry),
        wait=tenacity.wait_exponential(multiplier=_FIRST_PAUSE_S, max=_LONGEST_PAUSE_S),
        stop=tenacity.stop_after_attempt(_MOST_FAILURES),
        after=restart_count,
        before_sleep=warn,
        retry_error_callback=give_up,
    )(action)


def _error_of(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None
