"""What a run will take, computed before a weight is loaded: parameters, steps, memory by part, disk and time.

Training makes the plan for the device it finds and refuses a GPU that is too small; `--plan_only` (command.py) shows it
for any hardware. Bytes are counted in footprint.py; this module adds time and finds settings that fit. Figures of GPUs
are not measured yet.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from alpaca.architecture.description import ModelDescription
from alpaca.data.batching import count_steps_per_epoch
from alpaca.data.preferences import TrainingData
from alpaca.training.configuration.config import ADAPTER_DEFAULTS
from alpaca.training.configuration.settings import RunSettings
from alpaca.training.distributed import keeps_gradients_whole
from alpaca.training.model.base import Base
from alpaca.training.model.final import choose_save_dtype
from alpaca.training.planning.footprint import (
    Memory,
    bytes_for_gradients,
    checkpoint_bytes,
    count_memory,
)
from alpaca.training.planning.hardware import GPU_COUNTS, Hardware
from alpaca.training.planning.trained import count_adapter, count_trained
from alpaca.training.planning.workload import Setup, Workload, measure_workload, read_model
from alpaca.training.schedule import count_steps

logger = logging.getLogger(__name__)


def count_flops(shape: ModelDescription, setup: Setup, work: Workload) -> float:
    """FLOP of the whole run: per token and weight 2 forward, 2 for the input's gradient and 2 for the weight's.

    The head works on targets alone; embeddings are looked up; attention's own products are left out (under 3 % at
    512 tokens of a 7B model). Checkpointing repeats its layers' forward pass.
    """
    adapter = count_adapter(shape, setup) if setup.method != "full" else 0
    per_weight = (6 if setup.method == "full" else 4) + 2 * setup.num_checkpointed / shape.num_layers
    head_rows = work.num_targets if setup.padding_free else work.num_tokens
    return work.num_tokens * (per_weight * shape.num_linear + 6 * adapter) + 6 * head_rows * shape.num_head


def count_forward_flops(shape: ModelDescription, setup: Setup, work: Workload) -> float:
    """FLOP of what only goes forward: the reference before the first step, and KTO's mismatched answers."""
    adapter = count_trained(shape, setup) if setup.method != "full" else 0
    targets = 1 if not setup.padding_free else work.num_targets / work.num_tokens
    return 2 * work.num_forward * (shape.num_linear + adapter + targets * shape.num_head)


def share_of_peak(plan: "Plan", tokens_per_second: float) -> float | None:
    """The share of the devices' peak FLOP/s that is used. Recomputed work does not count as used."""
    if plan.hardware.peak_flops is None:
        return None
    once = dataclasses.replace(plan.setup, num_checkpointed=0)
    per_token = count_flops(plan.shape, once, plan.work) / plan.work.num_tokens
    return per_token * tokens_per_second / (plan.hardware.peak_flops * plan.setup.num_processes)


