"""Training on one process or many: the process group, sharding with FSDP2, and weights into and out of the shards.

With one process nothing is sharded and no process group exists, unless offload is asked for. Small facts (losses, stop
requests) always travel through gloo on the CPU; only gradients and parameters use the GPUs' network.
"""

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from alpaca.errors import AlpacaError, InputError, NotEnoughSpace
from alpaca.memory import free_memory
from alpaca.training.configuration.parsing import Sharding

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
_GRADIENT_BYTES = 4  # an element; bfloat16 parameters have float32 gradients, too, for they are summed up


@dataclass(frozen=True, kw_only=True)
class World:
    """One process among all of a run, and the device it computes on."""

    rank: int
    num_processes: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sum each value over all processes, in float64. This also waits for all of them."""
        if self.num_processes == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def wait_for_all(self) -> None:
        self.sum([0.0])

    def gather(self, value: Result) -> list[Result]:
        """The values of all processes, in the order of their ranks."""
        if self.num_processes == 1:
            return [value]
        values: list[Result | None] = [None] * self.num_processes
        dist.all_gather_object(values, value)
        return values

    def run_in_all(self, work: Callable[[], Result]) -> Result:
        """Do `work` in every process. An AlpacaError in one is raised in all, so that none waits for ever."""
        result, error = None, None
        try:
            result = work()
        except AlpacaError as caught:
            error = caught
        errors = [other for other in self.gather(error) if other]
        if errors:
            raise min(errors, key=lambda other: not isinstance(other, NotEnoughSpace)) from error
        return result


def join_world() -> World:
    """Join the processes that torchrun started, or be the only one. Call it once; `leave_world` ends it."""
    num_processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    world = World(rank=rank, num_processes=num_processes, device=_choose_device())
    if num_processes > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo")
    return world


def _choose_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"this machine has {torch.cuda.device_count()} GPUs and torchrun started a process number {local_rank} on "
            f"it; pass --nproc_per_node={torch.cuda.device_count()}"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def leave_world(status: int = 0) -> None:
    """End the program at once with exit status `status` where there are several processes; with one, just return.

    Everything must be on disk before.

    gloo's threads can abort an interpreter that shuts down after success ("terminate called without an active
    exception"), so the interpreter is not given the time to shut down.
    """
    if not dist.is_initialized():
        return
    dist.all_reduce(torch.zeros(1))
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# Sharding -----------------------------------------------------------------------------------------------------


def needs_sharding(world: World, sharding: Sharding) -> bool:
    """Whether the model is sharded: always with several processes, and with one that offloads to main memory."""
    return world.num_processes > 1 or (sharding.offload and world.device.type == "cuda")


def shard_model(
    model: nn.Module,
    layer_class: str,
    weights: dict[str, Tensor] | None,
    *,
    world: World,
    sharding: Sharding,
    bf16: bool,
) -> None:
    """Shard a model whose parameters are on the meta device, and fill it from rank 0's `weights`.

    With None for `weights` the parameters are real already, in every process, and each keeps its shards of them.
    Each decoder layer is gathered by itself, the rest (embeddings, head, last norm) as one. `weights` is emptied.
    Buffers are real already and stay what they are.
    """
    offload = sharding.offload and world.device.type == "cuda"
    if not dist.is_initialized():  # one process that offloads
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    mesh = make_mesh(world, sharding)
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in [module for module in model.modules() if type(module).__name__ == layer_class] + [model]:
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=sharding.reshard_after_forward,
            mp_policy=low if bf16 else MixedPrecisionPolicy(),
            offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(),
        )
    if weights is None:
        return
    _make_real(model, torch.device("cpu") if offload else world.device, world.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=offload)
    set_model_state_dict(model, weights, options=options)
    weights.clear()


def make_mesh(world: World, sharding: Sharding) -> DeviceMesh:
    """The processes in one row, or for a hybrid sharding in rows of one machine's; raises InputError.

    Rows hold equal copies of the model, each sharded along its row: only gradients then travel between machines.
    """
    if not sharding.hybrid:
        return init_device_mesh(world.device.type, (world.num_processes,))
    on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world.num_processes))  # torchrun's
    if world.num_processes % on_machine:
        raise InputError(
            f"--fsdp hybrid_shard: expected as many processes on every machine, found {on_machine} on this one and "
            f"{world.num_processes} in all; start as many on each, or use full_shard"
        )
    shape = (world.num_processes // on_machine, on_machine)
    logger.info("hybrid shard: %d copies of the model, each sharded over the %d processes of a machine", *shape)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("machines", "processes"))


def _make_real(model: nn.Module, parameters_on: torch.device, buffers_on: torch.device) -> None:
    """Give meta parameters memory; `to_empty` would lose the buffers, which no checkpoint holds (rotary tables)."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=parameters_on)
    for name, buffer in buffers.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], buffer.to(buffers_on))


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Free the parameters that the last forward pass left gathered, so that every one is a shard again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def keeps_gradients_whole(num_trained: int, free_bytes: int) -> bool:
    """Whether a process adds up whole float32 gradients until the step's last micro-batch, and reduces them once.

    free_bytes: of the device's memory with the model and the optimizer's moments in it. Activations need some, too, so
    gradients get half. Otherwise they are reduced after every micro-batch and each process keeps its shard: the sum is
    the same, the network is used more.
    """
    return num_trained * _GRADIENT_BYTES <= free_bytes // 2


