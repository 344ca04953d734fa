"""One process or many: the process group, sharding with FSDP2, and getting weights into and out of the shards.

With one process nothing is sharded and no process group exists, unless offload is asked for. Small facts (losses, stop
requests) always travel through gloo on the CPU; only gradients and parameters use the GPUs' network.
"""

import logging
import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from alpaca.errors import InputError
from alpaca.training.config import Sharding

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the others, and the device it computes on."""

    rank: int
    num_processes: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over all processes, in float64; also waits for all of them."""
        if self.num_processes == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def wait_for_all(self) -> None:
        self.sum([0.0])


def join_world() -> World:
    """Join the processes that torchrun started, or stand alone. Call once; `leave_world` ends it."""
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
    """End a command of several processes at once with `status`; returns in one alone. Everything must be on disk.

    gloo's threads can abort an interpreter that shuts down after success ("terminate called without an active
    exception"), so it is not given the time.
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
    """Several processes always shard; one does so to keep its parameters in main memory."""
    return world.num_processes > 1 or (sharding.offload and world.device.type == "cuda")


def shard_model(
    model: nn.Module, layer_class: str, weights: dict[str, Tensor], *, world: World, sharding: Sharding, bf16: bool
) -> None:
    """Shard a model whose parameters are on the meta device, and fill it from rank 0's `weights`.

    Each decoder layer is gathered by itself, the rest (embeddings, head, last norm) as one. `weights` is emptied.
    Buffers are real already and stay what they are.
    """
    offload = sharding.offload and world.device.type == "cuda"
    if not dist.is_initialized():  # one process that offloads
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(world.device.type, (world.num_processes,))
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in [module for module in model.modules() if type(module).__name__ == layer_class] + [model]:
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=sharding.reshard_after_forward,
            mp_policy=low if bf16 else MixedPrecisionPolicy(),
            offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(),
        )
    _make_real(model, torch.device("cpu") if offload else world.device, world.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=offload)
    set_model_state_dict(model, weights, options=options)
    weights.clear()


def _make_real(model: nn.Module, parameters_on: torch.device, buffers_on: torch.device) -> None:
    """Give meta parameters memory; `to_empty` would lose the buffers, which no checkpoint holds (rotary tables)."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=parameters_on)
    for name, buffer in buffers.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], buffer.to(buffers_on))


def sync_gradients(model: nn.Module, sync: bool) -> None:
    """Whether the next backward pass reduces gradients over the processes, or only adds them up here."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)


def whole_tensor(tensor: Tensor, world: World) -> Tensor:
    """A parameter's full value on the CPU; where it is sharded all processes must ask for it together."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.to(world.device).full_tensor()
    return tensor.cpu()


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients down to `max_norm` (0: leave them) and return their norm before that, over all shards."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.item()
