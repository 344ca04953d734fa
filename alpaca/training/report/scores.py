"""Scores of the final model for the report and the log. Who computes them is the caller's business."""

import logging
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch

from alpaca.errors import AlpacaError
from alpaca.training.run import Run

logger = logging.getLogger(__name__)

Scores = Mapping[str, tuple[float, float | None]]  # "task metric": value, standard error
_SIGN_OF_LIFE_S = 5.0


def score_final(run: Run, score: Callable[[Path], Scores] | None) -> Scores:
    """The scores, on the main process; nothing on the others, and where none could be computed, which ends no training.

    The others wait, and hear from the main process every few seconds: else they would give up some time.
    """
    if not run.world.is_main:
        while not run.world.sum([0.0])[0]:
            pass
        return {}
    _make_room(run)
    with ThreadPoolExecutor(1) as worker:
        future = worker.submit(score, run.settings.checkpoints.output_dir) if score else None
        while True:
            is_done = future is None or bool(wait([future], timeout=_SIGN_OF_LIFE_S).done)
            if run.world.sum([float(is_done)])[0]:
                break
    try:
        return future.result() if future else {}
    except AlpacaError as error:
        logger.warning("%s (the model is written; script/evaluate scores it by itself)", error)
        return {}


def _make_room(run: Run) -> None:
    """Let go of what only training needs: the model is loaded a second time, for its scores."""
    run.trainee.optimizer.zero_grad(set_to_none=True)
    run.trainee.optimizer.state.clear()
    if run.world.device.type == "cuda":
        torch.cuda.empty_cache()


def log_scores(run: Run, scores: Scores) -> None:
    """Say the scores, and add them to the history as one entry of the last step."""
    entry = {f"eval_{re.sub('[^A-Za-z0-9_]+', '_', name)}": value for name, (value, _) in scores.items()}
    run.progress.log_history.append(
        {**entry, "epoch": run.progress.step / run.steps_per_epoch, "step": run.progress.step}
    )
    for name, found in scores.items():
        logger.info("%s: %s", name, show_score(*found))


def show_score(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
