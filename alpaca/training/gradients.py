"""A step's gradients and losses, by micro-batches; and the loss of the held-out examples.

For SFT the loss is the sum of the target tokens' cross entropies over the number of target tokens in the whole step,
which every process knows from the data; so the layout of processes and micro-batches does not change it. Preference
objectives have theirs in `objectives`. The gradients of micro-batches are added up in float32, those of bfloat16
weights, too. There is one exception: where whole gradients do not fit, FSDP reduces bfloat16 shards after each
micro-batch and adds them up in bfloat16, rounding each time.
"""

import contextlib
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from alpaca.data.batching import split_step
from alpaca.data.preferences import PreferenceDataset, TrainingData
from alpaca.training.configuration.settings import ModelSettings
from alpaca.training.distributed import is_sharded, sync_gradients
from alpaca.training.guards import describe_not_finite, end_if_stopped
from alpaca.training.model.building import add_up_in_float32
from alpaca.training.objectives.preference import Share, Step, mean_measures
from alpaca.training.objectives.reference import part_of
from alpaca.training.report.recorders import Entry
from alpaca.training.report.summary import evaluation_entry
from alpaca.training.run import Run


def accumulate_gradients(run: Run, indices: Tensor) -> tuple[float, list[float]]:
    """Add up the gradients of this process's micro-batches.

    Returns its share of the step's loss, and its sums and counts for `mean_measures`.
    """
    micro_batches = run.passes.split(indices, run.data.lengths, width=run.data.width)
    if run.settings.batch.num_micro_batches > 1 and not is_sharded(run.trainee.model):
        add_up_in_float32(run.trainee.model)
    total, sums = torch.zeros((), dtype=torch.float32, device=run.world.device), None
    share = _begin_step(run, indices)
    for number, micro_batch in enumerate(micro_batches, start=1):
        end_if_stopped()
        sync_gradients(run.trainee.model, last=number == len(micro_batches), whole=run.keeps_gradients)
        with _noisy(run, micro_batch):
            loss, own_sums = share(micro_batch)
        (loss * run.world.num_processes).backward()  # FSDP takes the mean over the processes, and the sum is needed
        total += loss.detach()
        sums = own_sums if sums is None else sums + own_sums
    return total.item(), [] if sums is None else sums.flatten().tolist()


def _noisy(run: Run, micro_batch: Tensor) -> contextlib.AbstractContextManager:
    """A context in which the embeddings of these examples get the noise that the run asks for."""
    if run.noise is None:
        return contextlib.nullcontext()
    return run.noise.drawn_for(run.progress.step, micro_batch.tolist(), run.data.lengths[micro_batch].tolist())


def _begin_step(run: Run, indices: Tensor) -> Share:
    """What gives the micro-batches of a training step their shares of its loss."""
    if isinstance(run.data, PreferenceDataset):
        return _preference_step(run, "train", run.data, indices).begin()

    def share(micro_batch: Tensor) -> tuple[Tensor, Tensor]:
        losses = sum_losses(run, run.data, micro_batch, smoothing=run.settings.batch.label_smoothing)
        return losses / loss_divisor(run, indices, micro_batch), torch.zeros(2, 0)

    return share


def _preference_step(run: Run, part: str, data: PreferenceDataset, indices: Tensor) -> Step:
    """part: the name of `data` in the reference."""
    reference = part_of(run.progress.reference, part)
    return Step(passes=run.passes, settings=run.settings.objective, data=data, indices=indices, reference=reference)


def loss_divisor(run: Run, indices: Tensor, micro_batch: Tensor) -> int:
    """The number that a micro-batch's summed losses are divided by, so that the quotients add up to the step's loss.

    It is the number of target tokens in the step; with `--loss_average micro_batch`, of the micro-batch's own target
    tokens times the number of micro-batches.
    """
    counts = run.data.target_counts
    if run.settings.batch.loss_average == "token" or not len(micro_batch):
        return int(counts[indices].sum())
    return int(counts[micro_batch].sum()) * math.ceil(len(indices) / run.settings.batch.micro_batch_size)


def sum_losses(run: Run, data: TrainingData, indices: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """The summed cross entropy (float32 scalar) of the target tokens of some examples of `data`.

    smoothing: the share of each target's weight that is spread over the whole vocabulary.
    """
    examples = [data.sequences.example(place) for place in data.places(indices).tolist()]
    return run.passes.sum_losses(examples, smoothing=smoothing)


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
def evaluate(run: Run) -> Entry:
    """What an evaluation adds to the log: the mean loss of the held-out examples, and the objective's measures.

    It draws no random numbers.
    """
    model, data = run.trainee.model.eval(), run.held_out
    indices = torch.arange(len(data))
    micro_batches = split_step(
        indices,
        rank=run.world.rank,
        num_processes=run.world.num_processes,
        micro_batch_size=run.settings.batch.eval_micro_batch_size,
    )
    if isinstance(data, PreferenceDataset):
        entry = _evaluate_preferences(run, _preference_step(run, "held_out", data, indices).begin(), micro_batches)
    else:
        total = sum(sum_losses(run, data, micro_batch).item() for micro_batch in micro_batches)
        entry = evaluation_entry(run.world.sum([total])[0] / int(data.target_counts.sum()))
    model.train()
    return entry


def _evaluate_preferences(run: Run, share: Share, micro_batches: Sequence[Tensor]) -> Entry:
    parts = [share(micro_batch) for micro_batch in micro_batches]
    own = [torch.stack([loss for loss, _ in parts]).sum(), *torch.stack([sums for _, sums in parts]).sum(0).flatten()]
    loss, *sums = run.world.sum([value.item() for value in own])
    measures = mean_measures(run.settings.objective.name, sums)
    return {"eval_loss": loss, **{f"eval_{name}": value for name, value in measures.items()}}
