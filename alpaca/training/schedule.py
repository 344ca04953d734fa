"""How many steps a run has, which examples are held out, and the learning rate of each step."""

import math

from alpaca.errors import InputError
from alpaca.training.configuration.settings import BatchSettings, DataSettings, OptimizerSettings


def count_steps(batch: BatchSettings, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    return batch.max_steps if batch.max_steps > 0 else math.ceil(batch.num_epochs * steps_per_epoch)


def count_held_out(data: DataSettings, num_examples: int) -> int:
    """How many examples of the training data are held out for evaluation: a number, or a share of them (at least one).

    Raises InputError for a fraction that leaves none to train on.
    """
    if not data.held_out_share:
        return data.num_held_out
    held_out = max(1, round(data.held_out_share * num_examples))
    if held_out >= num_examples:
        raise InputError(
            f"--eval_fraction {data.held_out_share:g} holds out {held_out} of {num_examples} examples of "
            f"{data.path}, and leaves none to train on; give a smaller share, or --eval_data_path"
        )
    return held_out


def count_warmup_steps(optimizer: OptimizerSettings, num_steps: int) -> int:
    """Steps with a rising learning rate, rounded up as transformers does."""
    if optimizer.warmup_steps >= 1:
        return int(optimizer.warmup_steps)
    return math.ceil((optimizer.warmup_steps or optimizer.warmup_ratio) * num_steps)


def learning_rate_factor(
    step: int, *, schedule: str, num_warmup_steps: int, num_steps: int, least: float = 0.0
) -> float:
    """The share of the highest learning rate in a step (counted from 0), by transformers' schedules.

    least: what a cosine with a floor ends at.

    Written here because transformers' own, with what they import, take four seconds of a start.
    """
    if schedule == "constant":
        return 1.0
    if step < num_warmup_steps:
        return step / num_warmup_steps
    if schedule == "constant_with_warmup":
        return 1.0
    if schedule == "inverse_sqrt":
        timescale = num_warmup_steps or 10_000
        return ((step - num_warmup_steps + timescale) / timescale) ** -0.5
    progress = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    if schedule == "linear":
        return max(0.0, 1 - progress)
    return max(0.0, least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress)))
