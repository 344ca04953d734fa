"""What a run will take, worked out before a weight is loaded: parameters, steps, memory by part, disk, time.

`train` makes the plan for the device it finds and refuses a GPU that is too small; `--plan_only` (plan_command.py)
shows it for any. Bytes are counted in footprint.py; here are time, what fits, and what would. Figures of GPUs are not
measured yet.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from alpaca.data.batching import count_steps_per_epoch
from alpaca.data.examples import EncodedDataset
from alpaca.errors import InputError, NotEnoughSpace
from alpaca.memory import CUDA_CONTEXT_BYTES
from alpaca.training.config import ADAPTER_DEFAULTS, TrainConfig, count_steps, parse_memory_limit
from alpaca.training.distributed import World, keeps_gradients_whole, own_free_memory
from alpaca.training.footprint import (
    Memory,
    Setup,
    Work,
    bytes_for_gradients,
    checkpoint_bytes,
    count_trained,
    make_setup,
    measure_work,
    plan_memory,
)
from alpaca.training.layers import count_checkpointed
from alpaca.training.model import Base, choose_save_dtype
from alpaca.training.shape import Shape, read_shape

logger = logging.getLogger(__name__)

GPU_COUNTS = (1, 2, 4, 8)
DEVICE_PEAKS = {  # dense bf16 FLOP/s by a word of the device's name, from NVIDIA's data sheets
    "B200": 2250e12, "H200": 989e12, "H100 PCIE": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "L4": 121e12, "A10G": 70e12, "A10": 125e12, "A6000": 155e12, "4090": 165e12, "3090": 71e12,
}  # fmt: skip
# Assumptions.
_GPU_RESERVE = 0.03  # of a card, lost to the allocator's fragments; assumed
_ASSUMED_SHARE = 0.4  # of a device's peak that training reaches; published runs: 0.14 (Stanford) to 0.68 (fms-fsdp)


# Time --------------------------------------------------------------------------------------------------------


def count_flops(shape: Shape, setup: Setup, work: Work) -> float:
    """Of the whole run: 2 a token and weight forward, 2 for the gradient of the input, 2 for that of the weight.

    The head works on targets alone; embeddings are looked up; attention's own products are left out (under 3 % at
    512 tokens of a 7B model). Checkpointing repeats its layers' forward pass.
    """
    adapter = count_trained(shape, setup) if setup.method != "full" else 0
    per_weight = (6 if setup.method == "full" else 4) + 2 * setup.num_checkpointed / shape.num_layers
    head_rows = work.num_targets if setup.padding_free else work.num_tokens
    return work.num_tokens * (per_weight * shape.num_linear + 6 * adapter) + 6 * head_rows * shape.num_head


def find_device_peak(name: str) -> float | None:
    """A GPU's dense bfloat16 FLOP/s by its data sheet; None for one not listed."""
    words = name.upper()
    return next((peak for part, peak in DEVICE_PEAKS.items() if all(word in words for word in part.split())), None)


def measure_cpu_flops() -> float:
    """FLOP/s of float32 matrix products on this CPU now, in some 50 ms."""
    left = right = torch.ones(512, 512)
    left @ right
    start = time.perf_counter()
    for _ in range(8):
        left @ right
    return 8 * 2 * 512**3 / (time.perf_counter() - start)


def share_of_peak(plan: "Plan", tokens_per_second: float) -> float | None:
    """The part of the devices' peak that is put to use: of what the run needs, repeated work does not count."""
    if plan.hardware.peak_flops is None:
        return None
    once = dataclasses.replace(plan.setup, num_checkpointed=0)
    per_token = count_flops(plan.shape, once, plan.work) / plan.work.num_tokens
    return per_token * tokens_per_second / (plan.hardware.peak_flops * plan.setup.num_processes)


# The plan -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a plan is for. memory_bytes: for the run on each device; peak_flops: None where unknown."""

    name: str
    memory_bytes: int
    on_gpu: bool
    peak_flops: float | None
    flops: float  # a device's rate that times are reckoned with
    flops_are: str  # how that rate is known

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * (1 - _GPU_RESERVE)) if self.on_gpu else self.memory_bytes


