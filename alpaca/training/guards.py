"""What a run looks out for: a loss that is no number, one that falls apart, the time for the next checkpoint."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

_NUM_START_STEPS = 2  # whose mean loss is the start: a warm-up has not changed anything by then
_FACTOR = 1.5  # of the start; batches of 128 differ by a tenth, and a fine-tune goes down
_NUM_HIGH_STEPS = 20  # in a row, and then it is no accident
_MOST_NAMED = 5
_DISK_BYTES_PER_S = 300e6  # assumed for the first checkpoint; later ones take as long as the one before


class LossWatch:
    """Notices, once, a loss that stays far above its start: a learning rate that is too high.

    losses: of the steps before, where a run is resumed.
    """

    def __init__(self, losses: Sequence[float] = ()) -> None:
        self._start = list(losses[:_NUM_START_STEPS])
        self._num_high, self._said = 0, False

    def add(self, loss: float) -> str:
        """Take a step's loss; what to say about it, "" for nothing."""
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
    """Why training stops: which of a step's examples have a loss (each alone) that is no number.

    indices: the step's examples.    broken: those among them.    name: an example for a person.
    remedy: the flags with which products are float32's, "" where they are so.
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
    """When a checkpoint is due by time: early enough that another step as long as any, and saving, end in time.

    So the first is on disk within the limit whatever a step takes, unless one step takes longer than that.
    """

    def __init__(self, *, limit_s: float, num_bytes: int, now: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._save_s, self._now = limit_s, num_bytes / _DISK_BYTES_PER_S, now
        self._saved_at = self._step_at = now()
        self._longest_step_s = 0.0

    def is_due(self) -> bool:
        """Whether to save after the step that ends now. Call once a step."""
        now = self._now()
        self._longest_step_s = max(self._longest_step_s, now - self._step_at)
        self._step_at = now
        return 0 < self._limit_s <= now - self._saved_at + self._longest_step_s + self._save_s

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around the writing of a checkpoint."""
        began = self._now()
        yield
        self._saved_at = self._step_at = self._now()
        self._save_s = self._saved_at - began
