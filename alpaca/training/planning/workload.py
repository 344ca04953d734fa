"""What of a run decides its memory and time: its setup, and the largest micro-batch of its data."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from alpaca.architecture.description import ModelDescription
from alpaca.architecture.tensors import hf_name
from alpaca.data.batching import count_steps_per_epoch, split_step, split_step_by_tokens, step_examples
from alpaca.data.preferences import DPO, KTO, TrainingData
from alpaca.errors import InputError
from alpaca.formats.hf.adapters import matches
from alpaca.formats.hf.folder import read_description
from alpaca.formats.hf.pickled import read_as_stored
from alpaca.training.configuration.adapters import ADDED
from alpaca.training.configuration.config import ALL_LINEAR
from alpaca.training.configuration.parsing import count_checkpointed
from alpaca.training.configuration.settings import AdapterSettings, RunSettings
from alpaca.training.model.wide_products import multiplies_bfloat16

_MOST_SIMULATED = 500  # the largest micro-batch is looked for in that many steps
GPUS_PER_MACHINE = 8  # assumed where nothing says their number


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The settings that decide a run's memory and time."""

    method: str = "full"
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    lora_dropout: float = 0.0
    dora: bool = False
    lora_ranks: tuple[tuple[str, int], ...] = ()  # where they differ: the sum over all layers, by targets
    starts_from_base: bool = False  # frozen matrices of the same size are there, too
    trains_embedding: bool = False  # beside an adapter
    trains_head: bool = False
    num_token_rows: int = 0
    num_others: int = 0  # parameters of other modules that are trained whole
    optimizer: str = "adamw_torch"
    base_quantization: str = "none"
    objective: str = "sft"
    micro_batch_size: int = 4
    global_batch_size: int = 128
    max_length: int = 512
    num_checkpointed: int | None = 0  # recomputed layers, the first ones; None: the planner chooses
    whole_gradients: bool = False  # of sharded parameters: whether kept whole between micro-batches
    padding_free: bool = True
    offload: bool = False
    reshard: bool = True
    bf16: bool = True
    numerics: str = "stanford"
    cpu_lacks_bfloat16: bool = False  # so that a CPU's products of bfloat16 weights are in float32
    num_processes: int = 1
    on_machine: int = GPUS_PER_MACHINE  # the most processes on one machine
    hybrid: bool = False  # each machine has a copy of the model
    on_gpu: bool = True

    @property
    def sharded(self) -> bool:
        return self.num_processes > 1 or (self.offload and self.on_gpu)

    @property
    def num_shards(self) -> int:
        """The number of processes that one copy of the model is sharded over."""
        return min(self.on_machine, self.num_processes) if self.hybrid else self.num_processes

    @property
    def fast(self) -> bool:
        return self.numerics == "fast"

    @property
    def is_wide(self) -> bool:
        """Whether bfloat16 weights are multiplied in float32: see `wide_products`."""
        return self.fast and self.cpu_lacks_bfloat16 and not self.on_gpu

    @property
    def state_bytes(self) -> int:
        """Bytes of a trained element, and of each of its two moments."""
        return 2 if self.fast else 4

    @property
    def adds_up_in_float32(self) -> bool:
        """Whether bfloat16 parameters have float32 gradients: see `building.add_up_in_float32`."""
        num_micro_batches = -(-self.global_batch_size // (self.micro_batch_size * self.num_processes))
        return self.fast and not self.sharded and num_micro_batches > 1

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one element's gradient."""
        return 4 if self.adds_up_in_float32 else self.state_bytes

    @property
    def compute_bytes(self) -> int:
        """Bytes of one element in matrix products."""
        return 2 if self.bf16 or self.fast else 4

    @property
    def stream_bytes(self) -> int:
        """Bytes of one element of the residual stream, which has the embeddings' dtype: float32 under autocast."""
        lower = self.sharded or (self.method != "full" and not self.trains_embedding)
        return 2 if self.fast or (self.bf16 and lower) else 4

    @property
    def has_trained_head(self) -> bool:
        return self.method == "full" or self.trains_head

    @property
    def sums_losses(self) -> bool:
        """Whether the head gives the losses' sum, and its gradient with it."""
        return self.padding_free and self.objective == "sft"

    def trains(self, linear: str) -> bool:
        """Whether the backward pass needs this matrix's input: the matrix is trained, or an adapter on it is."""
        return self.method == "full" or linear in self.lora_targets


def read_model(folder: Path, *, num_tokens: int = 0) -> ModelDescription:
    """The model that a plan is for, its vocabulary grown to `num_tokens`. Raises InputError where none can be made."""
    try:
        model = read_description(folder)
    except InputError as error:
        raise InputError(f"no plan can be made: {error}") from error
    if model.num_experts:
        raise InputError(
            f"no plan can be made: {folder} has experts ({model.model_type}), which the plan does not count"
        )
    model = read_as_stored(folder, model)
    return model.with_vocab(max(num_tokens, model.vocab_size))


def make_setup(
    settings: RunSettings,
    shape: ModelDescription,
    *,
    num_processes: int,
    on_gpu: bool,
    on_machine: int | None = None,
    num_added: int = 0,
) -> Setup:
    """The setup of a run. on_machine: processes of a machine; left out, torchrun's number, else all of them.

    num_added: tokens that the tokenizer has beyond its vocabulary.
    """
    model, batch, adapter = settings.model, settings.batch, settings.model.adapter
    adapted: dict[str, object] = {}
    if adapter is not None:
        adapted = {
            "lora_rank": adapter.rank,
            "lora_targets": _targets(adapter.targets, shape),
            "lora_dropout": adapter.dropout,
            "dora": adapter.use_dora,
            "starts_from_base": adapter.init.startswith(("pissa", "olora")),
            **_beside(adapter, shape, num_added),
        }
    return Setup(
        method=model.method,
        optimizer=settings.optimizer.name,
        **adapted,
        base_quantization=model.base_quantization,
        objective=settings.objective.name,
        micro_batch_size=batch.micro_batch_size,
        global_batch_size=batch.global_batch_size,
        max_length=batch.max_length,
        num_checkpointed=count_checkpointed(model.checkpointing, shape.num_layers),
        padding_free=model.padding_free and not (shape.family.keeps_scores or shape.changes_scores),
        offload=model.sharding.offload,
        reshard=model.sharding.reshard_after_forward,
        bf16=model.bf16,
        numerics=model.numerics,
        cpu_lacks_bfloat16=not multiplies_bfloat16(),
        num_processes=num_processes,
        on_machine=on_machine or int(os.environ.get("LOCAL_WORLD_SIZE", num_processes)),
        hybrid=model.sharding.hybrid,
        on_gpu=on_gpu,
    )


def _beside(adapter: AdapterSettings, shape: ModelDescription, num_added: int) -> dict[str, object]:
    """Differing ranks, and what is trained beside the adapter. Names that the model does not have are refused later."""
    values: dict[str, object] = {"num_token_rows": 0, "num_others": 0}
    if adapter.ranks:
        targets, layers = _targets(adapter.targets, shape), range(shape.num_layers)
        values["lora_ranks"] = tuple(
            (name, sum(_rank(adapter, shape, layer, name) for layer in layers)) for name in targets
        )
        values["lora_rank"] = max(adapter.rank, *adapter.ranks.values())
    embedding, head = next(iter(shape.outer_shapes)), hf_name("head")
    for name, size in {**shape.tensor_shapes(), head: (shape.vocab_size, shape.width)}.items():
        if not any(f".{module}." in f".{name}" for module in adapter.modules_to_save):
            continue
        if name in (embedding, head):
            values["trains_embedding" if name == embedding else "trains_head"] = True
        else:
            values["num_others"] += math.prod(size)
    if adapter.tokens:
        number = num_added if adapter.tokens == ADDED else len(set(adapter.tokens))
        values["num_token_rows"] = number * (2 if hf_name("head") in shape.outer_shapes else 1)
    return values


def _rank(adapter: AdapterSettings, shape: ModelDescription, layer: int, target: str) -> int:
    """The rank of one layer's matrix, by the first pattern that is its name's, as in PEFT."""
    inside = next(name for name in shape.layer_shapes if name.removesuffix(".weight").rpartition(".")[2] == target)
    module = f"{shape.family.prefix}{layer}.{inside.removesuffix('.weight')}"
    return next((rank for key, rank in adapter.ranks.items() if matches(key, module)), adapter.rank)


def _targets(asked: Sequence[str], shape: ModelDescription) -> tuple[str, ...]:
    """The matrices of a layer that get an adapter. A name the model does not have is refused when it is loaded."""
    if list(asked) == [ALL_LINEAR]:
        return tuple(shape.linears)
    wanted = asked or shape.family.adapter_targets
    return tuple(name for name in shape.linears if name in wanted)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The work of a run, and its largest micro-batch (see `measure_workload`)."""

    num_examples: int
    num_tokens: int  # tokens of the whole run
    num_targets: int
    num_forward: int = 0  # tokens of the run that only go forward: a preference objective compares with them
    num_steps: int
    num_micro_batches: int  # the most in one step of one process
    max_tokens: int  # N of the largest micro-batch, padding included
    max_targets: int  # R of the largest; padded micro-batches make logits of all N
    max_length: int  # of a sequence


def measure_workload(setup: Setup, data: TrainingData, *, num_steps: int, seed: int) -> Workload:
    """Lay out the micro-batches of the first steps as training does, and take the largest."""
    largest, targets, most = 0, 0, 0
    for step in range(min(num_steps, _MOST_SIMULATED)):
        indices = step_examples(len(data), global_batch_size=setup.global_batch_size, seed=seed, step=step)
        micro_batches = _lay_out(setup, data, indices)
        most = max(most, len(micro_batches))
        for own in micro_batches:
            if len(own):
                lengths = data.sequences.lengths[data.places(own)]
                size = int(lengths.sum()) if setup.padding_free else int(lengths.max()) * len(lengths)
                largest = max(largest, size)
                targets = max(targets, int(data.target_counts[own].sum()))
    steps_per_epoch = count_steps_per_epoch(len(data), global_batch_size=setup.global_batch_size)
    share = num_steps * min(setup.global_batch_size * steps_per_epoch, len(data)) / steps_per_epoch / len(data)
    once = int(data.lengths.sum())
    num_tokens = round(share * once)
    return Workload(
        num_examples=len(data),
        num_tokens=num_tokens,
        num_forward={DPO: once, KTO: 2 * once + num_tokens}.get(setup.objective, 0),
        num_targets=round(share * int(data.target_counts.sum())),
        num_steps=num_steps,
        num_micro_batches=most,
        max_tokens=largest,
        max_targets=targets if setup.padding_free else largest,
        max_length=int(data.sequences.lengths.max()),
    )


def _lay_out(setup: Setup, data: TrainingData, indices: torch.Tensor) -> list[torch.Tensor]:
    layout = {"rank": 0, "num_processes": setup.num_processes}
    if not setup.padding_free:
        return split_step(indices, micro_batch_size=setup.micro_batch_size, **layout)
    max_tokens = setup.micro_batch_size * setup.max_length * data.width
    return split_step_by_tokens(indices, data.lengths, max_tokens=max_tokens, **layout)