@dataclass(frozen=True, kw_only=True)
class Plan:
    shape: Shape
    setup: Setup
    work: Work
    memory: Memory
    hardware: Hardware
    num_trained: int
    checkpoint_bytes: int
    num_checkpoints: int  # at once on the disk: those kept, and the one being written
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

    config: TrainConfig
    shape: Shape
    data: EncodedDataset
    dtype: torch.dtype  # of the final weights
    num_steps: int

    def plan(self, setup: Setup, hardware: Hardware) -> Plan:
        """The plan with the fewest recomputed layers that fits, where their number is open; else the leanest."""
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
        """With gradients kept whole between micro-batches where training would, unless they are what does not fit."""
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
        trained, saves = count_trained(self.shape, setup), self.config.save_strategy != "no"
        return Plan(
            shape=self.shape,
            setup=setup,
            work=work,
            memory=memory,
            hardware=hardware,
            num_trained=trained,
            checkpoint_bytes=checkpoint_bytes(self.shape, setup),
            num_checkpoints=self.config.save_total_limit + 1 if saves else 0,
            final_bytes=trained * self.dtype.itemsize,
            seconds=count_flops(self.shape, setup, work) / (hardware.flops * setup.num_processes),
        )

    def memory(self, setup: Setup) -> Memory:
        """What no hardware decides: the memory of a setup in which nothing is open."""
        return plan_memory(self.shape, setup, self._work(setup))

    def _work(self, setup: Setup) -> Work:
        layout = (setup.micro_batch_size, setup.num_processes, setup.padding_free)
        if layout not in self._works:
            self._works[layout] = measure_work(setup, self.data, num_steps=self.num_steps, seed=self.config.seed)
        return self._works[layout]

    @functools.cached_property
    def _works(self) -> dict[tuple, Work]:
        return {}

    def suggest(self, setup: Setup, hardware: Hardware) -> list[str]:
        """Changes of the command that would fit, the least ones; several together only where no single one does."""
        found: list[str] = []
        for group in _changes(setup):
            found = [text for text, changed in group if self.plan(changed, hardware).fits]
            if found:
                return found
        return found


def _changes(setup: Setup) -> Iterator[list[tuple[str, Setup]]]:
    """Groups of changes to try, each a text and the setup it makes."""
    change = functools.partial(dataclasses.replace, setup)
    recompute, micro = "--gradient_checkpointing auto", "--per_device_train_batch_size 1"
    single = [(recompute, {"num_checkpointed": None}), (micro, {"micro_batch_size": 1})]
    small, both = {"num_checkpointed": None, "micro_batch_size": 1}, f"{recompute} {micro}"
    if setup.num_checkpointed is None:  # it is open, and is so in what follows
        single, both = single[1:], micro
    back = " --numerics stanford" if setup.fast else ""
    methods = [
        (f"--method lora{back}", _adapted(setup, method="lora", quantization="none")),
        (f"--method qlora{back}", _adapted(setup, method="qlora", quantization="nf4")),
    ]
    fast = [("--numerics fast", {"numerics": "fast"})] if setup.method == "full" and not setup.fast else []
    if setup.method != "full":
        methods = methods[1:] if setup.base_quantization == "none" else []
    offload = [('--fsdp "full_shard auto_wrap offload"', {"offload": True})] if setup.on_gpu else []
    counts = [number for number in GPU_COUNTS if number > setup.num_processes] if setup.on_gpu else []
    more = [(f"{number} GPUs (torchrun --nproc_per_node={number})", {"num_processes": number}) for number in counts]
    yield [(text, change(**values)) for text, values in [*single, *offload, *more[:1], *fast, *methods]]
    yield [(both, change(**small))]
    yield [(f"{text}, with {both}", change(**values, **small)) for text, values in [*offload, *more, *fast, *methods]]
    yield [(f"{text}, with offload and {both}", change(**values, **small, offload=True)) for text, values in more]


