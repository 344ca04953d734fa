"""The training loop: the one there is, for any method, on one process or many.

    for each step: examples -> micro-batches -> gradients -> clip -> AdamW -> log, evaluate, save

The loss is the sum of the target tokens' cross entropies over the number of target tokens in the whole step, which
every process knows from the data; so the layout of processes and micro-batches does not change it. Gradients of
micro-batches are added up in float32, those of bfloat16 weights too; but for shards in bfloat16 that FSDP reduces after
each micro-batch (where whole gradients do not fit), which it adds up as they are: a rounding for each.
"""

import contextlib
import functools
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from alpaca.data.batching import MicroBatch, collate, pack, split_step, split_step_by_tokens, step_examples
from alpaca.data.examples import MASKED_LABEL, EncodedDataset
from alpaca.errors import AlpacaError, InputError, NotEnoughSpace
from alpaca.files.atomic import write_json
from alpaca.files.locks import locked
from alpaca.training.checkpoints.final import save_final
from alpaca.training.checkpoints.loading import find_checkpoint, load_checkpoint
from alpaca.training.checkpoints.output import check_output, clear_output, require_room, require_shared_folder
from alpaca.training.checkpoints.saving import checkpoint_bytes, save_checkpoint
from alpaca.training.config import TrainConfig, config_json, resolve
from alpaca.training.distributed import World, clip_gradients, is_sharded, join_world, sync_gradients
from alpaca.training.guards import LossWatch, SaveClock, describe_not_finite
from alpaca.training.model import padding_free
from alpaca.training.model.building import add_up_in_float32
from alpaca.training.model.final import choose_save_dtype
from alpaca.training.planning.command import print_plan
from alpaca.training.planning.plan import share_of_peak
from alpaca.training.report.answers import Sample, answer_after, answer_before, choose_samples
from alpaca.training.report.page import Record, write_report
from alpaca.training.report.recorders import Entry, NoRecorder, check_recorder, open_recorder
from alpaca.training.report.summary import (
    describe_progress,
    describe_summary,
    draw_losses,
    evaluation_entry,
    mean_rate,
    summarize,
    write_trainer_state,
)
from alpaca.training.run import Run, prepare

logger = logging.getLogger(__name__)