@dataclass(frozen=True, kw_only=True)
class Plan:
    shape: ModelDescription
    setup: Setup
    work: Workload
    memory: Memory
    hardware: Hardware
    num_trained: int
    checkpoint_bytes: int
    num_checkpoints: int  # on the disk at the same time: those that are kept and the one being written
    final_bytes: int
    seconds: float

    @property
    def fits(self) -> bool:
        return self.memory.peak_bytes <= self.hardware.usable_bytes

    @property
    def disk_bytes(self) -> int:
        return self.checkpoint_bytes * self.num_checkpoints + self.final_bytes


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Makes plans of one run for any setup and hardware."""

    settings: RunSettings
    shape: ModelDescription
    data: TrainingData
    dtype: torch.dtype  # of the final weights
    num_steps: int
    num_added: int = 0  # tokens that the tokenizer has beyond its vocabulary

    def plan(self, setup: Setup, hardware: Hardware) -> Plan:
        """The plan for a setup; an open number of recomputed layers becomes the fewest that fit, else least memory."""
        numbers = [setup.num_checkpointed]
        if setup.num_checkpointed is None:
            numbers = range(self.shape.num_layers + 1)
        plans: list[Plan] = []
        for number in numbers:
            plans.append(self._plan(dataclasses.replace(setup, num_checkpointed=number), hardware))
            if plans[-1].fits:
                return plans[-1]
        return min(plans, key=lambda plan: plan.memory.peak_bytes)

    def _plan(self, setup: Setup, hardware: Hardware) -> Plan:
        """A plan that keeps whole gradients between micro-batches where training would and where it then fits."""
        whole = dataclasses.replace(setup, whole_gradients=True)
        if setup.sharded and keeps_gradients_whole(
            count_trained(self.shape, setup), bytes_for_gradients(self.shape, setup, hardware.memory_bytes)
        ):
            plan = self._plan_exactly(whole, hardware)
            if plan.fits:
                return plan
        return self._plan_exactly(setup, hardware)

    def _plan_exactly(self, setup: Setup, hardware: Hardware) -> Plan:
        work, memory = self._work(setup), self.memory(setup)
        trained, saves = count_trained(self.shape, setup), self.settings.checkpoints.saves
        flops = count_flops(self.shape, setup, work) + count_forward_flops(self.shape, setup, work)
        return Plan(
            shape=self.shape,
            setup=setup,
            work=work,
            memory=memory,
            hardware=hardware,
            num_trained=trained,
            checkpoint_bytes=checkpoint_bytes(self.shape, setup),
            num_checkpoints=self.settings.checkpoints.keep + 1 if saves else 0,
            final_bytes=self._final_bytes(setup, trained),
            seconds=flops / (hardware.flops * setup.num_processes),
        )

    def _final_bytes(self, setup: Setup, trained: int) -> int:
        starts = count_adapter(self.shape, setup) if setup.starts_from_base else 0  # it has twice the rank
        return (trained + starts) * self.dtype.itemsize

    def memory(self, setup: Setup) -> Memory:
        """The memory of a setup in which no number is open. It does not depend on the hardware."""
        return count_memory(self.shape, setup, self._work(setup))

    def _work(self, setup: Setup) -> Workload:
        layout = (setup.micro_batch_size, setup.num_processes, setup.padding_free)
        if layout not in self._works:
            self._works[layout] = measure_workload(
                setup, self.data, num_steps=self.num_steps, seed=self.settings.batch.seed
            )
        return self._works[layout]

    @functools.cached_property
    def _works(self) -> dict[tuple, Workload]:
        return {}

    def suggest(self, setup: Setup, hardware: Hardware) -> list[str]:
        """The smallest changes of the command that would fit; several at once only where no single one is enough."""
        found: list[str] = []
        for group in _changes(setup, self.shape.family.adapter_targets):
            found = [text for text, changed in group if self.plan(changed, hardware).fits]
            if found:
                return found
        return found


def _changes(setup: Setup, targets: tuple[str, ...]) -> Iterator[list[tuple[str, Setup]]]:
    """Groups of changes to try, each a text and the setup it makes. targets: an adapter's usual layers."""
    change = functools.partial(dataclasses.replace, setup)
    recompute, micro = "--gradient_checkpointing auto", "--per_device_train_batch_size 1"
    single = [(recompute, {"num_checkpointed": None}), (micro, {"micro_batch_size": 1})]
    small, both = {"num_checkpointed": None, "micro_batch_size": 1}, f"{recompute} {micro}"
    if setup.num_checkpointed is None:  # it stays open in all changed setups
        single, both = single[1:], micro
    shards = setup.optimizer == "adamw_torch" and not (setup.starts_from_base or setup.num_token_rows)
    back = " --numerics stanford" if setup.fast else ""
    methods = [
        (f"--method lora{back}", _adapted(setup, targets, method="lora", quantization="none")),
        (f"--method qlora{back}", _adapted(setup, targets, method="qlora", quantization="nf4")),
    ]
    fast = [("--numerics fast", {"numerics": "fast"})] if setup.method == "full" and not setup.fast and shards else []
    if setup.method != "full":
        methods = methods[1:] if setup.base_quantization == "none" else []
    offload = [('--fsdp "full_shard auto_wrap offload"', {"offload": True})] if setup.on_gpu and shards else []
    counts = [number for number in GPU_COUNTS if number > setup.num_processes] if setup.on_gpu and shards else []
    more = [(f"{number} GPUs (torchrun --nproc_per_node={number})", {"num_processes": number}) for number in counts]
    yield [(text, change(**values)) for text, values in [*single, *offload, *more[:1], *fast, *methods]]
    yield [(both, change(**small))]
    yield [(f"{text}, with {both}", change(**values, **small)) for text, values in [*offload, *more, *fast, *methods]]
    yield [(f"{text}, with offload and {both}", change(**values, **small, offload=True)) for text, values in more]


def _adapted(setup: Setup, targets: tuple[str, ...], *, quantization: str, method: str) -> dict[str, object]:
    """Values of a setup with the default adapter on a frozen base."""
    own = {"lora_targets": setup.lora_targets, "lora_rank": setup.lora_rank, "lora_dropout": setup.lora_dropout}
    if not setup.lora_targets:
        own = {
            "lora_targets": targets,
            "lora_rank": ADAPTER_DEFAULTS["lora_r"],
            "lora_dropout": ADAPTER_DEFAULTS["lora_dropout"],
        }
    return {**own, "method": method, "base_quantization": quantization, "numerics": "stanford"}


def plan_json(plan: Plan) -> dict[str, object]:
    """The plan as JSON has it."""
    hardware = {**dataclasses.asdict(plan.hardware), "num_devices": plan.setup.num_processes}
    return {
        "parameters": plan.shape.num_parameters,
        "trained": plan.num_trained,
        "setup": dataclasses.asdict(plan.setup),
        "work": dataclasses.asdict(plan.work),
        "memory": dataclasses.asdict(plan.memory),
        "hardware": hardware,
        "disk": {
            "checkpoint_bytes": plan.checkpoint_bytes,
            "num_checkpoints": plan.num_checkpoints,
            "final_bytes": plan.final_bytes,
            "total_bytes": plan.disk_bytes,
        },
        "seconds": round(plan.seconds, 1),
        "recomputed_layers": plan.setup.num_checkpointed,
        "tokens_per_second": round(plan.work.num_tokens / plan.seconds, 1),
        "fits": plan.fits,
    }


def make_planner(settings: RunSettings, base: Base, data: TrainingData) -> Planner:
    """A planner for a run. Raises InputError for a model whose sizes are not known."""
    steps = count_steps(
        settings.batch, count_steps_per_epoch(len(data), global_batch_size=settings.batch.global_batch_size)
    )
    return Planner(
        settings=settings,
        shape=read_model(base.folder, num_tokens=base.tokenizer.size if settings.model.is_full else 0),
        data=data,
        dtype=choose_save_dtype(settings, base),
        num_steps=steps,
        num_added=base.tokenizer.size - base.tokenizer.base_size,
    )
