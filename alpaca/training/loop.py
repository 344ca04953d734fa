"""The training loop. There is one, for every method, on one process or many.

for each step: examples -> micro-batches -> gradients -> clip -> AdamW -> log, evaluate, save
"""

import contextlib
import functools
import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from alpaca.data.batching import step_examples
from alpaca.errors import AlpacaError, InputError, NotEnoughSpace
from alpaca.files.atomic import write_json
from alpaca.files.locks import locked
from alpaca.training.checkpoints.best import BestModel
from alpaca.training.checkpoints.loading import find_checkpoint, load_checkpoint
from alpaca.training.checkpoints.output import (
    check_output,
    clear_output,
    kept_once_begun,
    require_room,
    require_shared_folder,
)
from alpaca.training.checkpoints.saving import save_checkpoint
from alpaca.training.checkpoints.state import state_bytes
from alpaca.training.configuration.config import TrainConfig
from alpaca.training.configuration.resolving import resolve_settings
from alpaca.training.configuration.settings import RunSettings
from alpaca.training.distributed import World, clip_gradients, is_sharded, join_world
from alpaca.training.finishing import finish
from alpaca.training.gradients import accumulate_gradients, evaluate, explain_not_finite
from alpaca.training.guards import LossWatch, SaveClock
from alpaca.training.model.final import choose_save_dtype
from alpaca.training.objectives.preference import mean_measures
from alpaca.training.objectives.reference import measure_reference
from alpaca.training.planning.command import print_plan
from alpaca.training.progress import Meter, open_log, progress_bar, tell
from alpaca.training.report.answers import Sample, answer_before, choose_samples
from alpaca.training.report.recorders import Entry, check_recorder
from alpaca.training.report.scores import Scores
from alpaca.training.run import Run, prepare

logger = logging.getLogger(__name__)