class TrainingStopped(AlpacaError):
    """The run was asked to stop. Its state is saved. signal: the number of the signal that asked, 0 for none."""

    def __init__(self, message: str, *, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def train(
    config: TrainConfig,
    *,
    on_step: Callable[[Entry], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Path:
    """Fine-tune as `config` says and return the folder of the final model.

    on_step hears each step's log entry (on the main process); should_stop is asked after each step. Raises
    TrainingStopped after SIGTERM, SIGINT or should_stop, once a checkpoint is saved, and AlpacaErrors for what the
    user can mend.
    """
    if config.plan_only:
        print_plan(config)
        return Path(config.output_dir)
    world = join_world()
    config = resolve(config, num_processes=world.num_processes, device=world.device)
    check_recorder(config)
    require_shared_folder(Path(config.output_dir), world)
    with contextlib.ExitStack() as stack:
        world.together(lambda: stack.enter_context(locked(Path(config.output_dir))) if world.is_main else None)
        return _train_alone(config, world, on_step=on_step, should_stop=should_stop)


def _train_alone(
    config: TrainConfig,
    world: World,
    *,
    on_step: Callable[[Entry], None] | None,
    should_stop: Callable[[], bool] | None,
) -> Path:
    """`train`, once no other run can write to its output. `config` is resolved."""
    output_dir = Path(config.output_dir)
    checkpoint = find_checkpoint(output_dir, config.resume_from_checkpoint, world=world)
    check_output(
        output_dir,
        resume=config.resume_from_checkpoint is not None,
        checkpoint=checkpoint,
        overwrite=config.overwrite_output_dir,
    )
    run = prepare(config, world)
    if checkpoint:
        load_checkpoint(run.trainee, checkpoint)
    world.together(lambda: _prepare_output(run, resumed=checkpoint is not None) if world.is_main else None)
    samples = _answer_before(run, resumed=checkpoint is not None)
    try:
        seconds = run_steps(run, on_step=on_step, should_stop=should_stop)
    except torch.OutOfMemoryError as error:
        raise NotEnoughSpace(_out_of_memory(run, error)) from error
    finish(run, seconds=seconds, samples=samples)
    return output_dir


def _prepare_output(run: Run, *, resumed: bool) -> None:
    config, output_dir = run.config, Path(run.config.output_dir)
    dtype, saves = choose_save_dtype(config, run.base), config.save_strategy != "no"
    require_room(run.trainee.model, output_dir, dtype=dtype, checkpoints=saves)
    clear_output(output_dir, old_checkpoints=not resumed)
    write_json(output_dir / "train_config.json", {**config_json(config), **_identify_base(run)})


def _identify_base(run: Run) -> dict[str, str]:
    """An adapter's base by its tensors, for whoever serves it: a folder's name stays when another model moves in.

    Nothing for a whole model, and for bases in other files than safetensors, which training takes, too.
    """
    if run.config.method == "full" or run.base.fingerprint is None:
        return {}
    return {"base_fingerprint": run.base.fingerprint}


# The loop -----------------------------------------------------------------------------------------------------


def run_steps(
    run: Run, *, on_step: Callable[[Entry], None] | None = None, should_stop: Callable[[], bool] | None = None
) -> float:
    """Train from where `run` stands to its last step; returns the seconds spent in training steps."""
    config, progress = run.config, run.progress
    meter, watch = _Meter(), LossWatch([entry["loss"] for entry in progress.log_history if "loss" in entry])
    clock = SaveClock(limit_s=config.save_minutes * 60, num_bytes=checkpoint_bytes(run.trainee))
    with _stop_signals() as signals, _open_log(run) as log, _progress_bar(run) as bar:
        if progress.step == 0 and config.eval_strategy != "no":
            log(evaluation_entry(evaluate(run)))
        while progress.step < run.num_steps:
            with meter.measure():
                entry, requests = take_step(run, functools.partial(_own_requests, signals, should_stop, clock))
            meter.count(entry.pop("tokens"))
            if warning := watch.add(entry["loss"]):
                logger.warning("step %d: %s", progress.step, warning)
            _tell(run, entry, meter, log=log, bar=bar, on_step=on_step)
            if _is_due(run, config.eval_strategy, config.eval_steps, at_end=True):
                log(evaluation_entry(evaluate(run)))
            if _wants_checkpoint(run, requests):
                with clock.saving():
                    save_checkpoint(run.trainee, Path(config.output_dir), keep=config.save_total_limit)
            if requests.stop:
                raise TrainingStopped(_stop_text(run), signal=signals[0] if signals else 0)
    return meter.total_seconds


@dataclass(frozen=True, kw_only=True)
class _Requests:
    """What any process may ask for, and all then do after the same step."""

    stop: bool
    save: bool


def _own_requests(signals: list[int], should_stop: Callable[[], bool] | None, clock: SaveClock) -> _Requests:
    """What this process asks for now."""
    return _Requests(stop=bool(signals) or bool(should_stop and should_stop()), save=clock.is_due())


def take_step(run: Run, ask: Callable[[], _Requests]) -> tuple[Entry, _Requests]:
    """One optimizer step: its log entry (of this step alone), and what any process requests by the end of it."""
    config, trainee, progress = run.config, run.trainee, run.progress
    indices = step_examples(
        len(run.data), global_batch_size=config.global_batch_size, seed=config.seed, step=progress.step
    )
    own_loss = accumulate_gradients(run, indices)
    grad_norm = clip_gradients(trainee.model, config.max_grad_norm)
    own = ask()
    loss, stop, save = run.world.sum([own_loss, float(own.stop), float(own.save)])
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise InputError(_explain_not_finite(run, indices, loss, grad_norm))
    learning_rate = trainee.scheduler.get_last_lr()[0]
    trainee.optimizer.step()
    trainee.scheduler.step()
    trainee.optimizer.zero_grad()
    progress.step += 1
    progress.losses.append(loss)
    entry = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
    entry |= {"epoch": progress.step / run.steps_per_epoch, "step": progress.step}
    return {**entry, "tokens": int(run.data.lengths[indices].sum())}, _Requests(stop=stop > 0, save=save > 0)


def accumulate_gradients(run: Run, indices: Tensor) -> float:
    """Add up the gradients of this process's micro-batches; returns its share of the step's loss."""
    micro_batches = _micro_batches(run, indices)
    if run.config.gradient_accumulation_steps > 1 and not is_sharded(run.trainee.model):
        add_up_in_float32(run.trainee.model)
    total = torch.zeros((), dtype=torch.float32, device=run.world.device)
    for number, micro_batch in enumerate(micro_batches, start=1):
        sync_gradients(run.trainee.model, last=number == len(micro_batches), whole=run.keeps_gradients)
        loss = sum_losses(run, run.data, micro_batch) / loss_divisor(run, indices, micro_batch)
        (loss * run.world.num_processes).backward()  # FSDP takes the mean over the processes, the sum is wanted
        total += loss.detach()
    return total.item()


def _micro_batches(run: Run, indices: Tensor) -> list[Tensor]:
    """This process's part of a step. Without padding they have as many tokens as padded ones have at the most."""
    config, layout = run.config, {"rank": run.world.rank, "num_processes": run.world.num_processes}
    if not padding_free.is_enabled(run.trainee.model):
        return split_step(indices, micro_batch_size=config.per_device_train_batch_size, **layout)
    max_tokens = config.per_device_train_batch_size * config.model_max_length
    return split_step_by_tokens(indices, run.data.lengths, max_tokens=max_tokens, **layout)


def loss_divisor(run: Run, indices: Tensor, micro_batch: Tensor) -> int:
    """What a micro-batch's summed losses are divided by, so that all those of the step add up to its loss.

    The step's target tokens; or with `--loss_average micro_batch` its own, times the number of micro-batches.
    """
    counts = run.data.target_counts
    if run.config.loss_average == "token" or not len(micro_batch):
        return int(counts[indices].sum())
    return int(counts[micro_batch].sum()) * math.ceil(len(indices) / run.config.per_device_train_batch_size)


def sum_losses(run: Run, data: EncodedDataset, indices: Tensor) -> Tensor:
    """The summed cross entropy (float32 scalar) of the target tokens of some examples of `data`."""
    model, pad_id = run.trainee.model, run.base.tokenizer.fill_id
    examples = [data.example(index) for index in indices.tolist()]
    if padding_free.is_enabled(model):
        batch = pack(examples, pad_id=pad_id).to(run.world.device)
        return padding_free.sum_packed_losses(model, batch, bf16=run.config.autocasts)
    return _sum_padded_losses(model, collate(examples, pad_id=pad_id).to(run.world.device), bf16=run.config.autocasts)


def _sum_padded_losses(model: nn.Module, batch: MicroBatch, *, bf16: bool) -> Tensor:
    with torch.autocast(batch.input_ids.device.type, dtype=torch.bfloat16, enabled=bf16):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=MASKED_LABEL, reduction="sum"
    )


@torch.no_grad()
def _explain_not_finite(run: Run, indices: Tensor, loss: float, grad_norm: float) -> str:
    """Why training stops. The step's examples are gone through one by one, which all processes do together."""
    layout = {"rank": run.world.rank, "num_processes": run.world.num_processes}
    alone = [(own, sum_losses(run, run.data, own).item()) for own in split_step(indices, micro_batch_size=1, **layout)]
    broken = [index for own, value in alone if not math.isfinite(value) for index in own.tolist()]
    return describe_not_finite(
        loss,
        grad_norm,
        step=run.progress.step + 1,
        indices=indices.tolist(),
        broken=sorted(index for part in run.world.gather(broken) for index in part),
        name=functools.partial(_name_example, run),
        remedy=_float32_flags(run.config),
    )


def _float32_flags(config: TrainConfig) -> str:
    """What to pass for float32 products, "" where they are so already."""
    if config.numerics == "fast":  # whatever --bf16 says
        return "--numerics stanford --bf16 False"
    return "--bf16 False" if config.bf16 else ""


def _name_example(run: Run, index: int) -> str:
    """An example's number and the first words of its instruction."""
    text = run.base.tokenizer.decode(run.data.example(index)[0].tolist())
    words = text.partition("### Instruction:")[2].partition("\n###")[0].split()
    return f'number {index} ("{" ".join(words[:8])}{" …" if len(words) > 8 else ""}")'


# Evaluation ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(run: Run) -> float:
    """The mean loss over the held-out examples' target tokens. Draws no random numbers."""
    model, data = run.trainee.model.eval(), run.held_out
    micro_batches = split_step(
        torch.arange(len(data)),
        rank=run.world.rank,
        num_processes=run.world.num_processes,
        micro_batch_size=run.config.per_device_eval_batch_size,
    )
    total = sum(sum_losses(run, data, micro_batch).item() for micro_batch in micro_batches)
    model.train()
    return run.world.sum([total])[0] / int(data.target_counts.sum())


# Log, requests, end ---------------------------------------------------------------------------------------------


class _Meter:
    """Useful tokens per second of training time: evaluation and saving are not counted."""

    def __init__(self) -> None:
        self.num_tokens, self._seconds, self.total_seconds = 0, 0.0, 0.0
        self._step_seconds, self.last_rate = 0.0, 0.0  # last_rate: of the last step alone

    @contextmanager
    def measure(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._step_seconds = time.perf_counter() - start
        self._seconds += self._step_seconds
        self.total_seconds += self._step_seconds

    def count(self, num_tokens: int) -> None:
        """Take the useful tokens of the step just measured."""
        self.num_tokens += num_tokens
        self.last_rate = num_tokens / self._step_seconds

    def rate(self) -> float:
        """Tokens per second since the last call."""
        rate = self.num_tokens / self._seconds
        self.num_tokens, self._seconds = 0, 0.0
        return round(rate, 1)


@contextmanager
def _open_log(run: Run) -> Iterator[Callable[[Entry], None]]:
    """A function that adds an entry to the history and, on the main process, to the recorder."""
    progress = run.progress
    recorder = open_recorder(run.config, first_step=progress.step) if run.world.is_main else NoRecorder()

    def log(values: Entry) -> None:
        entry = {**values, "epoch": progress.step / run.steps_per_epoch, "step": progress.step}
        progress.log_history.append(entry)
        recorder.record(entry)
        if "eval_loss" in entry:
            values = (progress.step, entry["eval_loss"], entry["eval_perplexity"])
            logger.info("step %d: held-out loss %.4f, perplexity %.2f", *values)

    try:
        yield log
    finally:
        recorder.close()


def _tell(
    run: Run,
    entry: Entry,
    meter: _Meter,
    *,
    log: Callable[[Entry], None],
    bar: tqdm,
    on_step: Callable[[Entry], None] | None,
) -> None:
    """Say what a step did: to the bar, to the caller, and every `logging_steps` to the log (its loss a mean)."""
    progress = run.progress
    rate = meter.last_rate
    share = share_of_peak(run.plan, rate) if run.plan else None
    bar.set_postfix_str(describe_progress(entry["loss"], rate, run.memory.current_bytes(), share), refresh=False)
    bar.update()
    if on_step and run.world.is_main:
        on_step({**entry, "max_steps": run.num_steps})
    if progress.step % run.config.logging_steps == 0 or progress.step == run.num_steps:
        mean_loss, progress.losses = sum(progress.losses) / len(progress.losses), []
        log({**entry, "loss": mean_loss, "tokens_per_second": meter.rate()})


def _progress_bar(run: Run) -> tqdm:
    return tqdm(
        total=run.num_steps,
        initial=run.progress.step,
        desc="train",
        unit="step",
        disable=not run.world.is_main,
        mininterval=1.0 if sys.stderr.isatty() else 10.0,
    )


def _is_due(run: Run, strategy: str, steps: int, *, at_end: bool) -> bool:
    """Whether a strategy ("no", "steps", "epoch") asks for something after the present step."""
    step, last = run.progress.step, run.progress.step == run.num_steps
    if strategy == "steps":
        return step % steps == 0 or (last and at_end)
    return strategy == "epoch" and (step % run.steps_per_epoch == 0 or last)


def _wants_checkpoint(run: Run, requests: _Requests) -> bool:
    if run.config.save_strategy == "no":
        return False
    return requests.stop or requests.save or _is_due(run, run.config.save_strategy, run.config.save_steps, at_end=False)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT as entries of a list instead of an end in the middle of a step."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
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
    if run.config.save_strategy == "no":
        return f"{text}; nothing was saved (--save_strategy no)"
    folder = Path(run.config.output_dir) / f"checkpoint-{run.progress.step}"
    return f"{text}, saved in {folder}; go on with --resume_from_checkpoint auto"


def _out_of_memory(run: Run, error: torch.OutOfMemoryError) -> str:
    return (
        f"the device ran out of memory in step {run.progress.step + 1}: {str(error).splitlines()[0]}\n"
        f"lower --per_device_train_batch_size (now {run.config.per_device_train_batch_size}; the global batch stays), "
        f"or pass --gradient_checkpointing True (now {run.config.gradient_checkpointing}) "
        'or --fsdp "full_shard auto_wrap offload"'
    )


def _answer_before(run: Run, *, resumed: bool) -> list[Sample]:
    """The report's samples with the base model's answers; none on other processes."""
    model, tokenizer, folder = run.trainee.model, run.base.tokenizer, Path(run.config.output_dir)
    if not run.config.num_samples or not run.world.is_main or is_sharded(model):
        return []
    samples = choose_samples(run.held_out or run.data, tokenizer, run.config.num_samples)
    return answer_before(samples, model, tokenizer, folder=folder, device=run.world.device, resumed=resumed)


def finish(run: Run, *, seconds: float, samples: list[Sample]) -> None:
    """Write and verify the final model and the run's report."""
    config, output_dir = run.config, Path(run.config.output_dir)
    dtype = choose_save_dtype(config, run.base)
    learned = any(entry.get("learning_rate", 0) > 0 for entry in run.progress.log_history)
    save_final(run.trainee.model, run.base, output_dir, dtype=dtype, learned=learned, world=run.world)
    if run.world.is_main:
        history = run.progress.log_history
        summary = summarize(history, seconds=seconds)
        write_trainer_state(
            output_dir,
            config,
            history,
            num_steps=run.num_steps,
            steps_per_epoch=run.steps_per_epoch,
            summary=summary,
        )
        draw_losses(output_dir / "loss.png", history)
        write_report(output_dir, _record(run, summary, samples))
        logger.info("done: %s (%s), verified; %s", output_dir, str(dtype)[6:], describe_summary(summary))
    run.world.wait_for_all()


def _record(run: Run, summary: dict[str, object], samples: list[Sample]) -> Record:
    """What report.html shows. Memory is read before the last answers are given."""
    model, peak_bytes, rate = run.trainee.model, run.memory.peak_bytes(), mean_rate(run.progress.log_history)
    if samples:
        where = {"folder": Path(run.config.output_dir), "device": run.world.device}
        samples = answer_after(samples, model, run.base.tokenizer, **where)
    return Record(
        config=run.config,
        plan=run.plan,
        history=run.progress.log_history,
        summary=summary,
        data=run.data.report,
        held_out=run.held_out.report if run.held_out else None,
        num_processes=run.world.num_processes,
        device=run.world.device,
        peak_bytes=peak_bytes,
        tokens_per_second=rate,
        share_of_peak=share_of_peak(run.plan, rate) if run.plan else None,
        samples=samples,
        no_samples="The model was sharded: none were asked for." if is_sharded(model) else "None were asked for.",
    )