def _adapted(setup: Setup, *, quantization: str, method: str) -> dict[str, object]:
    """The default adapter on a base that is frozen."""
    own = {"lora_targets": setup.lora_targets, "lora_rank": setup.lora_rank, "lora_dropout": setup.lora_dropout}
    if not setup.lora_targets:
        own = {
            "lora_targets": ("q_proj", "v_proj", "query_key_value"),
            "lora_rank": ADAPTER_DEFAULTS["lora_r"],
            "lora_dropout": ADAPTER_DEFAULTS["lora_dropout"],
        }
    return {**own, "method": method, "base_quantization": quantization, "numerics": "stanford"}


def describe(plan: Plan) -> list[str]:
    """A few lines for the log."""
    memory, work = plan.memory, plan.work
    gradients = "kept whole until the step's last one" if plan.setup.whole_gradients else "reduced after each"
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory_parts(memory).items() if size > 5e6)
    return [
        f"plan: {plan.shape.num_parameters / 1e6:,.1f} M parameters, {plan.num_trained / 1e6:,.1f} M trained; "
        f"{work.num_steps:,} steps of up to {work.num_micro_batches} micro-batches of up to {work.max_tokens:,} tokens"
        + (f"; gradients are {gradients}" if plan.setup.sharded else ""),
        f"plan: peak memory {memory.peak_bytes / 1e9:.2f} GB ({memory.peak_moment}) of "
        f"{plan.hardware.memory_bytes / 1e9:.2f} GB free on {plan.hardware.name}: {parts} GB",
        f"plan: disk {plan.disk_bytes / 1e9:.2f} GB; about {format_seconds(plan.seconds)} at "
        f"{plan.hardware.flops / 1e12:,.2f} TFLOP/s ({plan.hardware.flops_are})",
    ]


def describe_checkpointing(plan: Plan) -> str:
    """How many layers are recomputed, and how much work that adds; "" for none."""
    number, total = plan.setup.num_checkpointed, plan.shape.num_layers
    if not number:
        return ""
    once = count_flops(plan.shape, dataclasses.replace(plan.setup, num_checkpointed=0), plan.work)
    more = count_flops(plan.shape, plan.setup, plan.work) / once - 1
    head = plan.shape.num_head * (plan.work.num_targets / plan.work.num_tokens if plan.setup.padding_free else 1)
    forward = number / total * plan.shape.num_linear / (plan.shape.num_linear + head)
    return f"{number} of {total} layers recomputed: {forward:.0%} of the forward pass, {more:.0%} more arithmetic"


def memory_parts(memory: Memory) -> dict[str, int]:
    """The parts by the names people read. Not all are there at once."""
    return {
        "weights": memory.weights_bytes,
        "copies of weights": memory.copies_bytes,
        "gradients": memory.gradients_bytes,
        "optimizer states": memory.optimizer_bytes,
        "activations": memory.activations_bytes,
        "logits": memory.logits_bytes,
        "working memory": memory.working_bytes,
        "context and heap": memory.overhead_bytes,
    }


