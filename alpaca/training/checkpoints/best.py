"""The best evaluation of a run: its weights can become the final ones, and a run without a better one for long ends."""

import logging
from pathlib import Path

from alpaca.training.checkpoints.loading import load_checkpoint
from alpaca.training.checkpoints.state import Trainee
from alpaca.training.configuration.settings import BestSettings

logger = logging.getLogger(__name__)


class BestModel:
    """Follows the held-out loss after each evaluation. The one before the first step does not count."""

    def __init__(self, trainee: Trainee, settings: BestSettings, output_dir: Path) -> None:
        self._trainee, self._settings, self._output_dir = trainee, settings, output_dir

    @property
    def step(self) -> int | None:
        """The step of the lowest held-out loss so far, the earliest of equal ones; None before the first."""
        losses = self._losses()
        return min(losses, key=lambda step: losses[step]) if losses else None

    @property
    def folder(self) -> Path | None:
        """Its checkpoint, where one is kept."""
        if not self._settings.is_loaded or self.step is None:
            return None
        return self._output_dir / f"checkpoint-{self.step}"

    @property
    def is_worn_out(self) -> bool:
        """Whether as many evaluations as patience allows have come since the best, and none was better."""
        patience = self._settings.patience
        return bool(patience) and sum(step > (self.step or 0) for step in self._losses()) >= patience

    @property
    def wants_checkpoint(self) -> bool:
        """Whether the present step is the best, and its weights may be wanted at the end."""
        return self._settings.is_loaded and self.step == self._trainee.progress.step

    def load(self) -> None:
        """At the end: put the best weights in the model, where the last ones are not they. The history stays."""
        progress, folder = self._trainee.progress, self.folder
        if folder is None or self.step == progress.step:
            return
        step, losses, history = progress.step, progress.losses, progress.log_history
        load_checkpoint(self._trainee, folder)
        logger.info("the final weights are those of step %d, whose held-out loss was the lowest", progress.step)
        progress.step, progress.losses, progress.log_history = step, losses, history

    def _losses(self) -> dict[int, float]:
        history = self._trainee.progress.log_history
        return {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry and entry["step"] > 0}