class TrainingStopped(AlpacaError):
    """The run was asked to stop, and its state is saved. signal: the number of the signal that asked, or 0."""

    def __init__(self, message: str, *, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def train(
    config: TrainConfig,
    *,
    on_step: Callable[[Entry], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    score: Callable[[Path], Scores] | None = None,
) -> Path:
    """Fine-tune as `config` says and return the folder of the final model.

    on_step is called with each step's log entry, on the main process; should_stop is asked after each step; score gives
    the final model's scores for the report (--eval_tasks). Raises
    TrainingStopped after SIGTERM, SIGINT or should_stop, once a checkpoint is saved, and AlpacaErrors for what the
    user can mend.
    """
    if config.plan_only:
        print_plan(config)
        return Path(config.output_dir)
    world = join_world()
    settings = resolve_settings(config, num_processes=world.num_processes, device=world.device)
    check_recorder(settings.report)
    require_shared_folder(settings.checkpoints.output_dir, world)
    with contextlib.ExitStack() as stack:
        world.run_in_all(
            lambda: stack.enter_context(locked(settings.checkpoints.output_dir)) if world.is_main else None
        )
        return _train_alone(settings, world, on_step=on_step, should_stop=should_stop, score=score)


def _train_alone(
    settings: RunSettings,
    world: World,
    *,
    on_step: Callable[[Entry], None] | None,
    should_stop: Callable[[], bool] | None,
    score: Callable[[Path], Scores] | None,
) -> Path:
    """Run the training while this process holds the lock on its output folder."""
    output_dir = settings.checkpoints.output_dir
    checkpoint = find_checkpoint(output_dir, settings.checkpoints.resume, world=world)
    check_output(
        output_dir,
        resume=settings.checkpoints.resume is not None,
        checkpoint=checkpoint,
        overwrite=settings.checkpoints.overwrite,
    )
    run = prepare(settings, world)
    if checkpoint:
        load_checkpoint(run.trainee, checkpoint)
        logger.info("resumed from %s, after step %d", checkpoint, run.progress.step)
    else:
        parts = {"train": run.data, "held_out": run.held_out}
        objective, given = settings.objective.name, {name: part for name, part in parts.items() if part is not None}
        run.progress.reference = measure_reference(objective, run.passes, given, progress=world.is_main)
    with kept_once_begun(output_dir, lambda: run.progress.step > 0) if world.is_main else contextlib.nullcontext():
        world.run_in_all(lambda: _prepare_output(run, resumed=checkpoint is not None) if world.is_main else None)
        samples = _answer_before(run, resumed=checkpoint is not None)
        try:
            seconds = run_steps(run, on_step=on_step, should_stop=should_stop)
        except torch.OutOfMemoryError as error:
            raise NotEnoughSpace(_out_of_memory(run, error)) from error
    finish(run, seconds=seconds, samples=samples, score=score)
    return output_dir


def _prepare_output(run: Run, *, resumed: bool) -> None:
    settings, output_dir = run.settings, run.settings.checkpoints.output_dir
    dtype, saves = choose_save_dtype(settings, run.base), settings.checkpoints.saves
    require_room(run.trainee, output_dir, dtype=dtype, checkpoints=saves)
    clear_output(output_dir, old_checkpoints=not resumed)
    write_json(output_dir / "train_config.json", {**settings.flags, **_identify_base(run)})


def _identify_base(run: Run) -> dict[str, str]:
    """The fingerprint of an adapter's base model, by which a server can tell whether it has the same base.

    It is empty for a whole model, and where the base's weights are not safetensors files.
    """
    if run.settings.model.is_full or run.base.fingerprint is None:
        return {}
    return {"base_fingerprint": run.base.fingerprint}


def run_steps(
    run: Run, *, on_step: Callable[[Entry], None] | None = None, should_stop: Callable[[], bool] | None = None
) -> float:
    """Train from the run's present step to its last one. Returns the seconds spent in training steps."""
    settings, progress = run.settings, run.progress
    meter, watch = Meter(), LossWatch([entry["loss"] for entry in progress.log_history if "loss" in entry])
    best = BestModel(run.trainee, settings.best, settings.checkpoints.output_dir)
    clock = SaveClock(limit_s=settings.checkpoints.minutes * 60, num_bytes=state_bytes(run.trainee))
    with _stop_signals() as signals, open_log(run) as log, progress_bar(run) as bar:
        if progress.step == 0 and settings.report.eval_strategy != "no":
            log(evaluate(run))
        while progress.step < run.num_steps:
            with meter.measure():
                entry, requests = take_step(run, functools.partial(_own_requests, signals, should_stop, clock))
            meter.count(entry.pop("tokens"))
            if warning := watch.add(entry["loss"]):
                logger.warning("step %d: %s", progress.step, warning)
            tell(run, entry, meter, log=log, bar=bar, on_step=on_step)
            if _is_due(run, settings.report.eval_strategy, settings.report.eval_steps, at_end=True):
                log(evaluate(run))
            if _wants_checkpoint(run, requests) or best.wants_checkpoint:
                with clock.saving():
                    save_checkpoint(
                        run.trainee,
                        settings.checkpoints.output_dir,
                        keep=settings.checkpoints.keep,
                        protected=best.folder,
                    )
            if requests.stop:
                raise TrainingStopped(_stop_text(run), signal=signals[0] if signals else 0)
            if best.is_worn_out:
                logger.info("ended after step %d: no lower held-out loss since step %s", progress.step, best.step)
                break
        best.load()
    return meter.total_seconds


@dataclass(frozen=True, kw_only=True)
class _Requests:
    """Stopping and saving, which any process may request and all then do after the same step."""

    stop: bool
    save: bool


def _own_requests(signals: list[int], should_stop: Callable[[], bool] | None, clock: SaveClock) -> _Requests:
    """What this process requests now."""
    return _Requests(stop=bool(signals) or bool(should_stop and should_stop()), save=clock.is_due())


def take_step(run: Run, ask: Callable[[], _Requests]) -> tuple[Entry, _Requests]:
    """Do one optimizer step. Returns its log entry and what any process has requested by its end."""
    settings, trainee, progress = run.settings, run.trainee, run.progress
    indices = step_examples(
        len(run.data), global_batch_size=settings.batch.global_batch_size, seed=settings.batch.seed, step=progress.step
    )
    own_loss, own_sums = accumulate_gradients(run, indices)
    grad_norm = clip_gradients(trainee.model, settings.optimizer.max_grad_norm)
    own = ask()
    loss, stop, save, *sums = run.world.sum([own_loss, float(own.stop), float(own.save), *own_sums])
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise InputError(explain_not_finite(run, indices, loss, grad_norm))
    learning_rate = trainee.scheduler.get_last_lr()[0]
    trainee.optimizer.step()
    trainee.scheduler.step()
    trainee.optimizer.zero_grad()
    progress.step += 1
    progress.losses.append(loss)
    entry = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
    if measures := mean_measures(settings.objective.name, sums):
        progress.measures.append(measures)
    entry |= measures | {"epoch": progress.step / run.steps_per_epoch, "step": progress.step}
    return {**entry, "tokens": int(run.data.lengths[indices].sum())}, _Requests(stop=stop > 0, save=save > 0)


def _is_due(run: Run, strategy: str, steps: int, *, at_end: bool) -> bool:
    """Whether a strategy ("no", "steps" or "epoch") makes evaluation or saving due after the present step."""
    step, last = run.progress.step, run.progress.step == run.num_steps
    if strategy == "steps":
        return step % steps == 0 or (last and at_end)
    return strategy == "epoch" and (step % run.steps_per_epoch == 0 or last)


def _wants_checkpoint(run: Run, requests: _Requests) -> bool:
    if run.settings.checkpoints.strategy == "no":
        return False
    return (
        requests.stop
        or requests.save
        or _is_due(run, run.settings.checkpoints.strategy, run.settings.checkpoints.steps, at_end=False)
    )


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list, so that the run ends after a step instead of in the middle of one."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # handlers can be set in the main thread alone
        yield received
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, frame: received.append(number)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _stop_text(run: Run) -> str:
    text = f"stopped after step {run.progress.step} of {run.num_steps}"
    if run.settings.checkpoints.strategy == "no":
        return f"{text}; nothing was saved (--save_strategy no)"
    folder = run.settings.checkpoints.output_dir / f"checkpoint-{run.progress.step}"
    return f"{text}, saved in {folder}; go on with --resume_from_checkpoint auto"


def _out_of_memory(run: Run, error: torch.OutOfMemoryError) -> str:
    return (
        f"the device ran out of memory in step {run.progress.step + 1}: {str(error).splitlines()[0]}\n"
        f"lower --per_device_train_batch_size (now {run.settings.batch.micro_batch_size}; the global batch stays), "
        f"or pass --gradient_checkpointing True (now {run.settings.model.checkpointing}) "
        'or --fsdp "full_shard auto_wrap offload"'
    )


def _answer_before(run: Run, *, resumed: bool) -> list[Sample]:
    """Choose the report's samples and have the base model answer them; an empty list on all but the main process."""
    model, tokenizer, folder = run.trainee.model, run.base.tokenizer, run.settings.checkpoints.output_dir
    if not run.settings.report.num_samples or not run.world.is_main or is_sharded(model):
        return []
    samples = choose_samples(run.held_out or run.data, tokenizer, run.settings.report.num_samples)
    return answer_before(samples, model, tokenizer, folder=folder, device=run.world.device, resumed=resumed)
