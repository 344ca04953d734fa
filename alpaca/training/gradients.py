"""A step's gradients and losses, by micro-batches; and the loss of the held-out examples.

The loss is the sum of the target tokens' cross entropies over the number of target tokens in the whole step, which
every process knows from the data; so the layout of processes and micro-batches does not change it. The
gradients of micro-batches are added up in float32, those of bfloat16 weights, too. There is one exception: where whole
gradients do not fit, FSDP reduces bfloat16 shards after each micro-batch and adds them up in bfloat16,
rounding each time.
"""

import contextlib
import functools
import math

import torch
from torch import Tensor, nn

from alpaca.data.batching import MicroBatch, collate, pack, split_step, split_step_by_tokens
from alpaca.data.examples import MASKED_LABEL, EncodedDataset
from alpaca.training.configuration.settings import ModelSettings
from alpaca.training.distributed import is_sharded, sync_gradients
from alpaca.training.guards import describe_not_finite
from alpaca.training.model import padding_free
from alpaca.training.model.building import add_up_in_float32
from alpaca.training.run import Run


def accumulate_gradients(run: Run, indices: Tensor) -> float:
    """Add up the gradients of this process's micro-batches; returns its share of the step's loss."""
    micro_batches = _micro_batches(run, indices)
    if run.settings.batch.num_micro_batches > 1 and not is_sharded(run.trainee.model):
        add_up_in_float32(run.trainee.model)
    total = torch.zeros((), dtype=torch.float32, device=run.world.device)
    for number, micro_batch in enumerate(micro_batches, start=1):
        sync_gradients(run.trainee.model, last=number == len(micro_batches), whole=run.keeps_gradients)
        with _noisy(run, micro_batch):
            losses = sum_losses(run, run.data, micro_batch, smoothing=run.settings.batch.label_smoothing)
        loss = losses / loss_divisor(run, indices, micro_batch)
        (loss * run.world.num_processes).backward()  # FSDP takes the mean over the processes, and the sum is needed
        total += loss.detach()
    return total.item()


def _noisy(run: Run, micro_batch: Tensor) -> contextlib.AbstractContextManager:
    """A context in which the embeddings of these examples get the noise that the run asks for."""
    if run.noise is None:
        return contextlib.nullcontext()
    return run.noise.drawn_for(run.progress.step, micro_batch.tolist(), run.data.lengths[micro_batch].tolist())


def _micro_batches(run: Run, indices: Tensor) -> list[Tensor]:
    """Cut this process's part of a step into micro-batches, each a tensor of example numbers.

    Without padding a micro-batch holds as many tokens as a padded one holds at the most.
    """
    settings, layout = run.settings, {"rank": run.world.rank, "num_processes": run.world.num_processes}
    if not padding_free.is_enabled(run.trainee.model):
        return split_step(indices, micro_batch_size=settings.batch.micro_batch_size, **layout)
    max_tokens = settings.batch.micro_batch_size * settings.batch.max_length
    return split_step_by_tokens(indices, run.data.lengths, max_tokens=max_tokens, **layout)


def loss_divisor(run: Run, indices: Tensor, micro_batch: Tensor) -> int:
    """The number that a micro-batch's summed losses are divided by, so that the quotients add up to the step's loss.

    It is the number of target tokens in the step; with `--loss_average micro_batch`, of the micro-batch's own target
    tokens times the number of micro-batches.
    """
    counts = run.data.target_counts
    if run.settings.batch.loss_average == "token" or not len(micro_batch):
        return int(counts[indices].sum())
    return int(counts[micro_batch].sum()) * math.ceil(len(indices) / run.settings.batch.micro_batch_size)


def sum_losses(run: Run, data: EncodedDataset, indices: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """The summed cross entropy (float32 scalar) of the target tokens of some examples of `data`.

    smoothing: the share of each target's weight that is spread over the whole vocabulary.
    """
    model, pad_id = run.trainee.model, run.base.tokenizer.fill_id
    examples = [data.example(index) for index in indices.tolist()]
    if padding_free.is_enabled(model):
        batch = pack(examples, pad_id=pad_id).to(run.world.device)
        return padding_free.sum_packed_losses(model, batch, bf16=run.settings.model.autocasts, smoothing=smoothing)
    batch = collate(examples, pad_id=pad_id).to(run.world.device)
    return _sum_padded_losses(model, batch, bf16=run.settings.model.autocasts, smoothing=smoothing)


def _sum_padded_losses(model: nn.Module, batch: MicroBatch, *, bf16: bool, smoothing: float) -> Tensor:
    with torch.autocast(batch.input_ids.device.type, dtype=torch.bfloat16, enabled=bf16):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        batch.labels[:, 1:].flatten(),
        ignore_index=MASKED_LABEL,
        reduction="sum",
        label_smoothing=smoothing,
    )


@torch.no_grad()
def explain_not_finite(run: Run, indices: Tensor, loss: float, grad_norm: float) -> str:
    """Say why training stops: compute each example's loss by itself. All processes call it together."""
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
        remedy=_float32_flags(run.settings.model),
    )


def _float32_flags(model: ModelSettings) -> str:
    """The flags that make products float32, or "" where they are so already."""
    if model.is_fast:  # fast numerics compute in bfloat16 whatever --bf16 says
        return "--numerics stanford --bf16 False"
    return "--bf16 False" if model.bf16 else ""


def _name_example(run: Run, index: int) -> str:
    """An example's number and the first words of its instruction."""
    text = run.base.tokenizer.decode(run.data.example(index)[0].tolist())
    words = text.partition("### Instruction:")[2].partition("\n###")[0].split()
    return f'number {index} ("{" ".join(words[:8])}{" …" if len(words) > 8 else ""}")'


@torch.no_grad()
def evaluate(run: Run) -> float:
    """The mean loss over the target tokens of the held-out examples. It draws no random numbers."""
    model, data = run.trainee.model.eval(), run.held_out
    micro_batches = split_step(
        torch.arange(len(data)),
        rank=run.world.rank,
        num_processes=run.world.num_processes,
        micro_batch_size=run.settings.batch.eval_micro_batch_size,
    )
    total = sum(sum_losses(run, data, micro_batch).item() for micro_batch in micro_batches)
    model.train()
    return run.world.sum([total])[0] / int(data.target_counts.sum())