def format_seconds(seconds: float) -> str:
    """Such as: 3 h 05 min; 12 min; 40 s."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


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


# At the start of a run ------------------------------------------------------------------------------------------


def make_planner(config: TrainConfig, base: Base, data: EncodedDataset) -> Planner:
    """For a resolved configuration. Raises InputError for a model whose sizes are not known."""
    steps = count_steps(config, count_steps_per_epoch(len(data), global_batch_size=config.global_batch_size))
    return Planner(
        config=config,
        shape=read_shape(base.folder, num_tokens=base.tokenizer.size if config.method == "full" else 0),
        data=data,
        dtype=choose_save_dtype(config, base),
        num_steps=steps,
    )


def survey(config: TrainConfig, world: World) -> Hardware:
    """The device of a process that has the least for the run, the same in all of them; they call it together.

    So all choose alike: which layers are recomputed, and when gradients are reduced.
    """
    hardware = find_hardware(world.device)
    least = min(world.gather(hardware.memory_bytes))
    return limit_hardware(dataclasses.replace(hardware, memory_bytes=least), config.memory_limit)


def limit_hardware(hardware: Hardware, limit: str | None) -> Hardware:
    """With no more than `--memory_limit`."""
    if limit is None:
        return hardware
    memory = min(parse_memory_limit(limit), hardware.memory_bytes)
    return dataclasses.replace(hardware, memory_bytes=memory, name=f"{hardware.name} (--memory_limit {limit})")


def check_plan(
    config: TrainConfig, base: Base, data: EncodedDataset, hardware: Hardware, *, num_processes: int
) -> Plan | None:
    """Make the plan for this hardware and log it; None for a model of another kind than those known.

    A GPU's memory is what it is, so a run that cannot fit is refused: NotEnoughSpace. Main memory also holds what can
    be dropped or swapped, and other processes come and go: there it is a warning, but for a limit that was asked for.
    """
    try:
        planner = make_planner(config, base, data)
    except InputError as error:
        logger.warning("%s; training goes on without one", error)
        return None
    setup = make_setup(config, planner.shape, num_processes=num_processes, on_gpu=hardware.on_gpu)
    plan = planner.plan(setup, hardware)
    for line in describe(plan):
        logger.info("%s", line)
    if recomputed := describe_checkpointing(plan):
        logger.info("--gradient_checkpointing %s: %s", config.gradient_checkpointing, recomputed)
    if not plan.fits and (plan.hardware.on_gpu or config.memory_limit):
        raise NotEnoughSpace(refusal(plan, planner))
    if not plan.fits:
        logger.warning("%s", refusal(plan, planner))
    return plan


def refusal(plan: Plan, planner: Planner) -> str:
    """That a plan does not fit, by how much, and what would."""
    would = suggest_for(plan, planner)
    moment = plan.memory.peak_moment
    if recomputed := describe_checkpointing(plan):
        moment += f"; with {recomputed}"
    advice = f"these would fit: {'; or '.join(would)}" if would else "no setting of one machine would fit"
    return (
        f"this run needs {plan.memory.peak_bytes / 1e9:.2f} GB on each device ({moment}), and "
        f"{plan.hardware.name} has {plan.hardware.usable_bytes / 1e9:.2f} GB to use; {advice}"
    )


def suggest_for(plan: Plan, planner: Planner) -> list[str]:
    """`Planner.suggest` for the setup that was asked for, in which the number of recomputed layers may be open."""
    asked = count_checkpointed(planner.config.gradient_checkpointing, plan.shape.num_layers)
    setup = dataclasses.replace(plan.setup, num_checkpointed=asked, whole_gradients=False)
    return planner.suggest(setup, plan.hardware)


def find_hardware(device: torch.device) -> Hardware:
    """The device there is, with the memory that is free on it now."""
    if device.type != "cuda":
        return Hardware(
            name="this CPU", memory_bytes=own_free_memory(device), on_gpu=False, peak_flops=None,
            flops=measure_cpu_flops() / 2,
            flops_are="half of what float32 matrix products reach here now",
        )  # fmt: skip
    name = torch.cuda.get_device_name(device)
    # The context is taken already, so the plan's must not be asked for twice.
    return assume_gpu(name, own_free_memory(device) + CUDA_CONTEXT_BYTES, find_device_peak(name))


def assume_gpu(name: str, memory_bytes: int, peak: float | None) -> Hardware:
    """A GPU at the share of its peak (dense bfloat16 FLOP/s; None where unknown) that training is assumed to reach."""
    flops = _ASSUMED_SHARE * (peak or DEVICE_PEAKS["A100"])
    known = f"{_ASSUMED_SHARE:.0%} of {peak / 1e12:,.0f}" if peak else f"{_ASSUMED_SHARE:.0%} of an A100's"
    return Hardware(
        name=name, memory_bytes=memory_bytes, on_gpu=True, peak_flops=peak, flops=flops, flops_are=f"assumed: {known}"
    )
