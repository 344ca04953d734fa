"""What is said of a run while it goes on: its rate, its progress bar, and its log."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from alpaca.training.objectives.preference import average
from alpaca.training.planning.plan import share_of_peak
from alpaca.training.report.recorders import Entry, NoRecorder, open_recorder
from alpaca.training.report.summary import describe_progress, describe_quality
from alpaca.training.run import Run

logger = logging.getLogger(__name__)


class Meter:
    """Measures useful tokens per second of training. The time of evaluation and saving is left out."""

    def __init__(self) -> None:
        self.num_tokens, self._seconds, self.total_seconds = 0, 0.0, 0.0
        self._step_seconds, self.last_rate = 0.0, 0.0  # last_rate: tokens per second of the last step

    @contextmanager
    def measure(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._step_seconds = time.perf_counter() - start
        self._seconds += self._step_seconds
        self.total_seconds += self._step_seconds

    def count(self, num_tokens: int) -> None:
        """Count the useful tokens of the step that was just measured."""
        self.num_tokens += num_tokens
        self.last_rate = num_tokens / self._step_seconds

    def rate(self) -> float:
        """Return tokens per second since the last call."""
        rate = self.num_tokens / self._seconds
        self.num_tokens, self._seconds = 0, 0.0
        return round(rate, 1)


@contextmanager
def open_log(run: Run) -> Iterator[Callable[[Entry], None]]:
    """Give a function that adds an entry to the run's history and, on the main process, to its recorder."""
    progress = run.progress
    recorder = open_recorder(run.settings, first_step=progress.step) if run.world.is_main else NoRecorder()

    def log(values: Entry) -> None:
        entry = {**values, "epoch": progress.step / run.steps_per_epoch, "step": progress.step}
        progress.log_history.append(entry)
        recorder.record(entry)
        if "eval_loss" in entry:
            logger.info("step %d: held-out loss %.4f%s", progress.step, entry["eval_loss"], describe_quality(entry))

    try:
        yield log
    finally:
        recorder.close()


def tell(
    run: Run,
    entry: Entry,
    meter: Meter,
    *,
    log: Callable[[Entry], None],
    bar: tqdm,
    on_step: Callable[[Entry], None] | None,
) -> None:
    """Report a step to the progress bar and the caller, and every `logging_steps` steps, averaged, to the log."""
    progress = run.progress
    rate = meter.last_rate
    share = share_of_peak(run.plan, rate) if run.plan else None
    bar.set_postfix_str(describe_progress(entry["loss"], rate, run.memory.current_bytes(), share), refresh=False)
    bar.update()
    if on_step and run.world.is_main:
        on_step({**entry, "max_steps": run.num_steps})
    if progress.step % run.settings.report.logging_steps == 0 or progress.step == run.num_steps:
        mean_loss, progress.losses = sum(progress.losses) / len(progress.losses), []
        means, progress.measures = average(progress.measures), []
        log({**entry, "loss": mean_loss, **means, "tokens_per_second": meter.rate()})


def progress_bar(run: Run) -> tqdm:
    return tqdm(
        total=run.num_steps,
        initial=run.progress.step,
        desc="train",
        unit="step",
        disable=not run.world.is_main,
        mininterval=1.0 if sys.stderr.isatty() else 10.0,
    )
