"""A plain loop over single examples, without padding: what our loop is held against, with other people's optimizers."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from alpaca.data.batching import step_examples
from alpaca.training.configuration.config import TrainConfig
from tests.training.test_loop import plain_examples

STEPS = 4
PLAIN = {  # no schedule and no clipping
    "max_steps": STEPS, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0,
    "model_max_length": 120, "lora_dropout": None, "save_strategy": "no",
}  # fmt: skip
Around = Callable[[int, int], None]


def train_plainly(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    config: TrainConfig,
    *,
    records: Path,
    model_file: Path,
    before_example: Around | None = None,
) -> list[float]:
    """Losses of STEPS steps. before_example: called with the step and the example's number before its forward pass."""
    examples = plain_examples(records, model_file, config.model_max_length)
    taught = [pair for pair in examples if any(label != -100 for label in pair[1][1:])]
    losses = []
    for step in range(STEPS):
        batch = step_examples(len(taught), global_batch_size=config.global_batch_size, seed=config.seed, step=step)
        num_targets = sum(label != -100 for index in batch.tolist() for label in taught[index][1][1:])
        total = 0.0
        for index in batch.tolist():
            ids, labels = (torch.tensor([part]) for part in taught[index])
            if before_example:
                before_example(step, index)
            logits = model(input_ids=ids).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum") / num_targets
            loss.backward()
            total += loss.item()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(total)
    return losses
