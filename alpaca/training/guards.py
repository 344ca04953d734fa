"""What a run watches while it goes on: a loss that is not finite or too high, when to save, and whether to end."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar

from alpaca.errors import AlpacaError

_NUM_START_STEPS = 2  # the mean loss of the first two steps is the start: warm-up has hardly changed the model by then
_FACTOR = 1.5  # a loss above 1.5 times the start is too high: batches of 128 differ by a tenth, and a loss should fall
_NUM_HIGH_STEPS = 20  # so many too high losses in a row are no accident
_MOST_NAMED = 5
_DISK_BYTES_PER_S = 300e6  # assumed for the first checkpoint; later ones take as long as the one before


class LossWatch:
    """Notices, once, that the loss stays far above where it started: the learning rate is too high.

    losses: those of the earlier steps, where a run is resumed.
    """

    def __init__(self, losses: Sequence[float] = ()) -> None:
        self._start = list(losses[:_NUM_START_STEPS])
        self._num_high, self._said = 0, False

    def add(self, loss: float) -> str:
        """Take a step's loss and return a warning, or "" where there is none to give."""
        if len(self._start) < _NUM_START_STEPS:
            self._start.append(loss)
            return ""
        start = sum(self._start) / len(self._start)
        self._num_high = self._num_high + 1 if loss > _FACTOR * start else 0
        if self._said or self._num_high < _NUM_HIGH_STEPS:
            return ""
        self._said = True
        return (
            f"the loss has been above {_FACTOR} times its start ({start:.2f}) for {_NUM_HIGH_STEPS} steps and is "
            f"{loss:.2f} now: the model is falling apart, most likely from too high a --learning_rate; stop, lower it "
            "and start anew"
        )


def describe_not_finite(
    loss: float,
    grad_norm: float,
    *,
    step: int,
    indices: Sequence[int],
    broken: Sequence[int],
    name: Callable[[int], str],
    remedy: str,
) -> str:
    """Say why training stops: which examples of the step have, each by itself, a loss that is not finite.

    indices: the step's examples.    broken: the examples among them whose loss is not finite.    name: describes an
    example for a person.    remedy: the flags that compute in float32, or "" where the run does so already.
    """
    text = (
        f"step {step}: the loss is {loss} and the gradient norm {grad_norm}; training stops before the weights are "
        "touched, and nothing was saved over the last checkpoint. "
    )
    calmer = f", or train with {remedy}" if remedy else ""
    shown = list(broken or indices)[:_MOST_NAMED]
    named = "; ".join(name(index) for index in shown)
    more = f"; and {len(broken or indices) - len(shown)} more" if len(broken or indices) > len(shown) else ""
    if not broken:
        return (
            f"{text}Each of its {len(indices)} examples alone has a finite loss ({named}{more}): lower "
            f"--learning_rate{calmer}"
        )
    if len(broken) == len(indices):
        return (
            f"{text}So has each of its {len(indices)} examples alone ({named}{more}): the weights are at fault, not "
            f"the data. Lower --learning_rate{calmer}, or look for what is odd in the base model"
        )
    return (
        f"{text}Of its {len(indices)} examples {len(broken)} have such a loss: {named}{more}. Look at them; else lower "
        f"--learning_rate{calmer}"
    )


class SaveClock:
    """Tells when a checkpoint is due by time: early enough that one more step and the saving end within the limit.

    The first checkpoint is then on disk within the limit, unless a single step takes longer than that.
    """

    def __init__(self, *, limit_s: float, num_bytes: int, now: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._save_s, self._now = limit_s, num_bytes / _DISK_BYTES_PER_S, now
        self._saved_at = self._step_at = now()
        self._longest_step_s = 0.0

    def is_due(self) -> bool:
        """Whether to save after the step that ends now. Call it once a step."""
        now = self._now()
        self._longest_step_s = max(self._longest_step_s, now - self._step_at)
        self._step_at = now
        return 0 < self._limit_s <= now - self._saved_at + self._longest_step_s + self._save_s

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """A context around the writing of a checkpoint, whose duration is measured."""
        began = self._now()
        yield
        self._saved_at = self._step_at = self._now()
        self._save_s = self._saved_at - began


# Ending a training whose result nobody wants any more, wherever it is ---------------------------------------------

_is_stopped: ContextVar[Callable[[], bool] | None] = ContextVar("_is_stopped", default=None)


class Interrupted(AlpacaError):
    """The training was asked to end, and nothing of it was to be saved."""


@contextlib.contextmanager
def stoppable(is_stopped: Callable[[], bool]) -> Iterator[None]:
    """Within the block `end_if_stopped` asks this."""
    token = _is_stopped.set(is_stopped)
    try:
        yield
    finally:
        _is_stopped.reset(token)


def end_if_stopped() -> None:
    """To be called between two parts of the work, by one process alone. Raises Interrupted."""
    is_stopped = _is_stopped.get()
    if is_stopped is not None and is_stopped():
        raise Interrupted("the training was stopped")