def decide_gradient_sync(model: nn.Module, world: World) -> bool:
    """Decide `keeps_gradients_whole` for a model that cannot be planned, before its first step.

    All processes call it together and get the same answer.
    """
    if not is_sharded(model):
        return True
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    shards = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in trained)
    num_trained, on_device = sum(p.numel() for p in trained), any(p.device == world.device for p in trained)
    moments = 2 * shards * on_device  # AdamW's two, which do not exist before the first step
    free_bytes = own_free_memory(world.device) - moments
    whole = all(world.gather(keeps_gradients_whole(num_trained, free_bytes)))
    kept = "kept whole until the step's last micro-batch" if whole else "reduced after every micro-batch"
    logger.info(
        "gradients are %s: whole they take %.2f GB of the %.2f GB that are free",
        kept, num_trained * _GRADIENT_BYTES / 1e9, free_bytes / 1e9,
    )  # fmt: skip
    return whole


def own_free_memory(device: torch.device) -> int:
    """Bytes this process may still take: its share of a machine's main memory, or all of its own GPU."""
    sharers = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return free_memory(device) // sharers


def sync_gradients(model: nn.Module, *, last: bool, whole: bool) -> None:
    """Set whether the next backward pass reduces gradients over the processes, or only adds them up in this one.

    last: whether it is the step's last backward pass.    whole: what `decide_gradient_sync` returned. Where several
    machines hold copies of the model, gradients travel between machines only after the last pass.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or not whole)
        model.set_requires_all_reduce(last)


def whole_tensor(tensor: Tensor, world: World) -> Tensor:
    """A parameter's full value on the CPU; where it is sharded all processes must ask for it together."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.to(world.device).full_tensor()
    return tensor.cpu()


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients down to `max_norm` (0: leave them) and return their norm before that, over all shards."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if any(parameter.grad.dtype == torch.bfloat16 for parameter in parameters):
        return _clip_low([parameter.grad for parameter in parameters], max_norm)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.item()


def _clip_low(gradients: list[Tensor], max_norm: float) -> float:
    """Clip bfloat16 gradients: torch's own function would round norm and factor to bfloat16's three digits."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    total = torch.linalg.vector_norm(torch.stack(norms))
    norm = (total.full_tensor() if isinstance(total, DTensor) else total).item()
    factor = max_norm / (norm + 1e-6)
    for gradient in gradients if 0 < factor < 1 else ():
        gradient.mul_(factor)  # torch's _foreach_mul_ rounds the factor
    return norm
